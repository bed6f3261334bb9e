"""A dozen pictures: what is there and what each run found, chosen to show the tail, misses and hits alike.

The choice depends on the files alone. Candidates are pictures of the rarest classes; of them come, in equal parts and
one per class where possible, pictures whose rare object the runs disagree about, all miss, or all find.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from tailfin.data.images import read_image
from tailfin.data.index import AnnotationIndex, image_folder, image_path, open_index
from tailfin.errors import UserError
from tailfin.report.draw import Color, data_uri, draw_detections
from tailfin.report.evaluated import Look, annotations_file, look
from tailfin.report.matching import IOU, Detections, Verdict, intersection, judge, read_detections
from tailfin.report.page import Section, color, count, defined, group_name, render
from tailfin.report.runs import Run

SCORE = 0.3  # detections from this score on are drawn, and the best one in any case
_PICTURES = 12
_PANELS = 60  # over all pictures: many runs show fewer pictures
_CANDIDATES = 400
_CROWDED = 12  # objects; pictures with more are hard to read and come last
_SHOWN = 20  # detections drawn per picture
_NAMED = 8  # detections and missed objects, up to which all missed objects are named
_LONG_SIDE = (320, 480)  # bounds of the pictures in the report, in pixels
_LONG_SIDE_ALONE = (320, 340)  # of one run's, which stand four in a row: smaller, so that labels stay readable
_HIT, _WRONG, _UNKNOWN, _MISSED = (46, 204, 113), (255, 122, 50), (150, 160, 175), (255, 64, 150)
_KINDS = {"differs": "the runs disagree", "missed": "missed", "found": "found"}


def examples(runs: Sequence[Run]) -> Section | None:
    """Pictures with ground truth and detections; without the data, a sentence that says so."""
    shown = [(index, run) for index, run in enumerate(runs) if run.results.is_file()]
    if not shown:
        return None
    notes: list[str] = []
    pictures: list[dict[str, Any]] = []
    try:
        pictures = list(_pictures(shown, notes))
    except UserError as error:
        notes.append(f"No examples: {error}")
    html = render("examples.html", pictures=pictures, notes=notes, score=SCORE, iou=IOU, several=len(shown) > 1)
    return Section("Example detections", html)


# ---- details ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Truth:
    """The evaluated file of the runs, with the numbers of training images that order its classes."""

    index: AnnotationIndex
    images: Path
    train_images: np.ndarray  # float64 [C]
    groups: list[str]
    max_pixels: int

    def objects(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes xyxy [G, 4], labels [G] and crowd marks [G] of an image row."""
        own = slice(int(self.index.offsets[row]), int(self.index.offsets[row + 1]))
        boxes = np.array(self.index.boxes[own])
        boxes[:, 2:] += boxes[:, :2]
        return boxes, self.index.labels[own].astype(np.int64), np.array(self.index.crowd[own])


@dataclass(frozen=True)
class _Panel:
    """What one run shows of one picture."""

    detections: Detections
    labels: np.ndarray
    verdict: Verdict
    unknown: np.ndarray  # bool [D], meets no object but is not known to be wrong


@dataclass(frozen=True)
class _Candidate:
    row: int
    label: int  # the class that the picture was chosen for
    kind: str
    crowded: bool
    panels: list[_Panel]


