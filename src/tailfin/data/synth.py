"""The synthetic long-tailed set: photo-like scenes with instance masks, made in seconds, the same for the same seed.

A class is shape x texture x colour. Classes come in families that share shape and colour and differ in texture; the
frequent, the common and the rare classes of the vocabulary each hold one member of every family, so that a rare class
looks like a frequent one. Training counts fall exponentially (`imbalance` is the most frequent class's count over the
rarest one's), validation counts are equal::

    make_synthetic("shapes", images_train=600, images_val=200, classes=24)
    # shapes/train.json, shapes/val.json, shapes/train/*.jpg, shapes/val/*.jpg

Picture k of a split depends on (seed, split, k) and its objects' classes alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from tailfin.data.document import Document, count_classes, with_train_counts
from tailfin.data.folders import staged_folder
from tailfin.data.synth_draw import Drawn, draw_scene
from tailfin.data.synth_shapes import COLOURS, SHAPES, TEXTURES, Look
from tailfin.errors import UserError
from tailfin.files import read_json, write_json

VERSION = 1  # of the pictures: raised whenever the same settings give other pictures
MAX_CLASSES = len(SHAPES) * len(COLOURS) * len(TEXTURES)
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class SynthReport:
    """What was made."""

    train: Path  # annotation files
    val: Path
    names: tuple[str, ...]  # class names in label order
    train_instances: NDArray[np.int64]  # [C], annotations per class
    val_instances: NDArray[np.int64]  # [C]
    hidden: int  # objects drawn but too hidden to be annotated


def make_synthetic(
    out: str | os.PathLike[str],
    *,
    images_train: int = 600,
    images_val: int = 200,
    classes: int = 24,
    imbalance: float = 100.0,
    size: int = 160,
    seed: int = 0,
    objects: float = 3.5,
    federated: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SynthReport:
    """Make the set in the folder `out`.

    `objects` is the mean number of objects per picture, `size` the side of the square pictures in pixels. `federated`
    labels the training set as LVIS does: for each picture only some classes are checked (`neg_category_ids` lists those
    found absent), some are annotated in part (`not_exhaustive_category_ids`), and annotations of unchecked classes are
    left out. `progress` is called with (pictures done, all pictures).

    Settings that cannot be met and an `out` that is in use are `UserError`s.
    """
    settings = {
        "version": VERSION, "images_train": images_train, "images_val": images_val, "classes": classes,
        "imbalance": imbalance, "size": size, "seed": seed, "objects": objects, "federated": federated,
    }  # fmt: skip
    _check(settings)
    looks = vocabulary(classes)
    counts = {
        "train": exponential_counts(classes, images_train * objects, imbalance),
        "val": np.full(classes, max(1, round(images_val * objects / classes)), np.int64),
    }
    names = [look.name for look in looks]
    ids = np.argsort(np.argsort(names)) + 1  # category ids in the order of the names, as in LVIS
    total, done, hidden = images_train + images_val, 0, 0
    documents: dict[str, Document] = {}
    out = Path(out)
    with staged_folder(out, overwrite=overwrite) as folder:
        for number, (split, pictures) in enumerate(zip(_SPLITS, (images_train, images_val), strict=True)):
            (folder / split).mkdir()
            plan = _plan(np.random.default_rng([seed, number]), counts[split], pictures)
            document = _document(looks, ids, settings, split)
            for k, row in enumerate(plan):
                name = f"{k + 1:06d}.jpg"
                drawn = _make_picture(folder / split / name, [seed, number, k, VERSION], [looks[c] for c in row], size)
                document["images"].append({"id": k + 1, "file_name": name, "width": size, "height": size, "license": 1})
                for entry in drawn:
                    ordered = {"id": len(document["annotations"]) + 1, "image_id": k + 1}
                    category = {"category_id": int(ids[row[entry.index]])}
                    document["annotations"].append({**ordered, **category, **_annotation(entry)})
                hidden += len(row) - len(drawn)
                done += 1
                if progress:
                    progress(done, total)
            documents[split] = document
        if federated:
            documents["train"] = _federate(documents["train"], np.random.default_rng([seed, 2]))
        for split in _SPLITS:
            documents[split] = with_train_counts(documents[split], documents["train"])
            write_json(folder / f"{split}.json", documents[split])
    return SynthReport(
        out / "train.json",
        out / "val.json",
        tuple(sorted(names)),
        count_classes(documents["train"])[1],
        count_classes(documents["val"])[1],
        hidden,
    )


def demo_set(
    folder: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> tuple[Path, Path]:
    """(train.json, val.json) of the set that `tailfin demo` trains on; made where it is absent, old or incomplete.

    A folder that holds anything else is a `UserError`.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        state = _demo_state(folder)
        if state == "foreign":
            raise UserError(f"{folder} holds other files than the demo set; give another folder or an empty one")
        if state == "complete":
            return folder / "train.json", folder / "val.json"
    report = make_synthetic(folder, overwrite=True, progress=progress)
    return report.train, report.val


