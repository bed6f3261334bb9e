"""Smooth-tail data (Step-wise Learning, Dong et al., ICCV'23, 3.1): exemplars of every class, and sets made of them.

    parts = divide(stats.image_count, (30,))                          # 0 head, 1 tail
    exemplars = rank_exemplars(index, rows, scores)                   # per class, best first
    kept = choose(exemplars, index, per_class(parts, 0, 200, 30))     # D_head as a mask over the annotations
    TrainingDataset(source, config, seed, kept=kept)                  # no picture is copied

An exemplar is one annotation. An image belongs to a set if one of its annotations does, and shows those alone.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tailfin.data import annotation_json
from tailfin.data.index import BORDER, AnnotationIndex, open_index
from tailfin.errors import UserError
from tailfin.files import read_json, read_object, write_atomic
from tailfin.schema.stages import steps
from tailfin.schema.stepwise import Kept, Step, Stepwise

_OWN = ("annotations", "fingerprint", "classes")  # of a file of exemplars, beside the facts of its selection
ALL = -1  # in counts: every annotation of the class


@dataclass(frozen=True, eq=False)
class Exemplars:
    """The annotations that stand for each class, class after class, best first."""

    rows: NDArray[np.int64]  # [E] of the index
    offsets: NDArray[np.int64]  # [C + 1]: class c has rows[offsets[c] : offsets[c + 1]]
    scores: NDArray[np.float32]  # [E]


@dataclass(frozen=True)
class PlannedStep:
    """A step with the classes that it is for."""

    name: str
    config: Step
    own: NDArray[np.bool_]  # [C] classes that the step is for
    old: NDArray[np.bool_]  # [C] classes of earlier parts, which a teacher knows; none in step 1
    counts: NDArray[np.int64]  # [C] annotations of each class; ALL
    file: str = ""  # of the annotations that it keeps, in the place of `counts`


def divide(image_count: ArrayLike, cuts: Sequence[int], boundary: str = "gt") -> NDArray[np.int64]:
    """Part of each class by its training images, int64 [C]: 0 above the largest cut, then 1, ... down to len(cuts).

    `boundary` "gt" puts a class with exactly as many images as the cut below it (released lists), "ge" above it (text).
    """
    counts = np.asarray(image_count)
    return len(cuts) - np.searchsorted(np.sort(cuts), counts, side="left" if boundary == "gt" else "right")


def divide_by_rank(instance_count: ArrayLike, cuts: Sequence[int]) -> NDArray[np.int64]:
    """Part of each class by its rank, int64 [C]: 0 for the cuts[0] classes with most annotations, 1 for the next ones
    up to cuts[1], ... Classes with equally many stay in their order."""
    order = np.argsort(-np.asarray(instance_count), kind="stable")
    parts = np.empty(len(order), dtype=np.int64)
    parts[order] = np.searchsorted(np.sort(cuts), np.arange(len(order)), side="right")
    return parts


def per_class(parts: NDArray[np.int64], own: int, before: int, inside: int, after: int | None = None) -> NDArray:
    """Counts [C] of a step: `before` for classes of earlier parts, `inside` for part `own`, `after` for later ones.

    Step 1 (`own` 0): `before` is what a head class gets and `inside` every other class.
    """
    if own == 0:
        return np.where(parts == 0, before, inside)
    return np.select([parts < own, parts == own], [before, inside], inside if after is None else after)


def rank_exemplars(
    index: AnnotationIndex,
    rows: NDArray[np.int64],
    scores: NDArray[np.float32],
    *,
    threshold: float = 0.5,
    distinct_images: bool = True,
    length: int = 500,
) -> Exemplars:
    """The first `length` annotations of each class.

    First those that score above `threshold` and are the class's best of their image, by falling score; then all others
    by falling score. Equal scores are in the order of annotation ids.

    Args:
        rows: annotations of the index that have a score.
        scores: theirs, float32.
    """
    labels, images = index.labels[rows], index.image_of[rows]
    by_score = np.lexsort((index.annotation_ids[rows], -scores, labels))
    rows, scores, labels, images = rows[by_score], scores[by_score], labels[by_score], images[by_score]
    sure = scores > threshold
    if distinct_images:
        # by descending score the first annotation of an image within its class is the best one, so above the threshold
        _, first = np.unique(labels.astype(np.int64) * len(index) + images, return_index=True)
        best = np.zeros(len(rows), dtype=bool)
        best[first] = True
        sure &= best
    order = np.lexsort((np.arange(len(rows)), ~sure, labels))
    position = _positions(labels[order], len(index.categories))
    order = order[position < length]
    sizes = np.bincount(labels[order], minlength=len(index.categories))
    return Exemplars(rows[order], np.concatenate([[0], np.cumsum(sizes)]), scores[order])


def random_scores(index: AnnotationIndex, rows: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
    """A number by chance for each annotation, the same for all of a picture: by it whole pictures are drawn."""
    drawn = np.random.default_rng([seed, 7]).random(len(index))
    return drawn[index.image_of[rows]].astype(np.float32)


def choose(exemplars: Exemplars, index: AnnotationIndex, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which annotations a set keeps, bool [A]: the first counts[c] exemplars of class c, all annotations for `ALL`."""
    kept = (counts == ALL)[index.labels]
    labels = index.labels[exemplars.rows]
    position = np.arange(len(labels)) - exemplars.offsets[labels]
    kept[exemplars.rows[position < counts[labels]]] = True
    return kept


