"""The bytes of an annotation or results file as typed values: encodings, and ids written as 1.0.

Programs that keep ids in a table of floats (pandas, `.item()` of a tensor) write `"image_id": 1.0`. That is the whole
number 1: where the typed parse refuses such a value, the file is parsed anew with these ids as integers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tailfin.errors import UserError
from tailfin.files import json_bytes, not_utf8

T = TypeVar("T")
_IDS = {
    "images": ("id",),
    "categories": ("id", "image_count", "instance_count"),
    "annotations": ("id", "image_id", "category_id"),
}
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")  # of an image of a federated set
_RESULTS = ("image_id", "category_id")


def read_bytes(path: Path, what: str = "annotation file") -> bytes:
    """The file as UTF-8 JSON text without a byte order mark."""
    return json_bytes(path.read_bytes(), f"{what} {path}")


def decode(data: bytes, kind: type[T], label: str) -> T:
    """`data` (UTF-8 JSON) as `kind`, with ids such as 1.0 read as whole numbers.

    Raises what msgspec raises for anything else, and a `UserError` for bytes that are no UTF-8.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except UnicodeDecodeError:
        raise UserError(not_utf8(data, label)) from None
    except msgspec.ValidationError as error:
        try:
            document = json.loads(data)
            mended = whole_ids(document)
        except (ValueError, RecursionError):  # broken further on
            raise error from None
        if not mended:
            raise
        return msgspec.json.decode(_encoded(document), type=kind)


def _encoded(document: Any) -> bytes:
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
        return json.dumps(document).encode()


def with_whole_ids(data: bytes) -> bytes:
    """The same bytes, or, where an id is written as 1.0, the document encoded anew."""
    try:
        msgspec.json.decode(data, type=_Ids)
    except msgspec.ValidationError:
        document = json.loads(data)
        if whole_ids(document):
            return _encoded(document)
    return data


class _Image(msgspec.Struct, gc=False):
    id: int
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class _Category(msgspec.Struct, gc=False):
    id: int


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int


class _Ids(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


def decode_plain(data: bytes, label: str) -> Any:
    """`data` as plain Python values, with ids such as 1.0 read as whole numbers."""
    try:
        document = msgspec.json.decode(data)
    except UnicodeDecodeError:
        raise UserError(not_utf8(data, label)) from None
    whole_ids(document)
    return document


def whole_ids(document: Any) -> bool:
    """Turn ids that are whole numbers written as floats into integers, in place; whether there were any."""
    if isinstance(document, list):
        return _whole_entries(document, _RESULTS)
    if not isinstance(document, dict):
        return False
    changed = False
    for key, ids in _IDS.items():
        entries = document.get(key)
        if isinstance(entries, list):
            changed |= _whole_entries(entries, ids)
            if key == "images":
                for entry in entries:
                    for name in LISTS if isinstance(entry, dict) else ():
                        values = entry.get(name)
                        if isinstance(values, list) and any(map(_is_whole_float, values)):
                            entry[name] = [int(value) if _is_whole_float(value) else value for value in values]
                            changed = True
    return changed


def _whole_entries(entries: list[Any], keys: tuple[str, ...]) -> bool:
    changed = False
    for entry in entries:
        for key in keys if isinstance(entry, dict) else ():
            if _is_whole_float(entry.get(key)):
                entry[key] = int(entry[key])
                changed = True
    return changed


def _is_whole_float(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) < 2**53
