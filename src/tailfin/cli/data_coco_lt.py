"""`tailfin data coco-lt`: the long-tailed part of COCO, or of any other set, with pictures of a class whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tailfin.cli.output import echo
from tailfin.errors import UserError


def coco_lt(
    file: Annotated[Path, typer.Argument(help="COCO annotation file: instances_train2017.json.")],
    out: Annotated[Path, typer.Option(help="Annotation file to write.")],
    image_ids: Annotated[
        Path | None,
        typer.Option(help="The set's own list: image ids (JSON, or one per line), or JSON {class: [image ids]}."),
    ] = None,
    counts: Annotated[
        Path | None, typer.Option(help="Annotations per class instead of COCO-LT's: `class: count` lines or JSON.")
    ] = None,
    imbalance: Annotated[
        float | None, typer.Option(help="Exponential fall instead: largest class count over the smallest.")
    ] = None,
    largest: Annotated[int | None, typer.Option(help="With --imbalance: the largest class count.")] = None,
    keep_empty: Annotated[bool, typer.Option("--keep-empty", help="Keep pictures that lose all annotations.")] = False,
    images: Annotated[Path | None, typer.Option(help="Picture folder of FILE.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same set.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is already at the target.")] = False,
) -> None:
    """Make a long-tailed training set with COCO-LT's number of annotations per class, or from its list.

    A class is annotated completely in a picture or not at all. Evaluate on all of val2017 with --protocol groups.
    """
    from tailfin.cli.data_make import leading_to_pictures, read_counts, summary
    from tailfin.data import coco_lt as lt
    from tailfin.data.document import count_classes, load_document
    from tailfin.data.index import image_folder
    from tailfin.data.split import exponential_counts, given_counts
    from tailfin.files import write_json

    given = [f"--{name}" for name, value in (("image-ids", image_ids), ("counts", counts), ("imbalance", imbalance))
             if value is not None]  # fmt: skip
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other")
    if largest is not None and imbalance is None:
        raise UserError("--largest belongs to --imbalance")
    if out.exists() and (not overwrite or out.resolve() == file.resolve()):
        raise UserError(f"{out} exists" + ("" if out.resolve() == file.resolve() else " (--overwrite replaces it)"))
    document = load_document(file)
    present = count_classes(document)[1]
    names = [category["name"] for category in document["categories"]]
    lacking = np.zeros(len(names), dtype=np.int64)
    if image_ids is not None:
        keep = lt.choose_listed(document, lt.read_listed(image_ids), str(image_ids))
    else:
        if imbalance is not None:
            wanted = exponential_counts(present, imbalance, largest)
        else:
            wanted = given_counts(document, present, read_counts(counts) if counts else lt.coco_counts(document))
        keep, lacking = lt.choose_pairs(document, wanted, seed)
    made = lt.kept_document(document, keep, keep_empty=keep_empty)
    if not made["annotations"]:
        raise UserError(f"{file}: no annotation is left")
    made, note = leading_to_pictures(made, image_folder(file, images), out)
    write_json(out, made)
    echo(summary(out, made))
    for line in (_groups(out), _lacking(names, lacking), note):
        if line:
            echo(line)


def _groups(path: Path) -> str:
    """Classes in each of COCO-LT's groups by the written file, as `data stats` counts it."""
    from tailfin.evaluation.groups import COCO_LT_EDGES
    from tailfin.stats import ClassStats

    counts = np.asarray(ClassStats.from_json(path).instance_count)
    group = np.searchsorted(COCO_LT_EDGES, counts[counts > 0], side="right") - 1
    ends = [*map(str, COCO_LT_EDGES[1:]), "inf"]
    sizes = zip(COCO_LT_EDGES, ends, np.bincount(group, minlength=len(ends)).tolist(), strict=True)
    shown = ", ".join(f"{size} in [{first},{last})" for first, last, size in sizes)
    return f"classes by annotations: {shown}; {counts.max()} to {counts[counts > 0].min()} per class"


def _lacking(names: list[str], lacking: np.ndarray) -> str:
    rows = np.flatnonzero(lacking)
    if not len(rows):
        return ""
    shown = ", ".join(f"{names[row]} {lacking[row]}" for row in rows[:12]) + (", ..." if len(rows) > 12 else "")
    return f"{len(rows)} classes have fewer annotations than wanted, by: {shown}"
