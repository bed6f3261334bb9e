"""Which image and class an entry of a results file means: its ids, and the names that some programs write beside them.

`tailfin predict` numbers pictures 1, 2, ... since it has no annotation file, and writes `file_name` and `category_name`
into every entry; Ultralytics writes `file_name`, and the stem of a name as `image_id`; others have keys of their own
(`PICTURE_KEYS`, `CLASS_KEYS`). Where ids and names contradict each other the names count, with a warning; where a name
is not to be found, the entry is refused, but texts under the others' keys of which none is a name mean something else.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import msgspec
import numpy as np

from tailfin.errors import UserError
from tailfin.evaluation.truth import GroundTruth
from tailfin.joins import PictureNames, composed
from tailfin.parsing import Box, column, nearest_id, rows_of

PICTURE_KEYS = ("file_name", "filename", "image_name", "img_name", "image_path", "image")
CLASS_KEYS = ("category_name", "class_name", "category", "label", "class", "name")
HEAD = 1 << 20  # bytes of a file in which its keys are looked for


class Entry(msgspec.Struct, gc=False):
    """A detection of COCO results."""

    image_id: int | float | str
    category_id: int | float | str
    score: float
    bbox: Box | None = None
    file_name: Any = None
    category_name: Any = None
    segmentation: msgspec.Raw = msgspec.Raw(b"")


def entries_of(data: bytes, label: str) -> type[list[Entry]]:
    """The type of the entries of a JSON text, with the keys that it has for names: the first of those with a text."""
    head = data[:HEAD]
    if head.lstrip().startswith(b"{"):
        raise UserError(f'{label}: an object, and a list [{{"image_id": ..., "bbox": ..., ...}}, ...] is needed')

    def key(keys: Sequence[str]) -> str:
        texts = set(re.findall(rb'"(' + "|".join(keys).encode() + rb')"\s*:\s*"', head))
        return next((own for own in keys if own.encode() in texts), keys[0])

    kind = _entry(key(PICTURE_KEYS), key(CLASS_KEYS))
    return list[kind]  # type: ignore[valid-type]


@functools.cache
def _entry(picture: str, category: str) -> type[Entry]:
    if (picture, category) == (PICTURE_KEYS[0], CLASS_KEYS[0]):
        return Entry
    names = {"file_name": picture, "category_name": category}
    fields = [(field.name, field.type, *_default(field)) for field in msgspec.structs.fields(Entry)]
    return cast(type[Entry], msgspec.defstruct("Entry", fields, rename=names, gc=False))


def _default(field: Any) -> tuple[Any, ...]:
    return () if field.required else (field.default,)


def entry_rows(entries: Sequence[Any], label: str, truth: GroundTruth) -> tuple[np.ndarray, np.ndarray]:
    """Image rows and category rows of results entries, int64 [N] each."""
    pictures = PictureNames(truth.image_names)
    classes = _ClassNames([category.name for category in truth.categories])
    keys = getattr(type(entries[0]), "__struct_encode_fields__", ()) if entries else ()
    shown = dict(zip(type(entries[0]).__struct_fields__, keys, strict=True)) if keys else {}
    return (
        _rows(
            entries, ("image_id", "file_name"), shown, truth.image_ids, truth.image_names, pictures.find, label, truth
        ),
        _rows(
            entries,
            ("category_id", "category_name"),
            shown,
            truth.category_ids,
            classes.names,
            classes.find,
            label,
            truth,
        ),
    )


class _ClassNames:
    """Class names, to be found as they stand, else without regard to case and outer spaces."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [name or None for name in names]
        self._exact: dict[str, list[int]] = {}
        self._folded: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name:
                self._exact.setdefault(name, []).append(row)
                self._folded.setdefault(_folded(name), []).append(row)

    def find(self, name: str) -> list[int]:
        return self._exact.get(name) or self._folded.get(_folded(name), [])


def _folded(name: str) -> str:
    return composed(name.strip()).casefold()


