"""A data set of Hugging Face's `datasets` with COCO-like features, as pictures and a COCO document.

    coco_of(datasets.load_dataset("cppe-5")["train"], Path("set"), "train")   # set/train.json, set/train/*.jpg

Features: `image`, and `objects` (a list of objects or one of lists) with `bbox` [x, y, width, height] and `category`
(also `categories`, `label`); `area`, `iscrowd` and polygons in `segmentation` are taken where there are such. Names of
classes are those of the feature; category k becomes id k + 1. Pictures that are stored encoded are written as they are.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tailfin.data.document import Document
from tailfin.errors import UserError

MARK = "hf:"  # before the name of a data set, or the folder of one that `save_to_disk` wrote
OBJECTS = ("objects", "annotations")
CATEGORIES = ("category", "categories", "category_id", "label", "labels")
BOXES = ("bbox", "bboxes", "boxes")
SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"}


def open_hub_set(source: str) -> dict[str, Any]:
    """The splits of `hf:NAME`, `hf:NAME:CONFIG` or `hf:FOLDER`, by our names."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs the package datasets: pip install 'tailfin[datasets]'") from None
    name = source.removeprefix(MARK)
    try:
        if Path(name).is_dir() and any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)
        else:
            name, _, config = name.partition(":")
            found = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library's own kinds are many
        raise UserError(f"{source} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, Mapping):
        return {"train": found}
    return {SPLITS.get(str(split), str(split)): part for split, part in found.items()}


def coco_of(part: Any, folder: Path, split: str) -> Document:
    """The COCO document of one split, a `datasets.Dataset`; its pictures are written below `folder`/`split`."""
    import datasets

    features = part.features
    if "image" not in features:
        raise UserError(f"the data set has no column image (it has {', '.join(features)})")
    objects = _named(OBJECTS, features, "the data set")
    names = _names(features[objects])
    place = folder / split
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(features["image"], datasets.Image):
        part = part.cast_column("image", datasets.Image(decode=False))
    document: Document = {"images": [], "annotations": [], "categories": []}
    largest = -1
    for number, row in enumerate(part, start=1):
        file, width, height = _write(row["image"], place, number)
        document["images"].append({"id": number, "file_name": file, "width": width, "height": height})
        for entry in _entries(row[objects], f"row {number - 1}"):
            label = entry.pop("category")
            label = names.index(label) if isinstance(label, str) and label in names else label
            if not isinstance(label, int) or label < 0:
                raise UserError(f"row {number - 1}: category {label!r} is neither a class name nor a number from 0")
            largest = max(largest, label)
            ids = {"id": len(document["annotations"]) + 1, "image_id": number, "category_id": label + 1}
            document["annotations"].append({**ids, "iscrowd": 0, **entry})
    if not names:
        names = [str(k) for k in range(largest + 1)]
    if largest >= len(names):
        raise UserError(f"the data set has {len(names)} class names, and an object of category {largest}")
    document["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    return document


# ---- details ---------------------------------------------------------------------------------------------------------


def _named(choices: Sequence[str], there: Any, what: str) -> str:
    found = next((name for name in choices if name in there), None)
    if found is None:
        raise UserError(f"{what} has no column {choices[0]} (it has {', '.join(map(str, there))})")
    return found


def _inner(feature: Any) -> Any:
    """What a list feature holds, in the forms of several versions of the library."""
    if isinstance(feature, list | tuple) and feature:
        return feature[0]
    return getattr(feature, "feature", feature)


def _names(feature: Any) -> list[str]:
    """Class names that the features know, in order; empty where categories are bare numbers."""
    fields = _inner(feature)
    if not isinstance(fields, Mapping):
        raise UserError("the objects of the data set are no records with bbox and category")
    label = _inner(fields[_named(CATEGORIES, fields, "an object")])
    return list(getattr(label, "names", None) or [])


def _entries(objects: Any, where: str) -> list[dict[str, Any]]:
    """The objects of a row as COCO fields."""
    if isinstance(objects, Mapping):
        count = max((len(values) for values in objects.values() if isinstance(values, list)), default=0)
        keys = [key for key, values in objects.items() if isinstance(values, list) and len(values) == count]
        objects = [{key: objects[key][k] for key in keys} for k in range(count)]
    found = []
    for entry in objects or ():
        box = entry[_named(BOXES, entry, f"{where}: an object")]
        if box is None or len(box) != 4:
            raise UserError(f"{where}: bbox {box} is not [x, y, width, height]")
        own: dict[str, Any] = {"bbox": [float(value) for value in box]}
        own["area"] = float(entry["area"]) if entry.get("area") is not None else own["bbox"][2] * own["bbox"][3]
        if entry.get("iscrowd") is not None:
            own["iscrowd"] = int(entry["iscrowd"])
        polygons = entry.get("segmentation")
        if isinstance(polygons, list) and polygons:
            own["segmentation"] = polygons if isinstance(polygons[0], list) else [polygons]
        own["category"] = entry[_named(CATEGORIES, entry, f"{where}: an object")]
        found.append(own)
    return found


def _write(image: Any, place: Path, number: int) -> tuple[str, int, int]:
    """Name, width and height of a picture's file, written as it is stored, else as PNG."""
    if isinstance(image, Mapping):
        data = image.get("bytes")
        if data is None:
            data = Path(str(image["path"])).read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            name = f"{number:06d}{ENDINGS.get(str(opened.format), '.png')}"
            turned = opened.getexif().get(274, 1) in range(5, 9)
            size = opened.size[::-1] if turned else opened.size
        (place / name).write_bytes(data)
        return name, int(size[0]), int(size[1])
    name = f"{number:06d}.png"
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(place / name)
    return name, picture.width, picture.height
