"""How each published row (`rows.py`) is run, as a recipe plus overrides.

A row is run by rules over its fields, not by a line of its own: its recipe is `<dataset>/<detector>_r50` or the variant
of it that its method names (`METHODS`); its backbone, sampler, schedule and switches become overrides.

    resolve("bacl/XIII/rfs/lvis_v1/r101")
    # Runnable(recipe="lvis_v1/faster_rcnn_r50", overrides=("backbone=resnet101", "sampler=rfs"))
    resolve("bacl/XIII/simcal/lvis_v1/r50")
    # Blocked(when="never", reason="the paper prints a dash")

A new method's rows become runnable when its recipe is added, and its switches when `SWITCHES` or `SWITCH_KEYS` has
them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import msgspec

from tailfin.recipe_values import split_override
from tailfin.recipes import catalog
from tailfin.recipes.rows import Row, papers, published_row
from tailfin.schema.detectors import DETECTORS as BUILT
from tailfin.schema.recipe import Recipe


@dataclass(frozen=True)
class Runnable:
    """A row that can be run: `load_recipe(recipe, overrides)`."""

    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Blocked:
    """A row that cannot be run "not yet" (something is missing here) or "never" (something is missing in the paper)."""

    when: Literal["not yet", "never"]
    reason: str

    def __str__(self) -> str:
        return f"{self.when}: {self.reason}"


@dataclass(frozen=True)
class Method:
    """Which recipe runs a method: the end of its address after `<dataset>/<detector>_r50`, its loss, stages, and any
    part besides these."""

    recipe: str  # "": the base of that file; ":seesaw": a variant of it; "_bacl": another file
    loss: str = ""
    part: str = ""
    stages: int = 1


# ---- the rules -------------------------------------------------------------------------------------------------------

# method_key -> recipe. Rows whose method is a sampler or a pre-training are trained with plain softmax: the papers' RFS
# rows do not state their loss, and softmax is the detectors' own.
METHODS: dict[str, Method] = {
    **{key: Method("", "softmax") for key in ("softmax", "supervised", "rfs", "irfs", "2drcl", "aligndet", "soco")},
    **{key: Method("", "softmax") for key in ("moco_v2", "simclr", "byol", "densecl", "slotcon", "self_emd")},
    **{key: Method(f":{key}", key) for key in ("sigmoid", "objectness", "focal", "eql", "eqlv2", "efl", "droploss")},
    **{key: Method(f":{key}", key) for key in ("seesaw", "ecm", "pcb", "rog")},
    **{key: Method(f":{key}", "softmax") for key in ("rio", "fasa", "forest_rcnn", "tde")},
    "balms": Method(":balms", "balanced_sigmoid"),  # its form for detection
    **{key: Method(f"_decoupled:{key}", key, stages=2) for key in ("acsl", "bags")},
    **{key: Method(f"_decoupled:{key}", "softmax", stages=2) for key in ("simcal", "disalign")},
    "loce": Method("_decoupled:loce", "ebl", stages=2),
    "bacl": Method("_bacl", "fcbl", stages=2),
    "deformable_detr": Method("", "focal"),
    "stepwise": Method(":stepwise", "focal", stages=3),
    "lst": Method(":lst", "softmax", stages=3),  # as released, without the paper's generator of classifier weights
}
END_TO_END = {"bacl": Method(":bacl_end_to_end", "fcbl")}  # method_key -> a two-stage method's one-stage form (BACL X)
DENSE = {"focal": Method("", "focal")}  # method_key -> what a one-stage detector's own loss is, not a variant
# What step-wise learning prints as RetinaNet are the numbers of EFL's paper, whose detector is built on ATSS.
EFL_METHODS = {"focal": Method(":efl_baseline", "focal"), "efl": Method(":efl", "efl")}
NO_CODE = {"ahrl": "AHRL"}  # announced, but no public code exists

# What step-wise learning leaves open of the methods that it compares with
_V05 = (
    {"detector": "mask_rcnn", "schedule": "2x"},
    "Assumed: Mask R-CNN, on which these methods report box AP on LVIS v0.5, and 2x.",
)
_LST = ({"detector": "mask_rcnn"}, "Assumed: Mask R-CNN, on which LST reports box AP on LVIS v0.5.")
_EFL = ({"detector": "faster_rcnn", "schedule": "2x"}, "Assumed: Faster R-CNN, 2x.")
ASSUMED: dict[tuple[str, str, str], tuple[dict[str, str], str]] = {  # paper/table, data set, method -> fields, sentence
    **{("stepwise/1", "lvis_v0.5", method): _V05 for method in ("droploss", "eqlv2")},
    ("stepwise/1", "lvis_v0.5", "lst"): _LST,
    **{("stepwise/1", "lvis_v1", method): _EFL for method in ("bags", "eqlv2", "seesaw")},
    ("stepwise/1", "lvis_v1", "efl"): ({"detector": "retinanet"}, "Assumed: the detector of the R50 row."),
    ("stepwise/2", "lvis_v0.5", "softmax"): ({"schedule": "2x"}, "Assumed: 2x."),
}

DETECTORS = {
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "cascade_faster_rcnn": "Cascade Faster R-CNN",
    "deformable_detr": "Deformable DETR",
    "atss": "ATSS",
    "retinanet": "RetinaNet",
}
ONE_STAGE = ("atss", "retinanet")
DATASETS = {"lvis_v1": "LVIS v1", "lvis_v0.5": "LVIS v0.5", "coco": "COCO", "coco_lt": "COCO-LT"}
BACKBONES = {"r50": ("backbone=resnet50",), "r101": ("backbone=resnet101",)}
# not stated: the one of the method's recipe, plain in all but ECM's and RIO's; see also OWN_RUNS
# and the factors are rounded up once, as mmdetection does, which the papers' code bases are built on.
SAMPLERS = {
    None: (),
    "random": ("sampler=plain",),
    "rfs": ("sampler=rfs", "sampler.rounding=ceil"),
    "irfs": ("sampler=irfs", "sampler.rounding=ceil"),
}
# Rows of 2DRCL on LVIS whose numbers no other paper prints are runs of its own code base, whose default sampler is RFS;
# a method of two stages keeps that of its recipe.
OWN_RUNS = {"2drcl": "rfs"}
TWO_STAGES = (
    *("schedule.epochs=12", "schedule.milestones=[8, 11]"),
    *("second.schedule.epochs=12", "second.schedule.milestones=[8, 11]"),
)
SIX_EPOCHS = ("schedule.epochs=6", "schedule.milestones=[4, 5]")  # 2DRCL gives no steps: those of 12 epochs, halved
SCHEDULES: dict[int, dict[str | None, tuple[str, ...]]] = {  # stages of the method -> schedule -> overrides
    1: {
        "1x": ("schedule.epochs=12", "schedule.milestones=[8, 11]"),
        "2x": ("schedule.epochs=24", "schedule.milestones=[16, 22]"),
        "3x": ("schedule.epochs=36", "schedule.milestones=[27, 33]"),
        "4x": ("schedule.epochs=48", "schedule.milestones=[36, 44]"),
        "50": ("schedule.epochs=50", "schedule.milestones=[40]"),  # Deformable DETR's own
        "6+6": SIX_EPOCHS,  # the first 6 are the pre-training's: `pretrain_epochs`
    },
    2: {
        "1x": (*SIX_EPOCHS, *(f"second.{override}" for override in SIX_EPOCHS)),  # 12 epochs in total, as 2x is 24
        "12+12": TWO_STAGES,
        "2x": TWO_STAGES,  # BACL XIII: "a 2x schedule, i.e., 24 epochs in total"
        "24+6": (  # LOCE's own
            *("schedule.epochs=24", "schedule.milestones=[16, 22]"),
            *("second.schedule.epochs=6", "second.schedule.milestones=[3, 5]"),
        ),
    },
    # of step-wise learning: which steps there are is said by the row's switches; with more than two parts the paper
    # states none, and each further part has the 2 epochs of step 2
    3: {"50+1+2": (), "50+1": (), "50+2": (), None: ()},
}
# pre-training -> overrides. Those that contrast boxes take them from DATA/proposals.npz (`tailfin data proposals`)
PRETRAINING: dict[str | None, tuple[str, ...]] = {
    None: ("weights=imagenet",),
    "imagenet": ("weights=imagenet",),
    "2drcl": ("weights=imagenet", "pretraining={preset: drcl, proposals: {file: proposals.npz}}"),
    **{
        preset: ("weights=imagenet", f"pretraining={{preset: {preset}, proposals: {{file: proposals.npz}}}}")
        for preset in ("aligndet", "soco")
    },
    **{
        preset: ("weights=imagenet", f"pretraining={{preset: {preset}}}")
        for preset in ("moco_v2", "simclr", "byol", "densecl", "slotcon", "self_emd")
    },
}
PRETRAINING_NAMES = {
    "2drcl": "2DRCL",
    "aligndet": "AlignDet",
    "soco": "SoCo",
    "densecl": "DenseCL",
    "slotcon": "SlotCon",
    "self_emd": "Self-EMD",
    "moco_v2": "MoCo v2",
    "simclr": "SimCLR",
    "byol": "BYOL",
}

# Switch of a row -> value -> overrides. An empty tuple: another field of the row says the same. A switch or value that
# is not listed blocks the row, except a False on a baseline row (the paper's own parts are absent there anyway).
SWITCHES: dict[str, dict[Any, tuple[str, ...]]] = {
    "pipeline": {"end_to_end": (), "decoupled": ()},
    "sigmoid": {False: (), True: ()},
    "objectness": {False: (), True: ()},
    "double_proposals": {False: (), True: ("detector.rpn_post_nms=[2000, 1000]",)},  # BACL IV-B: 1000 -> 2000
    "small_weight_decay": {False: (), True: ("schedule.weight_decay=5e-5",)},  # BACL IV-B
    "copy_paste": {
        False: (),
        True: (  # BACL IV-B: 1280 x 1280 instead of multi-scale; tested at 1333 x 800 like all others
            *("data.copy_paste=true", "data.resize=jitter", "data.sizes=[1280]", "data.jitter_scale=[0.8, 1.25]"),
            *("data.canvas=true", "data.test_size=800", "data.test_max_size=1333"),
        ),
    },
    "mg": {False: ("second.loss.alpha=0",), True: ()},  # BACL III: margin, weight term, feature hallucination
    "wt": {False: ("second.loss.reweight=false",), True: ()},
    "fhm": {False: ("second.features=null",), True: ()},
    "with_2drcl": {False: (), True: ()},
    "finetune": {"rfs": ()},
    "finetune_epochs": {12: (), 6: ()},
    "pretrain_epochs": {
        12: (),
        6: ("pretraining.schedule.epochs=6", "pretraining.schedule.milestones=[4, 5]"),
    },
    # table 5 of 2DRCL: holistic and local contrast, dynamic rebalancing, appearance and semantic reconstruction
    **{part: {True: (), False: (f"pretraining.weights.{part}=0",)} for part in ("hcl", "lcl", "ar", "sr")},
    "drb": {True: (), False: ("pretraining.sampler=plain",)},
    # tables 3, 4 and 8 of step-wise learning
    "fine_tuning": {True: (), False: ("stepwise.head=null",)},
    "knowledge_transfer": {True: (), False: ("stepwise.tail=null",)},
    "soq": {None: (), True: (), False: ("stepwise.tail.distillation.shared_queries=false",)},
    "fm_dis": {True: (), False: ("stepwise.tail.distillation.feature=0",)},
    "cls_dis": {True: (), False: ("stepwise.tail.distillation.classes=0",)},
    "stepwise_rfs": {True: (), False: ("stepwise.head.rfs=plain", "stepwise.tail.rfs=plain")},
    "backbone_init_for_pretraining": {
        "imagenet": (),
        "scratch": ("weights=none", "detector.norm=bn", "detector.frozen_layers=0"),
    },
    "copied_from": {"EFL paper": ()},
}
# Switch of a row -> the key that takes its value, whatever it is (BACL III-D and III-E).
SWITCH_KEYS = {
    **{switch: f"second.loss.{switch}" for switch in ("alpha", "prob_thr", "indicator", "matrix", "conditions")},
    "beta": "second.features.beta",
    "c": "second.features.sampled_num_classes",
    "m": "second.features.sampled_num_features",
    # tables 5 to 7 of step-wise learning
    "division": "stepwise.division",
    "d_head_n_head": "stepwise.head.per_head_class",
    "d_head_n_tail": "stepwise.head.per_tail_class",
    "d_tail_n_head": "stepwise.tail.per_head_class",
    "d_tail_n_tail": "stepwise.tail.per_tail_class",
}


def resolve(row: Row | str) -> Runnable | Blocked:
    """The recipe and overrides that run a row, or the reason why there are none. An unknown id is a `UserError`."""
    row = published_row(row) if isinstance(row, str) else row
    row = assumed(row)[0]
    if row.values == "dash":
        return Blocked("never", "the paper prints a dash")
    if row.method_key in NO_CODE:
        return Blocked("never", f"method without code ({NO_CODE[row.method_key]})")
    recipe = f"{row.dataset}/{_detector(row)}_r50{_method(row).recipe}" if row.detector else ""
    overrides, unknown = _overrides(row)
    missing = _missing_parts(row, recipe) or unknown  # a schedule or switch matters only once the recipe exists
    if missing:
        return Blocked("not yet", "needs " + ", ".join(missing))
    return Runnable(recipe, _effective(recipe, overrides))


def assumed(row: Row) -> tuple[Row, str]:
    """The row with what it leaves open filled in, and the sentence that says what was assumed ("": nothing)."""
    fields, sentence = ASSUMED.get((f"{row.paper}/{row.table}", row.dataset, row.method_key), ({}, ""))
    missing = {name: value for name, value in fields.items() if getattr(row, name) is None}
    return (msgspec.structs.replace(row, **missing), sentence) if missing else (row, "")


def about_overrides(row: Row, recipe: str) -> list[str]:
    """Overrides that put the row's own paper, table, numbers and doubt in the place of its recipe's (or before)."""
    paper = papers()[row.paper]
    facts: dict[str, Any] = {
        "title": f"{row.method}: {row.caption}",
        "paper": f"{paper.title} ({paper.venue}, {paper.year})",
        "table": f"table {row.table}",
        "published": row.numbers,
        "hours": None,
        "command": f"tailfin cost {row.id} --size 800 1333"
        if "gflops" in row.metrics
        else f"torchrun --nproc-per-node 8 -m tailfin train {row.id} data.root=DATA",
    }
    said = " ".join(filter(None, (row.doubt, assumed(row)[1])))
    if said:
        facts["notes"] = f"{said} {_resolved(recipe)['about']['notes']}".strip()
    return [f"about.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]


# ---- details ---------------------------------------------------------------------------------------------------------


def _method(row: Row) -> Method:
    method = METHODS[row.method_key]
    if _from_efl(row):
        return EFL_METHODS[row.method_key]
    if row.detector in ONE_STAGE:
        return DENSE.get(row.method_key, method)
    return END_TO_END.get(row.method_key, method) if row.settings.get("pipeline") == "end_to_end" else method


def _own_run(row: Row) -> bool:
    elsewhere = any(other.split("/")[0] != row.paper for other in row.same_numbers_as)
    own = row.paper in OWN_RUNS and row.role != "baseline" and not elsewhere
    return own and row.dataset.startswith("lvis") and _method(row).stages == 1


def _from_efl(row: Row) -> bool:
    return (row.paper, row.detector) == ("stepwise", "retinanet")


def _detector(row: Row) -> str | None:
    return "atss" if _from_efl(row) else row.detector


def _overrides(row: Row) -> tuple[list[str], list[str]]:
    """What the row's fields say as overrides, and those that no rule above knows."""
    schedules = SCHEDULES[_method(row).stages]
    # step-wise learning's RFS is that of its steps, which `stepwise_rfs` switches; step 0 has none
    sampler = None if row.method_key == "stepwise" else row.sampler
    if row.sampler is None and _own_run(row):
        sampler = OWN_RUNS[row.paper]
    overrides = [*BACKBONES[row.backbone], *PRETRAINING.get(row.pretraining, ()), *SAMPLERS[sampler]]
    if row.detector in ONE_STAGE and row.pretraining == "2drcl":
        overrides.append("pretraining.loss=focal")  # the detector's own
    missing = []
    if row.schedule in schedules:
        overrides += schedules[row.schedule]
    elif row.schedule is None and not _from_efl(row):  # its recipe has the schedule of EFL's paper
        missing.append("a schedule, which the paper does not state")
    elif row.schedule is not None:
        missing.append(f"the schedule {row.schedule}")
    for switch, value in row.settings.items():
        if row.role == "baseline" and value is False:
            continue
        values = SWITCHES.get(switch, {})
        if switch in SWITCH_KEYS:
            overrides.append(f"{SWITCH_KEYS[switch]}={value}")
        elif isinstance(value, list) or value not in values:
            missing.append(f"the switch {switch}={json.dumps(value)}")
        else:
            overrides += values[value]
    return overrides, missing