def planned_steps(
    settings: Stepwise, parts: NDArray[np.int64], instance_count: ArrayLike | None = None
) -> list[PlannedStep]:
    """The steps after step 0, in order; `instance_count` [C], annotations of each class, is for balanced replay."""
    planned = []
    for name, part, step in steps(settings):
        tail = _number(step.per_tail_class)
        if step.per_head_class == "balanced":
            head = _mean_of(instance_count, parts == part if part >= 0 else parts > 0)
        else:
            head = _number(step.per_head_class)
        if part == 0:
            counts = per_class(parts, 0, head, _later(settings))
        elif part > 0:
            counts = per_class(parts, part, head, tail, after=_later(settings))
        else:
            counts = np.where(parts == 0, head, tail)
        own, old = (parts == part, parts < part) if part >= 0 else (parts >= 0, parts == 0)
        file = step.annotations[max(part - 1, 0)] if step.annotations else ""
        planned.append(PlannedStep(name, step, own, old, counts, file))
    return planned


def few_exemplars(exemplars: Exemplars, index: AnnotationIndex, counts: NDArray[np.int64]) -> list[int]:
    """Classes whose list is shorter than what a step wants of them and than what the file has."""
    there = np.bincount(index.labels[index.clean().rows], minlength=len(counts))
    return np.flatnonzero((counts != ALL) & (np.diff(exemplars.offsets) < np.minimum(counts, there))).tolist()


