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
    "yxyx": "[y1, x1, y2, x2] in pixels",
    "xywh-fractions": "[x, y, width, height] as fractions of the picture's size",
    "xyxy-fractions": "[x1, y1, x2, y2] as fractions of the picture's size",
    "cxcywh-fractions": "[centre x, centre y, width, height] as fractions of the picture's size",
    "yxyx-fractions": "[y1, x1, y2, x2] as fractions of the picture's size",
    "xywh-percent": "[x, y, width, height] in percent of the picture's size",
    "xyxy-percent": "[x1, y1, x2, y2] in percent of the picture's size",
    "cxcywh-percent": "[centre x, centre y, width, height] in percent of the picture's size",
}
SCALES = {"fractions": 1.0, "percent": 0.01}  # by the end of a form's name
SAMPLE = 100_000
TOLERANCE = 2.0  # pixels, by which rounding may move a border
OVER_CORNERS, OVER_CENTRES = 0.2, 0.05  # share of boxes over the border from which it is no accident
FAR = 0.05  # of the picture's side: how far the middle one of those must pass it
FEW = 20  # boxes; centres are told from fewer with doubt only
LARGE = 200  # pixels of a picture's sides, in which boxes in percent keep to a corner


@dataclass(frozen=True)
class Guess:
    """Another form that boxes look like."""

    form: str  # a key of FORMS; empty where something else is odd about them, which is never sure
    reason: str  # the statistics, in words
    sure: bool  # whether they leave no doubt
    other: str = ""  # what they may be, where that is no form

    @property
    def question(self) -> str:
        """What to ask the user."""
        return f"{self.reason}: are they {FORMS[self.form] if self.form else self.other}?"


def check_form(form: str) -> str:
    """`form` if it is a key of `FORMS`; otherwise a `UserError`."""
    if form not in FORMS:
        raise UserError(f'there is no box form "{form}"{nearest(form, FORMS)}')
    return form


def to_xywh(boxes: Floats, form: str, sizes: Floats) -> Floats:
    """Boxes [N, 4] of a form as [x, y, width, height] in pixels; `sizes` [N, 2] is (width, height) of their pictures.

    Fractions (or percent) in pictures of unknown size (0) are a `UserError`.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    kind, _, unit = check_form(form).partition("-")
    if kind == "yxyx":
        boxes, kind = boxes[:, [1, 0, 3, 2]], "xyxy"
    if unit:
        if (sizes <= 0).any():
            raise UserError("boxes that are fractions need the width and height of every picture")
        boxes = boxes * np.tile(sizes, 2) * SCALES[unit]
    first, second = boxes[:, :2], boxes[:, 2:]
    if kind == "xyxy":
        second = second - first
    elif kind == "cxcywh":
        first = first - second / 2
    return np.concatenate([first, second], 1)


def guess(boxes: Floats, sizes: Floats) -> Guess | None:
    """The form that boxes [N, 4] rather have than xywh, None where they look right.

    `sizes` [N, 2] is (width, height) of each box's picture, 0 where it is unknown. Of more than `SAMPLE` boxes so many
    decide whether all are looked at: what is found here are shares.
    """
    if len(boxes) > SAMPLE:
        some = np.random.default_rng(0).integers(len(boxes), size=SAMPLE)
        if guess(boxes[some], sizes[some]) is None:
            return None
    usable = np.isfinite(boxes).all(1)
    boxes, sizes = boxes[usable], sizes[usable]
    if not len(boxes):
        return None
    tiny = ((sizes > 0) & (sizes < 8)).any()  # pictures in which such boxes may be right
    if (np.abs(boxes) <= 1.01).all() and _fractional(boxes) and not tiny:
        form = _fractions_form(boxes)
        return Guess(form, f"all {len(boxes):,} boxes are smaller than 1 pixel", len(boxes) > 1)
    small = np.asarray((boxes[:, 2:] < 1).all(1) & (boxes[:, 2:] > 0).any(1))
    known = (sizes > 0).all(1)
    boxes, sizes = boxes[known], sizes[known]
    if not len(boxes):
        return None
    if percent := _percent(boxes, sizes):
        return percent
    passes = (boxes[:, :2] + boxes[:, 2:] - sizes).max(1)
    over = passes > TOLERANCE
    count = int(over.sum())
    if (tinies := int(small.sum())) >= max(2, OVER_CORNERS * len(small)) and not tiny:
        text = f"{tinies:,} of {len(small):,} boxes are smaller than 1 pixel"
        return Guess("", text, False, "fractions of the picture's size")
    if not count:
        return None
    reason = f"{count:,} of {len(boxes):,} boxes pass the border of their picture"
    share = count / len(boxes)
    far = float(np.median((passes / sizes.max(1))[over])) >= FAR
    for form, read in (("xyxy", boxes), ("yxyx", boxes[:, [1, 0, 3, 2]])):  # told apart by pictures that are no squares
        if share >= OVER_CORNERS and ((read[:, 2:] > read[:, :2]).all(1) & _inside(read, sizes)).all():
            name = FORMS[form].partition(" in ")[0]
            return Guess(form, f"{reason}, and read as {name} all lie inside", far and count >= 3)
    half = boxes[:, 2:] / 2
    centres = _inside(np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1), sizes)
    if centres.all() and share >= OVER_CENTRES:
        text = f"{reason}, and read as [centre x, centre y, width, height] all lie inside"
        return Guess("cxcywh", text, len(boxes) >= FEW and count >= 3)
    if share >= OVER_CORNERS and count >= 3 and far:
        return Guess("", reason, False, "of pictures of another size, or of another form")
    return None


def _percent(boxes: Floats, sizes: Floats) -> Guess | None:
    """Whether boxes in large pictures keep to the upper left 100 x 100 pixels and spread over those."""
    boxes = boxes[(sizes >= LARGE).all(1)]
    if len(boxes) < FEW or (boxes < 0).any() or boxes.max() > 100.5 or not _fractional(boxes):
        return None
    ends = boxes[:, :2] + boxes[:, 2:]
    form = "xywh" if ends.max() <= 100.5 else "xyxy" if (boxes[:, 2:] >= boxes[:, :2]).all() else "cxcywh"
    if boxes[:, :2].max(0).min() < 50:
        return None
    reason = f"all {len(boxes):,} boxes in large pictures lie in the upper left 100 x 100 pixels"
    return Guess(f"{form}-percent", reason, False)


def _fractional(boxes: Floats) -> bool:
    """Whether most boxes have a coordinate between whole pixels."""
    return bool((boxes != np.rint(boxes)).any(1).mean() > 0.5)


def _inside(corners: Floats, sizes: Floats) -> NDArray[np.bool_]:
    low, high = corners[:, :2] >= -TOLERANCE, corners[:, 2:] <= sizes + TOLERANCE
    inside: NDArray[np.bool_] = np.asarray(np.concatenate([low, high], axis=1).all(axis=1))
    return inside


def _fractions_form(boxes: Floats) -> str:
    """Which fractions: the form with the fewest boxes outside of the picture, xywh first."""
    ones, slack = np.ones((len(boxes), 2)), 0.01
    wrong = {}
    for kind in ("xywh", "xyxy", "cxcywh"):
        turned = to_xywh(boxes, kind, ones)
        ends = turned[:, :2] + turned[:, 2:]
        wrong[kind] = int(((turned[:, :2] < -slack) | (ends > 1 + slack) | (turned[:, 2:] < 0)).any(1).sum())
    return f"{min(wrong, key=wrong.__getitem__)}-fractions"
