"""Detections of a few pictures out of a large results file, and how they compare with the ground truth.

found = read_detections("RUN/results.bbox.json", [139, 285], "RUN/results.segm.json")
verdict = judge(truth_boxes, truth_labels, boxes, labels, scores)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tailfin.errors import UserError
from tailfin.files import existing_file

IOU = 0.5  # from this overlap on a detection is on the object
_PIECE = 1 << 24  # bytes parsed at a time: a results file of a large set does not fit into memory as objects
_BETWEEN = re.compile(rb"\}\s*,\s*\{")


@dataclass(frozen=True)
class Detections:
    """Detections of one picture, best first."""

    boxes: np.ndarray  # float64 [D, 4] xyxy, pixels of the file
    categories: np.ndarray  # int64 [D], category ids of the file
    scores: np.ndarray  # float64 [D]
    masks: list[dict[str, Any]] | None = None  # D compressed RLEs at the size of the file, where there are masks

    def best(self, number: int) -> Detections:
        """The first `number` of them."""
        masks = None if self.masks is None else self.masks[:number]
        return Detections(self.boxes[:number], self.categories[:number], self.scores[:number], masks)


@dataclass(frozen=True)
class Verdict:
    """How D detections, best first, meet G objects of one picture."""

    match: np.ndarray  # int64 [G], the detection of the same class on each object, -1 for none
    taken_for: np.ndarray  # int64 [G], the best unmatched detection of another class on each object, -1 for none
    hit: np.ndarray  # bool [D], matched to an object


def read_detections(
    file: str | Path, image_ids: Iterable[int], masks: str | Path | None = None
) -> dict[int, Detections]:
    """Detections of some pictures; a picture without any has empty arrays.

    `masks` is the results file with the masks of the same detections in the same order. A broken file, or masks of
    other detections, are a `UserError`.
    """
    ids = [int(image_id) for image_id in image_ids]
    rows = _rows(file, ids, _Row)
    if masks is None:
        return {image_id: _detections(rows[image_id]) for image_id in ids}
    drawn = _rows(masks, ids, _MaskRow)
    for image_id in ids:
        own, other = ([(row.category_id, row.score) for row in found[image_id]] for found in (rows, drawn))
        if own != other:
            raise UserError(f"{masks} does not hold the masks of {file}: image {image_id} has other detections there")
    return {image_id: _detections(rows[image_id], drawn[image_id]) for image_id in ids}


def judge(truth_boxes: np.ndarray, truth_labels: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Verdict:
    """Match detections (best first) to objects: each takes the free object of its class that it overlaps most.

    Args:
        truth_boxes: float [G, 4] xyxy.
        truth_labels: int [G].
        boxes: float [D, 4] xyxy, best first.
        labels: int [D].
    """
    overlap = iou(truth_boxes, boxes)
    same = truth_labels[:, None] == labels[None]
    own = np.where(same & (overlap >= IOU), overlap, 0.0)
    match = np.full(len(truth_labels), -1, np.int64)
    hit = np.zeros(len(labels), bool)
    for detection in np.flatnonzero(own.any(0)):
        free = np.where(match < 0, own[:, detection], 0.0)
        if free.any():
            match[free.argmax()] = detection
            hit[detection] = True
    other = ~same & (overlap >= IOU) & ~hit
    taken_for = np.where(other.any(1), other.argmax(1) if len(labels) else 0, -1)
    return Verdict(match, taken_for, hit)


def iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of boxes xyxy [N, 4] and [M, 4], float64 [N, M]; 0 where neither has an area."""
    both = intersection(one, other)
    area, other_area = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (one, other))
    union = area[:, None] + other_area[None] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def intersection(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Area shared by boxes xyxy [N, 4] and [M, 4], float64 [N, M]."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


# ---- details ---------------------------------------------------------------------------------------------------------


class _Row(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


class _MaskRow(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    segmentation: dict[str, Any]
    score: float


def _rows(file: str | Path, image_ids: Sequence[int], kind: type) -> dict[int, list[Any]]:
    """Entries of some pictures, as `kind`, in the order of the file."""
    file = existing_file(file, "results file")
    decoder: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
    rows: dict[int, list[Any]] = {image_id: [] for image_id in image_ids}
    try:
        for piece in _pieces(file):
            for row in decoder.decode(piece):
                if row.image_id in rows:
                    rows[row.image_id].append(row)
    except msgspec.MsgspecError as error:
        raise UserError(f"results file {file} is not COCO results: {error}") from None
    return rows


def _detections(rows: list[_Row], drawn: Sequence[_MaskRow] | None = None) -> Detections:
    boxes = np.array([row.bbox for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([row.score for row in rows], np.float64)
    order = np.argsort(-scores, kind="stable")
    categories = np.array([row.category_id for row in rows], np.int64)
    masks = None if drawn is None else [drawn[place].segmentation for place in order]
    return Detections(boxes[order], categories[order], scores[order], masks)


def _pieces(file: Path) -> Iterator[bytes]:
    """A JSON list of objects as several smaller lists."""
    with file.open("rb") as stream:
        rest = b""
        while block := stream.read(_PIECE):
            rest += block
            cut = None
            for cut in _BETWEEN.finditer(rest, max(0, len(rest) - (1 << 16))):  # noqa: B007 - the last one is wanted
                pass
            if cut is not None:
                yield rest[: cut.start() + 1] + b"]"
                rest = b"[" + rest[cut.end() - 1 :]
        if rest.strip():
            yield rest
