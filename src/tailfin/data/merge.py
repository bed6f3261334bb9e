"""Merging COCO and LVIS files into one, and renaming, joining and dropping classes (also of a single file).

Classes of the same name are one class. LVIS's lists say which classes were looked for in a picture, so they are
recomputed: a class that joins several is known to be absent only where each of them is, and is annotated exhaustively
only where each of them was looked for everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailfin.data.annotation_json import LISTS
from tailfin.data.document import Document, file_name, load_document, with_train_counts
from tailfin.data.folders import Placing, leading_prefix, place_image, staged_folder
from tailfin.data.index import image_folder, image_path
from tailfin.data.yolo_yaml import load_plain_yaml
from tailfin.errors import UserError, nearest
from tailfin.files import write_json
from tailfin.joins import join_classes

Mapped = Mapping[str, str | None]


@dataclass
class MergeReport:
    """What came out."""

    images: int = 0
    annotations: int = 0
    classes: int = 0
    dropped: int = 0  # annotations of dropped classes
    lacking: dict[str, int] = field(default_factory=dict)  # per file: classes it does not know, while not federated
    added: list[str] = field(default_factory=list)  # classes of `classes_of` that the files lack


def merge_files(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    mapping: Mapped | None = None,
    prefixes: Sequence[str] | None = None,
    images: Sequence[str | os.PathLike[str]] | None = None,
    placing: Placing = "none",
    counts_from: str | os.PathLike[str] | None = None,
    federated: bool = False,
    box_form: str | None = None,
    classes_of: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merge annotation files into the file `out`; see `merge_documents`.

    `images` are the picture folders (default: the usual rule per file). With `placing` "copy" or "link" the pictures
    are put in the folder beside `out` that has its stem. Otherwise they stay, and where `prefixes` is None and all of
    them lie below `out`'s folder, the file names lead there, so that `out` can be used as it is. `counts_from` is the
    merged training file whose class counts `out` takes over; without it they are counted in `out`. `box_form` is the
    form of the files' boxes (`box_forms.FORMS`); `out` has [x, y, width, height]. `classes_of` is a file whose classes,
    ids and class counts `out` takes: classes are joined by name, those that occur nowhere are added.
    """
    out = Path(out)
    paths = [Path(file) for file in files]
    if images is not None and len(images) != len(paths):
        raise UserError(f"{len(images)} image folders are given for {len(paths)} files; one for each is needed")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists (--overwrite replaces it)")
    documents = [load_document(path, box_form=box_form, same_names=True) for path in paths]
    classes = load_document(Path(classes_of)) if classes_of is not None else None
    counted = load_document(Path(counts_from)) if counts_from is not None else classes
    folders = [image_folder(path, Path(images[k]) if images else None) for k, path in enumerate(paths)]
    if prefixes is None:
        start = image_folder(out)
        leading = [leading_prefix(folder, start) for folder in folders]
        usable = placing == "none" and None not in leading
        prefixes = [prefix or "" for prefix in leading] if usable else [""] * len(paths)
    report = MergeReport()
    merged = merge_documents(
        documents, names=[str(p) for p in paths], mapping=mapping, prefixes=prefixes, federated=federated, report=report
    )
    if classes is not None:
        merged = _with_classes(merged, classes, str(classes_of), report)
    if counted is not None:
        merged = with_train_counts(merged, counted)
    if placing == "none":
        write_json(out, merged)
        return report
    target = out.with_suffix("")
    if any(folder.resolve().is_relative_to(target.resolve()) for folder in folders):
        raise UserError(f"{target} holds pictures of the files to be merged; give another --out")
    sources = [
        image_path(folder, file_name(i)) for folder, d in zip(folders, documents, strict=True) for i in d["images"]
    ]
    with staged_folder(target, overwrite=overwrite) as staged:
        for image, source in zip(merged["images"], sources, strict=True):
            place_image(source, staged / image["file_name"], placing)
    write_json(out, merged)
    return report


