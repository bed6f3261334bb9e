"""Per-class counts of a training set: the one input that losses and samplers take from the data.

    stats = ClassStats.from_json("train.json")
    stats = ClassStats(image_count=[600, 40, 3], instance_count=[650, 41, 3], num_images=640)

Every annotation counts, crowd regions too: so the `image_count` and `instance_count` that COCO-style files carry in
their categories are the numbers found here (LVIS has no crowds).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tailfin.errors import UserError

if TYPE_CHECKING:
    from tailfin.data.index import AnnotationIndex

LVIS_BOUNDS = (10, 100)  # largest image count of a rare and of a common class
GROUPS = ("r", "c", "f")  # rare, common, frequent


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassStats:
    """Counts of C classes in label order.

    Args:
        image_count: [C] images that show the class; tensor, array or list. Kept as int64 (float64 where a value is no
            whole number); so is `instance_count`.
        instance_count: [C] annotations of the class.
        num_images: images of the training set.
        num_annotated_images: those with at least one annotation; `num_images` if not given.
        names: [C] class names; "0", "1", ... if not given.
        frequency: [C] "r", "c", "f", or "" for a class in no group; from `image_count` with LVIS's bounds if not given.
        category_ids: [C] the file's ids, int64; 0..C-1 if not given.

    Values that make no sense raise `UserError`.
    """

    image_count: NDArray[Any]
    instance_count: NDArray[Any]
    num_images: int
    num_annotated_images: int = None  # type: ignore[assignment]
    names: tuple[str, ...] = None  # type: ignore[assignment]
    frequency: tuple[str, ...] = None  # type: ignore[assignment]
    category_ids: NDArray[np.int64] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        images, instances = _counts(self.image_count, "image_count"), _counts(self.instance_count, "instance_count")
        classes = len(images)
        total = _whole(self.num_images, "num_images")
        annotated = total if self.num_annotated_images is None else self.num_annotated_images
        ids = np.arange(classes) if self.category_ids is None else _array(self.category_ids, "category_ids")
        values: dict[str, Any] = {
            "image_count": images,
            "instance_count": instances,
            "num_images": total,
            "num_annotated_images": _whole(annotated, "num_annotated_images"),
            "names": tuple(map(str, range(classes) if self.names is None else self.names)),
            "frequency": frequency_groups(images) if self.frequency is None else tuple(self.frequency),
            "category_ids": ids.astype(np.int64),
        }
        for name in ("instance_count", "names", "frequency", "category_ids"):
            if len(values[name]) != classes:
                raise UserError(f"class statistics: {name} has {len(values[name])} entries, image_count has {classes}")
        unknown = sorted({str(group) for group in values["frequency"]} - {*GROUPS, ""})
        if unknown:
            raise UserError(f'class statistics: frequency "{unknown[0]}" is none of "r", "c", "f" and ""')
        if values["num_annotated_images"] > total:
            raise UserError(f"class statistics: num_annotated_images {annotated} is more than num_images {total}")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def num_classes(self) -> int:
        """C, the number of foreground classes."""
        return len(self.image_count)

    def __repr__(self) -> str:
        return f"ClassStats({self.num_classes} classes, {self.num_images} images)"

    @classmethod
    def from_json(cls, path: str | Path, group_bounds: Sequence[int] | None = None) -> ClassStats:
        """Counts of a COCO or LVIS training file; `group_bounds` as in `from_index`."""
        from tailfin.data.index import open_index

        return cls.from_index(open_index(path, needs_names=False), group_bounds)

    @classmethod
    def from_index(cls, index: AnnotationIndex, group_bounds: Sequence[int] | None = None) -> ClassStats:
        """Counts of an open annotation file.

        A class's group comes from `group_bounds` (largest image count of a rare and of a common class) if given, else
        from the category's own `frequency`, else from its image count with LVIS's bounds.
        """
        classes = len(index.categories)
        pairs = np.unique(index.image_of.astype(np.int64) * classes + index.labels)
        images = np.bincount(pairs % classes, minlength=classes)
        frequency = frequency_groups(images, group_bounds)
        if group_bounds is None:
            own = (category.frequency for category in index.categories)
            frequency = tuple(
                group if group in GROUPS else counted for group, counted in zip(own, frequency, strict=True)
            )
        return cls(
            image_count=images,
            instance_count=np.bincount(index.labels, minlength=classes),
            num_images=len(index),
            num_annotated_images=int(np.count_nonzero(np.diff(index.offsets))),
            names=index.names,
            frequency=frequency,
            category_ids=index.category_ids,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's metadata; `from_dict` turns them back."""
        return {
            "image_count": self.image_count.tolist(),
            "instance_count": self.instance_count.tolist(),
            "num_images": self.num_images,
            "num_annotated_images": self.num_annotated_images,
            "names": list(self.names),
            "frequency": list(self.frequency),
            "category_ids": self.category_ids.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassStats:
        """The statistics that `to_dict` wrote; a missing entry is a `KeyError`, a wrong one a `UserError`."""
        fields = cls.__dataclass_fields__
        return cls(**{name: values[name] for name in fields})


def frequency_groups(image_count: ArrayLike, bounds: Sequence[int] | None = None) -> tuple[str, ...]:
    """ "r", "c" or "f" per class by its training images, "" for a class without any; `bounds` default to LVIS's."""
    rare, common = LVIS_BOUNDS if bounds is None else _bounds(bounds)
    counts = np.asarray(image_count)
    letters = np.select([counts <= 0, counts <= rare, counts <= common], ["", "r", "c"], "f")
    return tuple(letters.tolist())


def gini(counts: ArrayLike) -> float:
    """Gini coefficient of the counts of all classes: 0 when all are equal, near 1 when one class has everything."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    total = ordered.sum()
    if total <= 0:
        return 0.0
    size = len(ordered)
    return float(((2 * np.arange(1, size + 1) - size - 1) * ordered).sum() / (size * total))


def imbalance_factor(counts: ArrayLike) -> float:
    """Largest count over the smallest one that is not zero; NaN when all are zero."""
    values = np.asarray(counts, dtype=np.float64)
    values = values[values > 0]
    return float(values.max() / values.min()) if len(values) else float("nan")


def _array(values: Any, name: str) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor, wherever it lives
        values = values.detach().cpu().numpy()
    elif isinstance(values, Iterable) and not isinstance(values, (np.ndarray, Sequence)):
        values = list(values)
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        array = np.empty(0, object)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iuf":
        raise UserError(f"class statistics: {name} must be one number per class (given: {_short(values)})")
    return array


def _counts(values: Any, name: str) -> NDArray[Any]:
    array = _array(values, name)
    bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(bad):
        raise UserError(f"class statistics: {name} of class {bad[0]} is {array[bad[0]]}, a count is needed")
    whole = array.dtype.kind in "iu" or (array == np.rint(array)).all()
    return array.astype(np.int64 if whole else np.float64)


def _whole(value: Any, name: str) -> int:
    number = float(value) if np.ndim(value) == 0 and not isinstance(value, str) else float("nan")
    if not (number >= 0 and number == int(number)):
        raise UserError(f"class statistics: {name} must be a whole number of at least 0 (given: {_short(value)})")
    return int(number)


def _bounds(bounds: Sequence[int]) -> tuple[int, int]:
    if len(bounds) != 2 or not 0 < bounds[0] < bounds[1]:
        raise UserError(
            f"group bounds {list(bounds)}: two ascending image counts are needed, the largest of a rare and of a"
            " common class, for example 10,100"
        )
    return bounds[0], bounds[1]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
