"""The Pascal VOC layout: Annotations/*.xml, JPEGImages/, ImageSets/Main/SPLIT.txt.

VOC counts pixels from 1 and a box holds both its ends, so the COCO box [x, y, w, h] is xmin = x + 1, ymin = y + 1,
xmax = x + w, ymax = y + h, and back. The sums are decimal, so a box comes back as it was, fractions included. VOC has
no class list; one is written as `labels.txt` (a name per line) and read where there is one, else the names found are
sorted. `difficult`, `truncated`, `occluded` and `pose` are kept as fields of the annotation; `difficult` has no meaning
in COCO's own evaluation.

The picture of an XML file has its name in the same subfolder, else the name that the file itself gives, anywhere below
the picture folder; where several pictures may be meant the file is refused. Pictures without an XML file have no
objects: programs write none for an empty picture. XML may declare any encoding that Python knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from tailfin.data.document import Document, file_name
from tailfin.data.folders import Placing, place_image
from tailfin.data.images import is_hidden, pictures_below, read_header, size_problem
from tailfin.data.parts import SPLITS, Part, Report, annotations_by_image, common_folder
from tailfin.data.voc_xml import _EXACT, FLAGS, parse_xml, plain_number, to_xml, xml_text
from tailfin.errors import UserError
from tailfin.files import read_text
from tailfin.joins import plain_name

_MOST = 10**9  # pixels
_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_voc(source: Path) -> list[Part]:
    """The splits of a VOC folder; XML files beside their pictures, also in train/, valid/ and test/, are read too."""
    splits, absent = _find(source)
    others: dict[str, list[str]] = {split: [] for split in splits}
    entries = {split: _entries(found, others[split]) for split, found in splits.items()}
    _check_pixels(source, entries)
    names = _class_names(source, entries)
    number_of = {name: k + 1 for k, name in enumerate(names)}
    categories = [{"id": number, "name": name} for name, number in number_of.items()]
    parts, image_number, annotation_number = [], 0, 0
    for split, found in entries.items():
        document: Document = {"images": [], "annotations": [], "categories": categories}
        base = common_folder([picture for picture, _, _ in found])
        for picture, (width, height), objects in found:
            image_number += 1
            name = picture.relative_to(base).as_posix()
            document["images"].append({"id": image_number, "file_name": name, "width": width, "height": height})
            for label, fields in objects:
                annotation_number += 1
                document["annotations"].append(
                    {"id": annotation_number, "image_id": image_number, "category_id": number_of[label], **fields}
                )
        notes = []
        if difficult := sum(bool(entry.get("difficult")) for entry in document["annotations"]):
            which = "object is" if difficult == 1 else "objects are"
            notes.append(
                f"{split}: {difficult} {which} marked difficult, which COCO has no word for: kept as any other"
            )
        if bare := sum(xml is None for xml, _ in splits[split][1]):
            notes.append(f"{split}: {bare} pictures without an XML file kept as pictures without objects")
        if odd := others[split]:
            files = "1 XML file gives" if len(odd) == 1 else f"{len(odd)} XML files give"
            notes.append(f"{split}: {files} the name of another picture, their own names count (first: {odd[0]})")
        parts.append(Part(split, document, [picture for picture, _, _ in found], notes))
    parts[0].notes[:0] = absent
    return parts


def write_voc(parts: Sequence[Part], folder: Path, placing: Placing, report: Report) -> None:
    """Annotations/, JPEGImages/, ImageSets/Main/ and labels.txt in `folder`.

    A picture's id is its file name without suffix; where splits share names, SPLIT_ is put before all of them.
    """
    categories = sorted(parts[0].document["categories"], key=lambda category: category["id"])
    name_of = {category["id"]: xml_text(category["name"], f"category {category['id']}") for category in categories}
    stems = [[Path(file_name(image)).with_suffix("").as_posix() for image in part.document["images"]] for part in parts]
    shared = len({stem for own in stems for stem in own}) < sum(len(set(own)) for own in stems)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for part, own in zip(parts, stems, strict=True):
        grouped = annotations_by_image(part.document)
        owner: dict[str, int] = {}
        objects = 0
        for image, file, stem in zip(part.document["images"], part.files, own, strict=True):
            # VOC's folders are flat
            identity = (f"{part.name}_" if shared else "") + stem.replace("/", "_")
            if identity in owner:
                raise UserError(f"images {owner[identity]} and {image['id']} would both be called {identity}")
            owner[identity] = image["id"]
            kept = [annotation for annotation in grouped[image["id"]] if not annotation.get("iscrowd")]
            report.crowd += len(grouped[image["id"]]) - len(kept)
            report.masks += sum(bool(annotation.get("segmentation")) for annotation in kept)
            objects += len(kept)
            picture = identity + Path(file_name(image)).suffix
            tree = to_xml(image, picture, kept, name_of)
            (folder / "Annotations" / f"{identity}.xml").write_bytes(tree)
            place_image(file, folder / "JPEGImages" / picture, placing)
        listed = "".join(f"{identity}\n" for identity in owner)
        (folder / "ImageSets/Main" / f"{part.name}.txt").write_text(listed, "utf-8")
        report.images[part.name], report.objects[part.name] = len(owner), objects
        report.folders[part.name] = report.out / "JPEGImages"
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in name_of.values()), "utf-8")


# finding

Found = tuple["_Pictures", list[tuple[Path | None, str]]]  # pictures; each XML file (or none) with its name below them


class _Pictures:
    """The pictures of a folder and its folders, to be found by the XML files that belong to them."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist (the pictures of a VOC set are in JPEGImages)")
        found = pictures_below(folder)
        self.folder = folder
        self.paths = {path.relative_to(folder).as_posix(): path for path in found}
        self._by_stem: dict[str, list[str]] = {}
        self._anywhere: dict[str, list[str]] = {}  # by the last part, with and without the suffix
        for name in self.paths:
            base = name.rpartition("/")[2]
            self._by_stem.setdefault(name.rpartition(".")[0], []).append(name)
            for key in {base, base.rpartition(".")[0]}:
                self._anywhere.setdefault(key, []).append(name)

    def stems(self) -> dict[str, list[str]]:
        """Names by what they are without the suffix."""
        return self._by_stem

    def has(self, stem: str, inner: str) -> bool:
        """Whether the picture that a file called `stem` names lies beside its own, or where the name says."""
        inner, parent = plain_name(inner), stem.rpartition("/")[0]
        return any(name in self.paths for name in (f"{parent}/{inner}" if parent else inner, inner))

    def find(self, stem: str, inner: str, where: Path) -> tuple[Path, bool]:
        """The picture of an XML file called `stem` (`folder/name`) that gives `inner` as its file name, and whether it
        has the same name as the file."""
        inner = plain_name(inner)
        base, parent = inner.rpartition("/")[2], stem.rpartition("/")[0]
        own = self._by_stem.get(stem, [])
        if len(own) > 1:
            own = [name for name in own if name.rpartition("/")[2] == base] or own
        if len(own) == 1:
            return self.paths[own[0]], True
        inside = f"{parent}/{inner}" if parent else inner
        meant = own or [name for name in (inside, inner if "/" in inner else "") if name in self.paths][:1]
        # in other folders only where nothing else there has the name
        last = stem.rpartition("/")[2]
        for key in (base, last, base.rpartition(".")[0]):
            meant = meant or self._anywhere.get(key, [])
        if len(meant) == 1:
            return self.paths[meant[0]], False
        if meant:
            raise UserError(f"{where}: its picture may be {' or '.join(meant[:3])}: the file names none of them")
        raise UserError(f"{where}: there is no picture {PurePosixPath(stem).name} (.jpg, .png, ...) for it")


