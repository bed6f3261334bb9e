"""One pass over a COCO or LVIS file: its values as columns in file order, and every problem found.

What `index.py` makes an `AnnotationIndex` of, and what `data check` reports.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tailfin.data import annotation_json, problems
from tailfin.data import cache as _cache
from tailfin.data.box_forms import to_xywh
from tailfin.errors import UserError
from tailfin.files import json_bytes


class Category(msgspec.Struct, frozen=True):
    """One class as the file has it; counts and group are None where the file is silent."""

    id: int
    name: str
    frequency: str | None = None
    image_count: int | None = None
    instance_count: int | None = None
    supercategory: str | None = None


@dataclass(frozen=True)
class RawColumns:
    """The file's own ids and values in file order, before any check of the whole table."""

    image_ids: np.ndarray  # int64 [I]
    widths: np.ndarray  # float64 [I]
    heights: np.ndarray  # float64 [I]
    file_names: list[str]
    exhaustive: np.ndarray  # bool [I]
    negatives: np.ndarray  # int64, category ids
    negative_offsets: np.ndarray  # int64 [I + 1]
    not_exhaustive: np.ndarray  # int64, category ids
    not_exhaustive_offsets: np.ndarray  # int64 [I + 1]
    category_ids: np.ndarray  # int64 [C]
    category_names: list[str]
    categories_json: str
    annotation_ids: np.ndarray  # int64 [A]
    image_of: np.ndarray  # int64 [A], image ids
    category_of: np.ndarray  # int64 [A], category ids
    boxes: np.ndarray  # float64 [A, 4]
    areas: np.ndarray  # float64 [A], NaN where the file has none
    crowd: np.ndarray  # bool [A]
    crowd_given: np.ndarray  # bool [A], the annotation has iscrowd
    ignored: int  # annotations whose field `ignore` is set
    doubles: dict[int, int]  # categories left out, to the one of the same name that stays
    form_stated: bool  # the file says that its boxes are [x, y, width, height]
    unnamed: bool = False  # some file names are made up


def parse(
    path: Path, box_form: str | None = None, needs_names: bool = True
) -> tuple[RawColumns | None, str, list[problems.Finding]]:
    """One pass over the file: columns (None where types are wrong), hash of its bytes, and all problems found.

    `box_form` reads the boxes as one of `box_forms.FORMS`; without `needs_names` the names of images are made up where
    there are none.
    """
    data = path.read_bytes()
    fingerprint = _cache.digest(data)
    data = json_bytes(data, f"annotation file {path}")
    if not data.strip():
        raise UserError(f"annotation file {path} is empty")
    try:
        raw = _raw(annotation_json.decode(data, _File, f"annotation file {path}"), needs_names)
    except (msgspec.MsgspecError, OverflowError, RecursionError) as error:
        return None, fingerprint, _explain(path, data, error)
    if box_form is not None:
        raw = _in_form(raw, box_form)
    if not len(raw.image_ids) or not len(raw.category_ids):
        return None, fingerprint, problems.structure({"images": raw.file_names, "categories": [], "annotations": []})
    return raw, fingerprint, problems.columns(raw)


class _Image(msgspec.Struct, gc=False):
    id: int
    width: int | float
    height: int | float
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: bool | int | float | None = None
    ignore: Any = None


class _File(msgspec.Struct, gc=False):
    images: list[_Image]
    categories: list[Category]
    annotations: list[_Annotation]
    box_form: Any = None


