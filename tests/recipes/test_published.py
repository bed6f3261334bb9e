"""Published rows: every one resolves to a recipe and overrides that say what the row says, or tells why not."""

from __future__ import annotations

from collections import Counter

import pytest

from tailfin import losses, recipes
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.recipes import Blocked, Runnable
from tailfin.recipes.published import DATASETS, DETECTORS, METHODS, NO_CODE, PRETRAINING, PRETRAINING_NAMES, assumed
from tailfin.schema.features import FeatureMemory
from tailfin.schema.heads import CLASSIFIERS
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import second_recipe

SECOND_STAGE = [name for name, options in CLASSIFIERS.items() if options.second_stage]
ROWS = {row.id: row for row in recipes.rows()}
RUNS = {row_id: recipes.resolve(row_id) for row_id in ROWS}
RUNNABLE = [row_id for row_id, run in RUNS.items() if isinstance(run, Runnable)]
BLOCKED = [row_id for row_id, run in RUNS.items() if isinstance(run, Blocked)]
LOSSES = {  # method_key -> losses of its stages, where they are not the method_key
    **{key: ("softmax",) for key in ("rfs", "irfs", "2drcl", "supervised", "aligndet", "soco", "densecl")},
    **{key: ("softmax",) for key in ("moco_v2", "simclr", "byol", "slotcon", "self_emd")},
    "balms": ("balanced_sigmoid",),
    "fasa": ("softmax",),
    **{head: ("softmax",) for head in ("tde", "forest_rcnn")},
    **{head: ("softmax", "softmax") for head in ("disalign", "simcal")},
    "rio": ("softmax",),
    "lst": ("softmax",),
    "loce": ("softmax", "ebl"),
    "bags": ("softmax", "bags"),
    "acsl": ("softmax", "acsl"),
    "bacl": ("objectness", "fcbl"),
}


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_every_table_has_its_rows():
    counted = Counter((row.paper, row.table) for row in recipes.rows())
    papers = recipes.papers()
    stated = {(key, table): facts.rows for key in papers for table, facts in papers[key].tables.items()}
    assert counted == stated
    assert sum(stated.values()) == len(ROWS) == 311
    assert Counter(row.values for row in recipes.rows()) == {"printed": 298, "partial": 1, "dash": 6, "figure": 6}


def test_numbers_are_as_printed():
    row = recipes.published_row("bacl/XIII/bacl/lvis_v1/r101")
    assert row.numbers == {"AP": 27.8, "APr": 18.1, "APc": 27.3, "APf": 32.6}
    assert row.caption == recipes.papers()["bacl"].tables["XIII"].caption
    mask = recipes.published_row("2drcl/1/2drcl/coco/r50")
    assert mask.numbers["AP_m"] == 37.4 and "AP_b" not in mask.numbers
    assert recipes.published_row("bacl/XIII/simcal/lvis_v1/r50").numbers == {}


