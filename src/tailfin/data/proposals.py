"""Class-agnostic boxes around objects: what local contrast pairs across two views.

A source gives the boxes of one picture as a pure function of the sample's key: from a file (`proposal_files.py`;
`tailfin data proposals` writes one, COCO results of any program will do), from the annotations, or by selective search.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tailfin.data.dataset import Source
from tailfin.data.index import AnnotationIndex
from tailfin.data.proposal_files import StoredProposals, read_proposals
from tailfin.data.proposal_search import Boxes, opencv, selective_search
from tailfin.errors import UserError
from tailfin.schema.pretraining import Proposals

ASPECT, SIZE = 2.0, (0.15, 0.8)  # random boxes: bound of the aspect, square root of the share of the picture
INSTANCE_IOU = 0.5  # from which a proposal counts as an instance of an annotation's class
PAIRS = 2_000_000  # pairs of a proposal and an annotation that are compared at a time


@dataclass(frozen=True)
class ProposalSource:
    """Boxes of a picture by a recipe's `proposals` section."""

    config: Proposals
    stored: StoredProposals | None = None

    def boxes(self, row: int, truth: Boxes, image: Tensor, rng: np.random.Generator) -> Boxes:
        """At most `per_image` of the candidates, drawn at random, float32 [P, 4]."""
        found = self.candidates(row, truth, image, rng)
        if len(found) > self.config.per_image:
            found = found[rng.choice(len(found), self.config.per_image, replace=False)]
        return found

    def candidates(self, row: int, truth: Boxes, image: Tensor, rng: np.random.Generator) -> Boxes:
        """The usable boxes of an image row that a sample's are drawn from, the best `top`, float32 [N, 4].

        Args:
            truth: the picture's annotated boxes [M, 4].
            image: the picture, uint8 [3, H, W].
            rng: the sample's generator.
        """
        config = self.config
        size = (int(image.shape[-2]), int(image.shape[-1]))
        found = usable(self._candidates(config.source, truth, image, row, rng), size, config)
        if config.top:
            found = found[: config.top]
        if len(found) < config.fallback_below and config.fallback != "none":
            found = self._candidates(config.fallback, truth, image, row, rng)
        return np.ascontiguousarray(found, dtype=np.float32)

    def instances(self, index: AnnotationIndex) -> NDArray[np.int64]:
        """Usable proposals of each class in a whole training set, int64 [C]; only for sources that are not random.

        A proposal belongs to the class of the annotation that it overlaps most, by an IoU of at least 0.5; others are
        of no class. Where the fallback takes the place of too few boxes, the picture's annotations count. A class with
        annotations that no proposal finds counts as one: no share may be 0.
        """
        clean, images, classes = index.clean(), len(index), len(index.categories)
        truths = np.diff(clean.offsets)
        labels = index.labels[clean.rows].astype(np.int64)
        if self.stored is not None:
            starts, counts, all_boxes = self.stored.starts, self.stored.counts, self.stored.boxes
        elif self.config.source == "gt":
            starts, counts, all_boxes = clean.offsets[:-1], truths, clean.boxes
        else:
            raise ValueError(f"proposals of {self.config.source} are not known before they are drawn")
        found = np.zeros(classes, dtype=np.int64)
        # chunks of pictures by the memory that they need: pairs of a proposal and an annotation, and proposals
        chunk = np.cumsum(counts * (truths + 1)) // PAIRS
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(chunk)) + 1, [images]])
        for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            own = np.arange(first, last)
            boxes = all_boxes[_ragged(starts[own], counts[own])]
            image = np.repeat(own, counts[own])
            area = index.widths[image].astype(np.float64) * index.heights[image]
            keep = _within(boxes, area, self.config)
            boxes, image = boxes[keep], image[keep]
            if self.config.top:
                place = np.arange(len(image)) - np.searchsorted(image, image)
                boxes, image = boxes[place < self.config.top], image[place < self.config.top]
            if self.config.fallback != "none":
                few = np.bincount(image - first, minlength=last - first) < self.config.fallback_below
                boxes, image = boxes[~few[image - first]], image[~few[image - first]]
                found += np.bincount(labels[_ragged(clean.offsets[own[few]], truths[own[few]])], minlength=classes)
            best = _best_truth(boxes, image, clean.boxes, clean.offsets)
            found += np.bincount(labels[best[best >= 0]], minlength=classes)
        return np.maximum(found, np.bincount(labels, minlength=classes) > 0)

    def _candidates(self, source: str, truth: Boxes, image: Tensor, row: int, rng: np.random.Generator) -> Boxes:
        if source in ("file", "rpn"):
            assert self.stored is not None
            return self.stored.of(row)
        if source == "gt":
            return truth
        if source == "selective_search":
            return selective_search(image)
        size = (int(image.shape[-2]), int(image.shape[-1]))
        return jittered_truth(truth, size, self.config, rng)


