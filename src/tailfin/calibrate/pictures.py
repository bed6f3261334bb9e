"""The annotated pictures that a calibration is chosen on: drawn class by class, and parted into folds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailfin.data.document import Document, load_document, positions, subset
from tailfin.errors import UserError
from tailfin.files import existing_file, write_json
from tailfin.samplers.class_aware import class_aware_order


class Folds(NamedTuple):
    """Annotation files of the folds, and the fold of each picture by its id."""

    files: list[Path]
    of_image: dict[int, int]
    whole: Path  # all of them in one file


def make_folds(annotations: str | Path, folder: Path, *, folds: int, most: int = -1, seed: int = 0) -> Folds:
    """Write the folds of an annotation file into `folder`.

    `most` pictures at most are taken (-1: all), those of each class in turn; pictures of the same rarest class are
    dealt out over the folds, so that every fold has some of a class that has enough of them.
    """
    document = load_document(existing_file(annotations, "annotations"))
    image_of, class_of = positions(document)
    if not len(image_of):
        raise UserError(f"{annotations} has no annotation to calibrate on")
    rng = np.random.default_rng([seed, 6])
    chosen = np.ones(len(document["images"]), dtype=bool)
    if 0 <= most < len(chosen):
        order = class_aware_order(image_of, class_of, 4 * most, rng)
        _, first = np.unique(order, return_index=True)
        chosen[:] = False
        chosen[order[np.sort(first)[:most]]] = True
    fold = _dealt(image_of, class_of, chosen, folds, rng)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(folds):
        files.append(_written(folder / f"fold{number}.json", document, fold == number, image_of))
    whole = _written(folder / "all.json", document, chosen, image_of)
    ids = [image["id"] for image in document["images"]]
    return Folds(files, {ids[row]: int(fold[row]) for row in np.flatnonzero(chosen)}, whole)


def _dealt(
    image_of: NDArray[np.int64],
    class_of: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    folds: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """int64 [I]: the fold of each picture, -1 of one that is not chosen."""
    images = len(chosen)
    pairs = np.unique(np.stack([image_of, class_of], axis=1), axis=0)
    sizes = np.bincount(pairs[:, 1])
    rarest = np.full(images, len(sizes), dtype=np.int64)  # of a picture without objects: a class of its own
    rank = np.argsort(np.argsort(sizes, kind="stable"), kind="stable")
    np.minimum.at(rarest, pairs[:, 0], rank[pairs[:, 1]])
    order = np.lexsort((rng.random(images), rarest))
    order = order[chosen[order]]
    if folds > len(order):
        raise UserError(f"--folds {folds}: there are {len(order)} pictures to calibrate on")
    fold = np.full(images, -1, dtype=np.int64)
    fold[order] = np.arange(len(order)) % folds
    return fold


def _written(path: Path, document: Document, keep: NDArray[np.bool_], image_of: NDArray[np.int64]) -> Path:
    write_json(path, subset(document, keep, keep[image_of]))
    return path