def merge_documents(
    documents: Sequence[Document],
    *,
    names: Sequence[str] | None = None,
    mapping: Mapped | None = None,
    prefixes: Sequence[str] | None = None,
    federated: bool = False,
    report: MergeReport | None = None,
) -> Document:
    """One document with all images and annotations.

    `mapping` gives the new name of a class, None drops it; several may get the same name. `prefixes` are put before
    the file names of each document; two images of the same name are a `UserError`. Ids stay where they are free, and
    move to the next free one otherwise (classes, images, annotations and licences alike). Unknown fields are handed
    on; those of a joined class come from its first appearance. Class counts are those of the result.

    `federated` gives images without LVIS lists the list of all absent classes that their own file knows, so that
    classes which only another file knows do not count as absent there.
    """
    names = names or [f"document {k + 1}" for k in range(len(documents))]
    mapping, report = mapping or {}, report if report is not None else MergeReport()
    prefixes = list(prefixes) if prefixes is not None else [""] * len(documents)
    if not documents:
        raise UserError("there is nothing to merge")
    if len(prefixes) != len(documents):
        raise UserError(f"{len(prefixes)} prefixes are given for {len(documents)} files; one for each is needed")
    known = {category["name"] for document in documents for category in document["categories"]}
    for name in mapping:
        if name not in known:
            raise UserError(f'the class "{name}" is to be renamed, but no file has it{nearest(name, sorted(known))}')

    categories: dict[str, dict[str, Any]] = {}
    category_ids, image_ids, annotation_ids, licence_ids = _Ids(), _Ids(), _Ids(), _Ids()
    merged: Document = {}
    for document in documents:
        merged = {**document, **merged}
    merged |= {"images": [], "annotations": [], "categories": [], "licenses": []}
    owners: dict[str, str] = {}
    for document, name, prefix in zip(documents, names, prefixes, strict=True):
        new_category: dict[int, int | None] = {}
        for category in document["categories"]:
            title = mapping.get(category["name"], category["name"])
            if title is not None and title not in categories:
                categories[title] = {**category, "id": category_ids.claim(category["id"]), "name": title}
            new_category[category["id"]] = None if title is None else categories[title]["id"]
        new_licence = _merge_licences(document.get("licenses"), merged["licenses"], licence_ids)
        new_image = {image["id"]: image_ids.claim(image["id"]) for image in document["images"]}
        present: dict[int, set[int]] = {}
        for annotation in document["annotations"]:
            present.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
            category_id = new_category[annotation["category_id"]]
            if category_id is None:
                report.dropped += 1
                continue
            moved = {"id": annotation_ids.claim(annotation["id"]), "image_id": new_image[annotation["image_id"]]}
            merged["annotations"].append({**annotation, **moved, "category_id": category_id})
        for image in document["images"]:
            entry = {**image, "id": new_image[image["id"]], "file_name": prefix + file_name(image)}
            if entry["file_name"] in owners:
                raise UserError(
                    f"{name}: image {image['id']}: {owners[entry['file_name']]} has a picture {entry['file_name']}"
                    " too; give each file a prefix (--file-prefix)"
                )
            owners[entry["file_name"]] = name
            if image.get("license") in new_licence:
                entry["license"] = new_licence[image["license"]]
            entry |= _lists(image, present.get(image["id"], set()), new_category, federated)
            merged["images"].append(entry)
    if not categories:
        raise UserError("every class is dropped, none is left")
    merged["categories"] = sorted(categories.values(), key=lambda category: category["id"])
    if not merged["licenses"]:
        del merged["licenses"]
    _fill(report, documents, names, mapping, merged, federated)
    return with_train_counts(merged, merged)


