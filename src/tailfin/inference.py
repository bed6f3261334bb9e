"""A detector over a data set: every rank takes its share of the images and writes its own shards.

No detection travels between processes; the shards are merged afterwards, each image once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from tailfin.data.dataset import Source, evaluation_loader
from tailfin.data.index import AnnotationIndex
from tailfin.errors import UserError, nearest
from tailfin.evaluation import ResultWriter, TrainCounts
from tailfin.models.detector import Limits
from tailfin.progress import Progress
from tailfin.schema.data import Data
from tailfin.stats import ClassStats


def category_ids_for(names: Sequence[str], index: AnnotationIndex) -> np.ndarray:
    """The file's category id of each of the model's classes, int64 [C]; by name, a mismatch is an error."""
    known = dict(zip(index.names, index.category_ids.tolist(), strict=True))
    missing = [name for name in names if name not in known]
    extra = [name for name in index.names if name not in set(names)]
    if missing or extra:
        first = (
            f'the model\'s class "{missing[0]}" is not in the file{nearest(missing[0], known)}'
            if missing
            else f"the file's class \"{extra[0]}\" is not one of the model's{nearest(extra[0], names)}"
        )
        raise UserError(
            f"{index.path}: its categories are not the model's: {first} "
            f"({len(missing)} of the model's {len(names)} classes missing, {len(extra)} unknown ones in the file)"
        )
    return np.array([known[name] for name in names], dtype=np.int64)


def counts_by_id(stats: ClassStats, index: AnnotationIndex) -> TrainCounts:
    """Training counts of the model's classes by the file's category ids."""
    ids = category_ids_for(stats.names, index).tolist()
    return TrainCounts(
        image_count=dict(zip(ids, map(int, stats.image_count), strict=True)),
        instance_count=dict(zip(ids, map(int, stats.instance_count), strict=True)),
    )


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
) -> float:
    """Write this rank's detections into `shards`; returns the images per second of this rank, loading included.

    `limits` of what is reported, instead of the model's own.
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
                writer.add(int(index.image_ids[row]), boxes, scores, ids[labels])
            done += len(rows)
            progress.update(done)
    return done / max(time.perf_counter() - began, 1e-9)


def picture_scale(size: torch.Size, index: AnnotationIndex, row: int) -> np.ndarray:
    """Factors from the test picture's pixels to the file's."""
    across = index.widths[row] / size[1]
    down = index.heights[row] / size[0]
    return np.array([across, down, across, down], dtype=np.float32)
