"""From files and wishes to a plan: annotation files in place, facts looked at, choices made, a recipe of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tailfin.auto.facts import Facts, look
from tailfin.auto.rules import DENSE, NAMES, Choice, choose
from tailfin.config import check_recipe, load_recipe, split_override
from tailfin.data.document import load_document
from tailfin.data.index import image_folder, open_index
from tailfin.data.layouts import as_coco, is_annotation_file, splits_of
from tailfin.data.split import same_pictures, split_train_val
from tailfin.errors import UserError, nearest
from tailfin.files import write_json
from tailfin.schema.recipe import About, Recipe

VAL_SHARE = 0.2  # of the training pictures, where there is no validation set
HOLDOUTS = ("half_of_val", "train", "none")
BASES = {  # recipes whose other settings are taken, by detector and start
    ("faster_rcnn", "packaged"): "fod/packaged",
    ("mask_rcnn", "packaged"): "road12/mask_rcnn_lite0",
    ("cascade_rcnn", "packaged"): "road12/cascade_mask_rcnn_lite0",
    ("retinanet", "packaged"): "fod/retinanet_lite0",
    ("atss", "packaged"): "fod/atss_lite0",
    ("faster_rcnn", "none"): "fod/faster_rcnn_r18_softmax",
    ("mask_rcnn", "none"): "road12/mask_rcnn_r18",
    ("cascade_rcnn", "none"): "road12/cascade_mask_rcnn_r18",
    ("retinanet", "none"): "fod/retinanet_r18",
    ("atss", "none"): "fod/atss_r18",
    ("faster_rcnn", "coco"): "coco/faster_rcnn_r50_softmax",
    ("mask_rcnn", "coco"): "coco/mask_rcnn_r50",
}
OF_RECIPE = {  # keys of a recipe that decide a choice
    "detector.name": "detector",
    "weights": "start",
    "loss.name": "loss",
    "sampler.name": "sampler",
    "detector.classifier": "classifier",
    "detector.classifier.name": "classifier",
    "data.sizes": "size",
    "schedule.batch": "batch",
    "schedule.epochs": "epochs",
    "data.flip": "flip",
}
PUBLISHED = {
    "style": "torchvision",
    "anchor_style": "torchvision",
    "roi_aligned": False,
    "roi_sampling": 2,
}  # weights: coco


@dataclass(frozen=True)
class Files:
    """Annotation files and picture folders; `holdout` is chosen on, `test` measured on (none: on no pictures)."""

    train: Path
    val: Path
    train_images: Path
    val_images: Path
    holdout: Path | None = None
    test: Path | None = None
    holdout_images: Path | None = None
    notes: tuple[str, ...] = ()

    def moved(self, work: Path, place: Path) -> Files:
        """The same after all that lies in `work` has moved to `place`."""
        names = ("train", "val", "holdout", "test")
        paths = {name: path for name in names if (path := getattr(self, name)) is not None and path.parent == work}
        folders = {
            f"{name}_images": path for name in names[:3] if (path := getattr(self, f"{name}_images")) is not None
        }
        paths |= {name: path for name, path in folders.items() if path.parent == work}
        return replace(self, **{name: place / path.name for name, path in paths.items()})


@dataclass(frozen=True)
class Plan:
    """What will be done."""

    recipe: Recipe
    files: Files
    facts: Facts
    choices: list[Choice] = field(default_factory=list)

    def value(self, name: str) -> Any:
        """What was chosen."""
        return next(choice.value for choice in self.choices if choice.name == name)

    def lines(self) -> list[str]:
        """A line for each choice, with its reason."""
        return [f"{one.name:11} {str(one.value):12} {one.why} [{one.measured or 'yours'}]" for one in self.choices]

    def to_dict(self) -> dict[str, Any]:
        """For `auto.json`."""
        return {"facts": asdict(self.facts), "choices": [asdict(choice) for choice in self.choices]}


def make_plan(
    train: str | Path,
    val: str | Path | None,
    work: Path,
    *,
    train_images: str | Path | None = None,
    val_images: str | Path | None = None,
    holdout: str | Path | None = None,
    holdout_images: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """The plan for a training and a validation set; annotation files that are made lie in `work`."""
    given, rest = wishes(overrides)
    if holdout is not None and "holdout" in given:
        raise UserError("--holdout FILE and holdout=... say the same thing: give one of them")
    files = _files(train, val, work, train_images, val_images)
    facts = look(open_index(files.train), open_index(files.val))
    choices = choose(facts, {**given, **({"holdout": str(holdout)} if holdout is not None else {})})
    taken = {choice.name: choice.value for choice in choices}
    if holdout is not None:
        found = as_coco(holdout, "holdout", work, holdout_images)
        folder = found.images or image_folder(found.annotations)
        files = replace(files, holdout=found.annotations.absolute(), test=files.val, holdout_images=folder.absolute())
    elif taken["holdout"] == "half_of_val":
        files = _halves(files, work)
    elif taken["holdout"] == "train":
        files = replace(files, holdout=files.train, test=files.val, holdout_images=files.train_images)
    elif taken["holdout"] != "none":
        raise UserError(f'holdout="{taken["holdout"]}"{nearest(str(taken["holdout"]), HOLDOUTS)}')
    return Plan(recipe_of(facts, taken, files, rest), files, facts, choices)


def wishes(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(choices that the user gives, overrides of the recipe): `size=192` is a choice, `data.sizes=[192]` both."""
    given: dict[str, Any] = {}
    rest = []
    for text in overrides:
        key, value = split_override(text)
        if key in NAMES:
            given[key] = value
            continue
        if "." not in key and key not in Recipe.model_fields:
            known = [*NAMES, *Recipe.model_fields]
            raise UserError(f'there is no choice or key "{key}"{nearest(key, known)}')
        rest.append(text)
        if key in OF_RECIPE:
            given[OF_RECIPE[key]] = value[0] if isinstance(value, list) and value else value
    return given, rest