def _find(source: Path) -> tuple[dict[str, Found], list[str]]:
    """XML files and pictures of each split, and notes on lists of splits that are not there."""
    if (source / "Annotations").is_dir():
        folder = source / "Annotations"
        beside = source / "JPEGImages"
        pictures = _Pictures(beside if beside.is_dir() else source / "images")
        lists = {split: source / "ImageSets/Main" / f"{split}.txt" for split in (*SPLITS, "trainval")}
        there = {split: path for split, path in lists.items() if path.is_file()}
        if len(there) > 1:
            there.pop("trainval", None)  # the sum of train and val
        if not there:
            return {"train": (pictures, _with_bare(_xml_files(folder, recurse=True), folder, pictures))}, []
        splits: dict[str, Found] = {}
        absent = []
        for split, path in there.items():
            listed, missing = _listed(path, folder, pictures)
            if missing and listed:
                raise UserError(missing[0])
            if listed:
                splits["train" if split == "trainval" else split] = (pictures, listed)
            else:
                absent.append(f"{missing[0]}, nor any other of it" if missing else f"{path} is empty")
        if not splits:
            raise UserError(absent[0])
        used = {xml for _, listed in splits.values() for xml, _ in listed}
        unlisted = [path.relative_to(folder).as_posix() for path in _visible(folder, recurse=True) if path not in used]
        if unlisted:
            files = "1 XML file is" if len(unlisted) == 1 else f"{len(unlisted)} XML files are"
            absent.append(f"{files} in no list of ImageSets/Main (first: {unlisted[0]})")
        return splits, [f"{text}: left out" for text in absent]
    if _visible(source):
        pictures = _Pictures(source)
        return {"train": (pictures, _with_bare(_xml_files(source), source, pictures))}, []
    splits = {}
    for name, split in _FOLDERS.items():
        if _visible(source / name) and split not in splits:
            pictures = _Pictures(source / name)
            splits[split] = (pictures, _with_bare(_xml_files(source / name), source / name, pictures))
    if not splits:
        raise UserError(f"{source} has no Annotations/*.xml")
    return splits, []