def _with_classes(merged: Document, other: Document, label: str, report: MergeReport) -> Document:
    """The document with the categories of `other`, joined by name; a class that `other` lacks is a `UserError`."""
    join = join_classes([c["name"] for c in merged["categories"]], [c["name"] for c in other["categories"]])
    if join.missing:
        raise UserError(
            f"--classes-of {label}: it lacks the class {join.first_missing()}; rename or drop it (--rename)"
        )
    report.added, report.classes = join.unknown, len(other["categories"])
    ids = [category["id"] for category in other["categories"]]
    new = {c["id"]: ids[row] for c, row in zip(merged["categories"], join.rows.tolist(), strict=True)}
    images = [
        {**image, **{key: sorted(new[n] for n in image[key]) for key in LISTS if image.get(key)}}
        for image in merged["images"]
    ]
    annotations = [{**a, "category_id": new[a["category_id"]]} for a in merged["annotations"]]
    return {**merged, "images": images, "annotations": annotations, "categories": other["categories"]}


def read_mapping(path: str | os.PathLike[str]) -> dict[str, str | None]:
    """A YAML file of `old: new` lines; an empty value or null drops the class."""
    value = load_plain_yaml(Path(path))
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no mapping; lines `old: new` are needed (`old: null` drops a class)")
    for old, new in value.items():
        if not isinstance(old, str):
            raise UserError(f"{path}: {old!r} is no class name")
        if new is not None and (not isinstance(new, str) or not new):
            raise UserError(f'{path}: class "{old}": {new!r} is no class name (null drops the class)')
    return value


class _Ids:
    """Hands out ids: the wanted one while it is free, else the next above all used."""

    def __init__(self) -> None:
        self.used: set[int] = set()
        self.top = 0

    def claim(self, wanted: int) -> int:
        given = wanted if wanted not in self.used else self.top + 1
        self.used.add(given)
        self.top = max(self.top, given)
        return given


def _lists(image: dict[str, Any], present: set[int], new: dict[int, int | None], federated: bool) -> dict[str, Any]:
    """LVIS's lists of one image in the new ids; nothing for an image that has none (and need not get them)."""
    if all(image.get(key) is None for key in LISTS) and not federated:
        return {}
    partial = set(image.get("not_exhaustive_category_ids") or ())
    given = image.get("neg_category_ids")
    absent = set(new) - present - partial if given is None else set(given)
    members: dict[int, list[int]] = {}
    for old, joined in new.items():
        if joined is not None:
            members.setdefault(joined, []).append(old)
    negative, incomplete = [], []
    for joined, own in members.items():
        if all(old in absent for old in own):
            negative.append(joined)
        elif any(old in present for old in own) or any(old in partial for old in own):
            unchecked = any(old not in absent and old not in present for old in own)
            if unchecked or any(old in partial for old in own):
                incomplete.append(joined)
    lists = dict(zip(LISTS, (sorted(negative), sorted(incomplete)), strict=True))
    if given is None and not federated:
        del lists["neg_category_ids"]  # the image stays exhaustively annotated
    return lists


def _merge_licences(own: Any, merged: list[Any], ids: _Ids) -> dict[Any, int]:
    """Append a file's licences, equal ones once; the new id of each."""
    new: dict[Any, int] = {}
    for licence in own if isinstance(own, list) else ():
        if not isinstance(licence, dict) or not isinstance(licence.get("id"), int):
            continue
        content = {key: value for key, value in licence.items() if key != "id"}
        same = next((other for other in merged if {k: v for k, v in other.items() if k != "id"} == content), None)
        if same is None:
            same = {**licence, "id": ids.claim(licence["id"])}
            merged.append(same)
        new[licence["id"]] = same["id"]
    return new


def _fill(
    report: MergeReport,
    documents: Sequence[Document],
    names: Sequence[str],
    mapping: Mapped,
    merged: Document,
    federated: bool,
) -> None:
    report.images, report.annotations = len(merged["images"]), len(merged["annotations"])
    report.classes = len(merged["categories"])
    for document, name in zip(documents, names, strict=True):
        own = {mapping.get(category["name"], category["name"]) for category in document["categories"]} - {None}
        open_ = any(image.get("neg_category_ids") is None for image in document["images"])
        if len(own) < report.classes and open_ and not federated:
            report.lacking[name] = report.classes - len(own)
