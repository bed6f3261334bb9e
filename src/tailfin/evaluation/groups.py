"""Which classes are rare, common and frequent: training counts, LVIS's bounds and COCO-LT's bounds.

The counts are always those of the training set. They come from an explicit `TrainCounts`, from the categories' own
`frequency`, `image_count` and `instance_count` fields, and never from the file that is evaluated.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailfin.errors import UserError
from tailfin.evaluation.truth import Category
from tailfin.joins import join_classes, listed
from tailfin.stats import GROUPS, ClassStats, frequency_groups

COCO_LT_EDGES = (0, 20, 400, 8000)  # lower ends of AP1..AP4, in training instances


@dataclass(frozen=True)
class TrainCounts:
    """Images and instances per category id in the training set; an id that is not listed counts 0."""

    image_count: Mapping[int, int]
    instance_count: Mapping[int, int] | None = None
    names: Mapping[int, str] | None = None  # of the ids, where these are another file's: `for_file` joins by them
    label: str = ""  # that file

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> TrainCounts:
        """Counts of a COCO or LVIS training file; a broken file raises `UserError`."""
        stats = ClassStats.from_json(Path(path))
        ids = stats.category_ids.tolist()
        images, instances = (map(int, counts) for counts in (stats.image_count, stats.instance_count))
        names = dict(zip(ids, stats.names, strict=True))
        return cls(dict(zip(ids, images, strict=True)), dict(zip(ids, instances, strict=True)), names, str(path))

    def for_file(self, categories: Sequence[Category], label: str) -> TrainCounts:
        """The counts by the ids of `categories`, joined by name where they come from another file.

        Warns of classes that the training file lacks (they count 0), and raises `UserError` where it has none of them.
        """
        if self.names is None:
            return self
        if not any(category.name for category in categories):
            warnings.warn(
                f"{label}: its categories have no names: the counts of {self.label} are joined by id",
                UserWarning,
                stacklevel=3,
            )
            return TrainCounts(self.image_count, self.instance_count)
        ids = list(self.names)
        join = join_classes([category.name for category in categories], list(self.names.values()))
        if len(join.missing) == len(categories):
            raise UserError(
                f"{label}: none of its {len(categories)} classes is in the training file {self.label}: there is no "
                f"{join.first_missing()}"
            )
        if join.missing:
            warnings.warn(
                f"{label}: {len(join.missing)} of its {len(categories)} classes are not in the training file "
                f"{self.label} and belong to no group: {listed(join.missing)}",
                UserWarning,
                stacklevel=3,
            )
        own = {category.id: ids[row] for category, row in zip(categories, join.rows.tolist(), strict=True) if row >= 0}
        instances = self.instance_count
        return TrainCounts(
            {number: self.image_count[train] for number, train in own.items()},
            None if instances is None else {number: instances[train] for number, train in own.items()},
        )


def frequencies(
    categories: Sequence[Category], bounds: Sequence[int] | None, counts: TrainCounts | None
) -> list[str | None]:
    """ "r", "c", "f" or None (in no group) per category.

    Explicit `bounds` (largest image count of a rare and of a common class) rule; else a category's own `frequency`;
    else `counts` with LVIS's bounds. Bounds without `counts` use the categories' `image_count`, and a category that
    has neither is a `UserError`.
    """
    images = image_counts(categories, counts)
    if bounds is None:
        counted = frequency_groups([count or 0 for count in images]) if counts else [""] * len(categories)
        own = [category.frequency for category in categories]
        return [(letter if letter in GROUPS else group) or None for letter, group in zip(own, counted, strict=True)]
    for category, count in zip(categories, images, strict=True):
        if count is None:
            raise UserError(
                f'frequency groups need training counts: category {category.id} ("{category.name}") has no '
                "image_count; give the training file's counts (--train J, or train_counts=)"
            )
    return [letter or None for letter in frequency_groups([count or 0 for count in images], bounds)]


def image_counts(categories: Sequence[Category], counts: TrainCounts | None) -> list[int | None]:
    """Training images per category: `counts` where given, else the categories' own fields."""
    if counts is None:
        return [category.image_count for category in categories]
    return [int(counts.image_count.get(category.id, 0)) for category in categories]


def instance_counts(categories: Sequence[Category], counts: TrainCounts | None) -> list[int | None]:
    """Training instances per category: `counts` where it has them, else the categories' own fields."""
    if counts is None or counts.instance_count is None:
        return [category.instance_count for category in categories]
    return [int(counts.instance_count.get(category.id, 0)) for category in categories]


def instance_groups(categories: Sequence[Category], counts: TrainCounts | None) -> np.ndarray:
    """COCO-LT's group 0..3 per category, int64 `[C]`: [0, 20), [20, 400), [400, 8000), [8000, inf) instances."""
    instances = instance_counts(categories, counts)
    for category, count in zip(categories, instances, strict=True):
        if count is None:
            raise UserError(
                f'protocol "groups" needs training instances: category {category.id} ("{category.name}") has no '
                "instance_count; give the training file's counts (--train J, or train_counts=)"
            )
    return np.searchsorted(COCO_LT_EDGES, np.array(instances, np.int64), side="right") - 1


def as_train_counts(value: TrainCounts | Mapping[int, int] | str | os.PathLike[str] | None) -> TrainCounts | None:
    """`TrainCounts`, a plain mapping of image counts, or a training file's path, as `TrainCounts`."""
    if value is None or isinstance(value, TrainCounts):
        return value
    if isinstance(value, Mapping):
        return TrainCounts(value)
    return TrainCounts.from_json(value)
