"""Detectors of other projects' model zoos as model files: `tailfin convert CHECKPOINT --recipe R --classes FILE`.

    lines = convert("model_final.pkl", "lvis_v1/mask_rcnn_r50", "lvis_v1_val.json", "model.safetensors")

The recipe says what the detector is; where the other project does a thing in another way, the keys of the recipe are
set to it and the lines say which (`models/convert_*.py`). Rows of classes go to the class of the same name: the
checkpoint's own names, else those of `source_classes`, else COCO's, else, as the lines say, the order of `classes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from tailfin.checkpoint import file_hash, save_model
from tailfin.class_rows import Aliases, join_class_rows, read_aliases
from tailfin.config import check_recipe, load_recipe
from tailfin.data.index import open_index
from tailfin.errors import UserError
from tailfin.files import read_text
from tailfin.foreign import Checkpoint, read_checkpoint
from tailfin.joins import join_classes
from tailfin.models import build_detector, convert_detectron2, convert_mmdetection, released_weights
from tailfin.models.coco_weights import PUBLISHED, coco_state, differing_settings
from tailfin.models.convert_torchvision import is_torchvision_rcnn, is_torchvision_retinanet
from tailfin.models.convert_torchvision import zoo as torchvision_zoo
from tailfin.models.released import STYLES, Zoo
from tailfin.recipe_values import assign
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import final_stage
from tailfin.stats import ClassStats
from tailfin.weights import load_fitting, load_whole

COCO = "coco"  # in the place of a checkpoint: torchvision's published one


def convert(
    checkpoint: str | Path,
    recipe: str | Path,
    classes: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    style: str = "",
    source_classes: str | Path | None = None,
    aliases: str | Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a model file with a checkpoint's weights; returns lines that say what was read and set.

    Args:
        checkpoint: .pth or .pkl of detectron2, mmdetection or torchvision, or "coco", torchvision's own.
        recipe: name or path, with `overrides`; the detector that the checkpoint is one of.
        classes: annotation file (JSON) whose classes and counts the model gets, or a text file with a name per line.
        out: the model file.
        style: "caffe" or "pytorch", of the backbone and its pictures; by default what is known of the checkpoint.
        source_classes: text or annotation file with the checkpoint's classes in its order.
        aliases: file of `name in classes: name in the checkpoint`.

    Raises:
        UserError: a file that cannot be read, another detector than the recipe's, a class that the checkpoint lacks.
    """
    if style not in ("", *STYLES):
        raise UserError(f'--style "{style}" is none of {", ".join(STYLES)}')
    path = Path(out)
    if path.suffix != ".safetensors":
        raise UserError(f"--out {path}: a model file is a .safetensors file")
    if path.exists() and not overwrite:
        raise UserError(f"--out {path} exists already; add --overwrite to replace it")
    given = load_recipe(recipe, overrides)
    stats = _stats(Path(classes))
    name = str(checkpoint)
    read = Checkpoint(coco_state(given.detector), {}) if name == COCO else read_checkpoint(Path(checkpoint))
    zoo, project = _zoo(read, given, style, name)
    resolved, lines = _as_source(given, zoo, name)
    names, where = _names(zoo.rows, read.facts, source_classes, stats.names, name)
    model, _ = build_detector(resolved, stats, start=False)
    lines = [f"{name}: {zoo.detector} of {project}, {len(names)} classes by {where}", *lines]
    state, said = _joined(model.state_dict(), zoo.state, names, stats.names, aliases, name)
    own = model.state_dict()
    kept = {key for key in own if key.startswith(("roi_heads.loss.", "class_loss.")) or ".loss." in key}
    kept |= {key for key in own if key.endswith("num_batches_tracked")}
    load_whole(model, {**{key: own[key] for key in kept}, **state}, name)
    parents = [] if name == COCO else [file_hash(Path(checkpoint))]
    save_model(path, model, resolved, stats, parents=parents, converted=json.dumps({"project": project}))
    return [*lines, *said, f"{len(state)} weights: {path}"]


