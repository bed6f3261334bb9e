"""COCO and LVIS files as plain dicts, for tools that write annotation files: reading with every check, and counting.

Tools that only read annotations use `tailfin.data.index`. Here unknown fields matter: what a tool does not change, it
hands on as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.data import annotation_json
from tailfin.data.annotation_json import LISTS
from tailfin.data.columns import doubled_categories, parse
from tailfin.data.index import open_index
from tailfin.data.problems import unsafe_path
from tailfin.errors import UserError
from tailfin.files import existing_file
from tailfin.stats import frequency_groups

Document = dict[str, Any]


def load_document(path: str | Path, *, box_form: str | None = None, same_names: bool = False) -> Document:
    """The parsed file, after the checks of `open_index`: what is returned has ids, boxes and links in order.

    `box_form` turns boxes of one of `box_forms.FORMS` into [x, y, width, height]. `same_names` lets several annotated
    categories of one name pass, which every other caller refuses.
    """
    path = existing_file(path, "annotation file")
    boxes = None
    if box_form is None and not same_names:
        open_index(path)
    else:
        raw, _, findings = parse(path, box_form)
        findings = [finding for finding in findings if not (same_names and finding.kind == "names")]
        if raw is None or findings:
            raise UserError(f"{path}: {next(findings[0].messages())}")
        boxes = raw.boxes if box_form is not None else None
    document = annotation_json.decode_plain(annotation_json.read_bytes(path), f"annotation file {path}")
    if boxes is not None:
        for annotation, box in zip(document["annotations"], boxes.tolist(), strict=True):
            annotation["bbox"] = [round(value, 4) for value in box]
            if not annotation.get("segmentation"):
                annotation["area"] = round(box[2] * box[3], 4)
        document["box_form"] = "xywh"
    return _without_doubles(document)


def _without_doubles(document: Document) -> Document:
    """Without the unannotated categories that bear another's name, as `open_index` reads the file."""
    categories = [(entry["id"], entry["name"], entry.get("supercategory")) for entry in document["categories"]]
    doubles = doubled_categories(categories, {annotation["category_id"] for annotation in document["annotations"]})
    if not doubles:
        return document
    images = []
    for image in document["images"]:
        lists = {key: image[key] for key in LISTS if image.get(key)}
        images.append({**image, **{key: [doubles.get(n, n) for n in values] for key, values in lists.items()}})
    kept = [category for category in document["categories"] if category["id"] not in doubles]
    return {**document, "images": images, "categories": kept}


def file_name(image: Mapping[str, Any]) -> str:
    """File name below the image folder; an LVIS image without one uses the last two parts of its `coco_url`."""
    name = image.get("file_name")
    if name is None:
        name = "/".join(str(image.get("coco_url", "")).split("/")[-2:])
    problem = unsafe_path(name)
    if problem:
        raise UserError(f"image {image.get('id')}: file_name {problem}")
    return str(name)


def positions(document: Document) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image position and category position of each annotation, int64 [A] each; a dangling id is a `UserError`."""
    columns = []
    for what, key in (("image", "images"), ("category", "categories")):
        place = {entry["id"]: position for position, entry in enumerate(document[key])}
        try:
            column = [place[annotation[f"{what}_id"]] for annotation in document["annotations"]]
        except KeyError:
            bad = next(a for a in document["annotations"] if a.get(f"{what}_id") not in place)
            raise UserError(f"annotation {bad.get('id')}: {what}_id {bad.get(f'{what}_id')} does not exist") from None
        columns.append(np.array(column, np.int64))
    return columns[0], columns[1]


def count_classes(document: Document) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Images and instances per category position, int64 [C] each; crowds count, as in COCO-LT's own numbers."""
    classes = len(document["categories"])
    image_of, category_of = positions(document)
    pairs = np.unique(image_of * classes + category_of)
    return np.bincount(pairs % classes, minlength=classes), np.bincount(category_of, minlength=classes)


def with_train_counts(document: Document, train: Document) -> Document:
    """`document` with `image_count`, `instance_count` and `frequency` of its categories as counted in `train`.

    A class that `train` has no image of belongs to no group: it has no `frequency`.
    """
    images, instances = count_classes(train)
    counted = {
        category["name"]: (image_count, instance_count, group)
        for category, image_count, instance_count, group in zip(
            train["categories"], images.tolist(), instances.tolist(), frequency_groups(images), strict=True
        )
    }
    categories = []
    for category in document["categories"]:
        image_count, instance_count, group = counted.get(category["name"], (0, 0, ""))
        kept = {key: value for key, value in category.items() if key != "frequency"}
        counts = {"image_count": image_count, "instance_count": instance_count}
        categories.append({**kept, **counts, **({"frequency": group} if group else {})})
    return {**document, "categories": categories}


def subset(document: Document, images: NDArray[np.bool_], annotations: NDArray[np.bool_]) -> Document:
    """The document with the marked images and annotations (bool [I], bool [A]), in the file's order."""
    return {
        **document,
        "images": [image for image, keep in zip(document["images"], images.tolist(), strict=True) if keep],
        "annotations": [a for a, keep in zip(document["annotations"], annotations.tolist(), strict=True) if keep],
    }
