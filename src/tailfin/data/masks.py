"""Segmentations of an annotation file as flat columns, and masks from them (drawn by pycocotools).

Polygons are flat float64 coordinates with offsets, exactly as in the file; RLEs, compressed or as lists of counts, are
kept as COCO's compressed bytes. Like the boxes they are parsed once and memory-mapped afterwards::

    parts = index.segmentations()
    masks = parts.image_masks(7)  # uint8 [n, H, W], the annotations of the eighth image

A segmentation that cannot be read is an error there; `index.readable_segmentations()` has the others, for training,
where such an object still counts for its box.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from tailfin.data import annotation_json
from tailfin.data import cache as _cache
from tailfin.errors import UserError
from tailfin.files import json_bytes

if TYPE_CHECKING:
    from tailfin.data.index import AnnotationIndex

NONE, POLYGONS, RLE, BROKEN = 0, 1, 2, 3
LEAST = 6  # numbers of a polygon: parts of fewer than three points enclose nothing and are passed over
TOO_SHORT = "a polygon has {} numbers, three points [x1, y1, x2, y2, x3, y3, ...] are needed at least"
BOX_AS_POLYGON = f"{TOO_SHORT.format(4)}: is it a box?"


def short_polygons(polygons: Sequence[Sequence[float]]) -> str:
    """What is wrong with a mask none of whose parts has three points; others read four numbers as a box, as nothing, or
    not at all. Empty where a part encloses something, or there is none."""
    lengths = [len(part) for part in polygons]
    if not lengths or max(lengths) >= LEAST:
        return ""
    return BOX_AS_POLYGON if 4 in lengths else TOO_SHORT.format(max(lengths))


@dataclass(frozen=True, eq=False, repr=False)
class Segmentations:
    """Columns beside an index's rows (A annotations). All arrays are read-only; pickling passes paths."""

    index: AnnotationIndex
    kinds: np.ndarray  # int8 [A]: NONE, POLYGONS, RLE or BROKEN (cannot be read)
    polygons_of: np.ndarray  # int64 [A + 1]: row r has polygons polygons_of[r] : polygons_of[r + 1]
    polygon_offsets: np.ndarray  # int64 [P + 1] into coordinates
    coordinates: np.ndarray  # float64, x y x y ... in pixels of the file
    rle_offsets: np.ndarray  # int64 [A + 1] into rle_bytes; a row without RLE has none
    rle_bytes: np.ndarray  # uint8, COCO's compressed counts
    rle_sizes: np.ndarray  # int32 [A, 2], the RLE's own (height, width)
    _bundle: _cache.Bundle

    @property
    def problem(self) -> str:
        """What is wrong with the first segmentation that cannot be read, with the annotation's id; else empty."""
        return self._bundle.metadata.get("problem", "")

    def drawable(self) -> np.ndarray:
        """bool [A]: an RLE, or a polygon of three points or more."""
        return (self.kinds == RLE) | (np.diff(self.polygons_of) > 0)

    def bounds(self) -> np.ndarray:
        """float64 [A, 4]: x1, y1, x2, y2 around the mask of every row, NaN where there is none."""
        found = np.full((len(self.kinds), 4), np.nan)
        if rles := np.flatnonzero(self.kinds == RLE).tolist():
            boxes = coco_mask.toBbox([self.rle(row) for row in rles]).reshape(-1, 4)
            found[rles] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        drawn = np.flatnonzero(np.diff(self.polygons_of))
        if len(drawn):
            starts = self.polygon_offsets[self.polygons_of[drawn]] // 2  # polygons of a row stand together
            points = self.coordinates.reshape(-1, 2)
            found[drawn, :2] = np.minimum.reduceat(points, starts, axis=0)
            found[drawn, 2:] = np.maximum.reduceat(points, starts, axis=0)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.index, self._bundle if self._bundle.file is None else self._bundle.file)

    def polygons(self, row: int) -> list[np.ndarray]:
        """Polygons of one row, each float64 [2 n]; empty for an RLE or nothing."""
        bounds = self.polygon_offsets[self.polygons_of[row] : self.polygons_of[row + 1] + 1]
        return [self.coordinates[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]

    def rle(self, row: int) -> dict[str, Any]:
        """COCO's compressed RLE of one row at the image's size; a row without segmentation gives an empty mask."""
        image = self.index.image_of[row]
        height, width = int(self.index.heights[image]), int(self.index.widths[image])
        if self.kinds[row] == RLE:
            counts = self.rle_bytes[self.rle_offsets[row] : self.rle_offsets[row + 1]].tobytes()
            return {"size": self.rle_sizes[row].tolist(), "counts": counts}
        parts = [part.tolist() for part in self.polygons(row)]
        if not parts:
            return coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
        return coco_mask.merge(coco_mask.frPyObjects(parts, height, width))

    def masks(self, rows: Sequence[int] | np.ndarray, image: int | None = None) -> np.ndarray:
        """uint8 [n, H, W] in {0, 1} for rows of ONE image; a row without segmentation has an empty mask.

        `image` (its number) gives the size where there are no rows; without it that is [0, 0, 0].
        """
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            size = (0, 0) if image is None else (self.index.heights[image], self.index.widths[image])
            return np.zeros((0, *size), np.uint8)
        owners = self.index.image_of[rows]
        if (owners != (owners[0] if image is None else image)).any():
            raise ValueError("rows of several images cannot be stacked")
        decoded = coco_mask.decode([self.rle(int(row)) for row in rows])  # [H, W, n], Fortran order
        return np.ascontiguousarray(decoded.transpose(2, 0, 1))

    def image_masks(self, image: int) -> np.ndarray:
        """uint8 [n, H, W], one mask per annotation of image number `image`, crowds included."""
        return self.masks(np.arange(self.index.offsets[image], self.index.offsets[image + 1]), image)


def open_segmentations(index: AnnotationIndex) -> Segmentations:
    """Parse or map the segmentations of an index; malformed ones are marked, and the first told in `problem`."""
    cached = index._bundle.file is not None
    stamp = _cache.stamp(index.path) if cached else ""
    bundle = _cache.load(index.path, stamp, "masks") if cached else None
    if bundle is None or bundle.metadata.get("fingerprint") != index.fingerprint:
        columns, problem = _parse(index)
        metadata = {"fingerprint": index.fingerprint, "problem": problem}
        if cached:
            bundle = _cache.store(index.path, stamp, "masks", columns, metadata)
        else:
            bundle = _cache.Bundle(columns, metadata, None)
    return _from_bundle(index, bundle)


# ---- parsing ---------------------------------------------------------------------------------------------------------


class _Annotation(msgspec.Struct, gc=False):
    id: int
    segmentation: msgspec.Raw = msgspec.Raw()


class _File(msgspec.Struct, gc=False):
    annotations: list[_Annotation]


class _Rle(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[int]


_decode = msgspec.json.Decoder(list[list[float]] | _Rle | None).decode


def _parse(index: AnnotationIndex) -> tuple[dict[str, np.ndarray], str]:
    """Columns, and the first problem. Each segmentation becomes numbers at once, so the peak is the flat columns."""
    data = Path(index.path).read_bytes()
    if _cache.digest(data) != index.fingerprint:
        raise UserError(f"annotation file {index.path} has changed since it was opened")
    label = f"annotation file {index.path}"
    annotations = annotation_json.decode(json_bytes(data, label), _File, label).annotations
    total = len(annotations)
    by_id = np.argsort(np.fromiter((entry.id for entry in annotations), np.int64, total))
    in_row_order = np.empty(total, np.int64)
    in_row_order[np.argsort(index.annotation_ids)] = by_id
    kinds, sizes = np.zeros(total, np.int8), np.zeros((total, 2), np.int32)
    coordinates, ends, blob = array("d"), array("q", [0]), bytearray()
    polygons_of, rle_offsets = np.zeros(total + 1, np.int64), np.zeros(total + 1, np.int64)
    problem = ""
    for row, position in enumerate(in_row_order.tolist()):
        try:
            value = _segmentation(annotations[position])
            if isinstance(value, _Rle):
                blob += _compressed(index, row, value)
                kinds[row], sizes[row] = RLE, value.size
            elif value:
                if any(len(polygon) % 2 for polygon in value):
                    raise _Malformed("a polygon has an odd number of coordinates")
                if short := short_polygons(value):
                    raise _Malformed(short)
                kinds[row] = POLYGONS
                for polygon in value:
                    if len(polygon) >= LEAST:
                        coordinates.extend(polygon)
                        ends.append(len(coordinates))
        except _Malformed as error:
            kinds[row] = BROKEN
            problem = problem or f"annotation {annotations[position].id}: segmentation: {error}"
        polygons_of[row + 1], rle_offsets[row + 1] = len(ends) - 1, len(blob)
    columns: dict[str, np.ndarray] = {
        "kinds": kinds,
        "polygons_of": polygons_of,
        "polygon_offsets": np.frombuffer(ends, np.int64),
        "coordinates": np.frombuffer(coordinates, np.float64),
        "rle_offsets": rle_offsets,
        "rle_bytes": np.frombuffer(bytes(blob), np.uint8),
        "rle_sizes": sizes,
    }
    return columns, problem


class _Malformed(ValueError):
    """What is wrong with one segmentation."""


def _segmentation(entry: _Annotation) -> list[list[float]] | _Rle | None:
    if not len(memoryview(entry.segmentation)):
        return None
    try:
        return _decode(entry.segmentation)
    except msgspec.ValidationError as error:
        needed = "a list of polygons [[x, y, ...], ...] or an RLE {size, counts} is needed"
        raise _Malformed(f"{needed} ({error})") from None


def _compressed(index: AnnotationIndex, row: int, rle: _Rle) -> bytes:
    image = index.image_of[row]
    expected = (int(index.heights[image]), int(index.widths[image]))
    if rle.size != expected:
        raise _Malformed(f"the RLE's size (height, width) is {rle.size}, that of its image is {expected}")
    if isinstance(rle.counts, str):
        try:
            counts = rle.counts.encode("ascii")
        except UnicodeEncodeError:
            raise _Malformed("the RLE's counts are no COCO RLE text") from None
        lengths = _run_lengths(counts)
    else:
        counts, lengths = b"", rle.counts
    if lengths is None or min(lengths, default=0) < 0 or sum(lengths) != expected[0] * expected[1]:
        raise _Malformed(f"the RLE's counts do not add up to {expected[0]} x {expected[1]} pixels")
    if isinstance(rle.counts, str):
        return counts
    return coco_mask.frPyObjects({"size": list(rle.size), "counts": rle.counts}, *expected)["counts"]


def _run_lengths(counts: bytes) -> list[int] | None:
    """Run lengths of COCO's compressed text: 5 bits per character, a sign bit, differences to the run two before.

    pycocotools does not check what it decodes, and a text that says more pixels than the image has would be written
    beyond the array; so the runs are added up here first. None: not such a text.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        value = shift = 0
    return None if shift else lengths


_FIELDS = ("kinds", "polygons_of", "polygon_offsets", "coordinates", "rle_offsets", "rle_bytes", "rle_sizes")


def _from_bundle(index: AnnotationIndex, bundle: _cache.Bundle) -> Segmentations:
    return Segmentations(index=index, _bundle=bundle, **{name: bundle.columns[name] for name in _FIELDS})


def _restore(index: AnnotationIndex, source: _cache.Bundle | Path) -> Segmentations:
    """What unpickling calls: map the stored columns, or parse again where they are gone."""
    bundle = _cache.read(source) if isinstance(source, Path) else source
    return _from_bundle(index, bundle) if bundle is not None else open_segmentations(index)
