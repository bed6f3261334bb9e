"""What results look like that were joined twice, cut off, or written with other numbers than the annotations have.

Such files read well and measure something else than the detector. Right results are never so: they have no entry twice,
a detector that finds ten objects in a picture finds one in nearly all pictures with objects, and boxes that lie on the
objects have their classes. `doubts` says what is odd, `evaluate` warns of it beside the numbers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tailfin.data.box_forms import FORMS, to_xywh
from tailfin.evaluation.detections import Detections, best_per_image
from tailfin.evaluation.overlaps import near_boxes
from tailfin.evaluation.truth import GroundTruth

TWICE = 0.1  # share of entries given twice from which it is no accident
EMPTY, EMPTY_OF_MANY, MANY = 0.5, 0.1, 10  # share of pictures without an entry; where those with some have so many
FEW = 10  # pictures without an entry, objects in another form, of which nothing is said
WEAK = 0.1  # AP50 below which forms and classes are looked at
PICTURES, PER_PICTURE = 1000, 20  # looked at then
COVERED, MORE = 0.5, 4.0  # share of the objects that another reading finds, and times what this one finds
SHOWN = 3


def doubts(truth: GroundTruth, detections: Detections, ap50: float, form: str | None) -> list[str]:
    """What is odd about results, a sentence each.

    Args:
        truth, detections: as they were measured.
        ap50: AP50 of all of it, a fraction; below 0 where there is none.
        form: how the boxes were read, a key of `box_forms.FORMS`; None: as they are, [x, y, width, height].
    """
    found = [_given_twice(detections), _without_entry(truth, detections)]
    if 0 <= ap50 < WEAK and detections.boxes is not None:
        some = _some(detections)
        found.append(_other_form(truth, some, form) or _other_classes(truth, some))
    if len(detections) >= 2 * FEW and 0 <= ap50 < 1 and np.ptp(detections.scores) == 0:
        found.append(f"all {len(detections):,} scores are {detections.scores[0]:g}: AP depends on the order of entries")
    return [f"{detections.label}: {text}" for text in found if text]


def _given_twice(detections: Detections) -> str:
    if detections.boxes is None or not len(detections):
        return ""
    columns = [detections.image_rows, detections.category_rows, detections.scores, *detections.boxes.T]
    key = np.zeros(len(detections), np.uint64)
    for column in columns:  # equal rows have equal keys; different ones with equal keys are too few to count
        bits = np.ascontiguousarray(column, np.float64).view(np.uint64)
        key = (key ^ (bits >> np.uint64(29)) ^ bits) * np.uint64(0x9E3779B97F4A7C15)
    twice = len(key) - len(np.unique(key))
    if twice < max(2, TWICE * len(key)):
        return ""
    return (
        f"{twice:,} of {len(key):,} entries have picture, class, box and score of another one and count as false "
        "positives: were results joined twice?"
    )


def _without_entry(truth: GroundTruth, detections: Detections) -> str:
    wanted = np.unique(truth.image_rows[~truth.crowd])
    some = np.unique(detections.image_rows)
    missing = len(np.setdiff1d(wanted, some))
    share = EMPTY_OF_MANY if len(detections) >= MANY * max(len(some), 1) and len(some) else EMPTY
    if missing < FEW or missing <= share * len(wanted):
        return ""
    return (
        f"no entry for {missing:,} of the {len(wanted):,} pictures with objects, which count as missed: was the "
        "detector run on all of them?"
    )


def _some(detections: Detections) -> Detections:
    """The best of up to `PICTURES` pictures."""
    rows = np.unique(detections.image_rows)
    step = -(-len(rows) // PICTURES)
    chosen = np.isin(detections.image_rows, rows[:: max(step, 1)])
    return best_per_image(detections.select(chosen), PER_PICTURE)


def _objects(truth: GroundTruth, detections: Detections) -> NDArray[np.int64]:
    """Rows of the objects in the detections' pictures, crowds aside."""
    return np.flatnonzero(np.isin(truth.image_rows, np.unique(detections.image_rows)) & ~truth.crowd)


def _on_objects(
    truth: GroundTruth, detections: Detections, boxes: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Detections with `boxes`, and the objects that each of them is on (IoU 0.5), crowds aside."""
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:].clip(min=0)], axis=1)
    mine, theirs, _ = near_boxes(truth, replace(detections, boxes=boxes), 0.5)
    keep = ~truth.crowd[theirs]
    return mine[keep], theirs[keep]


def _other_form(truth: GroundTruth, detections: Detections, form: str | None) -> str:
    """The form in which the boxes fit the objects, if they do not in this one."""
    boxes = detections.boxes
    assert boxes is not None
    unit = (form or "").partition("-")[2]

    def found(read: NDArray[np.float64]) -> int:
        mine, theirs = _on_objects(truth, detections, read)
        return len(np.unique(theirs[detections.category_rows[mine] == truth.category_rows[theirs]]))

    sizes = truth.image_sizes[detections.image_rows][:, ::-1].astype(np.float64)
    scale = np.tile(sizes, 2) if unit else 1.0  # fractions are exchanged as fractions
    turned = (boxes / scale)[:, [1, 0, 3, 2]] * scale
    readings = {"[y, x, height, width]": turned}
    if form is None:
        readings |= {FORMS[other]: to_xywh(boxes, other, sizes) for other in ("xyxy", "cxcywh", "yxyx")}
    elif form.startswith("xyxy"):
        readings = {FORMS["yxyx" + (f"-{unit}" if unit else "")]: turned}
    counts = {name: found(read) for name, read in readings.items()}
    best = max(counts, key=counts.__getitem__)
    objects = len(_objects(truth, detections))
    if counts[best] < max(FEW, COVERED * objects) or counts[best] < MORE * found(boxes):
        return ""
    code = next((code for code, text in FORMS.items() if text == best), "")
    remedy = f" (--box-form {code}, box_form= in Python, reads them)" if code else ""
    return f"read as {best} the boxes find {counts[best]:,} of {objects:,} objects: are they of this form?{remedy}"


def _other_classes(truth: GroundTruth, detections: Detections) -> str:
    """Which class's objects are found as which other one, where nearly each class is found as one of its own."""
    assert detections.boxes is not None
    classes = len(truth.category_ids)
    mine, theirs = _on_objects(truth, detections, detections.boxes)
    order = np.lexsort((-detections.scores[mine], theirs))
    objects, first = np.unique(theirs[order], return_index=True)
    taken = detections.category_rows[mine[order[first]]]
    cells, counts = np.unique(truth.category_rows[objects] * classes + taken, return_counts=True)
    own, other = np.divmod(cells, classes)
    total = np.bincount(own, counts, minlength=classes)
    right = counts[own == other].sum()
    most = [(int(own[row]), int(other[row])) for row in np.flatnonzero((2 * counts > total[own]) & (total[own] >= 3))]
    moved = [pair for pair in most if pair[0] != pair[1]]
    enough = len(objects) >= 2 * FEW and len(objects) >= COVERED * len(_objects(truth, detections))
    one_to_one = len({target for _, target in most}) == len(most)
    if not enough or len(moved) < 2 or not one_to_one or right > 0.2 * len(objects):
        return ""
    pairs = ", ".join(f"{_class(truth, a)} as {_class(truth, b)}" for a, b in moved[:SHOWN])
    return (
        f"the boxes are on {len(objects):,} objects and nearly all have another class: {pairs}"
        f"{', ...' if len(moved) > SHOWN else ''}: is category_id of another numbering?"
    )


def _class(truth: GroundTruth, row: int) -> str:
    category = truth.categories[row]
    return f'"{category.name or category.id}" (id {category.id})'
