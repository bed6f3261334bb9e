"""Splits: a validation part that keeps every class on both sides, and a long-tailed part of a balanced set.

`split_train_val` is iterative stratification (Sechidis, Tsoumakas, Vlahavas: On the stratification of multi-label data,
ECML 2011) over images, a class at a time instead of an image at a time: the class with the fewest images left is dealt
out first. `long_tail_subsample` keeps a given number of annotations per class, the rarest class first, so that the
images that rare classes need are there before frequent classes choose theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.data.annotation_json import LISTS
from tailfin.data.document import Document, file_name, positions, subset, with_train_counts
from tailfin.data.index import image_path
from tailfin.errors import UserError, nearest
from tailfin.joins import plain_name

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def split_train_val(
    document: Document, fraction: float, seed: int = 0, *, groups: Ints | None = None
) -> tuple[Document, Document]:
    """(train, val) with about `fraction` of the images, and of each class's images, in val.

    Every class with annotations is in train; a class on two images or more is in val too wherever that is possible (see
    `absent_classes` for the rest). Images without annotations are dealt out alike. The class counts of both parts are
    those of train. `groups`, int64 [I], numbers images that must stay together (see `same_pictures`). The result
    depends on the document, `groups` and `seed` alone.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction is {fraction}, it must be between 0 and 1")
    image_of, category_of = positions(document)
    images, classes = len(document["images"]), len(document["categories"])
    if images < 2:
        raise UserError(f"{images} image cannot be split in two")
    group_of = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1]
    if not group_of.any():
        raise UserError(f"all {images} images are one picture, which cannot be split in two")
    rows = _Rows(group_of[image_of], category_of, int(group_of.max()) + 1, classes)
    group_in_val = _deal(rows, fraction, np.random.default_rng([seed, 11]))
    _mend(rows, group_in_val)
    in_val = group_in_val[group_of]
    train = subset(document, ~in_val, ~in_val[image_of])
    val = subset(document, in_val, in_val[image_of])
    return with_train_counts(train, train), with_train_counts(val, train)


def same_pictures(document: Document, folder: Path) -> Ints:
    """A number per image, int64 [I], equal where images are the same picture: by file name, or by the bytes of the
    file in `folder`. Only files of equal size are read; one that is missing is told by its name alone."""
    names = [file_name(image) for image in document["images"]]
    number: dict[str, int] = {}
    groups = np.array([number.setdefault(plain_name(name), len(number)) for name in names], np.int64)
    by_size: dict[int, list[tuple[int, Path]]] = {}
    for group, name in enumerate(dict.fromkeys(map(plain_name, names))):
        file = image_path(folder, name)
        if file.is_file():
            by_size.setdefault(file.stat().st_size, []).append((group, file))
    first = np.arange(len(number))
    for equal in by_size.values():
        owner: dict[bytes, int] = {}
        for group, file in equal if len(equal) > 1 else ():
            with file.open("rb") as opened:
                first[group] = owner.setdefault(hashlib.file_digest(opened, "blake2b").digest(), group)
    return first[groups]


def absent_classes(whole: Document, part: Document) -> list[str]:
    """Names of classes that have annotations in `whole` and none in `part`."""
    there = {a["category_id"] for a in part["annotations"]}
    missing = {a["category_id"] for a in whole["annotations"]} - there
    return [category["name"] for category in whole["categories"] if category["id"] in missing]


