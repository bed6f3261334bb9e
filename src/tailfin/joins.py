"""Joining by name: the classes of two files, and pictures with the names that other programs give them.

Ids and positions belong to one file. Whatever comes from another, a model, a training file, a results file, is joined
here, and what has no partner is said::

    join = join_classes(model.names, index.names)
    join.rows  # for each class of the model its place in the file, -1 where the file lacks it
    pictures = PictureNames(["train/0001.jpg", "train/0002.jpg"])
    pictures.find("/data/set/train/0001.jpg")  # [0]
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote

import numpy as np

from tailfin.errors import nearest

LISTED = 3  # names in a message


@dataclass(frozen=True)
class ClassJoin:
    """Which of `names` are which of `others`."""

    names: tuple[str, ...]
    others: tuple[str, ...]
    rows: np.ndarray  # int64 [len(names)]: place in `others`, -1 where it has no such name

    @cached_property
    def missing(self) -> list[str]:
        """Of `names`, those that `others` lacks."""
        return [name for name, row in zip(self.names, self.rows.tolist(), strict=True) if row < 0]

    @cached_property
    def unknown(self) -> list[str]:
        """Of `others`, those that none of `names` is."""
        used = {self.others[row] for row in self.rows.tolist() if row >= 0}
        return [name for name in self.others if name not in used]

    def first_missing(self) -> str:
        """`"name"` of the first class that `others` lacks, with the nearest one that it has."""
        return f'"{self.missing[0]}"{nearest(self.missing[0], self.others)}'


def join_classes(
    names: Sequence[str], others: Sequence[str], aliases: Mapping[str, Sequence[str]] | None = None
) -> ClassJoin:
    """Join classes by name; of several `others` of one name the first counts.

    `aliases` has further names of some of `names`, which count where `others` lacks the name itself; the first of them
    that is there does.
    """
    backwards = list(reversed(list(enumerate(others))))
    place = {composed(name): row for row, name in backwards} | {name: row for row, name in backwards}
    known = ([name, composed(name), *(aliases or {}).get(name, ())] for name in names)
    rows = [next((place[name] for name in own if name in place), -1) for own in known]
    return ClassJoin(tuple(names), tuple(others), np.array(rows, np.int64))


def listed(names: Sequence[str]) -> str:
    """`"a", "b", "c", ...` for a message."""
    return ", ".join(f'"{name}"' for name in names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def composed(name: str) -> str:
    """The name with letters and their marks as one character each; macOS writes them apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def plain_name(name: str) -> str:
    """A picture's name with `/` between folders and without `./` in front."""
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


class PictureNames:
    """The pictures of one file, to be found by names that may have more or fewer folders, or no suffix."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = [None if not name else composed(plain_name(name)) for name in names]
        self._by_base: dict[str, list[int]] = {}
        self._by_stem: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                base = name.rpartition("/")[2]
                self._by_base.setdefault(base, []).append(row)
                self._by_stem.setdefault(base.rpartition(".")[0] or base, []).append(row)

    @property
    def known(self) -> bool:
        """Whether any picture has a name."""
        return bool(self._by_base)

    def find(self, name: str) -> list[int]:
        """Rows of the pictures that `name` may mean: one, none, or several where it is ambiguous.

        The more folders agree the better; a name without a suffix is joined by the stem. URL escapes (`%20`) are read
        where the name as it stands is nowhere.
        """
        wanted = composed(plain_name(name))
        rows = self._among(wanted, self._by_base, whole=True) or self._among(wanted, self._by_stem, whole=False)
        if not rows and "%" in wanted and unquote(wanted) != wanted:
            return self.find(unquote(wanted))
        return rows

    def _among(self, wanted: str, places: dict[str, list[int]], *, whole: bool) -> list[int]:
        """Of the pictures with the last part of `wanted`, those that share the most of its folders."""
        *folders, base = wanted.split("/")
        candidates = places.get(base, [])
        scored: list[tuple[int, int]] = []
        for row in candidates:
            own = str(self.names[row]).split("/")[:-1]
            if whole and own == folders:
                scored.append((len(own) + 1, row))  # the very name
                continue
            shared = 0
            while shared < min(len(own), len(folders)) and own[-1 - shared] == folders[-1 - shared]:
                shared += 1
            if shared == min(len(own), len(folders)):  # one path is the end of the other
                scored.append((shared, row))
        best = max((score for score, _ in scored), default=0)
        return [row for score, row in scored if score == best]