def count_kept(index: AnnotationIndex, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Kept annotations of each class, int64 [C]."""
    return np.bincount(index.labels[kept], minlength=len(index.categories))


# ---- files -----------------------------------------------------------------------------------------------------------


def write_exemplars(
    path: Path, exemplars: Exemplars, index: AnnotationIndex, parts: NDArray[np.int64], facts: Mapping[str, Any]
) -> None:
    """A JSON file to read: `facts` about the selection, then every class with its list, one exemplar per line."""
    pairs = np.unique(index.labels.astype(np.int64) * len(index) + index.image_of)
    images = np.bincount(pairs // len(index), minlength=len(index.categories)).tolist()
    objects = np.bincount(index.labels, minlength=len(index.categories)).tolist()
    annotation_ids = index.annotation_ids[exemplars.rows].tolist()
    image_ids = index.image_ids[index.image_of[exemplars.rows]].tolist()
    scores = [float(f"{score:.6g}") for score in exemplars.scores.tolist()]
    head = {"annotations": index.path.name, "fingerprint": index.fingerprint, **facts}
    lines = [msgspec.json.format(msgspec.json.encode(head), indent=1).decode()[:-2] + ',\n "classes": [']
    for label, category in enumerate(index.categories):
        about = {
            "id": category.id,
            "name": category.name,
            "part": part_name(int(parts[label]), int(parts.max())),
            "images": images[label],
            "instances": objects[label],
        }
        own = range(int(exemplars.offsets[label]), int(exemplars.offsets[label + 1]))
        entries = [
            f'   {{"annotation": {annotation_ids[row]}, "image": {image_ids[row]}, "score": {scores[row]!r}}}'
            for row in own
        ]
        text = msgspec.json.encode(about).decode()[:-1]
        comma = "," if label + 1 < len(index.categories) else ""
        inner = "\n" + ",\n".join(entries) + "\n  " if entries else ""
        lines.append(f'  {text},"exemplars":[{inner}]}}{comma}')
    write_atomic(path, "\n".join([*lines, " ]\n}\n"]))


def read_exemplars(path: str | Path, index: AnnotationIndex) -> Exemplars:
    """The lists of `write_exemplars` as rows of the index; a file of other annotations is a `UserError`."""
    value = read_json(path, "exemplars")
    try:
        fingerprint = value["fingerprint"]
        lists = {int(entry["id"]): entry["exemplars"] for entry in value["classes"]}
        chosen = [lists.get(int(number), []) for number in index.category_ids]
        ids = np.array([entry["annotation"] for own in chosen for entry in own], dtype=np.int64)
        scores = np.array([entry["score"] for own in chosen for entry in own], dtype=np.float32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"exemplars {path}: it does not hold lists of exemplars ({error!r}); where it is a run's, remove the file, "
            "and --resume chooses them again"
        ) from None
    if fingerprint != index.fingerprint:
        raise UserError(f"exemplars {path} were chosen from other annotations than {index.path} holds now")
    rows = rows_of(ids, index, f"exemplars {path}")
    labels = np.repeat(np.arange(len(chosen)), [len(own) for own in chosen])
    wrong = np.flatnonzero(index.labels[rows] != labels)
    if len(wrong):
        raise UserError(f"exemplars {path}: annotation {ids[wrong[0]]} is listed under another class than its own")
    return Exemplars(rows, np.concatenate([[0], np.cumsum([len(own) for own in chosen])]).astype(np.int64), scores)


def read_facts(path: str | Path) -> dict[str, Any]:
    """What a file of exemplars says of its selection: `facts` of `write_exemplars`."""
    return {key: value for key, value in read_object(path, "exemplars").items() if key not in _OWN}


def read_kept(path: str | Path, index: AnnotationIndex) -> NDArray[np.bool_]:
    """Which annotations of the index a COCO file made from it has, bool [A]: the sets of `write_subset`.

    Annotations are joined by id; class (by name), image and box must be the same. Anything else is a `UserError`.
    """
    other = open_index(path)
    rows = rows_of(other.annotation_ids, index, f"annotations {path}")
    names, own_names = np.array(other.names), np.array(index.names)
    differ = {
        "class": names[other.labels] != own_names[index.labels[rows]],
        "image": other.image_ids[other.image_of] != index.image_ids[index.image_of[rows]],
        "box": (np.abs(other.boxes - index.boxes[rows]) > BORDER).any(1),
    }
    for what, wrong in differ.items():
        if wrong.any():
            number = other.annotation_ids[np.flatnonzero(wrong)[0]]
            raise UserError(f"annotations {path}: annotation {number} has another {what} than in {index.path}")
    kept = np.zeros(len(index.labels), dtype=bool)
    kept[rows] = True
    return kept


def rows_of(annotation_ids: NDArray[np.int64], index: AnnotationIndex, source: str) -> NDArray[np.int64]:
    """Rows of the index with these annotation ids; an unknown one is a `UserError`."""
    sorter = np.argsort(index.annotation_ids)
    place = np.searchsorted(index.annotation_ids, annotation_ids, sorter=sorter)
    rows = sorter[np.minimum(place, len(sorter) - 1)] if len(sorter) else np.zeros(len(annotation_ids), np.int64)
    missing = np.flatnonzero(index.annotation_ids[rows] != annotation_ids) if len(sorter) else annotation_ids
    if len(missing):
        raise UserError(f"{source}: there is no annotation {annotation_ids[missing[0]]} in {index.path}")
    return rows


class _Id(msgspec.Struct):
    id: int


class _Link(msgspec.Struct):
    id: int
    image_id: int


def write_subset(path: Path, index: AnnotationIndex, kept: NDArray[np.bool_]) -> tuple[int, int]:
    """The kept annotations and their images as a COCO file, every entry byte for byte; (images, annotations) written.

    Categories and all other top-level entries stay as they are.
    """
    data = annotation_json.with_whole_ids(annotation_json.read_bytes(index.path))
    document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    links = msgspec.json.decode(document["annotations"], type=list[_Link])
    images = msgspec.json.decode(document["images"], type=list[_Id])
    chosen = set(index.annotation_ids[kept].tolist())
    shown = {link.image_id for link in links if link.id in chosen}
    entries = {
        "images": (image.id in shown for image in images),
        "annotations": (link.id in chosen for link in links),
    }
    sizes = []
    for key, marks in entries.items():
        raw = msgspec.json.decode(document[key], type=list[msgspec.Raw])
        parts = [bytes(entry).strip() for entry, keep in zip(raw, marks, strict=True) if keep]
        document[key] = msgspec.Raw(b"[" + b",\n".join(parts) + b"]")
        sizes.append(len(parts))
    write_atomic(path, msgspec.json.encode(document))
    return sizes[0], sizes[1]


def curves(counts: Mapping[str, NDArray[np.int64]], names: Sequence[str]) -> Any:
    """Annotations per class of the whole set and of the sets made from it (Fig. 3), as a plotly figure.

    The first entry of `counts` is the whole set; classes are ordered by its falling counts.
    """
    import plotly.graph_objects as go

    whole = next(iter(counts.values()))
    order = np.argsort(-whole, kind="stable")
    labels = [html.escape(names[label], quote=False) for label in order]  # never read as markup
    picture = go.Figure()
    for (name, values), color in zip(
        counts.items(), ("#5b7083", "#2f7de1", "#e5484d", "#f0801a", "#10a37f"), strict=False
    ):
        picture.add_scatter(
            x=list(range(len(order))),
            y=[int(values[label]) or None for label in order],  # a log scale has no zero
            customdata=labels,
            hovertemplate="%{customdata}: %{y}",
            mode="lines+markers" if len(order) <= 60 else "lines",
            line={"color": color},
            name=f"{name} ({int(values.sum())})",
        )
    few = len(order) <= 60  # more names do not fit below the axis
    ticks = {"tickmode": "array", "tickvals": list(range(len(order))) if few else [], "ticktext": labels if few else []}
    picture.update_xaxes(title="classes by falling number of annotations", **ticks)
    picture.update_yaxes(title="annotations", type="log", dtick=1)
    picture.update_layout(title="Smooth-tail data: annotations per class", template="plotly_white", height=560)
    return picture


def part_name(part: int, last: int) -> str:
    """How a part of the classes is called: head and tail, of more than two head, part 2, ..., tail."""
    return "head" if part == 0 else "tail" if part == last else f"part {part + 1}"


def _positions(labels: NDArray[np.int32], classes: int) -> NDArray[np.int64]:
    """Place of each entry among those of its class; `labels` ascend."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=classes))])
    return np.arange(len(labels)) - starts[labels]


def _later(settings: Stepwise) -> int:
    """Annotations of a class that has its step still before it."""
    return _number(settings.head.per_tail_class) if settings.head is not None else 0


def _mean_of(instance_count: ArrayLike | None, own: NDArray[np.bool_]) -> int:
    """Annotations that the classes `own` have on average, at least one."""
    if instance_count is None or not own.any():
        return 1
    return max(1, round(float(np.asarray(instance_count)[own].mean())))


def _number(count: Kept) -> int:
    return ALL if count == "all" else int(count)
