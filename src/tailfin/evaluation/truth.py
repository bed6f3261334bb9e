"""The ground truth as numpy columns, with images and categories numbered by ascending id.

Reads COCO and LVIS annotation files and parsed dicts. `area` and `iscrowd` may be missing (mask area, else box area;
not a crowd), and so may LVIS's lists: an image without `neg_category_ids` counts as exhaustively annotated.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
from hotcoco import mask as mask_utils

from tailfin.data.masks import LEAST, short_polygons
from tailfin.errors import UserError, nearest
from tailfin.parsing import Box, boxes_array, column, load_typed, nearest_id, rows_of, with_text_counts

KEYS = ("images", "annotations", "categories")


class Category(msgspec.Struct):
    """A category of the file; counts and frequency are those of the training set, where the file states them."""

    id: int
    name: str = ""
    frequency: Any = None
    image_count: int | None = None
    instance_count: int | None = None


@dataclass(frozen=True)
class GroundTruth:
    """`rows` point into `image_ids` [I] and `categories` [C], both ascending by id; G annotations in file order."""

    label: str  # how messages name the file
    image_ids: np.ndarray  # int64 [I]
    image_sizes: np.ndarray  # int64 [I, 2] height, width; 0 where the file has none
    image_names: list[str | None]  # I file names, None where the file has none
    image_places: np.ndarray  # int64 [I] place of each image in the file
    categories: list[Category]
    category_ids: np.ndarray  # int64 [C]
    annotation_ids: np.ndarray  # int64 [G]
    image_rows: np.ndarray  # int64 [G]
    category_rows: np.ndarray  # int64 [G]
    boxes: np.ndarray  # float64 [G, 4] xywh in pixels
    area: np.ndarray  # float64 [G]
    crowd: np.ndarray  # bool [G]
    ignore: np.ndarray  # bool [G]
    raw_masks: list[msgspec.Raw]  # JSON text of `segmentation`, empty where there is none
    exhaustive: np.ndarray  # bool [I]: no neg_category_ids, so every class that is not annotated is a negative
    negative_pairs: np.ndarray  # int64: image row * C + category row
    partial_pairs: np.ndarray  # int64, likewise, of not_exhaustive_category_ids
    form_stated: bool  # the file says that its boxes are [x, y, width, height]

    def masks(self) -> list[Any]:
        """Polygons or RLE of every annotation, for the engine; one without a mask or image size is a `UserError`."""
        missing = next((row for row, raw in enumerate(self.raw_masks) if not has_mask(raw)), None)
        if missing is not None:
            number = self.annotation_ids[missing]
            raise UserError(f"{self.label}: annotation {number} has no segmentation, which iou type segm needs")
        unsized = np.flatnonzero((self.image_sizes[self.image_rows] <= 0).any(1))
        if unsized.size:
            image = self.image_ids[self.image_rows[unsized[0]]]
            raise UserError(f"{self.label}: image {image} has no width and height, which masks need")
        found = []
        for row, raw in enumerate(self.raw_masks):
            mask = msgspec.json.decode(raw)
            if isinstance(mask, list) and _short_parts(mask):
                height, width = self.image_sizes[self.image_rows[row]].tolist()
                try:
                    mask = encode_mask(mask, height, width)
                except ValueError as error:
                    number = self.annotation_ids[row]
                    raise UserError(f"{self.label}: annotation {number}: segmentation is {error}") from None
            found.append(mask)
        return found


def load_truth(source: str | os.PathLike[str] | Mapping[str, Any]) -> GroundTruth:
    """Read a COCO or LVIS annotation file (or the parsed dict); problems raise `UserError` with file and id."""
    file, label = load_typed(_readable(source), _File, "annotations")
    places = sorted(range(len(file.images)), key=lambda place: file.images[place].id)
    images = [file.images[place] for place in places]
    categories = sorted(file.categories, key=attrgetter("id"))
    image_ids = column(images, attrgetter("id"), np.int64, label)
    category_ids = column(categories, attrgetter("id"), np.int64, label)
    for what, ids in (("image", image_ids), ("category", category_ids)):
        twice = np.flatnonzero(np.diff(ids) == 0)
        if twice.size:
            raise UserError(f"{label}: {what} id {ids[twice[0]]} is given twice")

    found = file.annotations

    def place(row: int) -> str:
        return f"annotation {found[row].id}"

    rows = {}
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        ids = column(found, attrgetter(key), np.int64, label)
        rows[key], unknown = rows_of(ids, known)
        if unknown is not None:
            number = int(ids[unknown])
            raise UserError(f"{label}: {place(unknown)}: there is no {key} {number}{nearest_id(number, known)}")

    boxes = boxes_array([annotation.bbox for annotation in found], label, place)
    raw_masks = [annotation.segmentation for annotation in found]
    sizes = np.array([(_side(image.height), _side(image.width)) for image in images], np.int64).reshape(-1, 2)
    negative, partial = (
        _pairs([getattr(image, key) or [] for image in images], category_ids)
        for key in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    return GroundTruth(
        label=label,
        image_ids=image_ids,
        image_sizes=sizes,
        image_names=[_name(image) for image in images],
        image_places=np.array(places, np.int64),
        categories=categories,
        category_ids=category_ids,
        annotation_ids=column(found, attrgetter("id"), np.int64, label),
        image_rows=rows["image_id"],
        category_rows=rows["category_id"],
        boxes=boxes,
        area=_areas(found, boxes, sizes[rows["image_id"]], label),
        crowd=np.array([bool(annotation.iscrowd) for annotation in found], bool),
        ignore=np.array([bool(annotation.ignore) for annotation in found], bool),
        raw_masks=raw_masks,
        exhaustive=np.array([image.neg_category_ids is None for image in images], bool),
        negative_pairs=negative,
        partial_pairs=partial,
        form_stated=file.box_form == "xywh",
    )


def has_mask(raw: msgspec.Raw) -> bool:
    """Whether the JSON text of a `segmentation` field says anything."""
    return bytes(raw) not in (b"", b"null", b"[]", b"{}")


def encode_mask(mask: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, or RLE with list, text or bytes counts, as compressed RLE; what is neither raises `ValueError`."""
    if not isinstance(mask, (dict, list)):
        raise ValueError("neither polygons nor RLE")
    try:
        if isinstance(mask, list):
            if problem := short_polygons(mask):
                raise ValueError(problem)
            parts = [part for part in mask if len(part) >= LEAST]  # as training reads them
            if not parts:
                return mask_utils.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
            return mask_utils.merge(mask_utils.frPyObjects(parts, height, width))
        rows, columns = mask["size"]
        return mask if isinstance(mask["counts"], (str, bytes)) else mask_utils.frPyObjects(mask, rows, columns)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"neither polygons nor RLE: {error}") from None


