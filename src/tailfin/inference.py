"""A detector over a data set: every rank takes its share of the images and writes its own shards.

No detection travels between processes; the shards are merged afterwards, each image once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from tailfin.data.dataset import Source, evaluation_loader
from tailfin.data.index import AnnotationIndex
from tailfin.data.masks import NONE
from tailfin.errors import UserError, nearest
from tailfin.evaluation import ResultWriter, TrainCounts
from tailfin.joins import join_classes
from tailfin.mask_encoding import encode_masks
from tailfin.models.detector import Limits
from tailfin.progress import Progress
from tailfin.schema.data import Data
from tailfin.stats import ClassStats


def category_ids_for(names: Sequence[str], index: AnnotationIndex) -> np.ndarray:
    """The file's category id of each of the model's classes, int64 [C]; by name, a mismatch is an error."""
    join = join_classes(names, index.names)
    if join.missing or join.unknown:
        if join.missing:
            first = f'the model\'s class "{join.missing[0]}" is not in the file{nearest(join.missing[0], index.names)}'
        else:
            first = f"the file's class \"{join.unknown[0]}\" is not one of the model's{nearest(join.unknown[0], names)}"
        remedy = ""
        if not join.unknown:  # a file of a folder where a rare class does not occur
            remedy = f"; `tailfin data merge {index.path} --classes-of TRAIN.json --out NEW.json` adds them"
        raise UserError(
            f"{index.path}: its categories are not the model's: {first} ({len(join.missing)} of the model's "
            f"{len(names)} classes missing, {len(join.unknown)} unknown ones in the file{remedy})"
        )
    return index.category_ids[join.rows].astype(np.int64)


def counts_by_id(stats: ClassStats, index: AnnotationIndex) -> TrainCounts:
    """Training counts of the model's classes by the file's category ids."""
    ids = category_ids_for(stats.names, index).tolist()
    return TrainCounts(
        image_count=dict(zip(ids, map(int, stats.image_count), strict=True)),
        instance_count=dict(zip(ids, map(int, stats.instance_count), strict=True)),
    )


def check_validation(stats: ClassStats, index: AnnotationIndex, wanted: Sequence[str]) -> None:
    """Refuse, before a detector is trained, a file that it could not be measured on: other classes, or masks wanted
    and not there."""
    category_ids_for(stats.names, index)
    if "segm" in wanted:
        check_masks(index)


def check_masks(index: AnnotationIndex) -> None:
    """Refuse to measure masks on a file that lacks some, before a detector is trained or run for it."""
    parts = index.readable_segmentations
    without = np.flatnonzero(parts.kinds == NONE)
    problem = parts.problem or (
        f"annotation {index.annotation_ids[without].min()} has no segmentation" if len(without) else ""
    )
    if problem:
        raise UserError(f"{index.path}: iou type segm needs the mask of every annotation: {problem}")


def check_kinds(model: Any, wanted: Sequence[str], asked_by: str) -> None:
    """Refuse to measure what the detector does not give; `asked_by` names the option that asks for it."""
    if "segm" in wanted and "segm" not in model.kinds:
        raise UserError(f"{asked_by}: segm needs a detector with masks, {type(model).__name__} gives boxes only")


@torch.inference_mode()
def infer(
    model: nn.Module,
    source: Source,
    config: Data,
    shards: Path,
    names: Sequence[str],
    *,
    accelerator: Accelerator,
    batch: int,
    title: str = "inference",
    limits: Limits | None = None,
    masks: bool = False,
) -> float:
    """Write this rank's detections into `shards`; returns the images per second of this rank, loading included.

    `limits` of what is reported, instead of the model's own. `masks` of a detector that has them are written too: its
    probabilities [D, m, m] as RLEs at the size of the file.
    """
    index = source.index
    ids = category_ids_for(names, index)
    loader = evaluation_loader(
        source, config, batch=batch, rank=accelerator.process_index, processes=accelerator.num_processes
    )
    model.eval()
    began, done = time.perf_counter(), 0
    share = -(-len(index) // accelerator.num_processes)
    with (
        closing(loader),
        ResultWriter(shards, accelerator.process_index) as writer,
        Progress(title, share, enabled=accelerator.is_main_process) as progress,
    ):
        for images, rows in loader:
            with accelerator.autocast():
                on_device = [image.to(accelerator.device, non_blocking=True) for image in images]
                outputs = model(on_device, limits=limits)
            for image, row, output in zip(images, rows, outputs, strict=True):
                boxes = output["boxes"].float().cpu().numpy() * picture_scale(image.shape[-2:], index, row)
                labels = output["labels"].cpu().numpy()
                scores = output["scores"].float().cpu().numpy()
                rles = None
                if masks:
                    size = int(index.heights[row]), int(index.widths[row])
                    rles = encode_masks(output["masks"], torch.from_numpy(boxes), size)
                writer.add(int(index.image_ids[row]), boxes, scores, ids[labels], rles)
            done += len(rows)
            progress.update(done)
    return done / max(time.perf_counter() - began, 1e-9)


def picture_scale(size: torch.Size, index: AnnotationIndex, row: int) -> np.ndarray:
    """Factors from the test picture's pixels to the file's."""
    across = index.widths[row] / size[1]
    down = index.heights[row] / size[0]
    return np.array([across, down, across, down], dtype=np.float32)
