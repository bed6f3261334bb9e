"""Which image and class an entry of a results file means: its ids, and the names that some programs write beside them.

`tailfin predict` numbers pictures 1, 2, ... since it has no annotation file, and writes `file_name` and `category_name`
into every entry; Ultralytics writes `file_name`, and the stem of a name as `image_id`. Where ids and names contradict
each other the names count, with a warning; where a name is not to be found, the entry is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from tailfin.errors import UserError
from tailfin.evaluation.truth import GroundTruth
from tailfin.joins import PictureNames
from tailfin.parsing import column, nearest_id, rows_of


def entry_rows(entries: Sequence[Any], label: str, truth: GroundTruth) -> tuple[np.ndarray, np.ndarray]:
    """Image rows and category rows of results entries, int64 [N] each."""
    pictures = PictureNames(truth.image_names)
    classes = _ClassNames([category.name for category in truth.categories])
    return (
        _rows(entries, "image_id", "file_name", truth.image_ids, truth.image_names, pictures.find, label, truth.label),
        _rows(
            entries, "category_id", "category_name", truth.category_ids, classes.names, classes.find, label, truth.label
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
                self._folded.setdefault(name.strip().casefold(), []).append(row)

    def find(self, name: str) -> list[int]:
        return self._exact.get(name) or self._folded.get(name.strip().casefold(), [])


def _rows(
    entries: Sequence[Any],
    id_key: str,
    name_key: str,
    known: np.ndarray,
    own: Sequence[str | None],
    find: Callable[[str], list[int]],
    label: str,
    truth_label: str,
) -> np.ndarray:
    """Rows of `known` (ascending ids) by id and name; a loop over the different pairs of them, not over the entries."""
    ids = list(map(attrgetter(id_key), entries))
    names = list(map(attrgetter(name_key), entries))
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
