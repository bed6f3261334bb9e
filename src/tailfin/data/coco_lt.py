"""COCO-LT (Wang et al., SimCal, ECCV'20): a long-tailed part of COCO's training set, evaluated on all of val2017.

The set is a choice of pairs of a picture and a class: a class is annotated completely in a picture or not at all there,
and pictures without a pair are out. `choose_listed` makes it from a list of the pairs, `choose_pairs` draws one of the
same class counts. Objects that lose their annotation stay visible, as in the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.data.document import Document, positions, subset, with_train_counts
from tailfin.errors import UserError, nearest
from tailfin.files import read_json, read_text

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Annotations of each class in the released set: 666,493 in 99,411 pictures
# fmt: off
COUNTS = {
    "person": 262465, "bicycle": 3530, "car": 43867, "motorcycle": 8725, "airplane": 686, "bus": 248, "train": 408,
    "truck": 9973, "boat": 10759, "traffic light": 12884, "fire hydrant": 11, "stop sign": 22, "parking meter": 12,
    "bench": 9838, "bird": 10806, "cat": 198, "dog": 167, "horse": 1518, "sheep": 9509, "cow": 7079,
    "elephant": 374, "bear": 61, "zebra": 420, "giraffe": 383, "backpack": 8720, "umbrella": 11431,
    "handbag": 12354, "tie": 6112, "suitcase": 5360, "frisbee": 14, "skis": 2902, "snowboard": 22,
    "sports ball": 6221, "kite": 9076, "baseball bat": 67, "baseball glove": 52, "skateboard": 547,
    "surfboard": 4678, "tennis racket": 793, "bottle": 24342, "wine glass": 5047, "cup": 20650, "fork": 774,
    "knife": 7190, "spoon": 1025, "bowl": 14358, "banana": 9458, "apple": 589, "sandwich": 657, "orange": 4042,
    "broccoli": 6394, "carrot": 2746, "hot dog": 48, "pizza": 100, "donut": 6594, "cake": 4684, "chair": 38491,
    "couch": 629, "potted plant": 2689, "bed": 51, "dining table": 15714, "toilet": 73, "tv": 710, "laptop": 286,
    "mouse": 52, "remote": 765, "keyboard": 21, "cell phone": 4699, "microwave": 52, "oven": 65, "toaster": 47,
    "sink": 114, "refrigerator": 50, "book": 24715, "clock": 4004, "vase": 1473, "scissors": 24, "teddy bear": 693,
    "hair drier": 71, "toothbrush": 15,
}
# fmt: on


def choose_pairs(document: Document, wanted: Ints, seed: int = 0) -> tuple[Bools, Ints]:
    """(annotations to keep, bool [A]; annotations that each class lacks, int64 [C]).

    Classes choose their pictures, the rarest class first: pictures that are there already before others, in an order
    that `seed` gives, each as long as it does not pass the number `wanted` [C]. A class lacks some where it has fewer
    in all, or where every picture left has more of it than are missing.
    """
    image_of, category_of = positions(document)
    images, classes = len(document["images"]), len(document["categories"])
    pairs, pair_of, sizes = np.unique(category_of * images + image_of, return_inverse=True, return_counts=True)
    owner = pairs % images
    start = np.searchsorted(pairs, np.arange(classes + 1) * images)
    present = np.bincount(category_of, minlength=classes)
    rank = np.random.default_rng([seed, 13]).permutation(images)
    kept, taken = np.zeros(len(pairs), bool), np.zeros(images, bool)
    lacking = np.maximum(wanted - present, 0)
    for label in np.lexsort((present, wanted)).tolist():  # rarest first; of equals, the one with less choice
        mine = np.arange(start[label], start[label + 1])
        mine = mine[np.lexsort((rank[owner[mine]], ~taken[owner[mine]]))]
        missing = int(min(wanted[label], present[label]))
        while len(mine := mine[sizes[mine] <= missing]):  # those that fit, as far as they go; then smaller ones
            total = np.cumsum(sizes[mine])
            fit = int(np.searchsorted(total, missing, side="right"))
            kept[mine[:fit]] = taken[owner[mine[:fit]]] = True
            missing -= int(total[fit - 1])
            mine = mine[fit:]
        lacking[label] += missing
    return kept[pair_of], lacking


def choose_listed(
    document: Document, listed: Mapping[str, Sequence[int]] | Sequence[int], source: str = "list"
) -> Bools:
    """Annotations to keep, bool [A], by a list of image ids, or one for each class name (other classes keep none)."""
    image_of, category_of = positions(document)
    place = {image["id"]: position for position, image in enumerate(document["images"])}

    def rows(ids: Sequence[int], whose: str) -> Ints:
        for number in ids:
            if number not in place:
                raise UserError(f"{source}: {whose}image id {number} is not in the annotation file")
        return np.array([place[number] for number in ids], np.int64)

    images = len(document["images"])
    if not isinstance(listed, Mapping):
        chosen = np.zeros(images, bool)
        chosen[rows(listed, "")] = True
        return chosen[image_of]
    label = {category["name"]: position for position, category in enumerate(document["categories"])}
    pairs = np.zeros((len(label), images), bool)
    for name, ids in listed.items():
        if name not in label:
            raise UserError(f'{source}: the annotation file has no class "{name}"{nearest(name, label)}')
        pairs[label[name], rows(ids, f'class "{name}": ')] = True
    return pairs[category_of, image_of]


def kept_document(document: Document, keep: Bools, *, keep_empty: bool = False) -> Document:
    """The document with the annotations `keep` [A], the pictures that have one (or all) and the classes' new counts."""
    image_of, _ = positions(document)
    has = np.bincount(image_of[keep], minlength=len(document["images"])) > 0
    result = subset(document, has | keep_empty, keep)
    return with_train_counts(result, result)


def coco_counts(document: Document) -> dict[str, int]:
    """The released counts, for a file with COCO's 80 classes; another file is a `UserError`."""
    names = {category["name"] for category in document["categories"]}
    if names != set(COUNTS):
        foreign = next(iter(names - set(COUNTS)), None)
        what = f'"{foreign}" is none of them' if foreign else f'"{next(iter(set(COUNTS) - names))}" is missing'
        raise UserError(
            f"COCO-LT's counts are those of COCO's 80 classes, and {what}: give --imbalance, --counts or --image-ids"
        )
    return COUNTS


def read_listed(path: Path) -> dict[str, list[int]] | list[int]:
    """Image ids: a JSON list, a JSON object {class: [ids]}, or a text file with one id per line."""
    if path.suffix == ".json":
        value: Any = read_json(path, "list of images")
    else:
        value = read_text(path, "list of images").split()
        value = [int(word) if word.isdecimal() else word for word in value]
    lists = value.items() if isinstance(value, dict) else [("", value)]
    for name, ids in lists:
        if not isinstance(ids, list):
            raise UserError(f"{path}: a list of image ids is needed, or an object of lists by class name")
        wrong = next((one for one in ids if isinstance(one, bool) or not isinstance(one, int)), None)
        if wrong is not None:
            raise UserError(f"{path}: {name and f'class {name}: '}{wrong!r} is no image id")
    if not value:
        raise UserError(f"{path} lists no image")
    return value
