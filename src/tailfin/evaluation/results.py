"""Detections on disk: each process appends its own shard while it infers, and the shards become one results JSON.

Nothing is gathered between processes. A shard is a sequence of binary records, one per image: a header with the image
id and the record's length, then boxes, scores, category ids and masks::

    with ResultWriter(folder, rank) as writer:
        for image_id, found in ...:
            writer.add(image_id, found["boxes"], found["scores"], category_ids)
    # once every process has closed its writer
    merge_shards(folder, "RUN/results.bbox.json", ranks=world_size)
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import numpy as np

from tailfin.errors import UserError, nearest
from tailfin.files import writing

MAGIC = b"tailfin detections 1\n"
HEADER = struct.Struct("<qQ")  # image id, length of the record
BOX_DECIMALS = 3  # boxes are written to a thousandth of a pixel; scores keep every bit of their float32


class ResultWriter:
    """Appends one process's detections to `folder/rank-<rank>.shard`.

    The shard has a temporary name until `close`, so a process that dies leaves none that looks whole. An earlier
    shard of the same rank is replaced.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int = 0) -> None:
        self._path = Path(folder) / _shard_name(rank)
        self._part = self._path.with_name(self._path.name + ".part")
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            self._file: BinaryIO = self._part.open("wb")
            self._file.write(MAGIC)

    def add(self, image_id: int, boxes_xyxy: Any, scores: Any, category_ids: Any, rles: Any = None) -> None:
        """Write all detections of one image; call once per image, also when there are none.

        boxes_xyxy: `[N, 4]` in pixels of the image file; scores: `[N]`; category_ids: `[N]`, ids of the annotation
        file; rles: N compressed RLE masks (`{"size": [h, w], "counts": bytes or str}`), or None. Arrays, tensors on
        any device and lists all pass. Raises `UserError` for numbers that are not finite, `ValueError` for lengths
        that differ.
        """
        boxes = _array(boxes_xyxy, np.float64).reshape(-1, 4)
        score = _array(scores, np.float32).reshape(-1)
        category = _array(category_ids, np.int64).reshape(-1)
        if not len(boxes) == len(score) == len(category) == (len(score) if rles is None else len(rles)):
            raise ValueError(f"image {image_id}: {len(boxes)} boxes, {len(score)} scores, {len(category)} categories")
        if not (np.isfinite(boxes).all() and np.isfinite(score).all()):
            raise UserError(f"image {image_id}: a detection has a box or score that is not finite")
        xywh = np.concatenate([boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clip(min=0)], 1).round(BOX_DECIMALS)
        masks = None if rles is None else [_Rle(tuple(rle["size"]), _bytes(rle["counts"])) for rle in rles]
        payload = msgspec.msgpack.encode(_Record(xywh.tobytes(), score.tobytes(), category.tobytes(), masks))
        with writing(self._path):
            self._file.write(HEADER.pack(int(image_id), len(payload)))
            self._file.write(payload)

    def close(self) -> None:
        """Finish the shard; a second call does nothing."""
        if self._file.closed:
            return
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self._path)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # what is buffered does not fit on a full disk either
                self._file.close()
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)