def recipe_of(facts: Facts, taken: Mapping[str, Any], files: Files, rest: Sequence[str] = ()) -> Recipe:
    """The recipe of choices, with the user's own overrides last."""
    start = taken["start"] if taken["start"] in ("packaged", "coco") else "none"
    base = BASES.get((taken["detector"], start))
    if base is None:
        choices = ", ".join(dict.fromkeys(name for name, own in BASES if own == start))
        raise UserError(f"train auto has no {taken['detector']} that starts from {taken['start']} ({choices})")
    before = load_recipe(base)
    dense = taken["detector"] in DENSE
    iterations = max(1, round(float(taken["epochs"]) * facts.pictures / int(taken["batch"])))
    keys: dict[str, Any] = {
        "weights": taken["start"],
        "loss": taken["loss"],
        "sampler": taken["sampler"],
        "data.flip": taken["flip"],
        "schedule.batch": taken["batch"],
        "schedule.epochs": taken["epochs"],
        "schedule.lr_rule": "linear",
        "schedule.lr_batch": before.schedule.batch,
        "schedule.decay": "cosine",
        "schedule.precision": "auto",
        "schedule.channels_last": True,
        "schedule.warmup": max(1, min(before.schedule.warmup, iterations // 10)),
        "evaluation.protocol": "lvis",
        "evaluation.max_dets": 300,
        "evaluation.score_threshold": 1e-4,
        "data.root": "",
    }
    if taken["sampler"] in ("rfs", "irfs"):
        keys["sampler"] = {"name": taken["sampler"], "threshold": facts.threshold}
    if not dense and start != "coco":
        keys |= {"detector.classifier": taken["classifier"], **_proposals(int(taken["proposals"]))}
    if start == "coco":
        keys |= {f"detector.{key}": value for key, value in PUBLISHED.items()}
    else:
        size = int(taken["size"])
        keys |= {"data.resize": "square", "data.sizes": [size], "data.group_by_aspect": False}
        keys |= _anchors(taken["detector"], [size * share for share in facts.sides])
    if taken["detector"] == "cascade_rcnn":
        keys |= {"detector.masks": facts.masks}
    keys["evaluation.iou"] = ["bbox", "segm"] if _masks(taken["detector"], facts) else ["bbox"]
    values = load_recipe(base, {**keys, **dict(map(split_override, rest))}).model_dump(mode="json")
    for split in ("train", "val"):
        names = {"annotations": getattr(files, split), "images": getattr(files, f"{split}_images")}
        values["data"][split] = {name: str(path) for name, path in names.items()}
    values |= {"name": "auto", "about": About(title="Chosen by tailfin train auto").model_dump(mode="json")}
    return check_recipe(values, "auto")


def move_files(plan: Plan, work: Path, place: Path) -> Plan:
    """The plan after its files in `work` have been copied to `place`, for good."""
    for path in sorted(work.iterdir()):
        place.mkdir(parents=True, exist_ok=True)
        if path.is_dir():  # pictures of a hub's data set
            shutil.copytree(path, place / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, place / path.name)
    files = plan.files.moved(work, place)
    values = plan.recipe.model_dump(mode="json")
    for split in ("train", "val"):
        values["data"][split]["annotations"] = str(getattr(files, split))
        values["data"][split]["images"] = str(getattr(files, f"{split}_images"))
    return replace(plan, files=files, recipe=check_recipe(values, "auto"))


# ---- details ---------------------------------------------------------------------------------------------------------


def _files(
    train: str | Path,
    val: str | Path | None,
    work: Path,
    train_images: str | Path | None,
    val_images: str | Path | None,
) -> Files:
    """The two annotation files; without a validation set that of the data set, else a part of the training pictures."""
    if val is None and "val" in splits_of(train):
        val = train
    own = as_coco(train, "train", work, train_images)
    folder = (own.images or image_folder(own.annotations)).absolute()
    notes = list(own.notes)
    if val is None:
        document = load_document(own.annotations)
        groups = same_pictures(document, folder)
        parts = split_train_val(document, VAL_SHARE, groups=groups)
        work.mkdir(parents=True, exist_ok=True)
        for name, part in zip(("train", "val"), parts, strict=True):
            write_json(work / f"{name}.json", part)
        notes.append(f"no --val: {len(parts[1]['images'])} of {len(document['images'])} training pictures became val")
        return Files(work / "train.json", work / "val.json", folder, folder, notes=tuple(notes))
    other = as_coco(val, "val", work, val_images)
    notes += [] if is_annotation_file(val) and is_annotation_file(train) else ["annotations converted to COCO form"]
    return Files(
        own.annotations.absolute(),
        other.annotations.absolute(),
        folder,
        (other.images or image_folder(other.annotations)).absolute(),
        notes=tuple(dict.fromkeys([*notes, *other.notes])),
    )


def _halves(files: Files, work: Path) -> Files:
    """`holdout.json` and `test.json`: two halves of the validation pictures, each class in both where it can be."""
    document = load_document(files.val)
    groups = same_pictures(document, files.val_images)
    test, holdout = split_train_val(document, 0.5, groups=groups)
    counted = {"categories": document["categories"]}  # groups of classes are those of the training pictures
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "test.json", test | counted)
    write_json(work / "holdout.json", holdout | counted)
    return replace(files, holdout=work / "holdout.json", test=work / "test.json", holdout_images=files.val_images)


def _masks(detector: str, facts: Facts) -> bool:
    return detector == "mask_rcnn" or (detector == "cascade_rcnn" and facts.masks)


def _proposals(number: int) -> dict[str, Any]:
    """Proposals in testing, and what goes with so many objects."""
    return {
        "detector.rpn_pre_nms": [4 * number, 2 * number],
        "detector.rpn_post_nms": [2 * number, number],
        "detector.rpn_batch": 64 if number <= 100 else 128,
        "detector.roi_batch": 64 if number <= 100 else 128,
    }


def _anchors(detector: str, sides: Sequence[float]) -> dict[str, Any]:
    """Anchors for objects of these sides in pixels: a small, a middle and a large one, on strides 8, 16 and 32."""
    small, middle, large = sides
    if detector == "atss":  # one square per level
        return {"detector.anchor_scales": [round(min(max(middle / 14, 1.0), 8.0), 1)]}
    if detector == "retinanet":  # three sizes and three shapes per level
        return {"detector.anchor_scale": round(min(max(middle / 18, 1.0), 4.0), 1)}
    sizes = [max(8, round(small)), 0, 0]
    sizes[1] = max(round(middle), round(1.4 * sizes[0]))
    sizes[2] = max(round(large), round(1.4 * sizes[1]))
    return {"detector.anchor_sizes": sizes}
