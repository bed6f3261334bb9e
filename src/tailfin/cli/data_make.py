"""`tailfin data synth|split|convert|merge`: the tools that make annotation files and data set folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tailfin.cli.output import echo
from tailfin.errors import UserError
from tailfin.progress import Progress

_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what is already at the target.")]
_LINK = Annotated[
    bool, typer.Option("--link", help="Link the pictures (hard links where possible) instead of copying.")
]


def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make: train.json, val.json, train/, val/.")],
    images: Annotated[int, typer.Option(help="Training pictures.")] = 600,
    val_images: Annotated[int, typer.Option(help="Validation pictures.")] = 200,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 24,
    imbalance: Annotated[float, typer.Option(help="Most frequent class's count over the rarest one's.")] = 100.0,
    size: Annotated[int, typer.Option(help="Side of the square pictures in pixels.")] = 160,
    objects: Annotated[float, typer.Option(help="Mean number of objects per picture.")] = 3.5,
    seed: Annotated[int, typer.Option(help="The same seed gives the same set.")] = 0,
    federated: Annotated[bool, typer.Option("--federated", help="Label the training set as LVIS does.")] = False,
    overwrite: _OVERWRITE = False,
) -> None:
    """Draw a synthetic long-tailed set with boxes and masks."""
    from tailfin.data.synth import make_synthetic

    with Progress("drawing", images + val_images) as progress:
        report = make_synthetic(
            out, images_train=images, images_val=val_images, classes=classes, imbalance=imbalance, size=size, seed=seed,
            objects=objects, federated=federated, overwrite=overwrite, progress=lambda done, _: progress.update(done),
        )  # fmt: skip
    counts = report.train_instances
    echo(f"{report.train}: {images} pictures, {counts.sum()} objects of {classes} classes, {_range(counts)}")
    echo(f"{report.val}: {val_images} pictures, {report.val_instances.sum()} objects, {_range(report.val_instances)}")
    if report.hidden:
        echo(f"{report.hidden} objects are too hidden to be annotated")


def split(
    file: Annotated[Path, typer.Argument(help="COCO or LVIS annotation file.")],
    out_train: Annotated[Path, typer.Option(help="Training file to write.")],
    out_val: Annotated[Path | None, typer.Option(help="Validation file to write (with --val).")] = None,
    val: Annotated[float | None, typer.Option(help="Fraction of the images for validation, as 0.2.")] = None,
    long_tail: Annotated[bool, typer.Option("--long-tail", help="Thin the training part to a long tail.")] = False,
    imbalance: Annotated[
        float | None, typer.Option(help="With --long-tail: largest class count over the smallest.")
    ] = None,
    largest: Annotated[int | None, typer.Option(help="With --imbalance: the largest class count.")] = None,
    counts: Annotated[
        Path | None, typer.Option(help="With --long-tail: file with a `class: count` per line, or such JSON.")
    ] = None,
    keep_empty: Annotated[bool, typer.Option("--keep-empty", help="Keep images that lose all annotations.")] = False,
    images: Annotated[Path | None, typer.Option(help="Picture folder of FILE.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same split.")] = 0,
    overwrite: _OVERWRITE = False,
) -> None:
    """Split off a validation part, thin the training part to a long tail, or both.

    The split is stratified by image and keeps every class in both parts. Pictures stay where they are; the written file
    names lead to them from the new files where they lie beside or below these.
    """
    from tailfin.data.document import load_document, with_train_counts
    from tailfin.data.index import image_folder
    from tailfin.data.split import (
        absent_classes,
        long_tail_subsample,
        same_pictures,
        split_train_val,
        unlabelled,
    )
    from tailfin.files import write_json

    long_tail = long_tail or imbalance is not None or counts is not None
    if val is None and not long_tail:
        raise UserError("give --val FRACTION, --long-tail with --imbalance or --counts, or both")
    if (val is None) != (out_val is None):
        raise UserError("--val and --out-val belong together")
    targets = [path for path in (out_train, out_val) if path is not None]
    for path in targets:
        if path.exists() and (not overwrite or path.resolve() == file.resolve()):
            raise UserError(
                f"{path} exists" + ("" if path.resolve() == file.resolve() else " (--overwrite replaces it)")
            )
    if len({path.resolve() for path in targets}) < len(targets):
        raise UserError(f"--out-train and --out-val are both {out_train}")
    document = load_document(file)
    notes = []
    train, val_part = document, None
    if val is not None:
        groups = same_pictures(document, image_folder(file, images))
        repeated = len(groups) - len(set(groups.tolist()))
        notes.append(f"{repeated} pictures are there more than once (name or bytes): on one side each" * (repeated > 0))
        train, val_part = split_train_val(document, val, seed, groups=groups)
    if val_part is not None:
        notes.append(
            _listing("too few images to be in both parts, only in training", absent_classes(document, val_part))
        )
    if long_tail:
        if imbalance is None and counts is None:
            imbalance = 100.0
        wanted = read_counts(counts) if counts is not None else None
        thinned = long_tail_subsample(
            train, wanted, imbalance=imbalance, largest=largest, seed=seed, keep_empty=keep_empty
        )
        left = unlabelled(train, thinned)
        notes.append(f"{left} objects in the training pictures have lost their label" if left else "")
        train = thinned
        val_part = with_train_counts(val_part, train) if val_part is not None else None
    if not train["images"]:
        raise UserError(f"{file}: no image is left for training")
    pictures = image_folder(file, images)
    for target, part in ((out_train, train), (out_val, val_part)):
        if target is not None and part is not None:
            part, note = leading_to_pictures(part, pictures, target)
            write_json(target, part)
            echo(summary(target, part))
            notes.append(note)
    for note in filter(None, notes):
        echo(note)


def convert(
    source: Annotated[Path, typer.Argument(help="COCO .json or folder, YOLO data.yaml or folder, or VOC folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; for one COCO file without pictures a .json name.")],
    from_: Annotated[
        str | None, typer.Option("--from", help="coco, yolo or voc; found by looking if not given.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="coco (default), yolo or voc.")] = None,
    images: Annotated[Path | None, typer.Option(help="Picture folder of a COCO source.")] = None,
    link: _LINK = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="Write annotations only.")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="To YOLO: write polygons instead of boxes.")] = False,
    split: Annotated[str | None, typer.Option(help="Convert this split alone.")] = None,
    box_form: Annotated[
        str | None,
        typer.Option(help="Form of the boxes of YOLO's rows, where it is not theirs: xyxy-fractions, xywh, ..."),
    ] = None,
    overwrite: _OVERWRITE = False,
) -> None:
    """Convert between COCO JSON, YOLO and Pascal VOC."""
    from tailfin.data.box_forms import check_form
    from tailfin.data.convert import convert as convert_layout

    report = convert_layout(
        source, out, origin=_layout("--from", from_), target=_layout("--to", to), images=images,
        placing=_placing(link, no_images), masks=masks, split=split,
        box_form=check_form(box_form) if box_form is not None else None, overwrite=overwrite,
    )  # fmt: skip
    echo(f"{report.out}: {report.target}, {report.classes} classes")
    for name, number in report.images.items():
        echo(f"  {name}: {number} pictures, {report.objects[name]} objects, pictures in {report.folders[name]}")
    for number, what in (
        (report.crowd, "crowd regions left out"),
        (report.empty, "boxes without area in the picture left out"),
        (report.clipped, "boxes cut at the border"),
        (report.masks, "masks left out (boxes are written)"),
    ):
        if number:
            echo(f"  {number} {what}")
    for note in report.notes:
        echo(f"  {note}")


def merge(
    files: Annotated[list[Path], typer.Argument(help="COCO or LVIS annotation files; one may do for renaming.")],
    out: Annotated[Path, typer.Option(help="Annotation file to write.")],
    map_: Annotated[
        Path | None, typer.Option("--map", help="YAML file of `old: new` lines; null drops a class.")
    ] = None,
    rename: Annotated[list[str] | None, typer.Option(help="old=new, may be repeated; `old=` drops the class.")] = None,
    file_prefix: Annotated[list[str] | None, typer.Option(help="Put before file names; once per file.")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="Picture folder; once per file.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the pictures to the folder beside OUT.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Link them there.")] = False,
    counts_from: Annotated[
        Path | None, typer.Option(help="Merged training file to take the class counts from (for a validation file).")
    ] = None,
    federated: Annotated[
        bool, typer.Option("--federated", help="List per image which classes its file knows, as LVIS does.")
    ] = False,
    classes_of: Annotated[
        Path | None,
        typer.Option(help="File whose classes and ids OUT takes, joined by name; missing ones are added (for val)."),
    ] = None,
    box_form: Annotated[
        str | None,
        typer.Option(help="Form of the boxes, which OUT has as xywh: xyxy, cxcywh, xywh-fractions, ..."),
    ] = None,
    overwrite: _OVERWRITE = False,
) -> None:
    """Merge annotation files; rename, join, add and drop classes; mend boxes of another form."""
    from tailfin.data.box_forms import check_form
    from tailfin.data.merge import merge_files, read_mapping

    mapping = read_mapping(map_) if map_ is not None else {}
    for pair in rename or ():
        old, found, new = pair.partition("=")
        if not found or not old:
            raise UserError(f"--rename {pair}: old=new is needed (`old=` drops the class)")
        mapping[old] = new or None
    if copy and link:
        raise UserError("--copy and --link exclude each other")
    report = merge_files(
        files, out, mapping=mapping, prefixes=file_prefix or None, images=images or None,
        placing="copy" if copy else "link" if link else "none", counts_from=counts_from, federated=federated,
        box_form=check_form(box_form) if box_form is not None else None, classes_of=classes_of, overwrite=overwrite,
    )  # fmt: skip
    echo(f"{out}: {report.images} pictures, {report.annotations} objects, {report.classes} classes")
    if report.added:
        echo(f"  {_listing(f'of {classes_of} added, none of their objects in these pictures', report.added)}")
    if report.dropped:
        echo(f"  {report.dropped} objects of dropped classes left out")
    for name, number in report.lacking.items():
        echo(
            f"  {name} does not know {number} of the classes: its pictures count as free of them "
            "(--federated: as unknown)"
        )


def read_counts(path: Path) -> dict[str, int]:
    """Class counts from JSON ({"name": n}) or from `name: n` lines."""
    from tailfin.data.yolo_yaml import load_plain_yaml
    from tailfin.files import read_json

    value = read_json(path, "counts file") if path.suffix == ".json" else load_plain_yaml(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no counts; `class: count` per line or a JSON object is needed")
    counts = {}
    for name, count in value.items():
        if isinstance(count, str) and count.strip().isdecimal():
            count = int(count)
        if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f'{path}: class "{name}": {count!r} is no count, a whole number of at least 0 is needed')
        counts[name] = count
    return counts


# details


def leading_to_pictures(document: dict[str, Any], folder: Path, target: Path) -> tuple[dict[str, Any], str]:
    """The document with file names that lead from the picture folder of `target` to `folder`; else a note."""
    from tailfin.data.document import file_name
    from tailfin.data.folders import leading_prefix
    from tailfin.data.index import image_folder

    prefix = leading_prefix(folder, image_folder(target))
    if prefix is None:
        return document, f"the pictures of {target} are in {folder}: name that folder where {target.name} is used"
    if not prefix:
        return document, ""
    return {**document, "images": [{**i, "file_name": prefix + file_name(i)} for i in document["images"]]}, ""


def _layout(option: str, value: str | None) -> Any:
    from tailfin.errors import nearest

    if value is not None and value not in ("coco", "yolo", "voc"):
        raise UserError(f"{option} {value} is not a layout{nearest(value, ('coco', 'yolo', 'voc'))}")
    return value


def _placing(link: bool, no_images: bool) -> Any:
    if link and no_images:
        raise UserError("--link and --no-images exclude each other")
    return "none" if no_images else "link" if link else "copy"


def _range(counts: Any) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{high} per class" if low == high else f"{high} to {low} per class"


def summary(path: Path, document: dict[str, Any]) -> str:
    present = len({annotation["category_id"] for annotation in document["annotations"]})
    return (
        f"{path}: {len(document['images'])} pictures, {len(document['annotations'])} objects, "
        f"{present} of {len(document['categories'])} classes"
    )


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{len(names)} classes {what}: {shown}"
