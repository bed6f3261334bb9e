"""What every layout is read into and written from: splits as COCO documents with their picture files, and a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tailfin.data.document import Document

Layout = Literal["coco", "yolo", "voc"]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Part:
    """One split: its COCO document and, for each of the document's images, the picture file."""

    name: str
    document: Document
    files: list[Path]
    notes: list[str] = field(default_factory=list)  # what the reader passed over or took for something


@dataclass
class Report:
    """What was written and what had to stay behind."""

    target: Layout
    out: Path
    images: dict[str, int] = field(default_factory=dict)  # per split
    objects: dict[str, int] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)  # where the pictures of a split lie
    classes: int = 0
    crowd: int = 0  # crowd regions left out
    clipped: int = 0  # boxes cut at the border
    empty: int = 0  # boxes without area in the picture, left out
    masks: int = 0  # masks left out
    notes: list[str] = field(default_factory=list)  # of the parts


def on_both_sides(parts: Sequence[Part]) -> list[str]:
    """Notes on splits that have pictures in common: what is measured on them was trained on."""
    files = [{os.path.realpath(file) for file in part.files} for part in parts]
    notes = []
    for number, part in enumerate(parts):
        for other in range(number):
            if both := len(files[number] & files[other]):
                pictures = "1 picture is" if both == 1 else f"{both} pictures are"
                notes.append(
                    f"{pictures} in {parts[other].name} and in {part.name}: they are no measure of what is learnt"
                )
    return notes


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all files."""
    return Path(os.path.commonpath([file.parent for file in files])) if files else Path()


def clip_box(box: Sequence[float], image: dict[str, Any], report: Report) -> tuple[float, float, float, float] | None:
    """The part of [x, y, w, h] inside the image, None when it has no area; cuts are counted in the report."""
    x, y, width, height = (float(value) for value in box)
    left, top = min(max(x, 0.0), image["width"]), min(max(y, 0.0), image["height"])
    right, bottom = min(max(x + width, 0.0), image["width"]), min(max(y + height, 0.0), image["height"])
    if right <= left or bottom <= top:
        report.empty += 1
        return None
    if (left, top) != (x, y) or right < x + width or bottom < y + height:
        report.clipped += 1
        return left, top, right - left, bottom - top
    return x, y, width, height


def annotations_by_image(document: Document) -> dict[int, list[dict[str, Any]]]:
    """The annotations of each image id, in file order."""
    grouped: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    return grouped
