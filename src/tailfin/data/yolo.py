"""The YOLO layout: data.yaml, images/, and for each picture a text file with one object per line.

A line is `class cx cy w h` (a box) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon), class from 0, coordinates as fractions
of the picture's width and height. The label file of a picture has the same path with the last `/images/` replaced by
`/labels/`, or lies beside the picture; none, or an empty one, means no objects. Without a data.yaml the classes are the
lines of classes.txt, as Label Studio and labelImg write it.
The rows themselves are in `yolo_rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tailfin.data.box_forms import FORMS
from tailfin.data.document import Document, file_name
from tailfin.data.folders import Placing, place_image
from tailfin.data.images import is_hidden, is_picture, pictures_below, read_header
from tailfin.data.parts import Part, Report, annotations_by_image, clip_box, common_folder
from tailfin.data.yolo_rows import Rows, check_form, is_number, parse_row, row_kind, shape_fields
from tailfin.data.yolo_yaml import _names, _root, check_names, class_list, find_yaml, load_plain_yaml
from tailfin.errors import UserError
from tailfin.files import read_text, write_atomic
from tailfin.joins import plain_name

_KEYS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


def read_yolo(source: Path, box_form: str | None = None) -> list[Part]:
    """The splits of a data.yaml, of the folder that holds it, or of a folder with classes.txt; class k becomes category
    k + 1. `box_form` is that of the rows (`box_forms.FORMS`), where it is not YOLO's own."""
    path = find_yaml(source)
    names, splits, settings, absent = _without_yaml(source) if path is None else _splits(path)
    labelled = {split: _label_files(pictures) for split, (_, pictures) in splits.items()}
    rows = row_kind(path or source, settings, [file for found in labelled.values() for file in found if file])
    if box_form is not None:
        rows = replace(rows, form=box_form)
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    parts: list[Part] = []
    for split, (place, pictures) in splits.items():
        before = (sum(len(part.document[what]) for part in parts) for what in ("images", "annotations"))
        labels = labelled[split]
        if not any(labels) and split != "test":
            raise UserError(
                f"{place}: none of the {len(pictures)} pictures has a label file (the first was looked for at "
                f"{label_file(pictures[0])})"
            )
        parts.append(_read_split(split, pictures, labels, categories, rows, *before))
        parts[-1].notes.extend(f"{split}: {note}" for note in _orphans(pictures))
    if box_form is None and (doubt := check_form(_boxes(parts), str(path or source))):
        absent = [*absent, doubt]
    parts[0].notes[:0] = absent
    return parts