def vocabulary(classes: int) -> list[Look]:
    """The looks of a vocabulary of that size, the most frequent class first."""
    families = min(len(SHAPES) * len(COLOURS), -(-classes // 3))
    looks = []
    for rank in range(classes):
        member, family = divmod(rank, families)
        # steps that share no factor with the list's length visit every pair once
        colour = list(COLOURS)[(3 * family + family // len(SHAPES)) % len(COLOURS)]
        looks.append(Look(SHAPES[family % len(SHAPES)], TEXTURES[(family + 3 * member) % len(TEXTURES)], colour))
    return looks


def exponential_counts(classes: int, total: float, imbalance: float) -> NDArray[np.int64]:
    """Counts int64 [classes] that fall exponentially, sum to about `total` and are at least 1.

    The first over the last is `imbalance` wherever `total` is enough for it.
    """
    decay = imbalance ** -(np.arange(classes) / max(1, classes - 1))
    low, high = 1.0, max(1.0, float(total))
    for _ in range(60):  # bisection: the sum grows with the largest count
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(1, middle * decay).sum() < total else (low, middle)
    rarest = low * decay[-1]
    if rarest >= 1:
        low = round(rarest) / decay[-1]
    return np.maximum(1, np.rint(low * decay)).astype(np.int64)


# planning


def _check(settings: dict[str, Any]) -> None:
    for name, low, high in (
        ("images_train", 1, 10_000_000),
        ("images_val", 1, 10_000_000),
        ("classes", 1, MAX_CLASSES),
        ("imbalance", 1, 1e6),
        ("size", 48, 4096),
        ("objects", 1, 12),
        ("seed", 0, 2**63),
    ):
        value = settings[name]
        if not low <= value <= high:  # also catches NaN
            raise UserError(f"{name} is {value}, it must be {low} to {high}")
    for split in _SPLITS:
        room = math.floor(settings[f"images_{split}"] * settings["objects"])
        if room < settings["classes"]:
            raise UserError(
                f"images_{split} is {settings[f'images_{split}']}: that many pictures hold about {room} objects, "
                f"{settings['classes']} classes need at least one each"
            )


def _plan(rng: np.random.Generator, counts: NDArray[np.int64], pictures: int) -> list[NDArray[np.int64]]:
    """The classes of the objects of each picture, which together are exactly `counts`."""
    deck = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    mean = len(deck) / pictures
    most = max(2, math.ceil(2 * mean))
    sizes = np.minimum(rng.binomial(most - 1, min(1.0, max(0.0, (mean - 1) / (most - 1))), pictures) + 1, most)
    while (excess := int(sizes.sum()) - len(deck)) != 0:
        able = np.flatnonzero(sizes > (1 if len(deck) >= pictures else 0)) if excess > 0 else np.arange(pictures)
        chosen = rng.permutation(able)[: abs(excess)]
        sizes[chosen] -= np.sign(excess)
    return np.split(deck, np.cumsum(sizes)[:-1])


def _federate(document: Document, rng: np.random.Generator) -> Document:
    """The document with labels as a federated annotation campaign would have made them."""
    image_counts, _ = count_classes(document)
    ids = np.array([category["id"] for category in document["categories"]])
    checked_share = dict(zip(ids.tolist(), np.where(image_counts <= 10, 1.0, 0.8).tolist(), strict=True))
    by_image: dict[int, dict[int, list[dict[str, Any]]]] = {image["id"]: {} for image in document["images"]}
    for annotation in document["annotations"]:
        by_image[annotation["image_id"]].setdefault(annotation["category_id"], []).append(annotation)
    images, annotations = [], []
    for image in document["images"]:
        present = by_image[image["id"]]
        partial = []
        for category, own in sorted(present.items()):
            checked, thorough = rng.random(2)
            if checked > checked_share[category]:
                continue
            if len(own) > 1 and thorough < 0.3:
                own = own[: int(rng.integers(1, len(own)))]
                partial.append(category)
            annotations.extend(own)
        absent = np.array([number for number in ids.tolist() if number not in present], np.int64)
        negative = rng.choice(absent, min(len(absent), max(3, len(ids) // 4)), replace=False)
        lists = {"neg_category_ids": sorted(negative.tolist()), "not_exhaustive_category_ids": partial}
        images.append({**image, **lists})
    annotations.sort(key=lambda annotation: annotation["id"])
    return {**document, "images": images, "annotations": annotations}


# writing


def _document(looks: list[Look], ids: NDArray[np.int64], settings: dict[str, Any], split: str) -> Document:
    categories = [
        {"id": int(number), "name": look.name, "supercategory": look.shape}
        for number, look in zip(ids, looks, strict=True)
    ]
    return {
        "info": {"description": f"tailfin's synthetic set, {split} part", "settings": settings},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": [],
        "annotations": [],
        "categories": sorted(categories, key=lambda category: category["id"]),
    }


def _make_picture(path: Path, key: list[int], looks: list[Look], size: int) -> list[Drawn]:
    rng = np.random.default_rng(key)
    picture, drawn = draw_scene(rng, looks, size)
    Image.fromarray(picture).save(path, quality=int(rng.integers(82, 94)), subsampling=0)
    return drawn


def _annotation(drawn: Drawn) -> dict[str, Any]:
    """Box, area and mask: the polygon of an object in full view, a compressed RLE of what is seen of any other."""
    if drawn.outline is not None:
        points = np.round(np.clip(drawn.outline, 0, len(drawn.mask)), 2)
        (x, y), (right, bottom) = points.min(0), points.max(0)
        box, polygon = [x, y, right - x, bottom - y], points.ravel().tolist()
        ahead = np.roll(points, -1, axis=0)
        area = abs(float((points[:, 0] * ahead[:, 1] - points[:, 1] * ahead[:, 0]).sum())) / 2
        segmentation: Any = [polygon]
    else:
        rle = coco_mask.encode(np.asfortranarray(drawn.mask, dtype=np.uint8))
        box, area = coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle))
        segmentation = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}
    return {
        "bbox": [round(float(value), 2) for value in box],
        "area": round(area, 2),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def _demo_state(folder: Path) -> str:
    """ "complete", "stale" (ours, but old or incomplete) or "foreign"."""
    if {entry.name for entry in folder.iterdir()} - {"train.json", "val.json", "train", "val"}:
        return "foreign"
    try:
        documents = {split: read_json(folder / f"{split}.json") for split in _SPLITS}
        settings = [document["info"]["settings"] for document in documents.values()]
    except (UserError, KeyError, TypeError):
        return "foreign"
    if any(value != _DEMO_SETTINGS for value in settings):
        return "stale"
    for split, document in documents.items():
        there = {entry.name for entry in os.scandir(folder / split)} if (folder / split).is_dir() else set()
        if not {image["file_name"] for image in document["images"]} <= there:
            return "stale"
    return "complete"


def _default_settings() -> dict[str, Any]:
    defaults = make_synthetic.__kwdefaults__ or {}
    return {"version": VERSION, **{k: v for k, v in defaults.items() if k not in ("overwrite", "progress")}}


_DEMO_SETTINGS = _default_settings()
