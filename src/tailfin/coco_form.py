"""A recipe with data of another layout than COCO's (`data/layouts.py`): converted to the run folder, or for a block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailfin.config import check_recipe
from tailfin.data.layouts import as_coco, below, is_annotation_file, splits_of
from tailfin.progress import Progress
from tailfin.schema.recipe import Recipe


@contextmanager
def converted(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with COCO files in the place of data of another layout, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="tailfin-data-") as folder:
        yield with_coco_files(recipe, Path(folder).resolve())


def with_coco_files(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with data of another layout (YOLO, VOC) converted into `folder`; a validation part of the training
    set is taken where none is named."""
    values = recipe.model_dump(mode="json")
    data, root = values["data"], Path(recipe.data.root)
    train = data["train"]["annotations"]
    if train and not data["val"]["annotations"] and "val" in splits_of(below(root, train)):
        data["val"] = {"annotations": train, "images": ""}
    for split in ("train", "val"):
        files = data[split]
        source = below(root, files["annotations"])
        if files["annotations"] and not is_annotation_file(source):
            given = as_coco(source, split, folder, files["images"] or None)
            data[split] = {"annotations": str(given.annotations), "images": str(given.images)}
            for note in given.notes:
                Progress("", 1).note(note)
    return check_recipe(values, recipe.name or "recipe") if values != recipe.model_dump(mode="json") else recipe