def _rows(
    entries: Sequence[Any],
    fields: tuple[str, str],
    shown: Mapping[str, str],
    known: np.ndarray,
    own: Sequence[str | None],
    find: Callable[[str], list[int]],
    label: str,
    truth: GroundTruth,
) -> np.ndarray:
    """Rows of `known` (ascending ids) by id and name; a loop over the different pairs of them, not over the entries.

    `fields` are those of the id and of the name, `shown` the keys that the file has for them.
    """
    ids, names = (list(map(attrgetter(field), entries)) for field in fields)
    id_key, name_key = (shown.get(field, field) for field in fields)
    truth_label = truth.label
    if name_key != fields[1] and not any(map(find, {name for name in names if isinstance(name, str) and name})):
        names = [None] * len(names)  # not one is known: the key means something else
    if set(map(type, ids)) <= {int} and (names.count(None) == len(names) or not any(own)):
        rows, unknown = rows_of(column(entries, attrgetter(id_key), np.int64, label), known)
        if unknown is not None:
            raise UserError(_unknown(label, unknown, id_key, ids[unknown], known, truth_label))
        return rows

    keys = [(number, name if isinstance(name, str) and name else None) for number, name in zip(ids, names, strict=True)]
    place = {number: row for row, number in enumerate(known.tolist())}
    pairs: dict[tuple[Any, Any], int] = {}
    moved: set[tuple[Any, Any]] = set()
    first = ""
    for entry, (number, name) in enumerate(keys):
        if (number, name) in pairs:
            continue
        where = f"{label}: entry {entry}"
        if isinstance(number, float) and not number.is_integer():
            raise UserError(f"{where}: {id_key} is {number}, a whole number is needed")
        by_id = None if isinstance(number, str) else place.get(int(number))
        text = name if name is not None else number if isinstance(number, str) else None
        found = find(text) if text is not None and any(own) else []
        if len(found) > 1 and by_id not in found:
            listed = ", ".join(str(own[row]) for row in found[:3])
            key = name_key if name is not None else id_key
            raise UserError(f'{where}: {key} "{text}" may be any of {listed} of {truth_label}')
        if len(found) == 1:
            row = found[0]
            if by_id != row and not isinstance(number, str):
                moved.add((number, name))
                first = (
                    first or f"entry {entry}: {_says(id_key, number, by_id, own, truth_label)}, the entry says {name}"
                )
        elif by_id is not None:
            if name is not None and not found and own[by_id]:
                raise UserError(
                    f"{where}: {_says(id_key, number, by_id, own, truth_label)}, it says {name}, which is not there"
                )
            row = by_id
        elif isinstance(number, str):
            raise UserError(
                f'{where}: {id_key} is the text "{number}"; ids of {truth_label} are needed'
                f"{nearest_id(0, known) if not known.size else f' ({len(known)} ids from {known[0]} to {known[-1]})'}"
            )
        else:
            raise UserError(_unknown(label, entry, id_key, number, known, truth_label))
        pairs[number, name] = row
    bare = [row for row, (number, name) in enumerate(keys) if name is None and not isinstance(number, str)]
    if moved and bare:
        raise UserError(
            f"{label}: entry {bare[0]} has no {name_key}, and elsewhere {id_key} and {name_key} contradict each "
            f"other ({first}): what its {id_key} means is not known"
        )
    if moved:
        count = sum(key in moved for key in keys)
        warnings.warn(
            f"{label}: in {count} of {len(keys)} entries {id_key} and {name_key} contradict each other: matched by "
            f"{name_key} ({first})",
            UserWarning,
            stacklevel=2,
        )
    return np.array([pairs[key] for key in keys], np.int64)


def _says(key: str, number: Any, row: int | None, own: Sequence[str | None], truth_label: str) -> str:
    return f"{key} {number} is {own[row] if row is not None else 'not'} in {truth_label}"


def _unknown(label: str, entry: int, key: str, number: Any, known: np.ndarray, truth_label: str) -> str:
    return f"{label}: entry {entry}: {key} {number} is not in {truth_label}{nearest_id(int(number), known)}"
