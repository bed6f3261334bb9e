"""What `tailfin train auto` looks at: the data set, the device and what is installed, as plain numbers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tailfin.auto_batch import free_memory
from tailfin.data.advice import EXTRA, FEW, rfs_threshold, sided
from tailfin.data.index import AnnotationIndex
from tailfin.errors import UserError
from tailfin.models.coco_weights import PUBLISHED
from tailfin.processes import process_state
from tailfin.stats import ClassStats, imbalance_factor

QUANTILES = (0.2, 0.55, 0.9)  # of the objects' sides: where anchors are put
CROWDED = 0.95  # quantile of the objects per picture


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A data set and a machine."""

    pictures: int  # training pictures with objects
    val_pictures: int
    classes: int
    imbalance: float  # pictures of the largest class over those of the smallest that has any
    rare: int  # classes with at most `FEW` training pictures
    threshold: float  # of repeat factor sampling, for a set with these counts
    sided: tuple[str, ...]  # class names with left or right in them
    long_side: float  # of the median picture, in pixels
    sides: tuple[float, float, float]  # QUANTILES of the objects' sides, as shares of their picture's long side
    crowd: int  # objects in a crowded picture
    masks: bool  # every object of both files has a mask
    device: str  # cpu, cuda or mps
    memory: int  # free bytes
    processes: int
    packaged: bool  # the packages of the extra `weights` are installed
    coco: tuple[str, ...]  # detectors whose COCO weights are on this machine already


def look(train: AnnotationIndex, val: AnnotationIndex) -> Facts:
    """The facts of two annotation files on this machine; a training file without an object is a `UserError`."""
    stats, clean = ClassStats.from_index(train), train.clean()
    if not len(clean.rows):
        raise UserError(f"{train.path}: no annotations, there is nothing to learn from")
    counts = stats.image_count[stats.image_count > 0]
    long = np.maximum(train.widths, train.heights).astype(np.float64)
    boxes = clean.boxes.astype(np.float64)
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) / long[train.image_of[clean.rows]]
    objects = np.diff(clean.offsets)
    state = process_state()
    small, middle, large = (round(float(value), 4) for value in np.quantile(sides, QUANTILES))
    return Facts(
        pictures=int(np.count_nonzero(objects)),
        val_pictures=len(val),
        classes=stats.num_classes,
        imbalance=round(imbalance_factor(counts), 2),
        rare=int(np.count_nonzero(counts <= FEW)),
        threshold=rfs_threshold(stats),
        sided=tuple(sided(stats.names)),
        long_side=float(np.median(long)),
        sides=(small, middle, large),
        crowd=int(np.ceil(np.quantile(objects[objects > 0], CROWDED))),
        masks=_all_have_masks(train) and _all_have_masks(val),
        device=state.device.type,
        memory=free_memory(state.device),
        processes=state.num_processes,
        packaged=all(importlib.util.find_spec(name) is not None for name in EXTRA),
        coco=tuple(name for name, weights in PUBLISHED.items() if _is_here(weights)),
    )


def _all_have_masks(index: AnnotationIndex) -> bool:
    rows = index.clean().rows
    parts = index.readable_segmentations
    return bool(len(rows)) and not parts.problem and bool(parts.drawable()[rows].all())


def _is_here(weights: str) -> bool:
    """Whether torchvision has downloaded these weights before."""
    import torchvision

    file = Path(torchvision.models.get_weight(weights).url).name
    return (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file()