def merge_shards(
    folder: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    image_order: Sequence[int] | None = None,
    ranks: int | None = None,
) -> int:
    """Join the shards of a folder into one COCO results JSON and return the number of detections.

    Images come by their place in `image_order`, else by ascending id, each once: where two shards hold an image (the
    padding of a distributed sampler), the lower rank's detections count. So the file does not depend on the number of
    ranks. Where the detections have masks, a second file is written beside `out_path`, with `.bbox.` in the name
    replaced by `.segm.` (`x.json` gets `x.segm.json`); else an older one there is removed, as it would be taken for
    these detections' masks. Both appear whole or not at all, in memory of one image.

    `ranks` is the number of processes: their shards must all be there, and older ones beside them are not read.
    Raises `UserError` for a missing or damaged shard and for an image that `image_order` lacks.
    """
    shards = Shards.open(folder, ranks)
    image_ids = list(shards.places)
    if image_order is None:
        image_ids.sort()
    else:
        position = {int(image_id): place for place, image_id in enumerate(image_order)}
        unknown = next((image_id for image_id in image_ids if image_id not in position), None)
        if unknown is not None:
            raise UserError(f"{shards.label}: image {unknown} is not among the {len(position)} images asked for")
        image_ids.sort(key=position.__getitem__)

    out_path = Path(out_path)
    segm_path = segm_results_path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with JsonList(out_path) as boxes_out, JsonList(segm_path) as masks_out:
        for image_id, record in shards.records(image_ids):
            categories, scores = record.category_ids().tolist(), record.score_values().tolist()
            boxes_out.extend(
                [
                    {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
                    for category, box, score in zip(categories, record.box_values().tolist(), scores, strict=True)
                ]
            )
            if record.rles is not None:
                masks_out.extend(
                    [
                        {"image_id": image_id, "category_id": category, "segmentation": rle.as_dict(), "score": score}
                        for category, rle, score in zip(categories, record.rles, scores, strict=True)
                    ]
                )
                masks_out.wanted = True
        boxes_out.wanted = True
    if not masks_out.wanted:
        segm_path.unlink(missing_ok=True)
    return boxes_out.count


def segm_results_path(bbox_path: str | os.PathLike[str]) -> Path:
    """Where the masks' results lie beside a results file of boxes: `results.bbox.json` -> `results.segm.json`."""
    path = Path(bbox_path)
    if ".bbox." in path.name:
        return path.with_name(path.name.replace(".bbox.", ".segm."))
    return path.with_suffix(f".segm{path.suffix}")


def result_files(bbox_path: str | os.PathLike[str], kinds: Sequence[str]) -> dict[str, Path]:
    """The files that `merge_shards(..., bbox_path)` writes, by IoU type."""
    files = {"bbox": Path(bbox_path), "segm": segm_results_path(bbox_path)}
    return {kind: files[kind] for kind in kinds}


@dataclass(frozen=True)
class Shards:
    """The finished shards of a folder, and where in them each image's record lies."""

    label: str
    paths: list[Path]
    places: dict[int, tuple[int, int, int]]  # image id -> (shard, offset, length); the lowest rank that has it

    @classmethod
    def open(cls, folder: str | os.PathLike[str], ranks: int | None = None) -> Shards:
        """Find and index the shards of a folder; `UserError` where there are none, or unfinished or damaged ones."""
        folder = Path(folder)
        label = f"results folder {folder}"
        if not folder.is_dir():
            raise UserError(f"{label} does not exist")
        if ranks is not None:
            paths = [folder / _shard_name(rank) for rank in range(ranks)]
            missing = [path.name for path in paths if not path.is_file()]
        else:
            paths = sorted(folder.glob("rank-*.shard"))
            missing = [path.name.removesuffix(".part") for path in sorted(folder.glob("rank-*.shard.part"))]
        if missing:
            raise UserError(f"{label}: {missing[0]} is missing or unfinished: its process has not closed its writer")
        if not paths:
            near = nearest("results.bbox.json", (path.name for path in folder.iterdir()))
            raise UserError(f"{label} holds no finished shard and no results JSON{near}")
        places: dict[int, tuple[int, int, int]] = {}
        for number, path in enumerate(paths):
            for image_id, offset, length in _index(path):
                places.setdefault(image_id, (number, offset, length))
        return cls(label, paths, places)

    def records(self, image_ids: Sequence[int]) -> Iterator[tuple[int, _Record]]:
        """The records of these images, in this order."""
        files = [path.open("rb") for path in self.paths]
        try:
            for image_id in image_ids:
                number, offset, length = self.places[image_id]
                files[number].seek(offset)
                try:
                    yield image_id, msgspec.msgpack.decode(files[number].read(length), type=_Record)
                except msgspec.DecodeError as error:
                    raise UserError(f"{self.paths[number]} is damaged at image {image_id}: {error}") from None
        finally:
            for file in files:
                file.close()

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]] | None]:
        """All detections by ascending image id: image ids, category ids, scores, xywh boxes, and masks or None."""
        records = list(self.records(sorted(self.places)))
        counts = [record.length for _, record in records]
        image_ids = np.repeat(np.array([image_id for image_id, _ in records], np.int64), counts)
        category_ids = np.frombuffer(b"".join(record.categories for _, record in records), np.int64)
        scores = np.frombuffer(b"".join(record.scores for _, record in records), np.float32).astype(np.float64)
        boxes = np.frombuffer(b"".join(record.boxes for _, record in records), np.float64).reshape(-1, 4)
        masks: list[dict[str, Any]] | None = None
        if all(record.rles is not None for _, record in records if record.length):
            masks = [rle.as_dict() for _, record in records for rle in record.rles or ()]
        return image_ids, category_ids, scores, boxes, masks


class _Rle(msgspec.Struct, array_like=True, gc=False):
    size: tuple[int, int]
    counts: bytes

    def as_dict(self) -> dict[str, Any]:
        return {"size": list(self.size), "counts": self.counts.decode("ascii")}


class _Record(msgspec.Struct, array_like=True, gc=False):
    """One image: arrays as little-endian bytes."""

    boxes: bytes  # float64 [N, 4] xywh
    scores: bytes  # float32 [N]
    categories: bytes  # int64 [N]
    rles: list[_Rle] | None = None

    @property
    def length(self) -> int:
        return len(self.scores) // 4

    def box_values(self) -> np.ndarray:
        return np.frombuffer(self.boxes, np.float64).reshape(-1, 4)

    def score_values(self) -> np.ndarray:
        return np.frombuffer(self.scores, np.float32).astype(np.float64)

    def category_ids(self) -> np.ndarray:
        return np.frombuffer(self.categories, np.int64)


class JsonList:
    """A JSON list written piece by piece under a temporary name; on a clean exit it gets its own name, if `wanted`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self.count = 0
        self.wanted = False

    def __enter__(self) -> JsonList:
        with writing(self._path):
            self._file = self._part.open("wb")
            self._file.write(b"[")
        return self

    def extend(self, entries: list[dict[str, Any]]) -> None:
        if entries:
            data = msgspec.json.encode(entries)[1:-1].replace(b'},{"image_id"', b'},\n{"image_id"')
            with writing(self._path):
                self._file.write((b",\n" if self.count else b"\n") + data)
            self.count += len(entries)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.wanted:
                with writing(self._path):
                    self._file.write(b"\n]\n" if self.count else b"]\n")
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    self._part.replace(self._path)
        finally:
            with contextlib.suppress(OSError):  # what is buffered does not fit on a full disk either
                self._file.close()
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)


def _index(path: Path) -> Iterator[tuple[int, int, int]]:
    """(image id, offset, length) of every record of a shard, without reading the records."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is not a shard of detections")
        offset = len(MAGIC)
        while offset < size:
            file.seek(offset)
            header = file.read(HEADER.size)
            image_id, length = HEADER.unpack(header) if len(header) == HEADER.size else (0, size)
            offset += HEADER.size
            if offset + length > size:
                raise UserError(f"{path} is damaged: it ends within a record")
            yield image_id, offset, length
            offset += length


def _shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.shard"


def _array(values: Any, dtype: Any) -> np.ndarray:
    """A contiguous array of a list, array or tensor (of any device and precision)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))


def _bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