# rows on Deformable DETR: test_published_stepwise.py
@pytest.mark.parametrize("row_id", [row_id for row_id in RUNNABLE if ROWS[row_id].detector != "deformable_detr"])
def test_runnable_row(row_id):
    """The recipe of a row is what the row says, field by field."""
    run = RUNS[row_id]
    row, sentence = assumed(ROWS[row_id])
    recipe = load_recipe(row_id)
    assert recipe.name == row_id
    dense = row.detector in ("atss", "retinanet")
    from_efl = row.detector == "retinanet"  # numbers of EFL's paper, whose detector is built on ATSS
    name = {"cascade_faster_rcnn": "cascade_rcnn"}.get(row.detector, row.detector)
    assert recipe.detector.name == ("atss" if from_efl else name)
    masks = row.detector == "mask_rcnn"
    assert recipe.evaluation.iou == (("bbox", "segm") if masks else ("bbox",))
    normed = (row.method_key in ("seesaw", "ecm") or row.method_key == "bacl") and masks
    assert getattr(recipe.detector, "mask_predictor", "linear") == ("normed" if normed else "linear")
    assert recipe.backbone == row.backbone.replace("r", "resnet")
    scratch = row.settings.get("backbone_init_for_pretraining") == "scratch"
    assert recipe.weights == ("none" if scratch else "imagenet")
    presets = {None: None, "imagenet": None, "2drcl": "drcl"}
    assert (recipe.pretraining.preset if recipe.pretraining else None) == presets.get(row.pretraining, row.pretraining)
    # not BACL's numbers: runs of another code base, but for methods of two stages
    other = row.paper == "2drcl" and row.dataset == "lvis_v1" and row.role != "baseline" and not recipe.second
    other = other and not any(same.startswith("bacl/") for same in row.same_numbers_as)
    own = "rfs" if row.method_key in ("ecm", "rio") or other or dense else "plain"
    assert recipe.sampler.name == {None: own, "random": "plain"}.get(row.sampler, row.sampler)
    end_to_end = row.method_key == "bacl" and row.settings.get("pipeline") == "end_to_end"
    names = (recipe.loss.name, recipe.second.loss.name) if recipe.second else (recipe.loss.name,)
    assert names == (("fcbl",) if end_to_end else LOSSES.get(row.method_key, (row.method_key,)))
    stages = [recipe.schedule, *([recipe.second.schedule] if recipe.second else [])]
    epochs = {
        **{"1x": 12, "2x": 24, "3x": 36, "4x": 48, "12+12": 24, "24+6": 30, "6+6": 6},
        None: 24,
    }[row.schedule]
    shares = {("24+6", 2): (24, 6)}.get((row.schedule, len(stages)), [epochs / len(stages)] * len(stages))
    steps = {6: (4, 5), 12: (8, 11), 24: (16, 22), 36: (27, 33), 48: (36, 44)}
    if row.schedule == "24+6":
        steps[6] = (3, 5)  # LOCE's own
    if recipe.pretraining and row.schedule == "6+6":
        assert recipe.pretraining.schedule.epochs == 6
    for stage, share in zip(stages, shares, strict=True):
        assert (stage.epochs, stage.milestones) == (share, steps[share])
        assert (stage.batch, stage.momentum, stage.optimizer) == (16, 0.9, "sgd")
        slow = dense or (row.method_key == "simcal" and stage is not recipe.schedule)
        assert stage.lr == (0.01 if slow else 0.02)
    measure = (300, 0, 0.5) if from_efl else (300, 1e-4, 0.6 if dense else 0.5)
    measure = (100, 0.05, 0.5) if row.dataset == "coco" else measure
    assert (recipe.evaluation.max_dets, recipe.evaluation.score_threshold, recipe.evaluation.nms) == measure
    dataset = "instances" if row.dataset == "coco" else row.dataset
    assert dataset in recipe.data.train.annotations and "train" in recipe.data.train.annotations
    assert dataset in recipe.data.val.annotations and "val" in recipe.data.val.annotations
    bacl = row.method_key == "bacl"
    assert dense or recipe.detector.rpn_post_nms == (
        2000 if bacl or row.settings.get("double_proposals") else 1000,
        1000,
    )
    small_decay = (bacl and not end_to_end) or row.settings.get("small_weight_decay")
    assert recipe.schedule.weight_decay == (5e-5 if small_decay else 1e-4)
    pasted = (bacl and not end_to_end) or row.settings.get("copy_paste", False)
    assert recipe.data.copy_paste == pasted
    assert recipe.data.sizes == ((1280,) if pasted else (640, 672, 704, 736, 768, 800))
    assert recipe.data.resize == ("jitter" if pasted else "multiscale")
    assert recipe.data.inference_size == (800, 1333)
    if bacl:
        check_bacl(row, recipe)
    elif row.method_key == "loce":
        assert (recipe.second.trains, recipe.second.fresh_classifier) == (("classifier", "box", "rpn"), False)
        assert recipe.second.features == FeatureMemory()
    elif recipe.second:
        assert (recipe.method, recipe.second.trains, recipe.second.fresh_classifier) == (
            "decoupled",
            ("classifier",),
            row.method_key not in SECOND_STAGE,
        )
        classifier = recipe.second.classifier.name if recipe.second.classifier else None
        assert classifier == (row.method_key if row.method_key in SECOND_STAGE else None)
        assert recipe.second.data == {}
    # the row's own facts, not those of the row that the recipe is named after
    assert recipe.about.published == row.numbers
    assert recipe.about.table == f"table {row.table}"
    assert row_id in recipe.about.command
    assert recipe.about.notes == " ".join(filter(None, (row.doubt, sentence, load_recipe(run.recipe).about.notes)))
    # apart from these facts the row is its recipe plus its overrides, each of which changes something
    plain = load_recipe(run.recipe, run.overrides)
    assert recipe.model_copy(update={"about": plain.about, "name": plain.name}) == plain
    for index in range(len(run.overrides)):
        without = run.overrides[:index] + run.overrides[index + 1 :]
        if scratch:  # a random start needs its three keys together
            continue
        assert load_recipe(run.recipe, without) != plain