def long_tail_subsample(
    document: Document,
    counts: Mapping[str, int] | None = None,
    *,
    imbalance: float | None = None,
    largest: int | None = None,
    seed: int = 0,
    keep_empty: bool = False,
) -> Document:
    """The document with min(wanted, present) annotations of each class, crowds not counted.

    Wanted is either `counts` (by class name; other classes keep all) or an exponential fall with `imbalance` over the
    classes in the order of their present counts, from `largest` (default: the largest present count) down to
    largest / imbalance. Images that lose all annotations are dropped unless `keep_empty`; images that had none stay.
    Within a class whole images are preferred, those already kept for rarer classes first, so that few objects stay
    in the pictures without a label (`unlabelled` counts them). An image of a federated set (LVIS) that keeps some
    objects of a class and loses others lists the class as not exhaustively annotated.
    """
    if (counts is None) == (imbalance is None):
        raise UserError("a long tail needs either counts per class or an imbalance")
    image_of, category_of = positions(document)
    crowd = np.array([bool(a.get("iscrowd")) for a in document["annotations"]], bool)
    present = np.bincount(category_of[~crowd], minlength=len(document["categories"]))
    if counts is not None:
        wanted = given_counts(document, present, counts)
    else:
        assert imbalance is not None
        wanted = exponential_counts(present, imbalance, largest)
    keep = _choose(image_of, category_of, crowd, np.minimum(wanted, present), len(document["images"]), seed)
    had = np.bincount(image_of, minlength=len(document["images"])) > 0
    has = np.bincount(image_of[keep], minlength=len(document["images"])) > 0
    keep |= crowd & has[image_of]
    kept = np.ones_like(had) if keep_empty else has | ~had
    result = subset({**document, "images": _incomplete(document, image_of, category_of, keep)}, kept, keep)
    return with_train_counts(result, result)


def _incomplete(document: Document, image_of: Ints, category_of: Ints, keep: Bools) -> list[dict[str, Any]]:
    """The images; one that says which classes were looked for also says which of them it now shows in part."""
    federated = {n for n, image in enumerate(document["images"]) if any(image.get(key) is not None for key in LISTS)}
    there = set(zip(image_of[keep].tolist(), category_of[keep].tolist(), strict=True))
    lost = set(zip(image_of[~keep].tolist(), category_of[~keep].tolist(), strict=True)) & there
    images = list(document["images"])
    for number, category in sorted(lost):
        if number in federated:
            key, identity = "not_exhaustive_category_ids", document["categories"][category]["id"]
            before = images[number].get(key) or []
            if identity not in before:
                images[number] = {**images[number], key: [*before, identity]}
    return images


def unlabelled(whole: Document, part: Document) -> int:
    """Objects in the pictures of `part` whose annotations only `whole` has."""
    there = {image["id"] for image in part["images"]}
    return sum(a["image_id"] in there for a in whole["annotations"]) - len(part["annotations"])


# stratification


class _Rows:
    """Which image has which classes, as index lists both ways; one more class stands for "no annotation"."""

    def __init__(self, image_of: Ints, category_of: Ints, images: int, classes: int) -> None:
        empty = np.flatnonzero(np.bincount(image_of, minlength=images) == 0)
        pairs = np.unique(image_of * (classes + 1) + category_of)
        pairs = np.sort(np.concatenate([pairs, empty * (classes + 1) + classes]))
        self.images, self.classes = images, classes + 1
        self.labels = pairs % self.classes  # sorted by image
        owner = pairs // self.classes
        self.label_start = np.searchsorted(owner, np.arange(images + 1))
        by_class = np.argsort(self.labels, kind="stable")
        self.members = owner[by_class]  # sorted by class
        self.member_start = np.searchsorted(self.labels[by_class], np.arange(self.classes + 1))

    def of_class(self, label: int) -> Ints:
        return self.members[self.member_start[label] : self.member_start[label + 1]]

    def of_image(self, image: int) -> Ints:
        return self.labels[self.label_start[image] : self.label_start[image + 1]]

    def count(self, images: Ints) -> Ints:
        """Class counts over some images, int64 [classes]."""
        starts, stops = self.label_start[images], self.label_start[images + 1]
        lengths = stops - starts
        offsets = np.repeat(stops - np.cumsum(lengths), lengths)
        return np.bincount(self.labels[offsets + np.arange(lengths.sum())], minlength=self.classes)