def _visible(folder: Path, *, recurse: bool = False) -> list[Path]:
    found = folder.rglob("*.xml") if recurse else folder.glob("*.xml")
    return sorted(path for path in found if not is_hidden(path, folder))


def _xml_files(folder: Path, *, recurse: bool = False) -> list[Path]:
    found = _visible(folder, recurse=recurse)
    if not found:
        raise UserError(f"{folder} has no .xml file")
    return found


def _with_bare(files: list[Path], folder: Path, pictures: _Pictures) -> list[tuple[Path | None, str]]:
    """XML files with their names, then the pictures that none of them can mean."""
    found: list[tuple[Path | None, str]] = [
        (path, path.relative_to(folder).with_suffix("").as_posix()) for path in files
    ]
    claimed = set()
    for path, stem in found:
        assert path is not None
        inner = str(parse_xml(path)[0].findtext("filename") or "").strip()
        claimed.add(pictures.find(stem, inner, path)[0])
    return found + [(None, name) for name, path in pictures.paths.items() if path not in claimed]


def _listed(file: Path, folder: Path, pictures: _Pictures) -> tuple[list[tuple[Path | None, str]], list[str]]:
    """The XML files that a list names, or the pictures where there is no XML file; and messages about missing ones."""
    found: list[tuple[Path | None, str]] = []
    missing = []
    stems = pictures.stems()
    for number, line in enumerate(read_text(file).splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        head, _, last = name.rpartition(" ")
        # names may have spaces; a last word -1, 0 or 1 is that of a class list
        candidates = [name, *([head.strip()] if last in ("-1", "0", "1") and head.strip() else [])]
        xml = next((stem for stem in candidates if (folder / f"{stem}.xml").is_file()), None)
        bare = next((stems[stem] for stem in candidates if stem in stems), None)
        if xml is not None:
            found.append((folder / f"{xml}.xml", xml))
        elif bare is not None and len(bare) == 1:
            found.append((None, bare[0]))
        else:
            missing.append(f"{file}, line {number}: {folder / candidates[-1]}.xml does not exist")
    return found, missing


def _class_names(source: Path, entries: dict[str, list[Entry]]) -> list[str]:
    found = {label for images in entries.values() for _, _, objects in images for label, _ in objects}
    listed: list[str] = []
    if (source / "labels.txt").is_file():
        listed = [line.strip() for line in read_text(source / "labels.txt").splitlines() if line.strip()]
        if len(set(listed)) < len(listed):
            raise UserError(f"{source / 'labels.txt'} has a name twice")
    names = listed + sorted(found - set(listed))
    if not names:
        raise UserError(f"{source}: no object in any .xml file, so there are no classes")
    return names


# XML

Entry = tuple[Path, tuple[int, int], list[tuple[str, dict[str, Any]]]]  # picture, (width, height), (class, fields)


def _entries(found: Found, others: list[str]) -> list[Entry]:
    """The pictures of a split with their objects; a picture that two XML files mean is a `UserError`.

    To `others` come the files that have a picture of their own name and give the name of another one that is there.
    """
    pictures, files = found
    entries: list[Entry] = []
    owner: dict[Path, Path] = {}
    for xml, name in files:
        if xml is None:
            picture = pictures.paths[name]
            entries.append((picture, read_header(picture).shown_size, []))
            continue
        entry = _read_xml(xml, name, pictures, others)
        if owner.setdefault(entry[0], xml) != xml:
            raise UserError(f"{owner[entry[0]]} and {xml} both mean the picture {entry[0]}: one of them lacks its own")
        entries.append(entry)
    return entries


def _check_pixels(source: Path, entries: dict[str, list[Entry]]) -> None:
    """Refuse boxes that are fractions of the pictures' sizes."""
    boxes = [fields["bbox"] for found in entries.values() for _, _, objects in found for _, fields in objects]
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    corners[:, :2] += 1
    corners[:, 2:] += corners[:, :2] - 1
    if len(corners) > 1 and (np.abs(corners) <= 1.01).all() and (corners != np.rint(corners)).any(1).mean() > 0.5:
        raise UserError(
            f"{source}: all {len(corners):,} boxes are smaller than 1 pixel: they look like fractions of the pictures' "
            "sizes, and VOC has pixels"
        )


def _read_xml(path: Path, stem: str, pictures: _Pictures, others: list[str]) -> Entry:
    root, lines = parse_xml(path)
    inner = (root.findtext("filename") or "").strip()
    picture, same = pictures.find(stem, inner, path)
    if same and PurePosixPath(plain_name(inner)).stem != PurePosixPath(stem).name and pictures.has(stem, inner):
        others.append(f"{path.name} says {inner}")
    try:
        size = (int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0))
    except ValueError:
        raise UserError(f"{path}: size: width and height must be whole numbers") from None
    header = read_header(picture)
    if min(size) < 1:
        size = header.shown_size
    elif problem := size_problem(header, *size):
        which = f"{picture}" if same else f"no picture has its name, and {picture} is not it"
        raise UserError(f"{path}: {which}: {problem}")
    objects = []
    for number, (entry, line) in enumerate(zip(root.findall("object"), lines, strict=False), 1):
        label = (entry.findtext("name") or "").strip()
        where = f"{path}, line {line}: object {number}" + (f" ({label})" if label else "")
        if not label:
            raise UserError(f"{where} has no name")
        objects.append((label, _read_object(entry, where)))
    return picture, size, objects