def check_bacl(row: recipes.Row, recipe: Recipe) -> None:
    """The classifier stage of a BACL row: the paper's settings but for the row's switches."""
    settings = {"mg": True, "wt": True, "fhm": True} | recipes.papers()["bacl"].defaults | row.settings
    if row.settings.get("pipeline") == "end_to_end":
        assert (recipe.method, recipe.second, recipe.schedule.weight_decay) == ("baseline", None, 1e-4)
        loss, made_up = recipe.loss, recipe.features
    else:
        assert recipe.method == "bacl"
        stage = second_recipe(recipe)
        assert recipe.second.trains == ("classifier", "box", "rpn")
        assert not recipe.second.fresh_classifier
        assert (stage.schedule.weight_decay, stage.sampler.name) == (1e-4, "plain")
        assert (stage.data.resize, stage.data.copy_paste) == ("multiscale", False)
        assert (stage.data.sizes, stage.data.max_size) == ((640, 672, 704, 736, 768, 800), 1333)
        assert stage.data.inference_size == (800, 1333)
        loss, made_up = recipe.second.loss, recipe.second.features
    options = losses.LOSSES["fcbl"].__init__.__kwdefaults__ | loss.options
    assert options["alpha"] == (settings["alpha"] if settings["mg"] else 0)
    assert options["reweight"] == settings["wt"]
    for name in ("prob_thr", "indicator", "matrix", "conditions"):
        assert options[name] == settings[name]
    assert options["score_momentum"] == settings["gamma"]
    assert (made_up is not None) == settings["fhm"]
    if made_up is not None:
        numbers = (made_up.beta, made_up.sampled_num_classes, made_up.sampled_num_features)
        assert numbers == (settings["beta"], settings["c"], settings["m"])