def _missing_parts(row: Row, recipe: str) -> list[str]:
    """What the row needs that tailfin does not have: its pre-training, and whatever keeps its recipe from existing."""
    from tailfin import losses  # imports torch

    missing = []
    if row.pretraining not in PRETRAINING:
        missing.append(f"{PRETRAINING_NAMES[str(row.pretraining)]} pre-training")
    if catalog.exists(recipe):
        return missing
    method = _method(row)
    if method.loss and method.loss not in losses.names():
        missing.append(f"loss {method.loss}")
    if method.part:
        missing.append(method.part)
    if row.detector is None:
        missing.append("a detector, which the paper does not state")
    elif row.detector not in BUILT:
        missing.append(DETECTORS[row.detector])
    if not any(name.startswith(f"{row.dataset}/") for name in catalog.files()):
        missing.append(f"recipes for {DATASETS[row.dataset]}")
    return missing or [f"the recipe {recipe}"]


def _effective(recipe: str, overrides: list[str]) -> tuple[str, ...]:
    """The overrides that change something: a recipe states some of them itself."""
    effective = []
    for override in overrides:
        key, value = split_override(override)
        stated = _stated(recipe, key)
        if isinstance(stated, dict) and isinstance(value, str):
            stated = stated["name"]  # a section chosen by name
        if stated != value:
            effective.append(override)
    return tuple(effective)


def _stated(recipe: str, key: str) -> Any:
    """What the resolved recipe says at `key`; a loss's option that is not given stands at the loss's own default."""
    from tailfin.losses import LOSSES

    value: Any = _resolved(recipe)
    for part in key.split("."):
        if value is None:  # a section that the recipe does not have
            return None
        if part not in value and value.get("name") in LOSSES:
            value = LOSSES[value["name"]].__init__.__kwdefaults__  # type: ignore[misc]
        value = value[part]
    return value


@cache
def _resolved(recipe: str) -> dict[str, Any]:
    found = catalog.find_file(recipe)
    assert found is not None  # of the package
    return Recipe.model_validate(found.values()).model_dump(mode="json")