def _boxes(parts: Sequence[Part]) -> NDArray[np.float64]:
    """Boxes [N, 4] that came as such, centre and size as fractions."""
    found = []
    for part in parts:
        sizes = {image["id"]: (image["width"], image["height"]) for image in part.document["images"]}
        for annotation in part.document["annotations"]:
            if "segmentation" not in annotation:
                (x, y, w, h), (width, height) = annotation["bbox"], sizes[annotation["image_id"]]
                found.append([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
    return np.array(found, np.float64).reshape(-1, 4)


def write_yolo(parts: Sequence[Part], folder: Path, placing: Placing, report: Report, *, masks: bool = False) -> None:
    """data.yaml, images/SPLIT/ and labels/SPLIT/ in `folder`; classes in the order of ascending category id."""
    categories = sorted(parts[0].document["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: k for k, category in enumerate(categories)}
    entries: dict[str, Any] = {}
    for part in parts:
        base = folder / "images" / part.name
        base.mkdir(parents=True)
        grouped = annotations_by_image(part.document)
        written: dict[Path, int] = {}
        objects = 0
        for image, file in zip(part.document["images"], part.files, strict=True):
            target = base / file_name(image)
            labels = label_file(target)
            if labels in written:
                raise UserError(
                    f"images {written[labels]} and {image['id']} would share the label file "
                    f"{labels.relative_to(folder)}: their names differ in the suffix alone"
                )
            written[labels] = image["id"]
            lines = _lines(grouped[image["id"]], image, label_of, report, masks)
            objects += len(lines)
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            place_image(file, target, placing)
        entries[part.name] = f"images/{part.name}"
        report.images[part.name], report.objects[part.name] = len(part.files), objects
        report.folders[part.name] = report.out / "images" / part.name
    entries["names"] = {k: category["name"] for k, category in enumerate(categories)}
    # no `path:` key: readers then start at the folder of the file, wherever it is moved to
    write_atomic(folder / "data.yaml", yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))


def label_file(picture: Path) -> Path:
    """Where the labels of a picture are written, and looked for first."""
    parts = list(picture.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def find_labels(picture: Path) -> Path | None:
    """The label file of a picture: in `labels/`, else beside it."""
    return next((path for path in (label_file(picture), picture.with_suffix(".txt")) if path.is_file()), None)


# reading


Splits = dict[str, tuple[str, list[Path]]]  # where a split is named, for messages, and its pictures


def _without_yaml(source: Path) -> tuple[list[str], Splits, dict[str, Any], list[str]]:
    """Names of classes.txt, and the pictures of images/, by its folders train, val and test where there are such."""
    file = class_list(source)
    assert file is not None
    names = [line.strip() for line in _text_lines(file) if line.strip()]
    check_names(file, names)
    root = source / "images" if (source / "images").is_dir() else source
    splits: Splits = {}
    for key, split in _KEYS.items():
        for folder in (root / key, source / key):
            if folder.is_dir() and split not in splits and (pictures := pictures_below(folder)):
                splits[split] = (str(folder), pictures)
    if not splits:
        pictures = pictures_below(root)
        if not pictures:
            raise UserError(f"{root} has no pictures")
        splits["train"] = (str(root), pictures)
    return names, splits, {}, [f"no data.yaml: classes of {file.name}, pictures of {root.name}/"]


def _splits(path: Path) -> tuple[list[str], Splits, dict[str, Any], list[str]]:
    """What a data.yaml names: classes, splits, all its settings, and notes on splits that are not there."""
    settings = load_plain_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no mapping; keys train, val and names are needed")
    names = _names(path, settings)
    root = _root(path, settings)
    splits: Splits = {}
    absent: dict[str, str] = {}
    for key, split in _KEYS.items():
        entries = settings.get(key)
        if entries is None or entries == "" or split in splits:
            continue
        try:
            splits[split] = (f"{path}: {key}", _pictures(path, key, entries, root))
        except _AbsentError as error:  # a share without one of the parts that it was made with
            absent[split] = str(error)
    if "train" in absent or (absent and not splits):
        raise UserError(absent.get("train") or next(iter(absent.values())))
    if not splits:
        raise UserError(f"{path} names no pictures: a key train, val or test is needed")
    return names, splits, settings, [f"{text}: left out" for text in absent.values()]


class _AbsentError(Exception):
    """A split that is named and not there."""


def _pictures(path: Path, key: str, entries: Any, root: Path) -> list[Path]:
    """The picture files of one key: a folder, a text file of paths, or a list of those; sorted within a folder."""
    found: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str) or not entry:
            raise UserError(f"{path}: {key}: {entry!r} is no path")
        entry = entry.replace("\\", "/")
        place = root / entry
        if not place.exists() and entry.startswith("../"):  # as some exports write it, one level too high
            place = root / entry[3:]
        if place.is_dir():
            found.extend(pictures_below(place))
        elif place.is_file() and place.suffix.lower() == ".txt":
            found.extend(_listed(place, root))
        elif place.is_file() and is_picture(place):
            found.append(place)
        else:
            raise _AbsentError(f"{path}: {key}: {place} does not exist")
    if not found:
        raise _AbsentError(f"{path}: {key}: no pictures there")
    return list(dict.fromkeys(found))


def _listed(file: Path, root: Path) -> list[Path]:
    pictures, missing = [], []
    for number, line in enumerate(_text_lines(file), 1):
        name = line.strip()
        if not name:
            continue
        places = (folder / other for other in dict.fromkeys((name, plain_name(name))) for folder in (file.parent, root))
        picture = next((place for place in places if place.is_file()), None)
        if picture is None:
            missing.append(f"{file}, line {number}: there is no picture {name}")
        else:
            pictures.append(picture)
    if missing and pictures:
        raise UserError(missing[0])
    if missing:
        raise _AbsentError(f"{missing[0]}, nor any other of its {len(missing)} lines")
    return pictures


def _label_files(pictures: list[Path]) -> list[Path | None]:
    """The label file of each picture; one that two pictures share is a `UserError`."""
    found: list[Path | None] = []
    owner: dict[Path, Path] = {}
    for picture in pictures:
        labels = find_labels(picture)
        if labels is not None and owner.setdefault(labels, picture) != picture:
            raise UserError(
                f"{owner[labels]} and {picture} share the label file {labels}: whose it is cannot be told; rename or "
                "remove one of the pictures"
            )
        found.append(labels)
    return found


def _orphans(pictures: list[Path]) -> list[str]:
    """Notes on label files whose picture is missing, or is none that can be read."""
    places: dict[Path, set[Path]] = {}
    for picture in pictures:
        places.setdefault(label_file(picture).parent, set()).add(picture.parent)
    names = []
    for labels, folders in places.items():
        if not labels.is_dir():
            continue
        inside = [path for folder in folders for path in folder.iterdir() if path.suffix.lower() != ".txt"]
        known = {path.stem for path in inside if is_picture(path)}
        others = {path.stem: path.name for path in inside if not is_hidden(path)}
        for path in sorted(path for path in labels.iterdir() if path.suffix.lower() == ".txt"):
            if path.stem not in known and path.name != "classes.txt" and not is_hidden(path) and _has_rows(path):
                other = others.get(path.stem)
                names.append(
                    path.name if other is None else f"{path.name}: {other} is no picture that can be read here"
                )
    if not names:
        return []
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [f"{len(names)} label file{'s' * (len(names) > 1)} without a picture left out ({shown})"]


def _has_rows(path: Path) -> bool:
    """Whether a text file begins with a row of numbers."""
    with path.open("rb") as file:
        fields = file.readline(2000).split()
    return len(fields) >= 5 and all(is_number(field.decode("latin-1")) for field in fields)


def _read_split(
    split: str,
    pictures: list[Path],
    label_files: list[Path | None],
    categories: list[dict[str, Any]],
    rows: Rows,
    images: int,
    objects: int,
) -> Part:
    """One split; its ids go on after `images` and `objects`."""
    base = common_folder(pictures)
    document: Document = {"images": [], "annotations": [], "categories": categories}
    first = objects
    for number, (picture, labels) in enumerate(zip(pictures, label_files, strict=True), images + 1):
        width, height = read_header(picture).shown_size
        name = picture.relative_to(base).as_posix()
        document["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        if labels is None:
            continue
        for line_number, line in enumerate(_text_lines(labels), 1):
            if line.strip():
                objects += 1
                label, values = parse_row(line, f"{labels}, line {line_number}", len(categories), rows)
                ids = {"id": objects, "image_id": number, "category_id": label + 1}
                shape = shape_fields(values, width, height, rows.form)
                if min(shape["bbox"][2:]) < 0:
                    raise UserError(f"{labels}, line {line_number}: not {FORMS[rows.form]}: its size would be negative")
                if rows.kind == "oriented" and "segmentation" in shape:
                    del shape["segmentation"]
                    shape["area"] = round(shape["bbox"][2] * shape["bbox"][3], 4)
                document["annotations"].append({**ids, **shape, "iscrowd": 0})
    notes = []
    if bare := label_files.count(None):
        notes.append(f"{split}: {bare} pictures without a label file kept as pictures without objects")
    if rows.kind == "keypoints" and objects > first:
        notes.append(f"{split}: keypoints of {objects - first} objects left out, their boxes are read")
    if rows.kind == "oriented" and objects > first:
        notes.append(f"{split}: {objects - first} oriented boxes (four corners), read as the upright boxes around them")
    return Part(split, document, pictures, notes)


def _text_lines(path: Path) -> list[str]:
    return read_text(path).splitlines()


# writing


def _lines(
    annotations: list[dict[str, Any]], image: dict[str, Any], label_of: dict[int, int], report: Report, masks: bool
) -> list[str]:
    lines = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            report.crowd += 1
            continue
        box = clip_box(annotation["bbox"], image, report)
        if box is None:
            continue
        x, y, width, height = box
        size = np.array([image["width"], image["height"]], np.float64)
        if masks:
            values = _outline(annotation, box) / size
        else:
            report.masks += bool(annotation.get("segmentation"))
            values = np.array([[x + width / 2, y + height / 2], [width, height]]) / size
        numbers = " ".join(f"{value:.8f}".rstrip("0").rstrip(".") for value in np.clip(values, 0, 1).ravel())
        lines.append(f"{label_of[annotation['category_id']]} {numbers}")
    return lines


def _outline(annotation: dict[str, Any], box: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """One ring, [P, 2]: a line holds only one, so the parts of a mask are joined where they are nearest."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        raise UserError(
            f"annotation {annotation['id']} has an RLE mask and YOLO's lines hold polygons; convert without --masks"
        )
    try:
        parts = [np.array(part, np.float64).reshape(-1, 2) for part in segmentation or () if len(part) >= 6]
    except (TypeError, ValueError):
        raise UserError(
            f"annotation {annotation['id']}: its segmentation is no list of polygons [[x, y, ...]]"
        ) from None
    if not parts:
        x, y, width, height = box
        return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
    ring = parts[0]
    for part in parts[1:]:
        distance = ((ring[:, None] - part[None]) ** 2).sum(2)
        i, j = np.unravel_index(int(distance.argmin()), distance.shape)
        # out along the bridge, once around the part, back along the bridge
        around = np.concatenate([part[j:], part[: j + 1]])
        ring = np.concatenate([ring[: i + 1], around, ring[i:]])
    return ring