def _read_object(entry: ElementTree.Element, where: str) -> dict[str, Any]:
    ends = {}
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text = (entry.findtext(f"bndbox/{key}") or "").strip()
        try:
            ends[key] = Decimal(text)
        except InvalidOperation:
            raise UserError(
                f"{where}: {key} is {text!r}, a number is needed" if text else f"{where} has no {key}"
            ) from None
        if not ends[key].is_finite() or not -_MOST <= ends[key] <= _MOST:
            raise UserError(f"{where}: {key} is {text}, a finite number of pixels is needed")
    left, top = _EXACT.subtract(ends["xmin"], Decimal(1)), _EXACT.subtract(ends["ymin"], Decimal(1))
    width, height = _EXACT.subtract(ends["xmax"], left), _EXACT.subtract(ends["ymax"], top)
    if width < 0 or height < 0:
        axis = "x" if width < 0 else "y"
        raise UserError(f"{where}: {axis}max {ends[axis + 'max']} is less than {axis}min {ends[axis + 'min']}")
    box = [plain_number(value) for value in (left, top, width, height)]
    fields: dict[str, Any] = {"bbox": box, "area": plain_number(width * height), "iscrowd": 0}
    for flag in FLAGS:
        text = (entry.findtext(flag) or "").strip()
        if text:
            fields[flag] = int(text.lower() in ("1", "true"))
    pose = (entry.findtext("pose") or "").strip()
    return {**fields, "pose": pose} if pose and pose != "Unspecified" else fields
