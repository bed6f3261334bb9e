"""Files of proposals: class-agnostic boxes of the pictures of an annotation file, best first.

    write_proposals("proposals.npz", image_ids, offsets, boxes, scores, made_by)
    stored = read_proposals("proposals.npz", index)
    stored.of(row)                                             # [n, 4] of an image row

An .npz that `write_proposals` wrote is checked once, in parts, and its boxes and scores are memory-mapped where they
lie: 118,000 pictures with 300 boxes each need 2 MB of memory. COCO results JSON of any program, and an .npz whose
images or scores are in another order, are sorted in memory, once, and memory-mapped from the cache afterwards.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tailfin.data import cache
from tailfin.data.index import AnnotationIndex
from tailfin.errors import UserError
from tailfin.files import existing_file, read_npz, whole_file
from tailfin.joins import PictureNames
from tailfin.parsing import Box, boxes_array, column, load_typed, nearest_id, rows_of

Boxes = NDArray[np.float32]  # [N, 4] xyxy
BORDER = 1.0  # pixels by which a box may pass the picture's border: files round
PART = 1 << 20  # boxes that are looked at together
ARRAYS = ("image_ids", "offsets", "boxes", "scores")


@dataclass(frozen=True)
class StoredProposals:
    """Proposals of the pictures of an annotation file, best first; columns are memory-mapped."""

    path: Path
    starts: NDArray[np.int64]  # [I], where the boxes of an image row start ...
    counts: NDArray[np.int64]  # ... and how many they are; 0 for an image that the file lacks
    boxes: Boxes  # [N, 4]
    scores: NDArray[np.float32]  # [N]
    made_by: str  # what wrote the file; empty where it does not say

    def __reduce__(self) -> tuple[Any, ...]:  # a loader's process maps the columns itself
        return _reopened, (self.path, self.starts, self.counts)

    def of(self, row: int) -> Boxes:
        """Boxes [n, 4] of an image row, best first."""
        start = int(self.starts[row])
        return self.boxes[start : start + int(self.counts[row])]


class _Entry(msgspec.Struct, gc=False):
    """One detection of COCO results; its class does not matter."""

    image_id: int
    bbox: Box
    score: float = 0.0
    file_name: Any = None


def read_proposals(path: str | Path, index: AnnotationIndex) -> StoredProposals:
    """Proposals of a file for the images of `index`.

    The file is COCO results JSON (`image_id`, `bbox` xywh, `score`) or what `write_proposals` wrote (.npz). Images
    that the index lacks are passed over; boxes outside their picture, a file without any image of the index, and a
    `file_name` of another picture than that of its `image_id` are a `UserError`: such a file belongs to other data.
    """
    path = existing_file(path, "proposals file")
    bundle = _columns(path)
    ids, offsets, boxes = (bundle.columns[name] for name in ("image_ids", "offsets", "boxes"))
    rows, _ = rows_of(index.image_ids, ids)
    known = ids[rows] == index.image_ids if len(ids) else np.zeros(len(index), bool)
    if not known.any():
        first = "" if not len(ids) else f": its first image id {int(ids[0])} is not in"
        near = nearest_id(int(ids[0]), np.sort(index.image_ids)) if len(ids) else ""
        what = "holds no proposal" if not len(ids) else "holds proposals of other pictures"
        raise UserError(f"proposals {path} {what}{first}{f' {index.path}{near}' if len(ids) else ''}")
    _check_names(path, json.loads(bundle.metadata.get("names", "{}")), index)
    starts = np.where(known, offsets[rows], 0)
    counts = np.where(known, np.diff(offsets)[rows], 0)

    owner = np.full(len(ids), -1)
    owner[rows[known]] = np.flatnonzero(known)
    for start, end in _parts(offsets):  # of whole images, so that the memory does not grow with the file
        image = np.repeat(owner[start:end], np.diff(offsets[start : end + 1]))
        own = boxes[offsets[start] : offsets[end]]
        limit = np.stack([index.widths[image], index.heights[image]], axis=1) + BORDER
        outside = (image >= 0) & ((own[:, :2] < -BORDER).any(axis=1) | (own[:, 2:] > limit).any(axis=1))
        if outside.any():
            place = int(np.flatnonzero(outside)[0])
            row = int(image[place])
            raise UserError(
                f"proposals {path}: image id {int(index.image_ids[row])} has a box {own[place].round(1).tolist()} "
                f"(left, top, right, bottom) outside its picture of {index.widths[row]} x {index.heights[row]}"
            )
    scores = bundle.columns["scores"]
    return StoredProposals(path, starts, counts, boxes, scores, bundle.metadata.get("made_by", ""))


def write_proposals(
    path: str | Path,
    image_ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    boxes: Boxes,
    scores: NDArray[np.float32],
    made_by: str,
) -> None:
    """Write proposals atomically: an .npz of columns, or COCO results JSON where `path` ends in .json.

    Args:
        image_ids: [I] of the annotation file, ascending.
        offsets: [I + 1]; image i has boxes[offsets[i] : offsets[i + 1]], best first.
        boxes: [N, 4] xyxy, pixels of the picture's file.
        scores: [N].
        made_by: which model wrote them (kept in .npz alone).
    """
    path = Path(path)
    if path.suffix == ".json":
        with whole_file(path) as file:
            for number, image_id in enumerate(image_ids.tolist()):
                own = slice(int(offsets[number]), int(offsets[number + 1]))
                xywh = np.concatenate([boxes[own, :2], boxes[own, 2:] - boxes[own, :2]], axis=1).astype(np.float64)
                entries = [
                    {"image_id": image_id, "category_id": 0, "bbox": box, "score": score}
                    for box, score in zip(xywh.round(3).tolist(), scores[own].astype(np.float64).tolist(), strict=True)
                ]
                text = msgspec.json.encode(entries)[1:-1]
                file.write((b"," if number else b"[") + text)
            file.write(b"]" if len(image_ids) else b"[]")
        return
    arrays: dict[str, NDArray[Any]] = {
        "image_ids": image_ids.astype(np.int64, copy=False),
        "offsets": offsets.astype(np.int64, copy=False),
        "boxes": boxes.astype(np.float32, copy=False),
        "scores": scores.astype(np.float32, copy=False),
        "made_by": np.array(made_by),
    }
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)  # in parts


def _columns(path: Path) -> cache.Bundle:
    """A file's columns by ascending image id and descending score, memory-mapped, here or from the cache."""
    stamp = cache.stamp(path)
    checked = cache.load(path, stamp, "checked") if path.suffix == ".npz" else None
    mapped = _mapped(path, checked is None) if path.suffix == ".npz" else None
    if mapped is not None:
        if checked is None:
            made_by = _check(path, mapped)
            if not _in_order(mapped):
                mapped = None
            else:
                few = {name: mapped[name] for name in ("image_ids", "offsets")}
                checked = cache.store(path, stamp, "checked", few, {"made_by": made_by})
        if mapped is not None and checked is not None:
            columns = {**checked.columns, "boxes": mapped["boxes"], "scores": mapped["scores"]}
            return cache.Bundle(columns, checked.metadata, path)
    bundle = cache.load(path, stamp, "proposals")
    if bundle is not None and (path.suffix == ".npz" or "names" in bundle.metadata):
        return bundle
    owners, boxes, scores, facts = _from_npz(path) if path.suffix == ".npz" else _from_json(path)
    order = np.lexsort([-scores, owners])
    ids, counts = np.unique(owners, return_counts=True)
    columns = {
        "image_ids": ids.astype(np.int64),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes": boxes[order].astype(np.float32),
        "scores": scores[order].astype(np.float32),
    }
    return cache.store(path, stamp, "proposals", columns, facts)


