"""Between the three common layouts: COCO JSON, a YOLO folder with its data.yaml, and a Pascal VOC folder.

`convert` reads one layout into `Part`s (`parts.py`) and writes them in
another. The layouts themselves are in `yolo.py` and `voc.py`; COCO's is here::

    convert("yolo-set", "coco-set", target="coco")  # coco-set/train.json, coco-set/train/*.jpg, ...

Boxes survive: to YOLO and back within 1e-4 pixels (clipped to the image, which YOLO cannot leave), to VOC and back
exactly. Crowd regions have no place in YOLO or VOC and are left out; the report counts what was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tailfin.data.document import Document, file_name, load_document, with_train_counts
from tailfin.data.folders import Placing, place_image, staged_folder
from tailfin.data.images import is_hidden
from tailfin.data.index import image_folder, image_path
from tailfin.data.parts import SPLITS, Layout, Part, Report, common_folder, on_both_sides
from tailfin.data.voc import read_voc, write_voc
from tailfin.data.yolo import read_yolo, write_yolo
from tailfin.data.yolo_yaml import CLASS_LISTS
from tailfin.errors import UserError
from tailfin.files import write_json


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    origin: Layout | None = None,
    target: Layout | None = None,
    images: str | os.PathLike[str] | None = None,
    placing: Placing = "copy",
    masks: bool = False,
    split: str | None = None,
    box_form: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Convert the data set `source` (a COCO file or folder, a data.yaml or YOLO folder, a VOC folder) to `out`.

    `origin` is found by looking when it is None; `target` defaults to COCO for the other two. `images` is the picture
    folder of a COCO source (default: the usual rule). `placing` copies, links or leaves the pictures. `masks` writes
    polygons to YOLO instead of boxes. `box_form` is that of a YOLO source's boxes (a key of `box_forms.FORMS`), where
    it is not YOLO's. `split` takes or names a single split. An `out` ending in .json is one COCO file without
    pictures. Every mistake in the source is a `UserError` with file and line or id; nothing is written then.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise UserError(f"{source} does not exist")
    origin = origin or detect_layout(source)
    if target is None:
        if origin == "coco":
            raise UserError(f"{source} is COCO: say with --to whether it becomes yolo or voc")
        target = "coco"
    if origin == target:
        raise UserError(f"{source} is {origin} already, there is nothing to convert")
    if out.resolve() == source.resolve() or source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the source {source}; give another target")

    if box_form is not None and origin != "yolo":
        raise UserError(
            f"--box-form goes with YOLO's rows, {source} is {origin}; `tailfin data merge` has it for COCO files"
        )
    readers: dict[Layout, Callable[[], list[Part]]] = {
        "coco": lambda: read_coco(source, images=images, split=split),
        "yolo": lambda: read_yolo(source, box_form),
        "voc": lambda: read_voc(source),
    }
    parts = readers[origin]()
    if split is not None and origin != "coco":
        parts = [_named(parts, split, source)]
    report = Report(target, out, classes=len(parts[0].document["categories"]))
    report.notes = [note for part in parts for note in part.notes] + on_both_sides(parts)
    if out.suffix == ".json" and target == "coco":
        _write_single(parts, out, report, overwrite)
        return report
    with staged_folder(out, overwrite=overwrite) as folder:
        if target == "coco":
            write_coco(parts, folder, placing, report)
        elif target == "yolo":
            write_yolo(parts, folder, placing, report, masks=masks)
        else:
            write_voc(parts, folder, placing, report)
    return report


def detect_layout(path: Path) -> Layout:
    """The layout of a file or folder, by the files that are there."""
    if path.is_file():
        layouts: dict[str, Layout] = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}
        if path.suffix.lower() in layouts:
            return layouts[path.suffix.lower()]
        raise UserError(f"{path} is neither a COCO .json nor a YOLO .yaml file")
    if _any(path, "*.yaml", "*.yml") or _any(path, *CLASS_LISTS) or _any(path / "labels", "*.txt", "*/*.txt"):
        return "yolo"
    if _any(path, "Annotations/**/*.xml", "*.xml", "*/*.xml"):
        return "voc"
    if _any(path, "*.json", "annotations/*.json"):
        return "coco"
    raise UserError(
        f"{path} has no data set that is known: a YOLO data.yaml or classes.txt, VOC Annotations/*.xml or COCO *.json "
        "was looked for"
    )


def _any(folder: Path, *patterns: str) -> bool:
    return any(not is_hidden(found) for pattern in patterns for found in folder.glob(pattern))


def read_coco(source: Path, *, images: str | os.PathLike[str] | None = None, split: str | None = None) -> list[Part]:
    """The parts of a COCO file, or of the files of a folder (`*.json`, else `annotations/*.json`)."""
    files = [source]
    if source.is_dir():
        patterns = ("*.json", "annotations/instances_*.json", "annotations/*.json")
        files = next((found for pattern in patterns if (found := _visible(source, pattern))), [])
        if not files:
            raise UserError(f"{source} has no COCO *.json file")
    names = _split_names(files)
    if split is not None:
        if len(files) > 1 and split not in names:
            raise UserError(f"{source} has no split {split} (choices: {', '.join(names)})")
        files = files if len(files) == 1 else [files[names.index(split)]]
        names = [split]
    parts = []
    for name, path in zip(names, files, strict=True):
        document = load_document(path)
        folder = _pictures_of(path, source, images)
        parts.append(Part(name, *_with_pictures(document, folder)))
    _same_classes(parts, files)
    # train first: its categories and counts lead
    return sorted(parts, key=lambda part: SPLITS.index(part.name) if part.name in SPLITS else len(SPLITS))


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path))


def _with_pictures(document: Document, folder: Path) -> tuple[Document, list[Path]]:
    """The document with the names that its pictures have in `folder` (see `image_path`), and their paths."""
    images, files = [], []
    for image in document["images"]:
        name = file_name(image)
        file = image_path(folder, name)
        files.append(file)
        images.append(image if file == folder / name else {**image, "file_name": file.relative_to(folder).as_posix()})
    return {**document, "images": images}, files


def write_coco(parts: Sequence[Part], folder: Path, placing: Placing, report: Report) -> None:
    """`folder`/SPLIT.json and `folder`/SPLIT/, with counts of the training part."""
    for part in parts:
        _note(part, report, report.out / part.name if placing != "none" else common_folder(part.files))
        for image, file in zip(part.document["images"], part.files, strict=True):
            place_image(file, folder / part.name / file_name(image), placing)
        write_json(folder / f"{part.name}.json", _counted(part, parts))


def _write_single(parts: list[Part], out: Path, report: Report, overwrite: bool) -> None:
    if len(parts) > 1:
        names = ", ".join(part.name for part in parts)
        raise UserError(
            f"{out} is one file and the source has the splits {names}: choose one (--split) or give a folder"
        )
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists (--overwrite replaces it)")
    _note(parts[0], report, common_folder(parts[0].files))
    write_json(out, _counted(parts[0], parts))


def _note(part: Part, report: Report, folder: Path) -> None:
    report.images[part.name] = len(part.document["images"])
    report.objects[part.name] = len(part.document["annotations"])
    report.folders[part.name] = folder


def _counted(part: Part, parts: Sequence[Part]) -> Document:
    train = next((other for other in parts if other.name == "train"), None)
    return with_train_counts(part.document, train.document) if train else part.document


def _named(parts: list[Part], split: str, source: Path) -> Part:
    for part in parts:
        if part.name == split:
            return part
    raise UserError(f"{source} has no split {split} (choices: {', '.join(part.name for part in parts)})")


def _split_names(files: Sequence[Path]) -> list[str]:
    """train, val or test where a file's stem says so, else the stem; a single file of another name is train."""
    names = []
    for file in files:
        found = [name for name in SPLITS if name in file.stem.lower()]
        names.append(found[0] if len(found) == 1 else file.stem if len(files) > 1 else "train")
    return names if len(set(names)) == len(names) else [file.stem for file in files]


def _pictures_of(path: Path, source: Path, images: str | os.PathLike[str] | None) -> Path:
    if images is not None:
        beside = Path(images) / path.stem
        return beside if beside.is_dir() else image_folder(path, Path(images))
    folder = image_folder(path)
    if folder == path.parent and path.parent.name == "annotations":  # COCO's own download: annotations/ beside pictures
        stem = path.stem.removeprefix("instances_")
        for candidate in (path.parent.parent / stem, path.parent.parent / "images" / stem):
            if candidate.is_dir():
                return candidate
    return folder


def _same_classes(parts: Sequence[Part], files: Sequence[Path]) -> None:
    first = {category["name"]: category["id"] for category in parts[0].document["categories"]}
    for part, file in zip(parts, files, strict=True):
        own = {category["name"]: category["id"] for category in part.document["categories"]}
        odd = next((name for name in [*own, *first] if own.get(name) != first.get(name)), None)
        if odd is not None:
            raise UserError(
                f'{file}: class "{odd}" has id {own.get(odd, "none")} here and {first.get(odd, "none")} in {files[0]}; '
                "the files of one data set need the same categories (`tailfin data merge FILE --classes-of "
                f"{files[0]} --out NEW` gives a file those of another)"
            )
