"""The protocols: from annotations and results to the numbers of `metrics.json`.

metrics = evaluate("val.json", "results.bbox.json", protocol="lvis")
metrics["bbox"]["APr"]
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tailfin.data.odd_annotations import area_note
from tailfin.errors import UserError, nearest
from tailfin.evaluation.curves import AREAS, Curves, coco_curves, lvis_curves
from tailfin.evaluation.detections import (
    Detections,
    best_per_category,
    best_per_image,
    check_boxes,
    in_form,
    load_detections,
    warn_if_cut_per_image,
)
from tailfin.evaluation.groups import (
    TrainCounts,
    as_train_counts,
    frequencies,
    image_counts,
    instance_counts,
    instance_groups,
)
from tailfin.evaluation.odd_results import doubts
from tailfin.evaluation.truth import GroundTruth, load_truth
from tailfin.stats import GROUPS

PROTOCOLS = ("lvis", "coco", "lvis-fixed", "groups")
IOU_TYPES = ("bbox", "segm")
LVIS_LIMIT = 300  # detections per image
COCO_LIMITS = (1, 10, 100)
FIXED_LIMIT = 10_000  # detections per class over the set


def evaluate(
    annotations: str | os.PathLike[str] | Mapping[str, Any],
    results: Any,
    protocol: str = "lvis",
    iou_type: str | Sequence[str] = "bbox",
    *,
    max_dets: int | Sequence[int] | None = None,
    per_class: int | None = None,
    use_cats: bool = True,
    group_bounds: Sequence[int] | None = None,
    train_counts: TrainCounts | Mapping[int, int] | str | os.PathLike[str] | None = None,
    names: Mapping[int, str] | Sequence[str] | None = None,
    box_form: str | None = None,
) -> dict[str, Any]:
    """Average precision and recall of detections, as in `metrics.json`.

    annotations: COCO or LVIS annotation file, or the parsed dict.
    results: COCO results JSON, a list of its entries, a folder that `ResultWriter` wrote or that holds
        `results.bbox.json` / `results.segm.json`, or a mapping from IoU type to any of these.
    protocol: "lvis" (federated, 300 detections per image), "coco" (12 COCO metrics), "lvis-fixed" (LVIS with no limit
        per image and the best `per_class` detections of each class), "groups" (COCO plus AP1..AP4 by training
        instances [0, 20), [20, 400), [400, 8000), [8000, inf)).
    iou_type: "bbox", "segm", or several of them.
    max_dets: detections per image; -1 = no limit. lvis: over all classes (300). coco and groups: per class, one
        number or an ascending sequence of limits (1, 10, 100).
    per_class: lvis-fixed: detections kept per class over the whole set (10,000; -1 = all).
    use_cats: False pools all classes (coco only).
    group_bounds: largest training image count of a rare and of a common class; they overrule the categories' own
        `frequency`. Without them a category's `frequency` counts, else `train_counts` with LVIS's (10, 100).
    train_counts: counts of the training set: `TrainCounts`, image counts by category id, or the training file, whose
        classes are joined by name.
    names: names by category id, or in the order of ascending id, instead of the file's.
    box_form: form of the results' boxes, a key of `tailfin.data.box_forms.FORMS` ("xywh", "xyxy", "cxcywh",
        "yxyx", "xywh-fractions", ...). None reads xywh and refuses boxes that are surely of another form.

    Returns `{"protocol", "bbox": {"AP", ...}, "segm": {...}, "per_category": [...]}`: fractions in 0..1, -1 where the
    protocol defines none. Raises `UserError` for anything wrong with the input; warns where lvis-fixed gets results
    that look cut per image, where an LVIS file names no negative class, where names and ids of the results contradict
    each other, and of what right results never are (`odd_results`).
    """
    iou_types = _checked_iou_types(iou_type)
    limits = None if max_dets is None else np.atleast_1d(np.asarray(max_dets)).tolist()
    _check_options(protocol, limits, per_class, use_cats)
    truth = load_truth(annotations)
    if not truth.form_stated:
        check_boxes(
            truth.boxes,
            truth.image_sizes[truth.image_rows][:, ::-1].astype(np.float64),
            truth.label,
            "`tailfin data merge FILE --box-form {form} --out NEW` rewrites them",
        )
    if note := area_note(truth.area, truth.boxes):
        warnings.warn(f"{truth.label}: {note}", UserWarning, stacklevel=2)
    if protocol.startswith("lvis") and not truth.exhaustive.all() and not truth.negative_pairs.size:
        warnings.warn(
            f"{truth.label}: every neg_category_ids is empty: no image lists a negative class, so false positives in "
            "images without the class are not counted",
            UserWarning,
            stacklevel=2,
        )
    counts = as_train_counts(train_counts)
    counts = counts.for_file(truth.categories, truth.label) if counts is not None else None
    frequency = frequencies(truth.categories, group_bounds, counts)
    groups = {f"AP{letter}": [k for k, f in enumerate(frequency) if f == letter] for letter in GROUPS}
    if protocol == "groups":
        instance_group = instance_groups(truth.categories, counts)
        groups |= {f"AP{number + 1}": np.flatnonzero(instance_group == number).tolist() for number in range(4)}

    metrics: dict[str, Any] = {"protocol": protocol}
    tables: dict[str, dict[str, np.ndarray]] = {}
    for kind in iou_types:
        detections = in_form(load_detections(results, truth, kind), truth, box_form)
        curves, shown = _curves(truth, detections, protocol, kind, limits, per_class, use_cats)
        metrics[kind] = _summary(curves, shown, groups if use_cats else dict.fromkeys(groups, []), protocol)
        tables[kind] = _per_category(curves)
        if kind == iou_types[0]:
            for doubt in doubts(truth, detections, metrics[kind]["AP50"], box_form):
                warnings.warn(doubt, UserWarning, stacklevel=2)
    metrics["per_category"] = _rows(truth, frequency, counts, names, tables) if use_cats else []
    return metrics


def _curves(
    truth: GroundTruth,
    detections: Detections,
    protocol: str,
    iou_type: str,
    max_dets: list[int] | None,
    per_class: int | None,
    use_cats: bool,
) -> tuple[Curves, list[int]]:
    """The curves of a protocol and its limits as they were asked for (-1 = none)."""
    if protocol == "lvis":
        limit = LVIS_LIMIT if max_dets is None else max_dets[0]
        if limit >= 0:  # the limit comes before the federated filter: classes that nobody judged use it up too
            detections = best_per_image(detections, limit)
        return lvis_curves(truth, detections, iou_type), [limit]
    if protocol == "lvis-fixed":
        warn_if_cut_per_image(detections)
        limit = FIXED_LIMIT if per_class is None else per_class
        if limit >= 0:
            detections = best_per_category(detections, limit)
        return lvis_curves(truth, detections, iou_type), [-1]
    limits = _coco_limits(max_dets)
    engine_limits = [limit if limit >= 0 else max(1, len(detections)) for limit in limits]
    return coco_curves(truth, detections, iou_type, engine_limits, use_cats), limits


def _summary(curves: Curves, limits: list[int], groups: Mapping[str, list[int]], protocol: str) -> dict[str, float]:
    precision, recall = curves.precision[..., -1], curves.recall
    summary = {"AP": _mean(precision[..., 0]), "AP50": _mean(precision[0, ..., 0]), "AP75": _mean(precision[5, ..., 0])}
    summary |= {f"AP{name}": _mean(precision[..., area]) for area, name in enumerate(AREAS) if area}
    summary |= {name: _mean(precision[:, :, classes, 0]) for name, classes in groups.items()}
    suffix = f"@{limits[-1]}" if protocol == "lvis" else ""
    if protocol in ("coco", "groups"):
        summary |= {f"AR@{limit}": _mean(recall[:, :, 0, place]) for place, limit in enumerate(limits)}
    else:
        summary[f"AR{suffix}"] = _mean(recall[:, :, 0, -1])
    summary |= {f"AR{name}{suffix}": _mean(recall[:, :, area, -1]) for area, name in enumerate(AREAS) if area}
    return summary


def _per_category(curves: Curves) -> dict[str, np.ndarray]:
    """Metrics of every class, float64 `[K]` each; a class without ground truth is -1 throughout, so is its mean."""
    precision = curves.precision[..., -1]
    by_area = precision.mean((0, 1))  # [K, areas]
    table = {"AP": by_area[:, 0], "AP50": precision[0, :, :, 0].mean(0), "AP75": precision[5, :, :, 0].mean(0)}
    table |= {f"AP{name}": by_area[:, area] for area, name in enumerate(AREAS) if area}
    return table | {"AR": curves.recall[:, :, 0, -1].mean(0)}


def _rows(
    truth: GroundTruth,
    frequency: Sequence[str | None],
    counts: TrainCounts | None,
    names: Mapping[int, str] | Sequence[str] | None,
    tables: Mapping[str, Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
    images, instances = image_counts(truth.categories, counts), instance_counts(truth.categories, counts)
    values = {kind: {name: column.tolist() for name, column in table.items()} for kind, table in tables.items()}
    shown = _names(truth, names)
    return [
        {
            "id": category.id,
            "name": shown[k],
            "frequency": frequency[k],
            "image_count": images[k],
            "instance_count": instances[k],
            **{kind: {name: column[k] for name, column in table.items()} for kind, table in values.items()},
        }
        for k, category in enumerate(truth.categories)
    ]


def _names(truth: GroundTruth, names: Mapping[int, str] | Sequence[str] | None) -> list[str]:
    own = [category.name or str(category.id) for category in truth.categories]
    if names is None:
        return own
    if isinstance(names, Mapping):
        return [names.get(category.id, name) for category, name in zip(truth.categories, own, strict=True)]
    if len(names) != len(own):
        raise UserError(f"{len(names)} names were given for the {len(own)} categories of {truth.label}")
    return list(names)


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _checked_iou_types(iou_type: str | Sequence[str]) -> tuple[str, ...]:
    chosen = (iou_type,) if isinstance(iou_type, str) else tuple(iou_type)
    for name in chosen:
        if name not in IOU_TYPES:
            raise UserError(f'unknown IoU type "{name}"{nearest(name, IOU_TYPES)}')
    if not chosen:
        raise UserError(f"no IoU type is given{nearest('', IOU_TYPES)}")
    return tuple(dict.fromkeys(chosen))


def _check_options(protocol: str, max_dets: list[int] | None, per_class: int | None, use_cats: bool) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f'unknown protocol "{protocol}"{nearest(protocol, PROTOCOLS)}')
    if per_class is not None and protocol != "lvis-fixed":
        raise UserError(f'per_class (--per-class) belongs to protocol "lvis-fixed", not to "{protocol}"')
    if max_dets is not None and protocol == "lvis-fixed":
        raise UserError('protocol "lvis-fixed" has no limit per image: leave out max_dets (--max-dets)')
    if not use_cats and protocol != "coco":
        raise UserError(f'classes can be pooled (use_cats=False, --no-cats) in protocol "coco", not in "{protocol}"')
    for name, values in (("max_dets", max_dets or []), ("per_class", [] if per_class is None else [per_class])):
        for value in values:
            if value != -1 and not (value >= 1 and value == int(value)):
                raise UserError(f"{name} is {value}: a positive whole number is needed, or -1 for no limit")
    if protocol == "lvis" and max_dets is not None and len(max_dets) != 1:
        raise UserError(f'protocol "lvis" takes one limit per image, not {max_dets}')


def _coco_limits(max_dets: list[int] | None) -> list[int]:
    if max_dets is None:
        return list(COCO_LIMITS)
    if len(max_dets) == 1:  # a new largest limit, with the smaller ones that stay below it
        return [limit for limit in COCO_LIMITS[:-1] if max_dets[0] == -1 or limit < max_dets[0]] + max_dets
    finite = max_dets[:-1] if max_dets and max_dets[-1] == -1 else max_dets
    if not max_dets or -1 in finite or finite != sorted(set(finite)):
        raise UserError(f"max_dets {max_dets}: the limits must ascend; -1 (no limit) can only be the last")
    return max_dets