def _pictures(shown: Sequence[tuple[int, Run]], notes: list[str]) -> Iterator[dict[str, Any]]:
    truth, shown = _open(shown, notes)
    seeds = _seeds(truth)
    ids = [int(truth.index.image_ids[row]) for row, _ in seeds]
    found = [_detections(run, tuple(ids), notes) for _, run in shown]
    candidates = []
    for row, label in seeds:
        panels = [_panel(truth, row, detections[int(truth.index.image_ids[row])]) for detections in found]
        _, labels, crowd = truth.objects(row)
        wanted = labels[~crowd] == label
        hits = [bool((panel.verdict.match[wanted] >= 0).any()) for panel in panels]
        kind = "found" if all(hits) else "differs" if any(hits) else "missed"
        candidates.append(_Candidate(row, label, kind, len(labels) > _CROWDED, panels))
    unread: list[str] = []
    number = max(1, min(_PICTURES, _PANELS // (len(shown) + 1)))
    for candidate in _choose(candidates, number):
        try:
            yield _picture(truth, shown, candidate)
        except UserError as error:
            unread.append(str(error))
    if unread:
        notes.append(f"{len(unread)} of the pictures could not be read: {unread[0]}")


def _detections(run: Run, ids: tuple[int, ...], notes: list[str]) -> dict[int, Detections]:
    if run.masks is None:
        try:
            return _kept(look(run), ids)
        except UserError:
            pass  # the pictures may be worth showing all the same
    files = [run.results] + ([run.masks] if run.masks is not None else [])
    states = [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    try:
        return _read(tuple(states), ids)
    except UserError as error:
        if run.masks is None:
            raise
        notes.append(f"The masks of {run.name} are not drawn: {error}")
        return _read(tuple(states[:1]), ids)


def _kept(seen: Look, ids: tuple[int, ...]) -> dict[int, Detections]:
    """Detections of some pictures, without reading their file again."""
    rows, known = np.searchsorted(seen.truth.image_ids, ids), len(seen.truth.image_ids)
    if any(row >= known or seen.truth.image_ids[row] != own for row, own in zip(rows.tolist(), ids, strict=True)):
        raise UserError("the results are of other pictures")
    kept, found = seen.kept, {}
    for row, own in zip(rows.tolist(), ids, strict=True):
        part = slice(int(kept.starts[row]), int(kept.starts[row + 1]))
        categories = seen.truth.category_ids[kept.labels[part]]
        boxes, scores = (values[part].astype(np.float64) for values in (kept.boxes, kept.scores))
        found[own] = Detections(boxes, categories, scores)
    return found


@functools.lru_cache(maxsize=8)
def _read(states: tuple[tuple[Path, int, int], ...], ids: tuple[int, ...]) -> dict[int, Detections]:
    """A live page is made anew every few seconds: results that have not changed are read once."""
    files = [file for file, _, _ in states]
    return read_detections(files[0], ids, files[1] if len(files) > 1 else None)


def _open(shown: Sequence[tuple[int, Run]], notes: list[str]) -> tuple[_Truth, list[tuple[int, Run]]]:
    """The file of the first run, and the runs that were measured on the same one."""
    first = shown[0][1]
    annotations = annotations_file(first.recipe, first.name)
    assert first.recipe is not None
    index = open_index(annotations)
    same = []
    for number, run in shown:
        if run.recipe is not None and _same(annotations_file(run.recipe, run.name), annotations, index):
            same.append((number, run))
        else:
            notes.append(f"{run.name} was evaluated on another file and is not shown here.")
    images = Path(first.recipe.data.root) / first.recipe.data.val.images if first.recipe.data.val.images else None
    train_images, groups = _training_counts([run for _, run in same], index)
    folder = image_folder(annotations, images)
    return _Truth(index, folder, train_images, groups, first.recipe.data.max_pixels), same


def _same(file: Path, reference: Path, index: AnnotationIndex) -> bool:
    """Whether `file` is the reference or a copy of it."""
    if file.resolve() == reference.resolve():
        return True
    try:
        return open_index(file).fingerprint == index.fingerprint
    except UserError:
        return False


def _training_counts(runs: Sequence[Run], index: AnnotationIndex) -> tuple[np.ndarray, list[str]]:
    """Training images and frequency group per class: of the first run that knows them, else the file's own fields."""
    known = next(({str(entry.get("name")): entry for entry in run.categories} for run in runs if run.categories), {})
    in_file = np.bincount(index.labels, minlength=len(index.categories))
    counts, groups = [], []
    for label, category in enumerate(index.categories):
        entry = known.get(category.name, {})
        own = entry.get("image_count", category.image_count)
        counts.append(float(own) if defined(own) else float(in_file[label]))
        group = entry.get("frequency", category.frequency)
        groups.append("" if group is None else str(group))
    return np.array(counts), groups


def _seeds(truth: _Truth) -> list[tuple[int, int]]:
    """Candidate (image row, class) pairs, rarest classes first; each image once."""
    index = truth.index
    plain = ~index.crowd
    objects = np.bincount(index.image_of[plain], minlength=len(index))
    present = np.unique(index.labels[plain])
    each = max(4, _CANDIDATES // max(1, len(present)))
    seeds: dict[int, int] = {}
    for label in present[np.argsort(truth.train_images[present], kind="stable")]:
        rows = np.unique(index.image_of[plain & (index.labels == label)])
        rows = np.random.default_rng([0, int(label)]).permutation(rows)
        rows = rows[np.argsort(objects[rows] > _CROWDED, kind="stable")]
        for row in rows[:each]:
            seeds.setdefault(int(row), int(label))
        if len(seeds) >= _CANDIDATES:
            break
    return list(seeds.items())


def _panel(truth: _Truth, row: int, detections: Detections) -> _Panel:
    keep = min(_SHOWN, max(1, int((detections.scores >= SCORE).sum())))
    labels = np.searchsorted(truth.index.category_ids, detections.categories[:keep])
    labels = labels.clip(max=len(truth.index.categories) - 1)
    if not np.array_equal(truth.index.category_ids[labels], detections.categories[:keep]):
        raise UserError("the results hold category ids that the evaluated file does not have")
    best = detections.best(keep)
    boxes, truth_labels, crowd = truth.objects(row)
    verdict = judge(boxes[~crowd], truth_labels[~crowd], best.boxes, labels)
    area = np.prod(best.boxes[:, 2:] - best.boxes[:, :2], axis=1)
    inside = intersection(best.boxes, boxes[crowd]) >= IOU * area[:, None]
    in_crowd = (inside & (labels[:, None] == truth_labels[crowd][None])).any(1)
    unknown = ~verdict.hit & (in_crowd | ~truth.index.known(row)[labels])
    return _Panel(best, labels, verdict, unknown)


def _choose(candidates: Sequence[_Candidate], number: int) -> list[_Candidate]:
    """Kinds in turn, rarest classes first, one picture per class before a class comes twice."""
    queues = {kind: [c for c in candidates if c.kind == kind] for kind in _KINDS}
    used: Counter[int] = Counter()
    chosen: list[_Candidate] = []
    while len(chosen) < number and any(queues.values()):
        for queue in queues.values():
            if queue and len(chosen) < number:
                best = min(range(len(queue)), key=lambda at: (used[queue[at].label], queue[at].crowded, at))
                candidate = queue.pop(best)
                used[candidate.label] += 1
                chosen.append(candidate)
    order = {kind: rank for rank, kind in enumerate(_KINDS)}
    return sorted(chosen, key=lambda candidate: order[candidate.kind])


def _picture(truth: _Truth, shown: Sequence[tuple[int, Run]], candidate: _Candidate) -> dict[str, Any]:
    index, row = truth.index, candidate.row
    name = index.file_name(row)
    image = read_image(
        image_path(truth.images, name),
        width=int(index.widths[row]),
        height=int(index.heights[row]),
        max_pixels=truth.max_pixels,
    )
    boxes, labels, crowd = truth.objects(row)
    long_side = max(image.shape[:2])
    least, most = _LONG_SIDE if len(shown) > 1 else _LONG_SIDE_ALONE
    scale = min(max(long_side, least), most) / long_side
    small = Image.fromarray(image).resize(
        (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))),
        Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC,
    )
    canvas = np.asarray(small)
    factor = np.array([canvas.shape[1] / image.shape[1], canvas.shape[0] / image.shape[0]] * 2)
    masks = None
    if any(panel.detections.masks is not None for panel in candidate.panels):
        masks = _shrunk(index.readable_segmentations.image_masks(row), canvas)
    drawn = draw_detections(canvas, boxes * factor, labels, index.names, masks=masks, dashed=crowd)
    panels = [{"title": "ground truth", "color": "", "image": data_uri(drawn), "note": _objects(len(labels))}]
    own_boxes, own_labels = boxes[~crowd], labels[~crowd]
    for (number, run), panel in zip(shown, candidate.panels, strict=True):
        scaled = replace(panel, detections=replace(panel.detections, boxes=panel.detections.boxes * factor))
        panels.append(
            {
                "title": run.name,
                "color": color(number),
                "image": data_uri(_draw(canvas, scaled, own_boxes * factor, own_labels, index.names, candidate.label)),
                "note": _verdict(panel, own_labels, index.names),
            }
        )
    return {
        "name": index.names[candidate.label],
        "kind": candidate.kind,
        "verdict": _KINDS[candidate.kind],
        "group": truth.groups[candidate.label],
        "group_name": group_name(truth.groups[candidate.label]),
        "train_images": count(float(truth.train_images[candidate.label])),
        "file": name,
        "id": int(index.image_ids[row]),
        "panels": panels,
    }


def _draw(
    canvas: np.ndarray, panel: _Panel, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str], about: int
) -> Image.Image:
    """Detections in the colour of their verdict with their masks, and the objects that none of them met, dashed.

    Where there are many, only missed objects of the class that the picture is about are named.
    """
    missed = panel.verdict.match < 0
    few = missed.sum() + len(panel.labels) <= _NAMED
    colors: list[Color] = [
        _HIT if hit else _UNKNOWN if unknown else _WRONG
        for hit, unknown in zip(panel.verdict.hit, panel.unknown, strict=True)
    ]
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(panel.labels, panel.detections.scores, strict=True)]
    texts += [f"missed: {names[label]}" if few or label == about else "" for label in labels[missed]]
    masks = None
    if panel.detections.masks:
        found = coco_mask.decode(panel.detections.masks).transpose(2, 0, 1)
        masks = np.pad(_shrunk(found, canvas), ((0, int(missed.sum())), (0, 0), (0, 0)))
    return draw_detections(
        canvas,
        np.concatenate([panel.detections.boxes, boxes[missed]]),
        np.concatenate([panel.labels, labels[missed]]),
        names,
        colors=colors + [_MISSED] * int(missed.sum()),
        texts=texts,
        masks=masks,
        dashed=np.arange(len(texts)) >= len(panel.labels),
    )


