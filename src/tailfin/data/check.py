"""`data check`: can this annotation file, with its pictures, be trained on and evaluated?

Problems make a file unusable; notes are handled (dropped, clipped, turned) and only told. The messages about the
annotations are those of `open_index`; here the pictures' headers are read too, or with `decode` the whole pictures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np

from tailfin.data.box_forms import guess
from tailfin.data.columns import RawColumns, parse
from tailfin.data.images import MAX_PIXELS, Header, depth, read_header, read_image, size_problem, value_range
from tailfin.data.index import AnnotationIndex, from_columns, image_folder, image_path
from tailfin.data.masks import BOX_AS_POLYGON
from tailfin.data.odd_annotations import area_note, mask_note
from tailfin.data.problems import unsafe_path
from tailfin.errors import UserError
from tailfin.files import existing_file
from tailfin.joins import listed

PLAIN_MODES = ("RGB", "L")
SHOWN = 5  # names in a list
DECODED = 8  # 16-bit pictures whose values are looked at
Track = Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class CheckReport:
    """What `check_file` found."""

    path: Path
    images: Path | None  # the image folder; None where the annotations are already unusable
    problems: list[str]  # each names file and id; with `all_problems` every one, else the first
    num_problems: int
    notes: list[str] = field(default_factory=list)  # of usable annotations; of pictures, where these are usable too
    summary: dict[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return not self.num_problems


def check_file(
    path: str | Path,
    images: str | Path | None = None,
    all_problems: bool = False,
    *,
    decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    track: Track | None = None,
) -> CheckReport:
    """Check an annotation file and its pictures.

    Args:
        path: COCO or LVIS JSON.
        images: image folder; found as everywhere else if not given.
        all_problems: list every problem, not the first alone.
        decode: decode every picture (finds truncated ones); otherwise only headers are read.
        max_pixels: bound on a picture's size.
        track: wraps the iteration over the pictures to show progress: `track(iterable, length)`.

    A missing annotation file or image folder is a `UserError`; everything else is a problem in the report.
    """
    path = existing_file(path, "annotation file")
    try:
        raw, fingerprint, findings = parse(path)
    except UserError as error:
        return CheckReport(path, None, [str(error)], 1)
    annotation_problems = (message for finding in findings for message in finding.messages())
    if raw is None:
        return _unusable(path, None, annotation_problems, [], sum(map(len, findings)), all_problems)
    folder = image_folder(path, images)
    headers, bad = _pictures(path, raw, folder, decode, max_pixels, track)
    index = None if findings else from_columns(path, raw, fingerprint)
    masks = "" if index is None else _mask_problem(index)
    if masks.endswith(BOX_AS_POLYGON):
        bad.insert(0, masks)
    if findings or bad:
        total = sum(map(len, findings)) + len(bad)
        told = index is None or masks.endswith(BOX_AS_POLYGON)
        notes = [] if told or index is None else list(_notes(index, raw, None, folder, masks))
        return replace(_unusable(path, folder, annotation_problems, bad, total, all_problems), notes=notes)
    assert index is not None
    return CheckReport(path, folder, [], 0, list(_notes(index, raw, headers, folder, masks)), _summary(index))


def _unusable(
    path: Path, folder: Path | None, annotations: Iterable[str], pictures: list[str], total: int, all_problems: bool
) -> CheckReport:
    messages = (f"{path}: {message}" for message in chain(annotations, pictures))
    return CheckReport(path, folder, list(messages) if all_problems else [next(messages)], total)


# ---- pictures --------------------------------------------------------------------------------------------------------


def _pictures(
    path: Path, raw: RawColumns, folder: Path, decode: bool, max_pixels: int, track: Track | None
) -> tuple[list[Header], list[str]]:
    """Headers of the good pictures in order, and one message per bad one; what the columns forbid is not opened."""
    possible = (raw.widths >= 1) & (raw.heights >= 1)
    rows = [row for row, name in enumerate(raw.file_names) if possible[row] and unsafe_path(name) is None]

    def look(row: int) -> Header | str:
        file = image_path(folder, raw.file_names[row])
        width, height = int(raw.widths[row]), int(raw.heights[row])
        try:
            if not file.is_file():
                raise UserError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}")
            header = read_header(file, max_pixels)
            if problem := size_problem(header, width, height):
                raise UserError(f"{file}: {problem}")
            if decode:
                read_image(file, width=width, height=height, max_pixels=max_pixels)
            return header
        except UserError as error:
            return f"image {raw.image_ids[row]}: {str(error).removeprefix('image ')}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(look, rows)
        outcomes = list(track(results, len(rows)) if track else results)
    bad = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if len(bad) == len(rows) > 0 and all(message.endswith(" does not exist") for message in bad):
        bad[0] += f" (none of the {len(bad)} pictures is in {folder}: name their folder with --images)"
    return [outcome for outcome in outcomes if isinstance(outcome, Header)], bad


# ---- notes and summary -----------------------------------------------------------------------------------------------


def _alike(names: Sequence[str]) -> list[str]:
    """Class names that are one but for case and spaces, `"car", "Car"` each."""
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(" ".join(name.casefold().split()), []).append(f'"{name}"')
    return [", ".join(own) for own in places.values() if len(own) > 1]


def _notes(
    index: AnnotationIndex, raw: RawColumns, headers: list[Header] | None, folder: Path, masks: str
) -> Iterator[str]:
    """Notes on the annotations, and on the pictures where `headers` has those of all."""
    clean = index.clean()
    if not len(index.labels):
        yield "there are no annotations"
    for left_out, stays in raw.doubles.items():
        name = index.names[int(np.searchsorted(index.category_ids, stays))]
        yield f'category {left_out} has the name of category {stays}, "{name}", and no annotation: left out'
    if alike := _alike(index.names):
        yield f"classes whose names differ in case or spaces alone: {'; '.join(alike[:SHOWN])}"
    if crowds := crowd_note(index):
        yield crowds
    if lists := negative_lists_note(index):
        yield lists
    sizes = np.stack([index.widths, index.heights], 1)[index.image_of].astype(np.float64)
    form = None if raw.form_stated else guess(index.boxes, sizes)
    if form is not None and (form.form or not clean.clipped):  # else boxes over the border are told of below
        yield form.question
    if clean.dropped:
        yield f"{_many(clean.dropped, 'box')} without area inside the image: dropped in training, kept in evaluation"
    if clean.clipped:
        yield f"{_many(clean.clipped, 'box')} over the border of the image: clipped in training, kept in evaluation"
    if empty := int(np.count_nonzero(np.diff(index.offsets) == 0)):
        yield f"{_many(empty, 'image')} without annotations"
    if missing := int(np.count_nonzero(~raw.crowd_given)):
        yield f"{_many(missing, 'annotation')} without iscrowd: taken as 0"
    if raw.ignored:
        yield f"{_many(raw.ignored, 'annotation')} with ignore set: left out of lvis measures, trained like any other"
    if areas := area_note(raw.areas, raw.boxes):
        yield areas
    if repeated := _repeated_boxes(index):
        yield f"{_many(repeated, 'annotation')} with the image, class and box of an earlier one"
    names = Counter(raw.file_names)
    if shared := sum(count - 1 for count in names.values()):
        yield f'{_many(shared, "image")} with the file_name of an earlier one, as "{names.most_common(1)[0][0]}"'
    ids = index.category_ids
    if gaps := int(ids[-1]) - int(ids[0]) + 1 - len(ids):
        yield f"{_many(gaps, 'unused number')} between the category ids: they become labels 0..{len(ids) - 1}"
    unused = np.flatnonzero(np.bincount(index.labels, minlength=len(ids)) == 0)
    if len(unused):
        first = ", ".join(index.names[label] for label in unused[:SHOWN]) + (", ..." if len(unused) > SHOWN else "")
        yield f"{_many(len(unused), 'class')} without annotations: {first}"
    groups = {str(category.frequency) for category in index.categories} - {"None", "r", "c", "f"}
    if groups:
        yield f'category frequency "{min(groups)}" is none of r, c and f: such groups come from the counts'
    if roots := _roots(index):
        yield (
            f"{listed(roots)}: no annotations, and the supercategory of other classes: a root that would be a class of "
            f'its own (`tailfin data merge FILE --rename "{roots[0]}=" --out NEW` drops it)'
        )
    if headers is not None:
        yield from _picture_notes(index, headers)
        yield from _deep_pictures(index, headers, folder)
    if masks:
        yield f"masks cannot be used, boxes can: {masks}"
    else:
        kinds = index.segmentations().kinds
        if 0 < (without := int(np.count_nonzero(kinds == 0))) < len(kinds):
            yield f"{_many(without, 'annotation')} without segmentation, though others have one: the mask is empty"
        if apart := mask_note(index.segmentations()):
            yield apart


def crowd_note(index: AnnotationIndex) -> str | None:
    """What to say of a file half of whose annotations, or more, are crowd regions."""
    crowds, total = int(np.count_nonzero(index.crowd)), len(index.crowd)
    if not crowds or 2 * crowds < total:
        return None
    which = f"all {total}" if crowds == total else f"{crowds} of {total}"
    return f"{which} annotations are crowd regions (iscrowd 1): not trained, and ignored in evaluation"


def negative_lists_note(index: AnnotationIndex) -> str | None:
    """What to say of an LVIS file in which no image names a class that it lacks."""
    if not index.federated or len(index.neg_labels):
        return None
    return (
        "every neg_category_ids is empty: no image lists a negative class, so that the lvis protocol does not count "
        "false positives in images without the class (leave the lists out where all classes are annotated)"
    )


def _roots(index: AnnotationIndex) -> list[str]:
    """Classes without annotations that are the supercategory of other classes of the file."""
    above = {category.supercategory for category in index.categories if category.supercategory != category.name}
    used = np.bincount(index.labels, minlength=len(index.categories))
    return [name for name, count in zip(index.names, used.tolist(), strict=True) if not count and name in above]


def _mask_problem(index: AnnotationIndex) -> str:
    """Why the masks of the file cannot be read; empty where they can, or there are none."""
    try:
        index.segmentations()
    except UserError as error:
        return str(error).removeprefix(f"{index.path}: ")
    return ""


def _deep_pictures(index: AnnotationIndex, headers: list[Header], folder: Path) -> Iterator[str]:
    """Which values 16-bit pictures have, by some of them, and how they are read."""
    deep = [row for row, header in enumerate(headers) if ";16" in header.mode or header.mode == "I"]
    ranges = []
    for row in deep[:: max(1, len(deep) // DECODED)][:DECODED]:
        try:
            ranges.append(value_range(image_path(folder, index.file_name(row))))
        except UserError:  # damaged: --decode finds it
            continue
    if ranges:
        low, high = min(found[0] for found in ranges), max(found[1] for found in ranges)
        bits = sorted({depth(found[1]) for found in ranges})
        shown = str(bits[0]) if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"
        yield (
            f"values of the 16-bit pictures reach {high:,} of 65,535 (from {low:,}; {len(ranges)} of {len(deep)} looked"
            f" at): read as {shown}-bit, each picture by its own largest value, which gives {shades(low, high)} of 255 "
            f"(data.value_range=[{low},{high}] in a recipe would read all pictures alike, and give 0..255)"
        )


def shades(low: int, high: int) -> str:
    """What the smallest and the largest value of a 16-bit picture become."""
    scale = 255 / (2 ** depth(high) - 1)
    return f"{round(low * scale)}..{round(high * scale)}"


def _picture_notes(index: AnnotationIndex, headers: list[Header]) -> Iterator[str]:
    sizes = zip(index.widths.tolist(), index.heights.tolist(), strict=True)
    turned = sum(header.orientation > 1 for header in headers)
    stored = sum(header.shown_size != size for header, size in zip(headers, sizes, strict=True))
    if turned > stored:
        yield f"{_many(turned - stored, 'picture')} with an EXIF rotation: turned when read"
    if stored:
        yield f"{_many(stored, 'picture')} whose size fits only without the EXIF rotation: read without it"
    if several := sum(header.frames for header in headers):
        yield f"{_many(several, 'file')} of several frames or pages: the first one is read"
    modes = Counter(header.mode for header in headers if header.mode not in PLAIN_MODES)
    if modes:
        listed = ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
        yield f"{_many(modes.total(), 'picture')} not 8-bit RGB or grey ({listed}): read as 8-bit RGB without alpha"


def _repeated_boxes(index: AnnotationIndex) -> int:
    """Annotations whose image, class and box an earlier one has."""
    keys = np.column_stack([index.image_of, index.labels, index.boxes])
    order = np.lexsort(keys.T[::-1])
    return int(np.count_nonzero((keys[order][1:] == keys[order][:-1]).all(1)))


def _summary(index: AnnotationIndex) -> dict[str, int]:
    return {
        "images": len(index),
        "annotations": len(index.labels),
        "categories": len(index.categories),
        "crowd": int(np.count_nonzero(index.crowd)),
        "trained boxes": len(index.clean().rows),
    }


def _many(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith(("x", "s")) else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"