def _from_json(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], dict[str, str]]:
    entries, label = load_typed(path, list[_Entry], "proposals file")
    owners = column(entries, lambda entry: entry.image_id, np.int64, label)
    boxes = boxes_array([entry.bbox for entry in entries], label, lambda row: f"entry {row}")
    boxes[:, 2:] += boxes[:, :2]
    names = {str(entry.image_id): entry.file_name for entry in entries if isinstance(entry.file_name, str)}
    scores = column(entries, lambda entry: entry.score, np.float64, label)
    return owners, boxes, scores, {"made_by": "", "names": json.dumps(names)}


def _check_names(path: Path, names: Mapping[str, str], index: AnnotationIndex) -> None:
    """Refuse entries whose picture, by its name, is not the one that their id has in `index`."""
    if not names:
        return
    rows = {str(number): row for row, number in enumerate(index.image_ids.tolist())}
    own = [index.file_name(row) for row in range(len(index))]
    pictures = PictureNames(own)
    for number, name in names.items():
        row = rows.get(number)
        if name and row is not None and own[row] and row not in pictures.find(name):
            raise UserError(
                f"proposals {path}: image_id {number} is {own[row]} in {index.path}, the entry says {name}: the ids "
                "are those of another file"
            )


def _from_npz(path: Path) -> tuple[NDArray[np.int64], Boxes, NDArray[np.float32], dict[str, str]]:
    values = read_npz(path, "proposals file")
    made_by = _check(path, values)
    ids, counts = values["image_ids"], np.diff(values["offsets"])
    return np.repeat(ids.astype(np.int64), counts), values["boxes"], values["scores"], {"made_by": made_by}