def _shrunk(masks: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    """Masks [N, H, W] at the size of a canvas [h, w, 3], by the nearest pixel; bool [N, h, w]."""
    down, across = (
        (np.arange(canvas.shape[axis]) + 0.5) * masks.shape[axis + 1] // canvas.shape[axis] for axis in (0, 1)
    )
    return masks[:, down.astype(np.int64)][..., across.astype(np.int64)].astype(bool)


def _objects(number: int) -> str:
    return f"{number} object" if number == 1 else f"{number} objects"


def _verdict(panel: _Panel, labels: np.ndarray, names: Sequence[str]) -> str:
    """One line under a picture: what was found, what was taken for something else, what is wrong."""
    found = int((panel.verdict.match >= 0).sum())
    wrong = int((~panel.verdict.hit & ~panel.unknown).sum())
    parts = [f"{found} of {len(labels)} found"]
    for place in np.flatnonzero((panel.verdict.match < 0) & (panel.verdict.taken_for >= 0))[:2]:
        other = panel.verdict.taken_for[place]
        score = panel.detections.scores[other]
        parts.append(f"{names[labels[place]]} taken for {names[panel.labels[other]]} ({score:.2f})")
    if wrong:
        parts.append(f"{wrong} wrong")
    return ", ".join(parts)
