"""The rows of YOLO label files: boxes, polygons, and those of other tasks, which look alike.

Keypoints (`kpt_shape` in data.yaml) follow the box and are left out. Four corners that are a turned rectangle are an
oriented box, of which the upright box around it is taken. Both are told by the whole set, since a single row may be
anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.data.box_forms import FORMS, to_xywh
from tailfin.errors import UserError
from tailfin.files import read_text

BOX = "cxcywh-fractions"  # the form of YOLO's boxes
OVER = 0.2  # share of boxes over the border from which they are of another form, where in that none is
SURE = 3  # of such boxes; of fewer it is said


@dataclass(frozen=True)
class Rows:
    """How the numbers after the class are read."""

    kind: str  # "shapes" (boxes and polygons), "keypoints" or "oriented"
    keypoints: int = 0  # numbers behind the box
    form: str = BOX  # of boxes, a key of `box_forms.FORMS`


SAMPLED = 300  # label files that say what kind of rows a set has
ALIKE = 5  # rows; fewer prove nothing


def row_kind(path: Path, settings: dict[str, Any], files: Sequence[Path]) -> Rows:
    """How the rows of these label files are read; `path` names the set in messages, `settings` is its data.yaml."""
    shape = settings.get("kpt_shape")
    if shape is not None:
        try:
            count, size = (int(value) for value in shape)
        except (TypeError, ValueError):
            raise UserError(f"{path}: kpt_shape is {shape!r}, two numbers are needed, as [17, 3]") from None
        return Rows("keypoints", count * size)
    rows: list[list[float]] = []
    for labels in files[:: max(1, len(files) // SAMPLED)][:SAMPLED]:
        for line in read_text(labels).splitlines():
            fields = line.split()
            if fields and not all(map(is_number, fields)):
                return Rows("shapes")  # the reading below names it
            if fields:
                rows.append([float(field) for field in fields])
    lengths = {len(row) for row in rows}
    if settings.get("task") == "obb" or (lengths == {9} and _turned(np.array(rows)[:, 1:])):
        return Rows("oriented")
    if boxed := next((row for row in rows if _box_and_polygon(row)), None):
        raise UserError(
            f"{path}: rows hold a box and then the polygon that it is around (one has {len(boxed)} numbers): a row has "
            "either; leave one of them out"
        )
    if len(lengths) == 1 and len(rows) >= ALIKE and _like_keypoints(np.array(rows)):
        raise UserError(
            f"{path}: all rows have {lengths.pop()} numbers, which look like a box and keypoints: say so with "
            "`kpt_shape: [number, 2 or 3]` in data.yaml (the boxes are read, the keypoints left out)"
        )
    return Rows("shapes")


def _turned(corners: NDArray[np.float64]) -> bool:
    """Whether four corners [N, 8] are rectangles, and some of them turned: oriented boxes, not outlines.

    Coordinates are fractions, whose rectangles are sheared unless the picture is a square: opposite sides stay equal.
    """
    points = corners.reshape(-1, 4, 2)
    sides = np.roll(points, -1, 1) - points  # [N, 4, 2]
    length = np.abs(sides).sum(2).max(1) + 1e-9
    closed = np.abs(sides[:, 0] + sides[:, 2]).max(1) / length < 0.05
    upright = (np.abs(sides).min(2) / length[:, None] < 0.02).all(1)
    return bool(closed.mean() > 0.95 and (~upright).mean() > 0.05)


def _box_and_polygon(row: list[float]) -> bool:
    """Whether the first four numbers of a row are the box around the points of the others."""
    if len(row) < 11 or len(row) % 2 == 0:
        return False
    points = np.array(row[5:]).reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    around = np.concatenate([(low + high) / 2, high - low])
    return bool(np.abs(around - row[1:5]).max() < 0.002 and (high - low).min() > 0.01)


def check_form(boxes: NDArray[np.float64], where: str) -> str:
    """Raise `UserError` where boxes [N, 4] (centre and size, fractions) are surely of another form; words where they
    may be, else nothing."""
    half, slack = boxes[:, 2:] / 2, 0.01
    over = ((boxes[:, :2] - half < -slack) | (boxes[:, :2] + half > 1 + slack)).any(1)
    count = int(over.sum())
    if not count or count < OVER * len(boxes):
        return ""
    if (boxes[:, 2:] > boxes[:, :2]).all():
        form = "xyxy-fractions"
    elif (boxes[:, :2] + boxes[:, 2:] <= 1 + slack).all():
        form = "xywh-fractions"
    else:
        return ""
    text = f"{count:,} of {len(boxes):,} boxes pass the border of their picture, and read as {FORMS[form]} none does"
    if count >= SURE:
        raise UserError(f"{where}: {text} (--box-form {form} reads them so, --box-form {BOX} as they are)")
    return f"{text}: are they? (--box-form {form})"


def _like_keypoints(rows: NDArray[np.float64]) -> bool:
    """Whether rows [N, L] of class, box and more are x, y, visibility each, or points that all lie in the box."""
    box, rest = rows[:, 1:5], rows[:, 5:]
    if rest.shape[1] < 3:
        return False
    if rest.shape[1] % 3 == 0 and np.isin(rest[:, 2::3], (0, 1, 2)).all():
        return True
    if rest.shape[1] % 2 or rest.shape[1] < 6:
        return False
    points = rest.reshape(len(rows), -1, 2)
    within = np.abs(points - box[:, None, :2]) <= box[:, None, 2:] / 2 + 0.01
    return bool((within.all(2) | (points == 0).all(2)).all())


def parse_row(line: str, where: str, classes: int, rows: Rows) -> tuple[int, list[float]]:
    """Class and numbers of a row: four of a box, or the points of a polygon; `where` begins the messages."""
    fields = line.split()
    try:
        numbers = [float(value) for value in fields]
    except ValueError:
        bad = next(value for value in fields if not is_number(value))
        raise UserError(f"{where}: {bad!r} is not a number") from None
    if rows.kind == "keypoints":
        if len(numbers) not in (5, 5 + rows.keypoints):
            raise UserError(
                f"{where}: {len(numbers)} numbers; by kpt_shape an object has {5 + rows.keypoints} (class, centre x, "
                f"centre y, width, height and {rows.keypoints} of keypoints)"
            )
        numbers = numbers[:5]
    if rows.kind == "oriented" and len(numbers) not in (5, 9):
        raise UserError(f"{where}: {len(numbers)} numbers; an oriented box has 9 (class and four corners)")
    if len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
        more = "; a sixth number may be a score or an angle: such rows are predictions or another task's"
        raise UserError(
            f"{where}: {len(numbers)} numbers; a box has 5 (class, centre x, centre y, width, height), a polygon "
            f"an odd number from 7 on{more if len(numbers) == 6 else ''}"
        )
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{where}: a number is not finite")
    label, values = numbers[0], numbers[1:]
    if label != int(label) or not 0 <= label < classes:
        raise UserError(f"{where}: class {fields[0]} is not one of the {classes} classes 0 to {classes - 1}")
    outside = next((k for k, value in enumerate(values) if not -_SLACK <= value <= 1 + _SLACK), None)
    if not rows.form.endswith("-fractions") and len(values) == 4:
        outside = None
    if outside is not None:
        raise UserError(
            f"{where}: {fields[outside + 1]} is outside 0 to 1 (coordinates are fractions of the picture's size; "
            "--box-form reads boxes in pixels)"
        )
    return int(label), values


_SLACK = 1e-4  # what rounding by other tools may add


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shape_fields(values: list[float], width: int, height: int, form: str = BOX) -> dict[str, Any]:
    """bbox, area and, for a polygon, segmentation in pixels."""
    if len(values) == 4:
        if form == BOX:
            cx, cy, w, h = values
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        else:
            box = to_xywh(np.array([values]), form, np.array([[width, height]]))[0].tolist()
        return {"bbox": [round(value, 4) for value in box], "area": round(box[2] * box[3], 4)}
    points = np.array(values).reshape(-1, 2) * (width, height)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    ahead = np.roll(points, -1, axis=0)
    area = abs(float((points[:, 0] * ahead[:, 1] - points[:, 1] * ahead[:, 0]).sum())) / 2
    return {
        "bbox": [round(value, 4) for value in (left, top, right - left, bottom - top)],
        "area": round(area, 4),
        "segmentation": [np.round(points, 4).ravel().tolist()],
    }