def _deal(rows: _Rows, fraction: float, rng: np.random.Generator) -> Bools:
    """Mark the images of val, the class with the fewest images left first."""
    total = rows.count(np.arange(rows.images))
    want = fraction * total  # images of each class that val still wants
    left = total.copy()
    in_val = np.zeros(rows.images, bool)
    open_ = np.ones(rows.images, bool)
    only = np.flatnonzero(total[:-1] == 1)  # classes with one image: it trains
    fixed = np.unique(rows.members[rows.member_start[only]])
    left -= rows.count(fixed)
    open_[fixed] = False
    dealt, dealt_to_val = len(fixed), 0
    while left.any():
        label = int(np.argmin(np.where(left > 0, left, rows.images + 1)))
        mine = rng.permutation(rows.of_class(label))
        mine = mine[open_[mine]]
        behind = dealt_to_val <= fraction * dealt
        number = int(np.ceil(want[label] - 1e-9) if behind else np.floor(want[label] + 1e-9))
        already = total[label] - left[label]
        in_val_already = round(float(fraction * total[label] - want[label]))
        low = int(in_val_already == 0 and total[label] > 1)  # one in val, and one in train
        high = len(mine) - int(in_val_already == already)
        number = min(max(number, low, 0), max(high, 0))
        chosen = mine[:number]
        in_val[chosen] = True
        want -= rows.count(chosen)
        left -= rows.count(mine)
        open_[mine] = False
        dealt, dealt_to_val = dealt + len(mine), dealt_to_val + number
    return in_val


def _mend(rows: _Rows, in_val: Bools) -> None:
    """Move single images so that no class misses a side that it could be on; train comes first (in place)."""
    total = rows.count(np.arange(rows.images))
    for side, needed in ((False, 1), (True, 2)):
        here = rows.count(np.flatnonzero(in_val == side))
        there = total - here
        for label in np.argsort(total, kind="stable").tolist():
            if label == rows.classes - 1 or here[label] or total[label] < needed:
                continue
            candidates = rows.of_class(label)
            breaks = [int((there[rows.of_image(image)] == 1).sum()) for image in candidates.tolist()]
            if side and min(breaks) > 0:
                continue  # val would gain a class only by taking one from train
            chosen = candidates[int(np.argmin(breaks))]
            in_val[chosen] = side
            own = rows.of_image(chosen)
            here[own] += 1
            there[own] -= 1


# long tail


def given_counts(document: Document, present: Ints, counts: Mapping[str, int]) -> Ints:
    """Wanted annotations per category [C]: `counts` by name, `present` for classes that it does not name."""
    place = {category["name"]: position for position, category in enumerate(document["categories"])}
    wanted = present.copy()
    for name, count in counts.items():
        if name not in place:
            raise UserError(f'counts name the class "{name}", which the file does not have{nearest(name, place)}')
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f'the count of class "{name}" is {count!r}, a whole number of at least 0 is needed')
        wanted[place[name]] = min(count, np.iinfo(np.int64).max)
    return wanted


def exponential_counts(present: Ints, imbalance: float, largest: int | None) -> Ints:
    """Wanted annotations per category [C], falling from `largest` to largest / imbalance in the order of `present`."""
    if not 1 <= imbalance < float("inf"):
        raise UserError(f"the imbalance is {imbalance}, it must be at least 1")
    if largest is not None and largest < 1:
        raise UserError(f"the largest class count is {largest}, it must be at least 1")
    order = np.argsort(-present, kind="stable")
    order = order[present[order] > 0]  # classes without annotations take no place on the curve
    top = float(largest or present.max(initial=0))
    wanted = np.zeros_like(present)
    steps = np.arange(len(order)) / max(1, len(order) - 1)
    wanted[order] = np.maximum(1, np.rint(top * imbalance**-steps))
    return wanted


def _choose(image_of: Ints, category_of: Ints, crowd: Bools, wanted: Ints, images: int, seed: int) -> Bools:
    """Mark exactly `wanted` annotations of each class, bool [A]."""
    rank = np.random.default_rng([seed, 12]).permutation(images)
    keep = np.zeros(len(image_of), bool)
    taken = np.zeros(images, bool)
    ordinary = np.flatnonzero(~crowd)
    by_class = ordinary[np.argsort(category_of[ordinary], kind="stable")]
    start = np.searchsorted(category_of[by_class], np.arange(len(wanted) + 1))
    for label in np.lexsort((np.diff(start), wanted)).tolist():  # rarest first; of equals, the one with less choice
        mine = by_class[start[label] : start[label + 1]]
        owner = image_of[mine]
        chosen = mine[np.lexsort((rank[owner], ~taken[owner]))[: wanted[label]]]
        keep[chosen] = True
        taken[image_of[chosen]] = True
    return keep
