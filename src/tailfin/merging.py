"""One detector of the classes of two: `tailfin merge FIRST SECOND --out model.safetensors`.

    lines = merge_models("planes/model.safetensors", "debris/model.safetensors", "both.safetensors")

What can be merged are classifiers on the same features: body, pyramid, proposals and shared layers have to be the same
weights in both, as of two models whose classifiers alone were trained from one (`stepwise` with frozen features, a
decoupled second stage with `trains: [classifier, box]`). Then every class scores as in the model that it comes from:
exactly so with sigmoids, and with a softmax in its odds against the background. Models whose features differ cannot be
one detector; `as_start` writes the first one's features with the rows of both, as weights for a training on both data
sets and nothing else. A class that both have is the first one's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tailfin.checkpoint import ModelFile, content_hash, load_model_file, save_model
from tailfin.class_rows import check_aliases, join_class_rows, read_aliases, rows_behind, same_for_all_classes
from tailfin.errors import UserError
from tailfin.joins import join_classes, listed
from tailfin.losses.base import ClassificationLoss
from tailfin.models import build_detector
from tailfin.stats import ClassStats, frequency_groups
from tailfin.weights import load_weights

OTHER = "\0"  # before a name of the second model's classes that is not to be joined


def merge_models(
    first: str | Path,
    second: str | Path,
    out: str | Path,
    *,
    aliases: str | Path | None = None,
    as_start: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write a model file of the classes of both; returns lines that say what became of them.

    Args:
        first, second: model files or run folders. Recipe, features and shared classes are the first one's.
        aliases: file of `name in the first: name in the second`.
        as_start: features may differ; the file is a start for training, no detector.

    Raises:
        UserError: detectors of other kinds, losses of other kinds, other features without `as_start`.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise UserError(f"--out {path} exists already; add --overwrite to replace it")
    files = [load_model_file(_model(Path(given))) for given in (first, second)]
    one, other = files
    lines = _check_features(one, other, as_start)
    known = read_aliases(aliases) if aliases is not None else {}
    check_aliases(known, other.stats.names, one.stats.names)
    names = join_classes(one.stats.names, other.stats.names, known)
    added = [place for place, name in enumerate(other.stats.names) if name in set(names.unknown)]
    if not added:
        raise UserError(f"{other.path}: all of its {len(other.stats.names)} classes are in {one.path}, nothing is new")
    stats = _stats(one, other, names.rows.tolist(), added)
    model, _ = build_detector(one.recipe, stats, start=False)
    own = model.state_dict()
    state, anew = join_class_rows(own, one.weights, one.stats.names, stats.names)
    chosen = [name if place in set(added) else OTHER + name for place, name in enumerate(other.stats.names)]
    background, how = _with_background_of(one, other, model.loss)
    rows, _ = join_class_rows({**own, **state}, background, chosen, stats.names)
    shared = {
        key for key in rows if key in one.weights and same_for_all_classes(key, one.weights, one.stats.num_classes)
    }
    state |= {key: value for key, value in rows.items() if key not in shared and key in own}
    said = load_weights(model, state, str(path))
    save_model(path, model, one.recipe, stats, parents=[content_hash(file.path) for file in files], stage="merged")
    both = int((names.rows >= 0).sum())
    return [
        *lines,
        f"{len(stats.names)} classes: {one.stats.num_classes} of {one.path} ({both} of them in both), "
        f"{len(added)} more of {other.path} ({listed([other.stats.names[place] for place in added])})",
        how,
        *(line for line in anew if "start anew" in line),
        *(line for line in said if "another shape" in line),
        str(path),
    ]


# ---- details ---------------------------------------------------------------------------------------------------------


def _model(given: Path) -> Path:
    return given / "model.safetensors" if given.is_dir() else given


def _check_features(one: ModelFile, other: ModelFile, as_start: bool) -> list[str]:
    """Refuse what is no classifier on the same features; a line about features that differ."""
    for key, ours, theirs in (
        ("detector.name", one.recipe.detector.name, other.recipe.detector.name),
        ("backbone", one.recipe.backbone, other.recipe.backbone),
        ("loss", one.recipe.loss.name, other.recipe.loss.name),
    ):
        if ours != theirs:
            raise UserError(f"{other.path} cannot be merged with {one.path}: {key} is {theirs} there, {ours} here")
    mine = {key for key in one.weights if same_for_all_classes(key, one.weights, one.stats.num_classes)}
    yours = {key for key in other.weights if same_for_all_classes(key, other.weights, other.stats.num_classes)}
    shapes = [key for key in mine & yours if one.weights[key].shape != other.weights[key].shape]
    if wrong := sorted((mine ^ yours) | set(shapes)):
        raise UserError(
            f"{other.path} cannot be merged with {one.path}: they are built in another way, {len(wrong)} weights have "
            f"other names or shapes ({', '.join(wrong[:3])})"
        )
    different = sorted(key for key in mine if not torch.equal(one.weights[key], other.weights[key]))
    if not different:
        return [f"{len(mine)} weights that all classes share are the same in both"]
    told = f"{len(different)} of {len(mine)} weights that all classes share differ ({', '.join(different[:3])})"
    if not as_start:
        raise UserError(
            f"{other.path} cannot be merged with {one.path} into a detector: {told}, so the second one's classes were "
            "learnt on other features. --as-start writes a start for a training on the data of both"
        )
    return [f"{told}: the first one's are taken, and the file is a start for training, no detector"]


def _stats(one: ModelFile, other: ModelFile, shared: list[int], added: list[int]) -> ClassStats:
    """Classes of both by ascending category id; a new class whose id is taken gets the next free one. Counts of a class
    in both are added."""
    ours, theirs = one.stats, other.stats
    images, objects = ours.image_count.astype(float), ours.instance_count.astype(float)
    for place, row in enumerate(shared):
        if row >= 0:
            images[place] += theirs.image_count[row]
            objects[place] += theirs.instance_count[row]
    ids = [int(number) for number in ours.category_ids]
    for place in added:
        wanted = int(theirs.category_ids[place])
        ids.append(wanted if wanted not in ids else max(ids) + 1)
    names = [*ours.names, *(theirs.names[place] for place in added)]
    counts = [*images, *(float(theirs.image_count[place]) for place in added)]
    instances = [*objects, *(float(theirs.instance_count[place]) for place in added)]
    order = sorted(range(len(ids)), key=lambda place: ids[place])
    ordered = [counts[place] for place in order]
    return ClassStats(
        image_count=np.array(ordered),
        instance_count=np.array([instances[place] for place in order]),
        num_images=ours.num_images + theirs.num_images,
        num_annotated_images=ours.num_annotated_images + theirs.num_annotated_images,
        names=tuple(names[place] for place in order),
        frequency=frequency_groups(ordered, one.recipe.evaluation.group_bounds),
        category_ids=np.array([ids[place] for place in order], np.int64),
    )


def _with_background_of(
    one: ModelFile, other: ModelFile, loss: ClassificationLoss | None
) -> tuple[dict[str, Tensor], str]:
    """The second's weights with the first's columns behind the classes, and how that was done.

    A softmax knows differences of logits alone: its classes are moved with the background, so that their odds against
    it stay. Columns of a sigmoid stand for themselves, those behind the classes are the first one's.
    """
    found, moved, replaced = dict(other.weights), 0, 0
    shifts = loss is not None and _knows_differences_alone(loss)
    for key, value in other.weights.items():
        theirs = rows_behind(key, other.weights, other.stats.num_classes)
        ours = rows_behind(key, one.weights, one.stats.num_classes)
        if theirs is None or ours is None or not theirs.any():
            continue
        background = one.weights[key][ours]
        found[key] = value.clone()
        if shifts and int(theirs.sum()) == 1 and one.recipe.detector.name != "deformable_detr" and _linear(one):
            found[key] += background - value[theirs]
            moved += 1
        else:
            replaced += 1
        found[key][theirs] = background
    if moved:
        return found, "softmax: the second one's logits are moved to the first one's background, their odds stay"
    how = "the first one's columns behind the classes are used with all classes" if replaced else "classes stand alone"
    return found, f"{one.recipe.loss.name}: {how}"


def _linear(file: ModelFile) -> bool:
    classifier = getattr(file.recipe.detector, "classifier", None)
    return classifier is None or classifier.name == "linear"


def _knows_differences_alone(loss: ClassificationLoss) -> bool:
    zero = torch.linspace(-2, 2, loss.num_logits)[None]
    return loss.num_logits == loss.num_classes + 1 and torch.allclose(
        loss.scores(zero), loss.scores(zero + 1), atol=1e-5
    )