def test_runnable_rows_per_table():
    counted = Counter((ROWS[row_id].paper, ROWS[row_id].table) for row_id in RUNNABLE)
    in_full = ("I", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIV", "XV", "Fig4")
    for table in in_full:
        assert counted["bacl", table] == recipes.papers()["bacl"].tables[table].rows
    assert counted["bacl", "XIII"] == 4 * 16 + 3 + 2 + 1 + 4  # TDE, Forest R-CNN, SimCal, DisAlign without their dashes
    assert counted["2drcl", "3a"] == 12
    for table in ("1", "2", "3b", "4a", "4b", "5", "A.1", "A.2", "A.3", "A.4"):
        assert counted["2drcl", table] == recipes.papers()["2drcl"].tables[table].rows
    assert len(RUNNABLE) == sum(counted.values()) == 300
    assert all(row_id in RUNNABLE for row_id, row in ROWS.items() if assumed(row)[1])


def test_the_ablations_of_bacl_are_switches_of_one_recipe():
    recipe = "lvis_v0.5/faster_rcnn_r50_bacl"
    expected = {
        "III/bacl/lvis_v0.5/r50/mg": ("second.loss.reweight=false", "second.features=null"),
        "III/bacl/lvis_v0.5/r50/fhm": ("second.loss.alpha=0", "second.loss.reweight=false"),
        "IV/bacl/lvis_v0.5/r50/alpha=0": ("second.loss.alpha=0",),
        "V/bacl/lvis_v0.5/r50/prob_thr=0.9": ("second.loss.prob_thr=0.9",),
        "VI/bacl/lvis_v0.5/r50/beta=0.95": ("second.features.beta=0.95",),
        "VII/bacl/lvis_v0.5/r50/c=8,m=16": ("second.features.sampled_num_features=16",),
        "VIII/bacl/lvis_v0.5/r50/matrix=hard": ("second.loss.matrix=hard",),
        "IX/bacl/lvis_v0.5/r50/conditions=both": (),
        "X/bacl/lvis_v0.5/r50/decoupled": (),
        "Fig4/bacl/lvis_v0.5/r50/indicator=tpr": ("second.loss.indicator=tpr",),
    }
    for row_id, overrides in expected.items():
        assert RUNS[f"bacl/{row_id}"] == Runnable(recipe, overrides)
    assert RUNS["bacl/X/bacl/lvis_v0.5/r50/end_to_end"] == Runnable("lvis_v0.5/faster_rcnn_r50:bacl_end_to_end", ())
    assert RUNS["bacl/XII/bacl/lvis_v1/r101/faster_rcnn"].overrides == ("backbone=resnet101",)


def test_the_baselines_of_all_tables_are_runnable():
    for loss in ("softmax", "sigmoid", "objectness", "rfs"):
        for dataset in ("lvis_v0.5", "lvis_v1"):
            for backbone in ("r50", "r101"):
                assert f"bacl/XIII/{loss}/{dataset}/{backbone}" in RUNNABLE
    assert RUNS["bacl/XIII/softmax/lvis_v1/r50"] == Runnable("lvis_v1/faster_rcnn_r50", ())
    assert RUNS["bacl/XIII/rfs/lvis_v0.5/r101"] == Runnable(
        "lvis_v0.5/faster_rcnn_r50", ("backbone=resnet101", "sampler=rfs", "sampler.rounding=ceil")
    )
    assert RUNS["bacl/I/stage1/lvis_v0.5/r50/small_weight_decay"].overrides == (
        "schedule.epochs=12",
        "schedule.milestones=[8, 11]",
        "detector.rpn_post_nms=[2000, 1000]",
        "schedule.weight_decay=5e-5",
    )


@pytest.mark.parametrize("row_id", BLOCKED)
def test_blocked_row(row_id):
    """A row that cannot be run says why, and the reason is true of it."""
    row, run = ROWS[row_id], RUNS[row_id]
    told = refusal(load_recipe, row_id)
    assert told == f"the published row {row_id} cannot be run, {run.when}: {run.reason}"
    if run.when == "never":
        assert (row.values == "dash") == (run.reason == "the paper prints a dash")
        assert row.values == "dash" or row.method_key in NO_CODE
    else:
        assert run.reason.startswith("needs ")
        if row.pretraining not in PRETRAINING:
            assert f"{PRETRAINING_NAMES[row.pretraining]} pre-training" in run.reason


def test_reasons_of_some_rows():
    reasons = {
        "bacl/XIII/simcal/lvis_v1/r50": "never: the paper prints a dash",
        "stepwise/1/ahrl/lvis_v1/r50": "never: method without code (AHRL)",
    }
    for row_id, reason in reasons.items():
        assert str(RUNS[row_id]).endswith(reason)


def test_a_dash_and_a_method_without_code_are_the_only_nevers():
    never = [row for row_id, row in ROWS.items() if isinstance(RUNS[row_id], Blocked) and RUNS[row_id].when == "never"]
    assert never == [row for row in recipes.rows() if row.values == "dash" or row.method_key in NO_CODE]


def test_rules_cover_every_word_of_the_rows():
    for row in recipes.rows():
        assert row.method_key in METHODS or row.method_key in NO_CODE
        assert row.dataset in DATASETS
        assert row.detector is None or row.detector in DETECTORS
        if row.method_key not in NO_CODE:
            assert row.pretraining in PRETRAINING or row.pretraining in PRETRAINING_NAMES


def test_unknown_row():
    told = refusal(recipes.resolve, "bacl/XIII/softmax/lvis_v1/r52")
    assert told.startswith('there is no published row "bacl/XIII/softmax/lvis_v1/r52" (did you mean "bacl/XIII/')
