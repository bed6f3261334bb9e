"""How sure a detector is of every training annotation: what exemplars are chosen by (step-wise learning, 3.1).

The detector sees the training pictures at test size and says itself how sure it is (`Detector.annotation_scores`). The
pictures are cut into shards of whole batches, the same ones for every number of processes; a finished shard is a file,
so an interrupted selection goes on with the next one and ends with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from tailfin.data.dataset import Source, by_aspect, evaluation_loader
from tailfin.data.index import CleanBoxes
from tailfin.errors import UserError
from tailfin.files import read_npz, writing
from tailfin.inference import category_ids_for
from tailfin.models.detector import Detector
from tailfin.progress import Progress
from tailfin.schema.data import Data
from tailfin.stop_signals import Interrupted, StopSignals

Scores = tuple[NDArray[np.int64], NDArray[np.float32]]  # rows of the index, and how sure the detector is of each


@torch.inference_mode()
def score_annotations(
    model: Detector,
    source: Source,
    config: Data,
    folder: Path,
    *,
    accelerator: Accelerator,
    batch: int,
    score: str = "max",
    shard: int = 512,
    names: Sequence[str] | None = None,
) -> None:
    """Write this process's shards into `folder`; those that are there already are left as they are.

    Args:
        batch: pictures per step; a shard has about `shard` pictures, in whole batches.
        score: "max", the largest score over all classes, or "gt_class", that of the annotation's own class.
        names: the model's classes in its order, where it is not the file's.

    Raises:
        Interrupted: SIGINT or SIGTERM came; finished shards stay.
    """
    clean = source.index.clean()
    label_of = np.arange(len(source.index.categories))
    if names is not None:
        ids = category_ids_for(names, source.index)
        label_of = np.argsort(np.searchsorted(source.index.category_ids, ids))
    rows = by_aspect(source.index)
    rows = rows[np.diff(clean.offsets)[rows] > 0]
    size = max(1, shard // batch) * batch
    shares = [
        (number, rows[start : start + size])
        for number, start in enumerate(range(0, len(rows), size))
        if number % accelerator.num_processes == accelerator.process_index
    ]
    shares = [(number, share) for number, share in shares if not _shard(folder, number).exists()]
    if not shares:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # only the very last shard can be shorter than whole batches, so the loader's batches never straddle two shards
    loader = evaluation_loader(
        source, config, batch=batch, rank=0, processes=1, rows=np.concatenate([share for _, share in shares])
    )
    model.eval()
    done = 0
    total = sum(len(share) for _, share in shares)
    with (
        closing(loader),
        StopSignals() as signals,
        Progress("exemplars", total, enabled=accelerator.is_main_process) as progress,
    ):
        for number, share in shares:
            found: list[Scores] = []
            for _ in range(-(-len(share) // batch)):
                images, pictures = next(loader)
                on_device = [image.to(accelerator.device, non_blocking=True) for image in images]
                targets, own = _targets(source, clean, label_of, images, pictures, accelerator.device)
                with accelerator.autocast():
                    values = annotation_scores(model, on_device, targets, score)
                found.append((own, values.float().cpu().numpy()))
                done += len(pictures)
                progress.update(done)
            _write(_shard(folder, number), found)
            if signals.received is not None:
                raise Interrupted(signals.received, folder.parent)


def read_scores(folder: Path, annotations: int) -> Scores:
    """All shards of a folder, in the order of the index; `annotations` is how many there must be."""
    parts = [_read(path) for path in sorted(folder.glob("*.npz")) if not path.name.startswith(".")]
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.zeros(0, np.int64)
    scores = np.concatenate([scores for _, scores in parts]) if parts else np.zeros(0, np.float32)
    if len(rows) != annotations or len(np.unique(rows)) != annotations:
        raise UserError(
            f"{folder}: its shards hold {len(rows)} scored annotations, {annotations} are needed; "
            "remove the folder to begin the selection again"
        )
    order = np.argsort(rows)
    return rows[order], scores[order]


def annotation_scores(
    model: Detector, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], score: str = "max"
) -> Tensor:
    """Scores of all annotations of a batch, [sum M]: pictures one after another, in the order of their targets.

    An annotation that is matched with nothing (more objects than queries, no proposal) has 0.
    """
    labels = torch.cat([target["labels"] for target in targets])
    scores, place = model.annotation_scores(images, targets)
    own = scores.gather(1, labels[place, None])[:, 0] if score == "gt_class" else scores.amax(1)
    return scores.new_zeros(len(labels)).index_copy(0, place, own)


# ---- details ---------------------------------------------------------------------------------------------------------


def _targets(
    source: Source,
    clean: CleanBoxes,
    label_of: NDArray[np.int64],
    images: Sequence[Tensor],
    pictures: Sequence[int],
    device: torch.device,
) -> tuple[list[dict[str, Tensor]], NDArray[np.int64]]:
    """Boxes and labels of the pictures at test size, and the index rows of all of them."""
    index = source.index
    targets, rows = [], []
    for image, picture in zip(images, pictures, strict=True):
        own = slice(int(clean.offsets[picture]), int(clean.offsets[picture + 1]))
        across, down = image.shape[-1] / index.widths[picture], image.shape[-2] / index.heights[picture]
        boxes = clean.boxes[own] * np.array([across, down, across, down], dtype=np.float32)
        rows.append(np.asarray(clean.rows[own], dtype=np.int64))
        labels = label_of[index.labels[rows[-1]]]
        targets.append({"boxes": torch.from_numpy(boxes).to(device), "labels": torch.from_numpy(labels).to(device)})
    return targets, np.concatenate(rows)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _read(path: Path) -> Scores:
    """A shard; a damaged one, or one with code in it, is a `UserError`."""
    arrays = read_npz(path, "scores")
    rows, scores = arrays.get("rows", np.zeros(0)), arrays.get("scores", np.zeros(1))
    if rows.ndim != 1 or rows.shape != scores.shape or rows.dtype.kind not in "iu" or scores.dtype.kind != "f":
        raise UserError(f"scores {path} are damaged; remove the file to have its pictures scored again")
    return rows, scores


def _write(path: Path, found: Sequence[Scores]) -> None:
    """A shard under a temporary name first, so that one that is there is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                np.savez(
                    file, rows=np.concatenate([rows for rows, _ in found]), scores=np.concatenate([s for _, s in found])
                )
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