def _short_parts(polygons: list[Any]) -> bool:
    return any(isinstance(part, list) and len(part) < LEAST for part in polygons)


def _side(value: Any) -> int:
    """A picture's side; 0 for what is none, since boxes need no sizes."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**31
    return int(value) if good else 0


def _name(image: _Image) -> str | None:
    """The file name of an image, as the data set reads it."""
    if isinstance(image.file_name, str):
        return image.file_name
    return "/".join(image.coco_url.split("/")[-2:]) if isinstance(image.coco_url, str) else None


class _Image(msgspec.Struct):
    id: int
    height: Any = None
    width: Any = None
    file_name: Any = None
    coco_url: Any = None
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: Box
    id: int = -1
    area: float | None = None
    iscrowd: float | bool | None = None
    ignore: float | bool | None = None
    segmentation: msgspec.Raw = msgspec.Raw(b"")


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[Category]
    box_form: Any = None


def _readable(source: Any) -> Any:
    """A path as it is; of a parsed dict the three lists that are read, so that other fields may hold anything."""
    if isinstance(source, (str, os.PathLike)):
        return source
    if not isinstance(source, Mapping):
        raise UserError(f"annotations: a path or a COCO dict is needed, not a {type(source).__name__}")
    for key in KEYS:
        if key not in source:
            raise UserError(f'annotations: there is no "{key}"{nearest(key, source)}')
    values = {key: source[key] for key in (*KEYS, "box_form") if key in source}
    if isinstance(values["annotations"], Sequence):
        values["annotations"] = with_text_counts(values["annotations"])
    return values


def _pairs(lists: list[list[int]], category_ids: np.ndarray) -> np.ndarray:
    """Per-image lists of category ids as pair codes; ids that the file does not list concern no class."""
    image_rows = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
    ids = np.array([number for ids in lists for number in ids], np.int64)
    if not category_ids.size:
        return np.empty(0, np.int64)
    rows = np.searchsorted(category_ids, ids).clip(max=len(category_ids) - 1)
    known = category_ids[rows] == ids
    return np.unique(image_rows[known] * len(category_ids) + rows[known])


def _areas(annotations: list[_Annotation], boxes: np.ndarray, sizes: np.ndarray, label: str) -> np.ndarray:
    """The `area` fields; where one is missing the area of the mask, and without one that can be read that of the box,
    with a warning."""
    area = np.array([np.nan if a.area is None else a.area for a in annotations], np.float64)
    bad: list[tuple[int, str]] = []
    for row in np.flatnonzero(np.isnan(area)):
        raw, (height, width) = annotations[row].segmentation, sizes[row]
        area[row] = boxes[row, 2] * boxes[row, 3]
        if has_mask(raw) and height > 0 and width > 0:
            try:
                area[row] = mask_utils.area(encode_mask(msgspec.json.decode(raw), int(height), int(width)))
            except ValueError as error:
                bad.append((annotations[row].id, str(error)))
    if bad:
        warnings.warn(
            f"{label}: {len(bad)} annotations have no area and a segmentation that cannot be read: their box counts "
            f"(annotation {bad[0][0]}: {bad[0][1]})",
            UserWarning,
            stacklevel=3,
        )
    return area
