"""Typed decoding of annotation and results JSON, from a file or from Python values, with errors that name the place.

Both inputs go through the same decoder: Python values are encoded first, so that numpy scalars, arrays and tensors
pass, and a missing key, a NaN or a wrong type is found and worded in one place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import msgspec
import numpy as np

from tailfin.data import annotation_json
from tailfin.errors import UserError
from tailfin.files import existing_file, json_bytes, not_utf8

T = TypeVar("T")


class Box(msgspec.Struct, array_like=True, gc=False, eq=False):
    """`[x, y, w, h]`; a longer list leaves something in `rest`, which the readers refuse."""

    x: float
    y: float
    w: float
    h: float
    rest: Any = None


def load_typed(
    source: Any, kind: type[T], what: str, *, by_keys: Callable[[bytes, str], type[T]] | None = None
) -> tuple[T, str]:
    """Decode a JSON file (path) or plain Python values as `kind`; also how to name the source in messages.

    `by_keys` says the kind of a JSON text (and its label), where it depends on the keys there.
    Raises `UserError` for a missing file, broken JSON, a missing key or a value of the wrong type; NaN and infinity,
    which Python's `json` writes although JSON has no word for them, are found at their place.
    """
    if isinstance(source, (str, os.PathLike)):
        path = existing_file(source, what)
        label = f"{what} {path}"
        data = json_bytes(path.read_bytes(), label)
        if not data.strip():
            raise UserError(f"{label} is empty")
    else:
        label, data = what, _encode(source)
    kind = by_keys(data, label) if by_keys is not None else kind
    try:
        return _decode(data, kind, label), label
    except RecursionError:
        raise UserError(f"{label} is not valid JSON: it is nested too deeply") from None
    except msgspec.DecodeError as error:
        try:
            value = json.loads(data)
        except UnicodeDecodeError:
            raise UserError(not_utf8(data, label)) from None
        except (ValueError, RecursionError):
            raise UserError(f"{label} is not valid JSON: {error}") from None
        return _decode(_encode(value), kind, label), label


def column(rows: Sequence[Any], get: Callable[[Any], Any], dtype: type, label: str) -> np.ndarray:
    """One field of all rows as an array `[len(rows)]`."""
    try:
        return np.fromiter(map(get, rows), dtype, len(rows))
    except OverflowError:
        raise UserError(f"{label} holds an id that does not fit 64 bits") from None


def boxes_array(boxes: Sequence[Box], label: str, place: Callable[[int], str]) -> np.ndarray:
    """Boxes as float64 `[N, 4]` (xywh); more than four numbers or a negative size is a `UserError` at `place(row)`."""
    if list(map(attrgetter("rest"), boxes)).count(None) < len(boxes):
        row = next(row for row, box in enumerate(boxes) if box.rest is not None)
        raise UserError(f"{label}: {place(row)}: bbox has more than four numbers")
    array = np.empty((len(boxes), 4))
    for axis, name in enumerate("xywh"):
        array[:, axis] = np.fromiter(map(attrgetter(name), boxes), np.float64, len(boxes))
    bad = np.flatnonzero((array[:, 2:] < 0).any(1))
    if bad.size:
        row = int(bad[0])
        raise UserError(f"{label}: {place(row)}: bbox {array[row].tolist()} has a negative width or height")
    return array


def rows_of(ids: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Position of every id in the ascending array `known`, and the first row whose id is unknown (None: all known)."""
    if not known.size:
        return np.zeros(len(ids), np.int64), 0 if len(ids) else None
    rows = np.searchsorted(known, ids).clip(max=len(known) - 1)
    unknown = np.flatnonzero(known[rows] != ids)
    return rows, int(unknown[0]) if unknown.size else None


def nearest_id(number: int, known: np.ndarray) -> str:
    """The end of a message about an unknown id: the ids that exist."""
    if not known.size:
        return " (there are none)"
    near = int(known[np.abs(known.astype(np.float64) - float(number)).argmin()])  # the number may be of any size
    return f" (nearest: {near}; {len(known)} ids from {int(known[0])} to {int(known[-1])})"


def with_text_counts(entries: Iterable[Any]) -> list[Any]:
    """The same entries with RLE counts given as bytes turned into text, which JSON can hold."""
    return [_text_counts(entry) for entry in entries]


def _text_counts(entry: Any) -> Any:
    mask = entry.get("segmentation") if isinstance(entry, dict) else None
    if isinstance(mask, dict) and isinstance(mask.get("counts"), bytes):
        return {**entry, "segmentation": {**mask, "counts": mask["counts"].decode("ascii", "replace")}}
    return entry


def _decode(data: bytes, kind: type[T], label: str) -> T:
    try:
        return annotation_json.decode(data, kind, label)
    except OverflowError:
        raise UserError(f"{label} holds a number that does not fit 64 bits") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{label}: {_explain(str(error))}") from None


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the values given cannot be read as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """numpy scalars, arrays and tensors as Python values; an object of a field that is not read becomes null."""
    return value.tolist() if hasattr(value, "tolist") else None


def _explain(message: str) -> str:
    """The decoder's message with the place first: ``entry 3, score: Expected `float`, got `null` ``."""
    text, _, path = message.partition(" - at `$")
    if "got `null`" in text:
        text += " (missing, or not a finite number)"
    path = path.rstrip("`").lstrip(".")
    path = re.sub(r"^\[(\d+)\]", r"entry \1", path)
    path = re.sub(r"^(\w+)\[(\d+)\]", r"\1 entry \2", path)
    return f"{path.replace('.', ', ')}: {text}" if path else text
