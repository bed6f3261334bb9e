"""The annotation file as numpy columns: parsed once, kept on disk, memory-mapped by every process that reads it.

COCO and LVIS (v0.5, v1.0) JSON both open with `open_index`. The first open is one typed parse that skips what boxes do
not need (polygons come later, see `AnnotationIndex.segmentations`); reopening maps the stored columns, so DataLoader
workers and ranks share one copy. Everything else in the package (dataset, samplers, statistics) reads these columns::

    index = open_index("train.json")
    rows = slice(index.offsets[7], index.offsets[8])  # the annotations of the eighth image
    index.boxes[rows], index.labels[rows], index.file_name(7)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
import numpy as np

from tailfin.data import cache as _cache
from tailfin.data import problems
from tailfin.data.columns import Category, RawColumns, parse, places_of
from tailfin.errors import UserError
from tailfin.files import existing_file

if TYPE_CHECKING:
    from tailfin.data.masks import Segmentations

_COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.\w+)")
BORDER = 0.05  # pixels by which a box may pass the border before it counts as clipped: files round to 2 decimals


@dataclass(frozen=True, eq=False)
class CleanBoxes:
    """What training sees: no crowds, boxes clipped to the image, boxes without area dropped."""

    boxes: np.ndarray  # float32 [K, 4] xyxy, pixels of the file
    rows: np.ndarray  # int64 [K], rows of the index
    offsets: np.ndarray  # int64 [I + 1]: image i has boxes[offsets[i] : offsets[i + 1]]
    dropped: int  # boxes without area inside the image
    clipped: int  # kept boxes that pass the border
    crowd: int  # annotations marked iscrowd
    _index: AnnotationIndex = field(repr=False)
    _kept: np.ndarray | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationIndex.clean, (self._index, self._kept)


@dataclass(frozen=True, eq=False, repr=False)
class AnnotationIndex:
    """Columns of one annotation file; I images, A annotations, C classes. All arrays are read-only.

    Annotations are sorted by image (file order within): those of image i are rows offsets[i] : offsets[i + 1].
    Pickling passes the path of the stored columns, not the columns (unless the cache folder cannot be written).
    """

    path: Path  # as given to open_index
    fingerprint: str  # hash of the file's bytes: the same for every copy of the file
    categories: tuple[Category, ...]  # ascending id
    federated: bool  # some image lists neg_category_ids (LVIS)
    image_ids: np.ndarray  # int64 [I], in file order
    widths: np.ndarray  # int32 [I]
    heights: np.ndarray  # int32 [I]
    offsets: np.ndarray  # int64 [I + 1]
    annotation_ids: np.ndarray  # int64 [A]
    image_of: np.ndarray  # int32 [A], position of the image
    labels: np.ndarray  # int32 [A], 0..C-1 by ascending category id
    boxes: np.ndarray  # float64 [A, 4] xywh, exactly as in the file
    areas: np.ndarray  # float64 [A], the file's `area`, else width * height
    crowd: np.ndarray  # bool [A]
    exhaustive: np.ndarray  # bool [I], the image has no neg_category_ids: every class that it lacks is a negative
    neg_offsets: np.ndarray  # int64 [I + 1]
    neg_labels: np.ndarray  # int32, labels known to be absent from image i: neg_offsets[i] : neg_offsets[i + 1]
    not_exhaustive_offsets: np.ndarray  # int64 [I + 1]
    not_exhaustive_labels: np.ndarray  # int32, labels not annotated everywhere in image i
    _bundle: _cache.Bundle

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __repr__(self) -> str:
        return (
            f"AnnotationIndex({str(self.path)!r}: {len(self)} images, {len(self.labels)} annotations,"
            f" {len(self.categories)} categories)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._bundle.file is None:
            return _from_bundle, (self.path, self._bundle)
        return _reopen, (self.path, self._bundle.file, self.fingerprint)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(category.name for category in self.categories)

    @property
    def category_ids(self) -> np.ndarray:
        """int64 [C]: the file's ids in label order."""
        return self._bundle.columns["category_ids"]

    def known(self, image: int) -> np.ndarray:
        """bool [C]: the classes whose every object in an image is annotated, or that are known to be absent."""
        known = np.full(len(self.categories), bool(self.exhaustive[image]))
        known[self.labels[self.offsets[image] : self.offsets[image + 1]]] = True
        known[self.neg_labels[self.neg_offsets[image] : self.neg_offsets[image + 1]]] = True
        known[self.not_exhaustive_labels[slice(*self.not_exhaustive_offsets[image : image + 2])]] = False
        return known

    def known_share(self) -> float:
        """The share of all pairs of image and class that `known` has."""
        images, classes = np.arange(len(self)), len(self.categories)
        partial = np.repeat(images, np.diff(self.not_exhaustive_offsets)) * classes + self.not_exhaustive_labels
        listed = np.repeat(images, np.diff(self.neg_offsets)) * classes + self.neg_labels
        some = np.union1d(self.image_of.astype(np.int64) * classes + self.labels, listed)
        some = some[~self.exhaustive[some // classes]]  # an exhaustive image knows every class but the partial ones
        of_all = np.unique(partial[self.exhaustive[partial // classes]])
        known = classes * int(self.exhaustive.sum()) - len(of_all) + len(np.setdiff1d(some, partial))
        return known / max(len(self) * classes, 1)

    def file_name(self, image: int) -> str:
        """File name of image number `image`, relative to the image folder."""
        image = range(len(self))[image]
        start, stop = self._bundle.columns["name_offsets"][image : image + 2]
        return self._bundle.columns["name_bytes"][start:stop].tobytes().decode("utf-8", "surrogatepass")

    def clean(self, kept: np.ndarray | None = None) -> CleanBoxes:
        """The training view: crowds excluded, boxes clipped to the image, boxes without area dropped; with counts.

        `kept`, bool [A], leaves only the marked annotations; the counts stay those of the file.
        """
        columns = self._bundle.columns
        dropped, clipped, crowd = columns["clean_counts"].tolist()
        boxes, rows, offsets = (columns[f"clean_{name}"] for name in ("boxes", "rows", "offsets"))
        if kept is not None:
            chosen = kept[rows]
            offsets = np.concatenate([[0], np.cumsum(chosen)])[offsets]
            boxes, rows = boxes[chosen], rows[chosen]
        return CleanBoxes(boxes, rows, offsets, dropped, clipped, crowd, self, kept)

    def segmentations(self) -> Segmentations:
        """Polygons and RLEs of the same rows: a second parse at the first call, then memory-mapped likewise.

        One that cannot be read is a `UserError` that names the annotation.
        """
        if problem := self.readable_segmentations.problem:
            raise UserError(f"{self.path}: {problem}")
        return self.readable_segmentations

    @cached_property
    def readable_segmentations(self) -> Segmentations:
        """The same where some cannot be read: these have kind BROKEN and an empty mask."""
        from tailfin.data.masks import open_segmentations

        return open_segmentations(self)

    def same_categories(self, other: AnnotationIndex | Sequence[str]) -> bool:
        """Whether `other` (an index or class names in label order) has the same classes in the same order, by name."""
        return self.names == (other.names if isinstance(other, AnnotationIndex) else tuple(other))


def open_index(path: str | Path, *, cache: bool = True, needs_names: bool = True) -> AnnotationIndex:
    """Open a COCO or LVIS annotation file; `cache=False` neither reads nor writes stored columns.

    `needs_names=False`, for counts and geometry, makes up the names of images that have none. A file that cannot be
    used (see `tailfin data check`) is a `UserError` that names the id and the problem.
    """
    path = existing_file(path, "annotation file")
    stamp = _cache.stamp(path) if cache else ""
    bundle = _cache.load(path, stamp, "index") if cache else None
    if bundle is None:
        raw, fingerprint, findings = parse(path, needs_names=needs_names)
        if raw is None or findings:
            message = f"{path}: {next(findings[0].messages())}"
            others = sum(map(len, findings)) - 1
            raise UserError(f"{message} ({others} more; `tailfin data check --all` lists them)" if others else message)
        index = from_columns(path, raw, fingerprint)
        if not cache or raw.unnamed or _cache.stamp(path) != stamp:  # changed while it was read
            return index
        bundle = _cache.store(path, stamp, "index", index._bundle.columns, index._bundle.metadata)
    return _from_bundle(path, bundle)


def from_columns(path: Path, raw: RawColumns, fingerprint: str) -> AnnotationIndex:
    """The index, in memory, of parsed columns without findings."""
    metadata = {"fingerprint": fingerprint, "categories": raw.categories_json}
    return _from_bundle(path, _cache.Bundle(_columns(raw), metadata, None))


def image_folder(annotations: str | Path, images: str | Path | None = None) -> Path:
    """The folder `images` if given, else the one beside the file that has its stem, else the file's own folder."""
    annotations = Path(annotations)
    if images is not None and str(images):
        folder = Path(images)
        if not folder.is_dir():
            raise UserError(f"image folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
        return folder
    beside = annotations.with_suffix("")
    return beside if beside != annotations and beside.is_dir() else annotations.parent


def image_path(folder: Path, name: str) -> Path:
    """Where a picture lies: `name` below `folder`, or as `other_names` has it where there is no such file."""
    path = folder / name
    others = other_names(name)
    if not others or path.is_file():
        return path
    return next((candidate for other in others if (candidate := folder / other).is_file()), path)


def other_names(name: str) -> list[str]:
    """What a `file_name` may mean beside itself.

    Programs on Windows write `folder\\picture.jpg`, web tools `my%20picture.jpg`, macOS letters and their marks apart.
    LVIS v0.5 names its pictures as COCO 2014 did (`COCO_val2014_000000000139.jpg`), while COCO 2017's folders hold
    `000000000139.jpg`.
    """
    names = []
    if "\\" in name:
        names.append(name.replace("\\", "/"))
    if "%" in name:
        names += [plain for known in [name, *names] if (plain := unquote(known)) != known]
    if marked := [known for known in [name, *names] if not known.isascii()]:
        forms = [unicodedata.normalize(form, known) for known in marked for form in ("NFC", "NFD")]
        names += [other for other in dict.fromkeys(forms) if other != name and other not in names]
    old = _COCO_2014.fullmatch(name)
    if old is not None:
        names += [f"{sub}{old[1]}" for sub in ("", "train2017/", "val2017/")]
    return [other for other in names if problems.unsafe_path(other) is None]


# ---- parsing ---------------------------------------------------------------------------------------------------------


# ---- columns ---------------------------------------------------------------------------------------------------------


def _columns(raw: RawColumns) -> dict[str, np.ndarray]:
    """Checked values to the columns of the index."""
    positions = places_of(raw.image_ids, raw.image_of)
    order = np.argsort(positions, kind="stable")
    image_of = positions[order].astype(np.int32)
    widths, heights = raw.widths.astype(np.int32), raw.heights.astype(np.int32)
    boxes = raw.boxes[order]
    areas = raw.areas[order]
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    crowd = raw.crowd[order]
    encoded = [name.encode("utf-8", "surrogatepass") for name in raw.file_names]
    columns = {
        "category_ids": raw.category_ids,
        "image_ids": raw.image_ids,
        "widths": widths,
        "heights": heights,
        "offsets": _offsets(image_of, len(raw.image_ids)),
        "annotation_ids": raw.annotation_ids[order],
        "image_of": image_of,
        "labels": np.searchsorted(raw.category_ids, raw.category_of[order]).astype(np.int32),
        "boxes": boxes,
        "areas": areas,
        "crowd": crowd,
        "exhaustive": raw.exhaustive,
        "neg_offsets": raw.negative_offsets,
        "neg_labels": np.searchsorted(raw.category_ids, raw.negatives).astype(np.int32),
        "not_exhaustive_offsets": raw.not_exhaustive_offsets,
        "not_exhaustive_labels": np.searchsorted(raw.category_ids, raw.not_exhaustive).astype(np.int32),
        "name_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        "name_offsets": np.concatenate([[0], np.cumsum([len(name) for name in encoded], dtype=np.int64)]),
        **_clean_columns(boxes, crowd, image_of, widths, heights),
    }
    for column in columns.values():
        column.setflags(write=False)
    return columns


def _offsets(image_of: np.ndarray, images: int) -> np.ndarray:
    return np.searchsorted(image_of, np.arange(images + 1)).astype(np.int64)


def _clean_columns(
    boxes: np.ndarray, crowd: np.ndarray, image_of: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> dict[str, np.ndarray]:
    limits = np.stack([widths, heights], 1)[image_of].astype(np.float64)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    over = (np.minimum(corners[:, :2], limits - corners[:, 2:]) < -BORDER).any(1)
    np.clip(corners, 0, np.tile(limits, 2), out=corners)
    corners = corners.astype(np.float32)
    solid = (corners[:, 2:] > corners[:, :2]).all(1)
    rows = np.flatnonzero(solid & ~crowd)
    counts = [np.count_nonzero(~solid & ~crowd), np.count_nonzero(over[rows]), np.count_nonzero(crowd)]
    return {
        "clean_boxes": corners[rows],
        "clean_rows": rows,
        "clean_offsets": _offsets(image_of[rows], len(widths)),
        "clean_counts": np.array(counts, np.int64),
    }


_FIELDS = (
    "image_ids",
    "widths",
    "heights",
    "offsets",
    "annotation_ids",
    "image_of",
    "labels",
    "boxes",
    "areas",
    "crowd",
    "exhaustive",
    "neg_offsets",
    "neg_labels",
    "not_exhaustive_offsets",
    "not_exhaustive_labels",
)


def _from_bundle(path: Path, bundle: _cache.Bundle) -> AnnotationIndex:
    return AnnotationIndex(
        path=path,
        fingerprint=bundle.metadata["fingerprint"],
        categories=msgspec.json.decode(bundle.metadata["categories"], type=tuple[Category, ...]),
        federated=not bundle.columns["exhaustive"].all(),
        _bundle=bundle,
        **{name: bundle.columns[name] for name in _FIELDS},
    )


def _reopen(path: Path, file: Path, fingerprint: str) -> AnnotationIndex:
    """What unpickling calls: map the stored columns; parse again where they are gone, if the file is still the same."""
    bundle = _cache.read(file)
    if bundle is not None:
        return _from_bundle(path, bundle)
    index = open_index(path)
    if index.fingerprint != fingerprint:
        raise UserError(f"annotation file {path} has changed while it was in use")
    return index