def open_proposals(config: Proposals, source: Source, root: str | Path = "") -> ProposalSource:
    """The source of proposals for a training set; a missing, unfit or foreign file is a `UserError`."""
    if config.source == "selective_search":
        opencv()
    if config.source not in ("file", "rpn"):
        return ProposalSource(config)
    if not config.file:
        raise UserError(
            f'proposals.source is "{config.source}" and proposals.file names no file: write one with `tailfin data '
            "proposals MODEL --annotations FILE --out FILE`, or take proposals.source=gt_jitter"
        )
    stored = read_proposals(Path(root) / config.file, source.index)
    if config.source == "rpn" and not stored.made_by:
        raise UserError(
            f'proposals {stored.path}: proposals.source is "rpn", but no detector of tailfin wrote this file; take '
            'proposals.source "file" for boxes of another program'
        )
    return ProposalSource(config, stored)


def usable(boxes: Boxes, size: tuple[int, int], config: Proposals) -> Boxes:
    """The boxes of a picture of `size` (height, width) within the recipe's bounds of side, aspect and size."""
    keep = _within(boxes, size[0] * size[1], config)
    return boxes if keep.all() else boxes[keep]


def _within(boxes: Boxes, area: int | NDArray[np.float64], config: Proposals) -> NDArray[np.bool_]:
    """Which boxes [N, 4] of pictures of `area` pixels (one, or [N]) are usable, bool [N]."""
    sides = boxes[:, 2:] - boxes[:, :2]
    small, large = sides.min(axis=1), sides.max(axis=1)
    keep = (small >= config.min_side) & (small > 0)
    if config.max_aspect:
        keep &= large <= config.max_aspect * small
    if tuple(config.size) != (0.0, 1.0):
        share = np.sqrt(sides.prod(axis=1) / area)
        keep &= (share >= config.size[0]) & (share <= config.size[1])
    return keep


def _best_truth(boxes: Boxes, image: NDArray[np.int64], truth: Boxes, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row of the annotation that each box [N, 4] of its `image` [N] overlaps most, int64 [N]; -1 below IoU 0.5.

    Picture i has the annotations truth[offsets[i] : offsets[i + 1]]; of equals the first one. `image` ascends.
    """
    result = np.full(len(boxes), -1, dtype=np.int64)
    counts = offsets[image + 1] - offsets[image]
    box, other = np.repeat(np.arange(len(boxes)), counts), _ragged(offsets[image], counts)
    if not len(box):
        return result
    base = int(offsets[image[0]])
    near = truth[base : int(offsets[image[-1] + 1])]
    one, two = (np.ascontiguousarray(values.T, dtype=np.float64) for values in (boxes, near))  # whole columns: fast
    first, second = one[:, box], two[:, other - base]
    shared = np.minimum(first[2], second[2]) - np.maximum(first[0], second[0])
    np.clip(shared, 0, None, out=shared)
    shared *= np.clip(np.minimum(first[3], second[3]) - np.maximum(first[1], second[1]), 0, None)
    area, own = ((corners[2] - corners[0]) * (corners[3] - corners[1]) for corners in (one, two))
    iou = shared / (area[box] + own[other - base] - shared)
    hit = np.flatnonzero(iou >= INSTANCE_IOU)
    hit = hit[np.lexsort((-iou[hit], box[hit]))]  # stable: of equals the first
    owner, place = np.unique(box[hit], return_index=True)
    result[owner] = other[hit[place]]
    return result


def _ragged(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows starts[0] .. starts[0] + counts[0], then those of the next, ...: int64 [sum of counts]."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def jittered_truth(truth: Boxes, size: tuple[int, int], config: Proposals, rng: np.random.Generator) -> Boxes:
    """Shifted and scaled copies of the annotated boxes, and boxes at random places: at least twice `per_image`.

    A copy's centre moves by up to `jitter` of its sides, which are scaled by a factor in 1 +- `jitter`; all boxes are
    cut at the border of the picture of `size` (height, width).
    """
    total = 2 * max(config.per_image, len(truth))
    anywhere = total if not len(truth) else round(config.random * total)
    limit = np.array([size[1], size[0]], dtype=np.float64)

    share = rng.uniform(*SIZE, anywhere)
    aspect = np.exp(rng.uniform(-np.log(ASPECT), np.log(ASPECT), anywhere))
    area = np.sqrt(limit.prod())
    free = np.stack([share * area * np.sqrt(aspect), share * area / np.sqrt(aspect)], axis=1)
    free = np.minimum(free, limit)
    corner = rng.random((anywhere, 2)) * (limit - free)

    rows = np.arange(total - anywhere) % max(len(truth), 1)
    change = rng.uniform(-config.jitter, config.jitter, (len(rows), 4))
    copies = truth[rows].astype(np.float64)
    sides = copies[:, 2:] - copies[:, :2]
    centres = copies[:, :2] + sides / 2 + change[:, :2] * sides
    half = sides * (1 + change[:, 2:]) / 2

    boxes = np.concatenate(
        [np.concatenate([centres - half, centres + half], axis=1), np.concatenate([corner, corner + free], axis=1)]
    )
    boxes = np.clip(boxes, 0, np.concatenate([limit, limit])).astype(np.float32)
    return boxes[(boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)]
