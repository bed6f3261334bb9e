"""Class-agnostic proposals of a trained detector over a data set, written for pre-training.

    Detector.proposals -> boxes of any class, after NMS, best `top` -> shards by chunks of images -> one file

The memory is that of one picture's boxes: 118,000 pictures with 300 boxes each are 700 MB on disk.
Every detector serves: the localizer with its own scores, a two-stage detector with its RPN's, any other with its
detections regardless of class. A chunk of images that is done is not done again when the command is repeated after an
interruption.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torchvision.ops import box_iou

from tailfin.api import load
from tailfin.checkpoint import content_hash
from tailfin.data.dataset import Source, by_aspect, evaluation_loader
from tailfin.data.index import AnnotationIndex, image_folder, open_index
from tailfin.data.proposal_files import write_proposals
from tailfin.data.proposal_search import selective_search
from tailfin.errors import UserError
from tailfin.evaluation.results import ResultWriter, Shards
from tailfin.files import read_json, write_json
from tailfin.models.detector import Detector
from tailfin.processes import new_accelerator, on_main
from tailfin.progress import Progress
from tailfin.schema.data import Data

CHUNK = 2000  # images per shard: what an interruption costs at most
SELECTIVE_SEARCH = "selective_search"
THRESHOLDS = np.arange(0.5, 1.0, 0.05)
AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, np.inf)}


class Found(NamedTuple):
    """Proposals of a data set, images by ascending id, best first within."""

    image_ids: NDArray[np.int64]  # [I], those with a proposal
    offsets: NDArray[np.int64]  # [I + 1]
    boxes: NDArray[np.float32]  # [N, 4] xyxy, pixels of the picture's file
    scores: NDArray[np.float32]  # [N]


def propose(
    model: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    top: int = 1000,
    nms_iou: float = 0.7,
    device: str | None = None,
    overwrite: bool = False,
) -> tuple[Found, AnnotationIndex]:
    """Write the proposals of a model (or of "selective_search") for every image of an annotation file; returns them,
    memory-mapped, and the file's index. On other processes than the main one there are none.

    Args:
        model: a run folder or model file, or the words "selective_search".
        out: .npz, or .json for COCO results.
        top: boxes per image, after NMS at `nms_iou`.
        device: "cpu" keeps a GPU out of it.
    """
    out = Path(out)
    if out.suffix not in (".npz", ".json"):
        raise UserError(f"--out {out}: proposals are written as .npz or .json")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; --overwrite replaces it")
    index = open_index(annotations)
    source = Source(index, image_folder(annotations, images))
    by_search = str(model) == SELECTIVE_SEARCH
    if by_search:
        config, proposer, made_by = Data(), None, ""
        accelerator = new_accelerator("no", cpu=True)
    else:
        detector = load(model, "cpu")
        config, made_by = detector.recipe.data, _made_by(Path(model), detector.recipe.detector.name)
        accelerator = new_accelerator(detector.recipe.schedule.precision, cpu=device == "cpu")
        proposer = detector.model.to(accelerator.device).eval()

    parts = out.with_name(f".{out.name}.parts")
    asked = {"model": made_by or SELECTIVE_SEARCH, "annotations": index.fingerprint, "top": top, "nms": nms_iou}
    on_main(accelerator, lambda: _begin(parts, {**asked, "processes": accelerator.num_processes}))
    order = by_aspect(index)
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    with Progress("proposals", len(index), enabled=accelerator.is_main_process) as progress:
        for number, rows in enumerate(chunks):
            folder = parts / f"{number:05d}"
            if not (folder / f"rank-{accelerator.process_index:05d}.shard").is_file():
                if proposer is None:
                    _search_chunk(source, rows, folder, accelerator, top, config)
                else:
                    _propose_chunk(proposer, top, nms_iou, source, config, rows, folder, accelerator)
            progress.update(number * CHUNK + len(rows))
    accelerator.wait_for_everyone()
    result = Found(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    def join() -> None:
        nonlocal result
        result = _joined(parts, len(chunks), accelerator.num_processes)
        write_proposals(out, *result, made_by)
        shutil.rmtree(parts)

    on_main(accelerator, join)
    return result, index


def average_recall(found: Found, index: AnnotationIndex, limits: Sequence[int]) -> dict[str, float]:
    """Class-agnostic recall of the annotated boxes, averaged over IoU 0.5 to 0.95: AR@n for the best n proposals per
    image, R50@n at IoU 0.5 alone, and ARs, ARm, ARl at the largest n by the object's area in the picture.

    A proposal counts for one object only: the best overlaps are taken first. -1 where there is no object.
    """
    clean = index.clean()
    limits = sorted(limits)
    overlaps = np.zeros((len(limits), len(clean.boxes)), dtype=np.float32)
    place = {int(image_id): number for number, image_id in enumerate(found.image_ids)}
    for row in np.flatnonzero(np.diff(clean.offsets)):
        number = place.get(int(index.image_ids[row]))
        if number is None:
            continue
        own = slice(int(clean.offsets[row]), int(clean.offsets[row + 1]))
        boxes = found.boxes[found.offsets[number] : found.offsets[number + 1]]
        iou = box_iou(torch.from_numpy(np.array(clean.boxes[own])), torch.from_numpy(np.array(boxes))).numpy()
        for position, limit in enumerate(limits):
            overlaps[position, own] = _best_pairs(iou[:, :limit])
    if not len(clean.boxes):
        return {f"AR@{limit}": -1.0 for limit in limits}
    hit = overlaps[:, :, None] >= THRESHOLDS - 1e-6
    result = {f"AR@{limit}": float(hit[position].mean()) for position, limit in enumerate(limits)}
    result |= {f"R50@{limit}": float(hit[position, :, 0].mean()) for position, limit in enumerate(limits)}
    areas = (clean.boxes[:, 2:] - clean.boxes[:, :2]).prod(axis=1)
    for name, (low, high) in AREAS.items():
        inside = (areas >= low) & (areas < high)
        result[f"AR{name}@{limits[-1]}"] = float(hit[-1, inside].mean()) if inside.any() else -1.0
    return result


# ---- details ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _propose_chunk(
    detector: Detector,
    top: int,
    nms_iou: float,
    source: Source,
    config: Data,
    rows: np.ndarray,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    index = source.index
    loader = evaluation_loader(
        source, config, batch=8, rank=accelerator.process_index, processes=accelerator.num_processes, rows=rows
    )
    with closing(loader), ResultWriter(folder, accelerator.process_index) as writer:
        for images, batch_rows in loader:
            with accelerator.autocast():
                on_device = [image.to(accelerator.device, non_blocking=True) for image in images]
                outputs = detector.proposals(on_device, top, nms_iou)
            for image, row, output in zip(images, batch_rows, outputs, strict=True):
                across, down = index.widths[row] / image.shape[-1], index.heights[row] / image.shape[-2]
                boxes = output["boxes"].float().cpu().numpy() * np.array([across, down] * 2, dtype=np.float32)
                scores = output["scores"].float().cpu().numpy()
                writer.add(int(index.image_ids[row]), boxes, scores, np.zeros(len(boxes)))


def _search_chunk(
    source: Source, rows: np.ndarray, folder: Path, accelerator: Accelerator, top: int, config: Data
) -> None:
    """Selective search has no scores: its boxes are ranked by size, the largest first."""
    with ResultWriter(folder, accelerator.process_index) as writer:
        for row in rows[accelerator.process_index :: accelerator.num_processes].tolist():
            boxes = selective_search(source.read(row, config.max_pixels, config.value_range))[:top]
            scores = np.linspace(1, 0, len(boxes), endpoint=False)
            writer.add(int(source.index.image_ids[row]), boxes, scores, np.zeros(len(boxes)))


def _begin(parts: Path, asked: dict[str, Any]) -> None:
    """Keep the shards of an interrupted command that was asked the same; otherwise start anew."""
    note = parts / "asked.json"
    if note.is_file() and read_json(note) == asked:
        return
    shutil.rmtree(parts, ignore_errors=True)
    write_json(note, asked)


def _joined(parts: Path, chunks: int, ranks: int) -> Found:
    """The proposals of all chunks, images by ascending id; boxes and scores go through files of their own."""
    shards = [Shards.open(parts / f"{number:05d}", ranks) for number in range(chunks)]
    where = {image_id: shard for shard in shards for image_id in shard.places}
    ids, counts = [], []
    names = (parts / "boxes.bin", parts / "scores.bin")
    with names[0].open("wb") as box_file, names[1].open("wb") as score_file:
        for image_id in sorted(where):
            ((_, record),) = where[image_id].records([image_id])
            boxes, scores = record.box_values().astype(np.float32), record.score_values().astype(np.float32)
            if len(scores):
                boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
                order = np.argsort(-scores, kind="stable")
                box_file.write(boxes[order].tobytes())
                score_file.write(scores[order].tobytes())
                ids.append(image_id)
                counts.append(len(scores))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if not ids:
        return Found(np.zeros(0, np.int64), offsets, np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    mapped = [np.memmap(name, np.float32, "r") for name in names]
    return Found(np.array(ids, np.int64), offsets, mapped[0].reshape(-1, 4), mapped[1])


def _best_pairs(iou: NDArray[np.float32]) -> NDArray[np.float32]:
    """The IoU [G] of every object with the proposal it is paired with, of overlaps [G, D]; each is used once."""
    best = np.zeros(len(iou), dtype=np.float32)
    if iou.size == 0:
        return best
    iou = iou.copy()
    for _ in range(min(iou.shape)):
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        if iou[row, column] < THRESHOLDS[0] - 1e-6:
            break
        best[row] = iou[row, column]
        iou[row, :] = iou[:, column] = -1
    return best


def _made_by(model: Path, name: str) -> str:
    path = model / "model.safetensors" if model.is_dir() else model
    return f"{name} {content_hash(path)}"