def _raw(file: _File, needs_names: bool) -> RawColumns:
    images, annotations = file.images, file.annotations
    categories = sorted(file.categories, key=attrgetter("id"))
    unnamed = [] if needs_names else [image for image in images if image.file_name is None and image.coco_url is None]
    for image in unnamed:
        image.file_name = f"unnamed-{image.id}"
    category_of = _column(annotations, "category_id", np.int64)
    doubles = doubled_categories(
        [(category.id, category.name, category.supercategory) for category in categories],
        set(np.unique(category_of).tolist()),
    )
    categories = [category for category in categories if category.id not in doubles]
    names = [image.file_name if image.file_name is not None else _from_url(image) for image in images]
    negatives = [image.neg_category_ids for image in images]
    crowd = list(map(attrgetter("iscrowd"), annotations))
    return RawColumns(
        image_ids=_column(images, "id", np.int64),
        widths=_column(images, "width", np.float64),
        heights=_column(images, "height", np.float64),
        file_names=names,
        exhaustive=np.array([values is None for values in negatives], bool),
        negatives=_renumbered(_flat(negatives), doubles),
        negative_offsets=_lengths(negatives),
        not_exhaustive=_renumbered(_flat([image.not_exhaustive_category_ids for image in images]), doubles),
        not_exhaustive_offsets=_lengths([image.not_exhaustive_category_ids for image in images]),
        category_ids=_column(categories, "id", np.int64),
        category_names=[category.name for category in categories],
        categories_json=msgspec.json.encode(categories).decode(),
        annotation_ids=_column(annotations, "id", np.int64),
        image_of=_column(annotations, "image_id", np.int64),
        category_of=category_of,
        boxes=np.fromiter(
            chain.from_iterable(map(attrgetter("bbox"), annotations)), np.float64, 4 * len(annotations)
        ).reshape(-1, 4),
        areas=np.array(list(map(attrgetter("area"), annotations)), np.float64),  # None becomes NaN
        crowd=np.fromiter(map(bool, crowd), bool, len(crowd)),
        crowd_given=np.fromiter((value is not None for value in crowd), bool, len(crowd)),
        ignored=sum(map(bool, map(attrgetter("ignore"), annotations))),
        doubles=doubles,
        form_stated=file.box_form == "xywh",
        unnamed=bool(unnamed),
    )


def doubled_categories(categories: Sequence[tuple[int, str, str | None]], annotated: set[int]) -> dict[int, int]:
    """Categories (id, name, supercategory) that bear the name of another and have no annotation, to that other's id.

    Some exports put a root above the classes: in a project of one class it may bear the name of that class. Several
    annotated categories of one name stay: they are a mistake, or classes to be joined (`data merge`).
    """
    by_name: dict[str, list[tuple[int, str | None]]] = {}
    for number, name, above in categories:
        by_name.setdefault(name, []).append((number, above))
    left_out = {}
    for name, group in by_name.items():
        numbers = [number for number, _ in group]
        used = [number for number in numbers if number in annotated]
        if len(group) == 1 or len(used) > 1 or len(set(numbers)) < len(numbers):
            continue
        below_root = next((number for number, above in group if above == name), numbers[0])
        stays = used[0] if used else below_root
        left_out.update({number: stays for number in numbers if number != stays})
    return left_out


def _renumbered(ids: np.ndarray, new: dict[int, int]) -> np.ndarray:
    for old, number in new.items():
        ids = np.where(ids == old, number, ids)
    return ids


def _in_form(raw: RawColumns, form: str) -> RawColumns:
    """The columns with boxes of another form as [x, y, width, height]."""
    known = np.isin(raw.image_of, raw.image_ids)
    sizes = np.ones((len(raw.boxes), 2))
    sizes[known] = np.stack([raw.widths, raw.heights], 1)[places_of(raw.image_ids, raw.image_of[known])]
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = to_xywh(raw.boxes, form, sizes)
    return replace(raw, boxes=boxes, areas=np.full(len(boxes), np.nan), form_stated=True)


def _from_url(image: _Image) -> str:
    if image.coco_url is None:
        raise msgspec.ValidationError("no file_name")  # the slow check names the image
    return "/".join(image.coco_url.split("/")[-2:])


def _column(entries: Sequence[Any], name: str, dtype: type) -> np.ndarray:
    return np.fromiter(map(attrgetter(name), entries), dtype, len(entries))


def _flat(lists: list[list[int] | None]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(values or () for values in lists), np.int64)


def _lengths(lists: list[list[int] | None]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(values or ()) for values in lists], dtype=np.int64)])


def _explain(path: Path, data: bytes, error: Exception) -> list[problems.Finding]:
    """The problems behind a failed typed parse; JSON that is none is raised at once."""
    try:
        document = json.loads(data)  # knows NaN and Infinity, so the annotation that has them can be named
        annotation_json.whole_ids(document)
    except (ValueError, RecursionError) as worse:
        raise UserError(problems.syntax(path, data, worse)) from None
    findings = problems.structure(document)
    if not findings:
        raise UserError(problems.syntax(path, data, error)) from None
    return findings


def places_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Position in `ids` (unique, any order) of each wanted id; every one is there."""
    sorter = np.argsort(ids)
    return sorter[np.searchsorted(ids, wanted, sorter=sorter)]
