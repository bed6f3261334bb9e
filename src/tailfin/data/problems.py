"""What can be wrong with an annotation file: every check and its message, shared by `open_index` and `data check`.

`structure` looks at the parsed JSON (types and required fields, slow, only run when the typed parse fails);
`columns` looks at the numpy columns (ids, links, boxes, sizes, names; vectorised). Both return `Finding`s whose
messages are made on demand, so that a file with a million problems costs nothing until they are printed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tailfin.data.box_forms import FORMS, guess
from tailfin.errors import nearest
from tailfin.files import not_utf8

if TYPE_CHECKING:
    from tailfin.data.columns import RawColumns

INT64 = 2**63


@dataclass(frozen=True)
class Finding:
    """One kind of problem: the rows that have it and how to say it of a row."""

    rows: Sequence[int] | np.ndarray
    describe: Callable[[int], str]
    kind: str = ""  # for callers that can mend it: "names" (several categories of one name)

    def __len__(self) -> int:
        return len(self.rows)

    def messages(self) -> Iterator[str]:
        return (self.describe(int(row)) for row in self.rows)


def structure(document: Any) -> list[Finding]:
    """Problems of types and required fields in plain parsed JSON; empty when the typed parse must have succeeded."""
    if isinstance(document, list):
        keys = document[0].keys() if document and isinstance(document[0], dict) else ()
        looks = "; this looks like a results file" if {"score", "image_id"} & set(keys) else ""
        return [_one(f'holds a list, an object with "images", "annotations" and "categories" is needed{looks}')]
    if not isinstance(document, dict):
        return [_one(f'holds {_kind(document)}, an object with "images", "annotations" and "categories" is needed')]
    for key in ("images", "categories", "annotations"):
        if key not in document:
            near = nearest(key, map(str, document))
            return [_one(f'has no "{key}"{near if "did you mean" in near else ""}')]
        if not isinstance(document[key], list):
            return [_one(f'"{key}" is {_kind(document[key])}, a list is needed')]
    if not document["images"]:
        return [_one('"images" is empty')]
    if not document["categories"]:
        return [_one('"categories" is empty')]
    messages: list[str] = []
    for what, key, check in (
        ("image", "images", _image),
        ("category", "categories", _category),
        ("annotation", "annotations", _annotation),
    ):
        for position, entry in enumerate(document[key]):
            if not isinstance(entry, dict):
                messages.append(f"{what} number {position + 1} is {_kind(entry)}, an object is needed")
                continue
            problem = _id(entry, "id")
            if problem:
                messages.append(f"{what} number {position + 1}: {problem}")
                continue
            problem = check(entry)
            if problem:
                messages.append(f"{what} {entry['id']}: {problem}")
    return [Finding(range(len(messages)), messages.__getitem__)] if messages else []


def columns(raw: RawColumns) -> list[Finding]:
    """Problems that need the whole table: duplicate ids and names, dangling ids, impossible boxes, sizes and paths."""
    image_ids, category_ids = np.unique(raw.image_ids), np.unique(raw.category_ids)
    x, y, width, height = raw.boxes.T
    sizes_bad = ~((raw.widths >= 1) & (raw.heights >= 1) & _whole(raw.widths) & _whole(raw.heights))
    with np.errstate(over="ignore", invalid="ignore"):  # two finite numbers may still add up to infinity
        boxes_bad = ~(np.isfinite(raw.boxes).all(1) & np.isfinite(x + width) & np.isfinite(y + height))
    boxes_bad |= (width < 0) | (height < 0)
    names, files = raw.category_names, raw.file_names
    findings = [
        Finding(_repeats(raw.image_ids), lambda i: f"image id {raw.image_ids[i]} is given twice"),
        Finding(
            np.flatnonzero(sizes_bad),
            lambda i: (
                f"image {raw.image_ids[i]}: its size is {raw.widths[i]:g} x {raw.heights[i]:g},"
                " width and height must be whole numbers of at least 1"
            ),
        ),
        Finding(
            [i for i, name in enumerate(files) if unsafe_path(name)],
            lambda i: f"image {raw.image_ids[i]}: file_name {unsafe_path(files[i])}",
        ),
        Finding(_repeats(raw.category_ids), lambda i: f"category id {raw.category_ids[i]} is given twice"),
        Finding(
            _repeated_names(names),
            lambda i: (
                f'category {raw.category_ids[i]}: the name "{names[i]}" is already that of category'
                f" {raw.category_ids[names.index(names[i])]} and both are annotated"
                " (`tailfin data merge FILE --out NEW` joins them)"
            ),
            "names",
        ),
        Finding(_repeats(raw.annotation_ids), lambda i: f"annotation id {raw.annotation_ids[i]} is given twice"),
        Finding(
            np.flatnonzero(~np.isin(raw.image_of, image_ids)),
            lambda i: _dangling(f"annotation {raw.annotation_ids[i]}", "image", int(raw.image_of[i]), image_ids),
        ),
        Finding(
            np.flatnonzero(~np.isin(raw.category_of, category_ids)),
            lambda i: _dangling(
                f"annotation {raw.annotation_ids[i]}", "category", int(raw.category_of[i]), category_ids
            ),
        ),
        Finding(
            np.flatnonzero(boxes_bad),
            lambda i: f"annotation {raw.annotation_ids[i]}: {box_problem(raw.boxes[i].tolist())}",
        ),
    ]
    for key, values, offsets in (
        ("neg_category_ids", raw.negatives, raw.negative_offsets),
        ("not_exhaustive_category_ids", raw.not_exhaustive, raw.not_exhaustive_offsets),
    ):
        findings.append(_list_finding(key, values, offsets, raw.image_ids, category_ids))
    findings = [finding for finding in findings if len(finding)]
    if not findings and not raw.form_stated and (form := _box_form(raw)):
        findings.append(_one(form))
    return findings


def _box_form(raw: RawColumns) -> str | None:
    """Why the boxes are surely of another form, None where they are not."""
    order = np.argsort(raw.image_ids)
    images = order[np.searchsorted(raw.image_ids, raw.image_of, sorter=order)]
    found = guess(raw.boxes, np.stack([raw.widths, raw.heights], 1)[images])
    if found is None or not found.sure:
        return None
    return (
        f"{found.reason}: they look like {FORMS[found.form]}, and [x, y, width, height] in pixels is needed (`tailfin"
        f" data merge FILE --box-form {found.form} --out NEW` rewrites them, --box-form xywh says that they are right)"
    )


def box_problem(box: Any) -> str | None:
    """Why `box` is no [x, y, width, height]; None when it is one."""
    good = isinstance(box, list) and len(box) == 4 and all(_is_finite(value) for value in box)
    if not good or not math.isfinite(float(box[0]) + box[2]) or not math.isfinite(float(box[1]) + box[3]):
        return f"bbox is {_short(box)}, four finite numbers [x, y, width, height] are needed"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {_short(box)} has a negative size ([x, y, width, height] is needed)"
    return None


def unsafe_path(name: str) -> str | None:
    """Why a file name may not be opened below the image folder; None when it may."""
    if not name:
        return "is empty"
    if "\0" in name:
        return f"{name!r} has a zero byte"
    plain = name.replace("\\", "/")
    if plain.startswith("/") or (len(plain) > 1 and plain[1] == ":" and plain[0].isalpha()):
        return f'"{name}" is absolute; it must be relative to the image folder'
    if ".." in plain and ".." in plain.split("/"):
        return f'"{name}" leaves the image folder'
    return None


def syntax(path: object, data: bytes, error: Exception) -> str:
    """One message for bytes that are no JSON, with the place where the parser stopped (json's error or msgspec's)."""
    if isinstance(error, RecursionError):
        return f"{path} is not valid JSON: it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(data, str(path))
    if isinstance(error, json.JSONDecodeError):
        text, position = error.doc, error.pos
        if error.msg.startswith("Unterminated") or position >= len(text.rstrip()):
            return f"{path} is not valid JSON: it ends too early, after {len(data)} bytes (is the file complete?)"
    else:
        place = str(error).rpartition("(byte ")[2].rstrip(")")
        if not place.isdigit():
            return f"{path} is not valid JSON: {error}"
        before = data[: int(place)].decode(errors="replace")
        text, position = before + data[int(place) :].decode(errors="replace"), len(before)
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    found = text[position : position + 20].split("\n")[0]
    return f"{path} is not valid JSON: unexpected {found!r} at line {line}, column {column}"


# ---- one entry -------------------------------------------------------------------------------------------------------


def _image(entry: dict[str, Any]) -> str | None:
    for key in ("width", "height"):
        if not _is_finite(entry.get(key)):
            return f"{key} {_found(entry, key)}, a whole number is needed"
    name, url = entry.get("file_name"), entry.get("coco_url")
    if name is None and url is None:
        return 'has neither "file_name" nor "coco_url"'
    for key in ("file_name", "coco_url"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            return f"{key} {_found(entry, key)}, text is needed"
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        values = entry.get(key)
        if values is not None and (not isinstance(values, list) or not all(_is_id(value) for value in values)):
            return f"{key} {_found(entry, key)}, a list of whole numbers is needed"
    return None


def _category(entry: dict[str, Any]) -> str | None:
    for key, needed in (("name", True), ("frequency", False), ("supercategory", False)):
        if not isinstance(entry.get(key), str) and (needed or entry.get(key) is not None):
            return f"{key} {_found(entry, key)}, text is needed"
    for key in ("image_count", "instance_count"):
        if entry.get(key) is not None and not _is_id(entry[key]):
            return f"{key} {_found(entry, key)}, a whole number is needed"
    return None


def _annotation(entry: dict[str, Any]) -> str | None:
    problem = _id(entry, "image_id") or _id(entry, "category_id")
    if problem:
        return problem
    if "bbox" not in entry:
        return 'has no "bbox"'
    problem = box_problem(entry["bbox"])
    if problem:
        return problem
    area = entry.get("area")
    if area is not None and not _is_finite(area):
        return f"area {_found(entry, 'area')}, a finite number is needed"
    crowd = entry.get("iscrowd")
    if crowd is not None and not isinstance(crowd, bool) and not _is_finite(crowd):
        return f"iscrowd {_found(entry, 'iscrowd')}, 0 or 1 is needed"
    return None


def _id(entry: dict[str, Any], key: str) -> str | None:
    if key not in entry:
        return f'has no "{key}"'
    if isinstance(entry[key], int) and not isinstance(entry[key], bool) and not _is_id(entry[key]):
        return f"{key} {_found(entry, key)}, which does not fit 64 bits"
    return None if _is_id(entry[key]) else f"{key} {_found(entry, key)}, a whole number is needed"


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -INT64 <= value < INT64


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return _is_number(value) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float64
        return False


def _found(entry: dict[str, Any], key: str) -> str:
    return f"is {_short(entry[key])}" if key in entry else "is missing"


def _short(value: Any) -> str:
    if isinstance(value, str):
        text = f'the text "{value}"'
    elif isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return _short(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), "a number")


def _one(message: str) -> Finding:
    return Finding(range(1), lambda _: message)


# ---- columns ---------------------------------------------------------------------------------------------------------


def _whole(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values) & (values == np.rint(values)) & (values < 2**31)


def _repeats(ids: np.ndarray) -> np.ndarray:
    """Rows whose id an earlier row has."""
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order][1:] == ids[order][:-1]) + 1
    return np.sort(order[again])


def _repeated_names(names: Sequence[str]) -> list[int]:
    seen: set[str] = set()
    repeated = []
    for row, name in enumerate(names):
        if name in seen:
            repeated.append(row)
        seen.add(name)
    return repeated


def _dangling(owner: str, what: str, unknown: int, known: np.ndarray) -> str:
    near = known[np.argmin(np.abs(known.astype(object) - unknown))]  # Python integers: no overflow at the ends
    return f"{owner}: {what}_id {unknown} does not exist (nearest {what} id: {near})"


def _list_finding(
    key: str, values: np.ndarray, offsets: np.ndarray, image_ids: np.ndarray, category_ids: np.ndarray
) -> Finding:
    def describe(row: int) -> str:
        image = image_ids[np.searchsorted(offsets, row, side="right") - 1]
        near = category_ids[np.argmin(np.abs(category_ids.astype(object) - int(values[row])))]
        return f"image {image}: {key} names category {values[row]}, which does not exist (nearest category id: {near})"

    return Finding(np.flatnonzero(~np.isin(values, category_ids)), describe)