def converted(
    recipe: str | Path,
    weights: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    train: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Write a checkpoint of another project, which `weights` of the recipe would read, as a model file as it is.

    Args:
        recipe: name or path; its detector (that of the last stage) is the checkpoint's.
        annotations: file whose classes the model has; with their counts, unless `train` names the training file.
        out: the model file.

    Returns:
        Lines that say what was loaded, dropped, and how classes were told.

    Raises:
        UserError: weights that the model needs are not in the checkpoint: they would be random.
    """
    given = final_stage(load_recipe(recipe, [f"weights={weights}", *overrides])).recipe
    stats = ClassStats.from_index(open_index(annotations if train is None else train))
    released = released_weights(given, stats)
    if released is None:
        raise UserError(f"{weights}: it has no known names of a {given.detector.name} of another project")
    names = stats.names if released.names is None else released.names
    join = join_classes(stats.names, names)
    if join.missing:
        raise UserError(f"{weights}: it has no class {join.first_missing()}, which the annotations have")
    model, _ = build_detector(given, stats, start=False)
    joined, said = join_class_rows(model.state_dict(), released.state, names, stats.names)
    loaded = load_fitting(model, joined)
    if lost := [key for key in loaded.missing if ".loss." not in key]:  # a loss's counts are no matter of detections
        more = ", ..." if len(lost) > 1 else ""
        raise UserError(f"{weights}: {len(lost)} weights of this detector are not in it ({lost[0]}{more})")
    notes = [*released.notes, f"{weights}: {len(loaded.names)} weights loaded", *said]
    if loaded.dropped:
        notes.append(f"  not in this detector: {len(loaded.dropped)} ({loaded.dropped[0]}, ...)")
    save_model(Path(out), model, given, stats, parents=[file_hash(Path(str(weights).partition("#")[0]))])
    return notes


# ---- details ---------------------------------------------------------------------------------------------------------


def _stats(path: Path) -> ClassStats:
    """The classes and their counts; of a list of names all counts are 0."""
    if path.suffix == ".json":
        return ClassStats.from_index(open_index(path))
    names = _listed(path)
    none = np.zeros(len(names), np.int64)
    return ClassStats(image_count=none, instance_count=none, num_images=0, names=names)


def _listed(path: Path) -> tuple[str, ...]:
    """Class names of a file, in label order."""
    if path.suffix == ".json":
        return tuple(open_index(path).names)
    names = tuple(line.strip() for line in read_text(path, "classes").splitlines() if line.strip())
    if not names:
        raise UserError(f"classes {path} is empty: a name per line is needed")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'classes {path}: "{twice}" stands there twice')
    return names


def _zoo(read: Checkpoint, recipe: Recipe, style: str, source: str) -> tuple[Zoo, str]:
    """The weights by tailfin's names, and whose they were."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in read.state.items()}
    if convert_detectron2.is_detectron2(state):
        return convert_detectron2.convert(state, recipe.backbone, style, source), "detectron2"
    if convert_mmdetection.is_mmdetection(state):
        meta = read.facts.get("meta")
        meta = meta if isinstance(meta, Mapping) else {}
        config = str(meta.get("config") or meta.get("cfg") or "")
        version = str(meta.get("mmdet_version") or "")
        zoo = convert_mmdetection.convert(state, recipe.backbone, style, config, version, source)
        return zoo, "mmdetection"
    if is_torchvision_rcnn(state) or is_torchvision_retinanet(state):
        return torchvision_zoo(state, recipe.backbone), "torchvision"
    raise UserError(
        f"{source}: its weights ({', '.join(list(state)[:3])}, ...) have the names of none of detectron2's, "
        "mmdetection's and torchvision's detectors"
    )


def _as_source(recipe: Recipe, zoo: Zoo, source: str) -> tuple[Recipe, list[str]]:
    """The recipe that gives the source's own outputs, and lines that say what was set."""
    recipe = final_stage(recipe).recipe
    if recipe.detector.name != zoo.detector:
        raise UserError(
            f"{source} is a {zoo.detector}, the recipe's detector is {recipe.detector.name}: take another one"
        )
    values = recipe.model_dump(mode="json")
    absolute = source if source in (COCO,) else str(Path(source).absolute())
    for key, value in {**zoo.changes, "weights": absolute}.items():
        assign(values, key, value)
    resolved = check_recipe(values, f"the recipe as {source} needs it")
    there, here = recipe.model_dump(mode="json"), resolved.model_dump(mode="json")
    changed = [key for key in zoo.changes if _at(there, key) != _at(here, key)]
    lines = [f"  {key}: {_text(_at(here, key))}, the recipe had {_text(_at(there, key))}" for key in changed]
    return resolved, lines + (differing_settings(resolved.detector) if source == COCO and PUBLISHED else [])


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _text(value: Any) -> str:
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else str(value)


def _names(
    rows: int, facts: Mapping[str, Any], given: str | Path | None, wanted: Sequence[str], source: str
) -> tuple[Sequence[str], str]:
    """The classes of the checkpoint's rows in their order, and how they are known.

    A classifier has C rows, C + 1 with the background, C + 2 with Seesaw's two, the further ones last.
    """

    def fits(names: Sequence[str]) -> bool:
        return 0 <= rows - len(names) <= 2

    if given is not None:
        names: Sequence[str] = _listed(Path(given))
        if not fits(names):
            raise UserError(f"--source-classes {given}: {len(names)} names, {source} has a classifier of {rows} rows")
        return names, f"--source-classes {given}"
    meta = facts.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    inner = meta.get("dataset_meta")
    own = meta.get("CLASSES") or (inner.get("classes") or inner.get("CLASSES") if isinstance(inner, Mapping) else None)
    if own and not isinstance(own, str):
        names = [str(name) for name in own]
        if not fits(names):
            raise UserError(f"{source}: it names {len(names)} classes, its classifier has {rows} rows")
        return names, "its own names"
    coco = [name for name in RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if name[0] not in "_N"]
    if fits(coco) and set(wanted) & set(coco):
        return coco, "COCO's 80 names"
    if fits(wanted):
        return wanted, "the order of --classes, since it has no names (say with --source-classes if it is another)"
    raise UserError(
        f"{source}: it has no class names, its classifier has {rows} rows, --classes {len(wanted)} names: give its "
        "own classes with --source-classes"
    )


def _joined(
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    names: Sequence[str],
    wanted: Sequence[str],
    file: str | Path | None,
    source: str,
) -> tuple[dict[str, Any], list[str]]:
    """The state with the rows of the classes `wanted`, all of which must be there."""
    aliases: Aliases = read_aliases(file) if file is not None else {}
    join = join_classes(wanted, names, aliases)
    if join.missing:
        raise UserError(f"{source}: it has no class {join.first_missing()}; a file with --map says which it is there")
    joined, lines = join_class_rows(own, state, names, wanted, aliases)
    if lost := [line for line in lines if "another kind" in line or "start anew" in line]:
        raise UserError(
            f"{source}: its classifier does not fit the recipe's loss or classifier: {' '.join(lost).strip()}"
        )
    return joined, lines