def _mapped(path: Path, whole: bool) -> dict[str, NDArray[Any]] | None:
    """The arrays of an uncompressed .npz where they lie in the file; None where they cannot be mapped so: `read_npz`
    then reads it, or says what is wrong with it. `whole` compares the checksums, too."""
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    return None
                file.seek(info.header_offset)
                name_length, extra_length = struct.unpack("<HH", file.read(30)[26:30])
                file.seek(info.header_offset + 30 + name_length + extra_length)
                start = file.tell()
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, by_column, kind = read(file)
                values = int(np.prod(shape, dtype=np.int64))
                if kind.hasobject or by_column or file.tell() - start + values * kind.itemsize != info.file_size:
                    return None
                if not values:
                    found[info.filename.removesuffix(".npy")] = np.zeros(shape, kind)
                    continue
                if whole and not _intact(file, start, info):
                    return None
                file.seek(start)
                np.lib.format.read_magic(file)
                read(file)
                found[info.filename.removesuffix(".npy")] = np.memmap(path, kind, "r", file.tell(), shape)
    except Exception:  # zipfile and numpy may raise anything on damaged bytes
        return None
    return found


def _intact(file: io.BufferedReader, start: int, info: zipfile.ZipInfo) -> bool:
    """Whether a stored member has the checksum that the archive says."""
    file.seek(start)
    left, total = info.file_size, 0
    while left and (data := file.read(min(left, 1 << 22))):
        total = zlib.crc32(data, total)
        left -= len(data)
    return not left and total == info.CRC


def _check(path: Path, values: dict[str, Any]) -> str:
    """What made the file; a `UserError` where its arrays are not what they must be."""
    missing = [name for name in ARRAYS if name not in values]
    if missing:
        raise UserError(f"proposals file {path} lacks the array {missing[0]} (it has {', '.join(values) or 'none'})")
    ids, offsets, boxes, scores = (values[name] for name in ARRAYS)
    counts = np.diff(offsets) if offsets.ndim == 1 and offsets.dtype.kind in "iu" else np.array([-1])
    whole = ids.dtype.kind in "iu" and offsets.dtype.kind in "iu" and boxes.dtype.kind == scores.dtype.kind == "f"
    shapes = boxes.ndim == 2 and boxes.shape[1:] == (4,) and scores.shape == (len(boxes),) and ids.shape == counts.shape
    if not whole or not shapes or (counts < 0).any() or (len(offsets) and (offsets[0], offsets[-1]) != (0, len(boxes))):
        raise UserError(
            f"proposals file {path}: image_ids [I] and offsets [I + 1] must be whole numbers, offsets from 0 to N, "
            "boxes [N, 4] and scores [N] floats"
        )
    for first in range(0, len(boxes), PART):
        own = boxes[first : first + PART]
        if not (np.isfinite(own).all() and np.isfinite(scores[first : first + PART]).all()):
            raise UserError(f"proposals file {path}: a box or score is not a finite number")
        negative = (own[:, 2:] < own[:, :2]).any(axis=1)
        if negative.any():
            row = first + int(np.flatnonzero(negative)[0])
            raise UserError(f"proposals file {path}: box {row} has a negative width or height (boxes are xyxy)")
    return str(values.get("made_by", ""))


def _in_order(values: dict[str, NDArray[Any]]) -> bool:
    """Whether the arrays are as `write_proposals` writes them: images ascend, an image's scores descend."""
    ids, offsets, scores = values["image_ids"], values["offsets"], values["scores"]
    kinds = [values[name].dtype for name in ARRAYS]
    if (
        kinds != [np.int64, np.int64, np.float32, np.float32]
        or (np.diff(ids) <= 0).any()
        or (np.diff(offsets) == 0).any()
    ):
        return False
    for first, last in _parts(offsets):
        rises = np.flatnonzero(np.diff(scores[offsets[first] : offsets[last]]) > 0) + 1 + offsets[first]
        if not np.isin(rises, offsets[first : last + 1]).all():
            return False
    return True


def _parts(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(first, last) of the images whose boxes are looked at together: about `PART` boxes, at least one image."""
    first, images = 0, len(offsets) - 1
    while first < images:
        last = max(int(np.searchsorted(offsets, offsets[first] + PART, side="right")) - 1, first + 1)
        yield first, last
        first = last


def _reopened(path: Path, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> StoredProposals:
    columns = _columns(path)
    return StoredProposals(
        path, starts, counts, columns.columns["boxes"], columns.columns["scores"], columns.metadata.get("made_by", "")
    )
