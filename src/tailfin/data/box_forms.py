"""Boxes in another form than COCO's [x, y, width, height]: recognising them, and turning them into it.

A file whose boxes are corners, centres or fractions parses well and trains on nonsense. `guess` tells them by what
right boxes never do: all of them smaller than a pixel; or a large part of them over the border of their pictures, while
in another form not one is. Boxes that pass the border by little, or in part of a file only, stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailfin.errors import UserError, nearest

Floats = NDArray[np.float64]
FORMS = {
    "xywh": "[x, y, width, height] in pixels",
    "xyxy": "[x1, y1, x2, y2] in pixels",
    "cxcywh": "[centre x, centre y, width, height] in pixels",
    "xywh-fractions": "[x, y, width, height] as fractions of the picture's size",
    "xyxy-fractions": "[x1, y1, x2, y2] as fractions of the picture's size",
    "cxcywh-fractions": "[centre x, centre y, width, height] as fractions of the picture's size",
}
TOLERANCE = 2.0  # pixels, by which rounding may move a border
OVER_CORNERS, OVER_CENTRES = 0.2, 0.05  # share of boxes over the border from which it is no accident
FAR = 0.05  # of the picture's side: how far the middle one of those must pass it
FEW = 20  # boxes; centres are told from fewer with doubt only


@dataclass(frozen=True)
class Guess:
    """Another form that boxes look like."""

    form: str  # a key of FORMS
    reason: str  # the statistics, in words
    sure: bool  # whether they leave no doubt


def check_form(form: str) -> str:
    """`form` if it is a key of `FORMS`; otherwise a `UserError`."""
    if form not in FORMS:
        raise UserError(f'there is no box form "{form}"{nearest(form, FORMS)}')
    return form


def to_xywh(boxes: Floats, form: str, sizes: Floats) -> Floats:
    """Boxes [N, 4] of a form as [x, y, width, height] in pixels; `sizes` [N, 2] is (width, height) of their pictures.

    Fractions in pictures of unknown size (0) are a `UserError`.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if check_form(form).endswith("-fractions"):
        if (sizes <= 0).any():
            raise UserError("boxes that are fractions need the width and height of every picture")
        boxes = boxes * np.tile(sizes, 2)
    first, second = boxes[:, :2], boxes[:, 2:]
    kind = form.partition("-")[0]
    if kind == "xyxy":
        second = second - first
    elif kind == "cxcywh":
        first = first - second / 2
    return np.concatenate([first, second], 1)


def guess(boxes: Floats, sizes: Floats) -> Guess | None:
    """The form that boxes [N, 4] rather have than xywh, None where they look right.

    `sizes` [N, 2] is (width, height) of each box's picture, 0 where it is unknown.
    """
    usable = np.isfinite(boxes).all(1)
    boxes, sizes = boxes[usable], sizes[usable]
    if not len(boxes):
        return None
    tiny = ((sizes > 0) & (sizes < 8)).any()  # pictures in which such boxes may be right
    if (np.abs(boxes) <= 1.01).all() and _fractional(boxes) and not tiny:
        form = _fractions_form(boxes)
        return Guess(form, f"all {len(boxes):,} boxes are smaller than 1 pixel", len(boxes) > 1)
    known = (sizes > 0).all(1)
    boxes, sizes = boxes[known], sizes[known]
    if not len(boxes):
        return None
    passes = (boxes[:, :2] + boxes[:, 2:] - sizes).max(1)
    over = passes > TOLERANCE
    count = int(over.sum())
    if not count:
        return None
    reason = f"{count:,} of {len(boxes):,} boxes pass the border of their picture"
    share = count / len(boxes)
    corners = (boxes[:, 2:] > boxes[:, :2]).all(1) & _inside(boxes, sizes)
    if corners.all() and share >= OVER_CORNERS:
        far = float(np.median((passes / sizes.max(1))[over])) >= FAR
        return Guess("xyxy", f"{reason}, and read as [x1, y1, x2, y2] all lie inside", far and count >= 3)
    half = boxes[:, 2:] / 2
    centres = _inside(np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1), sizes)
    if centres.all() and share >= OVER_CENTRES:
        text = f"{reason}, and read as [centre x, centre y, width, height] all lie inside"
        return Guess("cxcywh", text, len(boxes) >= FEW and count >= 3)
    return None


def _fractional(boxes: Floats) -> bool:
    """Whether most boxes have a coordinate between whole pixels."""
    return bool((boxes != np.rint(boxes)).any(1).mean() > 0.5)


def _inside(corners: Floats, sizes: Floats) -> NDArray[np.bool_]:
    inside = [corners[:, :2] >= -TOLERANCE, corners[:, 2:] <= sizes + TOLERANCE]
    return np.asarray(np.concatenate(inside, 1).all(axis=1), bool)


def _fractions_form(boxes: Floats) -> str:
    """Which fractions: the form with the fewest boxes outside of the picture, xywh first."""
    ones, slack = np.ones((len(boxes), 2)), 0.01
    wrong = {}
    for kind in ("xywh", "xyxy", "cxcywh"):
        turned = to_xywh(boxes, kind, ones)
        ends = turned[:, :2] + turned[:, 2:]
        wrong[kind] = int(((turned[:, :2] < -slack) | (ends > 1 + slack) | (turned[:, 2:] < 0)).any(1).sum())
    return f"{min(wrong, key=wrong.__getitem__)}-fractions"
