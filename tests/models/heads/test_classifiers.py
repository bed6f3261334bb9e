"""The classifiers of a recipe: each trains, loads, predicts; second stages; what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tailfin
from tailfin import ClassStats, api, losses
from tailfin.checkpoint import load_model_file
from tailfin.config import load_recipe
from tailfin.data.dataset import TrainingDataset
from tailfin.data.index import open_index
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models import heads as box_heads
from tailfin.models.heads import simcal
from tailfin.models.heads.cosine import NormedLinear, WeightNormCosine
from tailfin.models.heads.disalign import align
from tailfin.models.heads.forest import GrownForest, class_company, class_name_parts
from tailfin.models.heads.pcb import STEP_WEIGHTS
from tailfin.models.heads.roi_heads import BoxPredictor
from tailfin.models.heads.tde import TDEHead
from tailfin.models.rpn import ResamplingRPN
from tailfin.samplers.episodes import EpisodeDataset, EpisodePlan
from tailfin.schema.heads import CLASSIFIERS, Classifier
from tailfin.schema.training import Sampler

pytestmark = pytest.mark.usefixtures("quick_training")
STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
HEADS = {
    "weight_cosine": ["detector.classifier=weight_cosine"],
    "tde": ["detector.classifier=tde"],
    "forest": ["detector.classifier=forest", "detector.rpn_nms_resampling=discrete"],
    "pcb": ["detector.classifier=pcb", "loss={name: pcb, start_epoch: 1}"],
    "pcb_cosine": ["detector.classifier={name: pcb, base: cosine}", "loss={name: pcb, base: seesaw, start_epoch: 0}"],
}  # fmt: skip
SECOND = [
    "method=decoupled",
    "second.trains=[classifier]",
    "second.schedule.epochs=1.5",
    "second.schedule.batch=4",
    "second.schedule.warmup=0",
    "second.schedule.milestones=[]",
    "schedule.epochs=1",
]
STAGE_TWO = {
    "disalign": [*SECOND, "second.classifier=disalign"],
    "disalign_cosine": [*SECOND, "detector.classifier={name: cosine, temperature: 16}", "second.classifier=disalign"],
    "simcal": [*SECOND, "second.classifier={name: simcal, instance_threshold: 10}", "second.sampler=class_aware"],
}


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def log(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def assert_finite(run: Path, at_least: int = 7) -> None:
    for stage in (run / "stages").iterdir():
        lines = [line for line in log(stage) if "loss" in line]
        assert len(lines) >= at_least
        assert np.isfinite([line["loss"] for line in lines]).all()
    assert all(bool(torch.isfinite(value).all()) for value in load_file(run / "model.safetensors").values())


# ---- one stage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tde", "forest", "pcb"])
def test_trains_resumes_loads_and_predicts_the_same(tmp_path, tiny_set, tiny_recipe, name):
    overrides = [*HEADS[name], "schedule.epochs=1.5"]
    run = tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=tmp_path / "run", overrides=overrides)
    assert_finite(run)
    again = api.predict_to_results(run / "model.safetensors", tiny_set[1], None, tmp_path / "again", device="cpu")
    found = json.loads((run / "results.bbox.json").read_text())
    assert len(found) > 0 and json.loads(again["bbox"].read_text()) == found
    assert load_recipe(run / "recipe.yaml") == load_recipe(tiny_recipe, overrides).model_copy(
        update={"name": "tiny", "data": load_recipe(run / "recipe.yaml").data}
    )
    # killed after its last resume point: running state and trees come back with it, to the same bits
    straight = load_file(run / "model.safetensors")
    state = {"tde": "predictor.cls_score.embedding", "forest": "loss.parents", "pcb": "loss.num_inst_cnt"}[name]
    assert straight[f"roi_heads.{state}"].abs().sum() > 0
    for file in (run / "model.safetensors", *run.glob("stages/*/model.safetensors"), run / "results.bbox.json"):
        file.unlink()
    point = json.loads((run / "stages/1-train/last/complete.json").read_text())["iteration"]
    assert point == 10 < len([line for line in log(run / "stages" / "1-train") if "loss" in line])
    tailfin.train("", out=run, resume=True)
    resumed = load_file(run / "model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert json.loads((run / "results.bbox.json").read_text()) == found


@pytest.mark.parametrize("name", ["weight_cosine", "forest", "pcb_cosine", "disalign", "simcal"])
def test_trains_in_this_processors_precision(tmp_path, tiny_set, tiny_recipe, name):
    overrides = [*(HEADS | STAGE_TWO)[name], "schedule.precision=auto", "schedule.epochs=0.5"]
    if name in STAGE_TWO:
        overrides += ["second.schedule.precision=auto", "second.schedule.epochs=0.5"]
    run = tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert_finite(run, at_least=3)


def test_tde_follows_the_rows_of_all_processes(run_on_ranks):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((12, 8), generator=generator)
    labels = torch.tensor([0, 3, 1, 3, 3, 3, 2, 0, 3, 3, 3, 3])

    def embedding(rows: slice) -> Tensor:
        torch.manual_seed(1)
        predictor = BoxPredictor(8, losses.build("softmax", STATS), False, TDEHead(8, 3)).train()
        for _ in range(3):
            predictor(features[rows], labels[rows])
        return predictor.cls_score.embedding.clone()

    alone = embedding(slice(None))
    assert alone.abs().sum() > 0
    for found in run_on_ranks(lambda rank: embedding(slice(0, 4) if rank == 0 else slice(4, None)).tolist()):
        torch.testing.assert_close(torch.tensor(found, dtype=alone.dtype), alone)


def test_every_pass_of_pcb_moves_the_confusions(tiny_set, tiny_recipe):
    recipe = load_recipe(tiny_recipe, ["detector.classifier=pcb", "loss=pcb"])
    model, _ = build_detector(recipe, STATS, start=False)
    steps = []
    heads = model.train().roi_heads
    plain = heads.loss.loss
    heads.loss.loss = lambda logits, labels, iter_id=None, epoch=None: (
        steps.append(iter_id) or plain(logits, labels, iter_id, epoch)
    )
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    model([torch.rand(3, 64, 64)], [target])
    assert steps == [0, 1, 2]
    assert heads.loss.num_inst_cnt[1] >= 3


# ---- forests ---------------------------------------------------------------------------------------------------------


def test_a_grown_forest_is_in_the_model(tmp_path, tiny_set, tiny_recipe):
    overrides = [*HEADS["forest"], "detector.classifier.parents=[2, 3, 2]", "schedule.epochs=0.2"]
    run = tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    heads = tailfin.load(run).model.roi_heads
    expected = GrownForest(STATS, parents=[2, 3, 2])
    meaningless = expected.parents.clone()
    expected.see_annotations(open_index(tiny_set[0]))
    assert torch.equal(heads.loss.parents, expected.parents)
    assert not torch.equal(expected.parents, meaningless)
    assert heads.loss.widths == [3, 4, 3, 4]
    assert isinstance(tailfin.load(run).model.rpn, ResamplingRPN)


def test_rpn_with_a_threshold_per_class(tiny_recipe):
    model, _ = build_detector(load_recipe(tiny_recipe, ["detector.rpn_nms_resampling=linear"]), STATS, start=False)
    assert (model.rpn.scheme, model.rpn.thresholds) == ("linear", (0.9, 0.8, 0.7))
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([2])}
    assert all(torch.isfinite(value) for value in model.train()([torch.rand(3, 64, 64)], [target]).values())


def test_trees_from_a_file(tmp_path, tiny_set):
    path = tmp_path / "trees.json"
    path.write_text(json.dumps({"looks": {"red": "warm", "green": "cold", "blue": "cold"}}))
    forest = GrownForest(STATS, trees=str(path), parents=[2])
    forest.see_annotations(open_index(tiny_set[0]))
    assert forest.parents.tolist() == [[0, 1, 1, 2]]
    small = GrownForest(STATS, trees=str(path), parents=[1])
    assert "has 2 parents, there is room for 1: change `parents`" in refusal(
        small.see_annotations, open_index(tiny_set[0])
    )
    with pytest.raises(ValueError, match="need `parents`"):
        GrownForest(STATS, trees=str(path))


def test_descriptions_of_classes(tmp_path):
    """Names that share words and classes that share pictures are near each other."""
    names = ["alarm_clock", "clock_tower", "pear", "prickly_pear", "wall_clock"]
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 9} for i in range(6)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": label, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
            for n, (image, label) in enumerate(
                [(0, 0), (0, 2), (1, 0), (1, 2), (2, 1), (2, 3), (3, 1), (3, 3), (3, 4), (4, 4), (5, 1), (5, 4)]
            )
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    index = open_index(path)

    def near(features: np.ndarray, first: int, second: int, third: int) -> bool:
        return np.linalg.norm(features[first] - features[second]) < np.linalg.norm(features[first] - features[third])

    parts = class_name_parts(index)
    assert near(parts, 0, 4, 2) and near(parts, 2, 3, 0) and near(parts, 1, 0, 3)
    company = class_company(index)
    assert near(company, 3, 4, 0), "both are seen with clock_tower"


# ---- second stages ---------------------------------------------------------------------------------------------------


def first_names(name: str) -> dict[str, str]:
    """Where the first stage's box head is in the second: beginnings of weights' names."""
    if name.startswith("disalign"):
        return {"predictor.cls_score.": "predictor.cls_score.classifier."}
    return {"head.": "predictor.head.", "predictor.": "predictor.predictor."}


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_calibrates_and_freezes(tmp_path, tiny_set, tiny_recipe, name):
    run, val = tmp_path / "run", tiny_set[1] if name == "disalign" else None
    tailfin.train(tiny_recipe, train=tiny_set[0], val=val, out=run, overrides=STAGE_TWO[name])
    assert_finite(run)
    first = load_file(run / "stages" / "1-representation" / "model.safetensors")
    last = load_file(run / "model.safetensors")
    moved = {}
    for key, value in first.items():
        for before, after in first_names(name).items():
            if key.startswith(f"roi_heads.{before}"):
                key = key.replace(f"roi_heads.{before}", f"roi_heads.{after}", 1)
                break
        moved[key] = value
    assert set(moved) <= set(last)
    assert [key for key, value in moved.items() if not torch.equal(value, last[key])] == []
    new = set(last) - set(moved)
    part = "calibrated" if name.startswith("simcal") else "cls_score"
    assert new and all(part in key for key in new)
    if name == "simcal":  # it started as a copy of the original
        original = last["roi_heads.predictor.predictor.cls_score.weight"]
        assert 0 < (last["roi_heads.predictor.calibrated_classifier.weight"] - original).abs().max() < 1
    if name.startswith("disalign"):
        assert not torch.equal(last["roi_heads.predictor.cls_score.logit_scale"], torch.ones(3))
    if val is not None:
        found = json.loads((run / "results.bbox.json").read_text())
        again = api.predict_to_results(run / "model.safetensors", val, None, tmp_path / "again", device="cpu")
        assert json.loads(again["bbox"].read_text()) == found
    base = load_model_file(run / "model.safetensors").recipe.detector.classifier.options["base"]
    assert base["name"] == ("cosine" if name == "disalign_cosine" else "linear")
    if name == "simcal":  # stopped in the second stage: it goes on with the same episodes
        (run / "model.safetensors").unlink()
        (run / "stages" / "2-classifier" / "model.safetensors").unlink()
        assert list(run.glob("stages/2-classifier/last/complete.json"))
        tailfin.train("", out=run, resume=True)
        resumed = load_file(run / "model.safetensors")
        assert all(torch.equal(last[key], resumed[key]) for key in last)


def test_episodes_tell_their_class(tiny_set, tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    source = api.Source(open_index(tiny_set[0]), tiny_set[0].with_suffix(""))
    dataset = EpisodeDataset(source, recipe.data, 0)
    stats = ClassStats.from_json(tiny_set[0])
    plan = EpisodePlan(source.index, dataset.rows(), stats, Sampler(name="class_aware"), 8, 40, 0, False)
    assert plan.iterations == 40 * -(-len(dataset.rows()) // 8)
    keys = [key for batch in plan.keys(0, slice(0, 1), 1) for key in batch]
    share = np.bincount([label for *_, label in keys]) / len(keys)
    np.testing.assert_allclose(share, 1 / 3, atol=0.05)
    later = [key for batch in plan.keys(5, slice(0, 1), 1) for key in batch]
    assert keys[40:] == later
    parts = [[key for batch in plan.keys(0, slice(i, i + 1), 2) for key in batch] for i in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(keys)
    for key in keys[:6]:
        _, target = dataset.sample(*key)
        assert int(target["sampled_class"]) == key[-1] and key[-1] in target["labels"]
    plain = TrainingDataset(source, recipe.data, 0).sample(*keys[0][:3])
    assert torch.equal(plain[0], dataset.sample(*keys[0])[0])


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["detector.classifier=cosin"], 'there is no classifier "cosin" (did you mean "cosine"?)'),
        (["detector.classifier=cosine", "detector.classifier.temprature=1"], '(did you mean "temperature"?)'),
        (["detector.classifier={name: linear, temperature: 1}"], "linear has no option"),
        (["detector.classifier={name: cosine, temperature: 0}"], "temperature must be above 0"),
        (["detector.classifier={name: tde, num_heads: 0}"], "cannot be shared by 0 heads"),
        (["detector.classifier={name: tde, mu: 2}"], "mu must be in 0..1"),
        (["detector.classifier={name: forest, trees: [geometri]}"], 'no source of trees (did you mean "geometry"?)'),
        (["detector.classifier={name: forest, parents: [4]}"], "parents has 1 entries for 3 trees"),
        (["detector.classifier={name: pcb, base: tde}"], "base must be one of linear, cosine"),
        (["detector.classifier={name: pcb, base: {name: cosine, temp: 1}}"], 'cosine has no option "temp"'),
        (["detector.classifier={name: pcb, step_weights: [1, -1]}"], "step_weights must not be negative"),
        (["detector.classifier={name: disalign, exponent: -1}"], "exponent must not be negative"),
        (["detector.classifier={name: simcal, instance_threshold: -1}"], "instance_threshold must not be negative"),
        ([*SECOND, "second.classifier=disalighn"], 'there is no classifier "disalighn" (did you mean "disalign"?)'),
        ([*SECOND, "detector.classifier=tde", "second.classifier=disalign"], "base must be one of"),
        (["detector.rpn_nms_resampling=discret"], 'is not a choice (did you mean "discrete"?)'),
        (["calibration.gamma=-1"], "calibration.gamma"),
        (["calibration=norcall"], 'calibration.name: "norcall" is not a choice (did you mean "norcal"?)'),
    ],
)  # fmt: skip
def test_refused_recipe(tiny_recipe, overrides, message):
    assert message in refusal(load_recipe, tiny_recipe, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["detector.classifier=disalign"], "set method=decoupled and second.classifier=disalign"),
        (["detector.classifier=simcal"], "calibrates a trained classifier"),
        (["detector.classifier=tde", "loss=seesaw"], "made for a plain softmax"),
        (["detector.classifier=tde", "loss=objectness"], "it has no bias"),
        (["detector.classifier=weight_cosine", "loss=focal"], "it has no bias"),
        (["detector.classifier={name: tde, num_heads: 3}"], "in_features 32 cannot be shared by 3 heads"),
        (["detector.classifier=forest", "loss=seesaw"], "Seesaw cannot stand beside it"),
        (["detector.classifier={name: forest, parents: [2, 9, 2]}"], "parents must lie in 1..3"),
        (["detector.classifier={name: pcb, step_weights: [1, 1]}", "loss=pcb"], "the loss expects 3 passes"),
        (["detector.classifier=pcb", "features=fasa"], "cannot join it"),
    ],
)  # fmt: skip
def test_refused_detector(tmp_path, tiny_set, tiny_recipe, overrides, message):
    assert message in refusal(tailfin.train, tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*STAGE_TWO["disalign"], "loss=sigmoid"], "freezes roi_heads.predictor.cls_score.classifier.weight untrained"),
        ([*STAGE_TWO["simcal"], "second.fresh_classifier=true"], "second.fresh_classifier starts it anew"),
        ([*SECOND, "second.classifier=forest"], "the first stage has none"),
        ([*STAGE_TWO["simcal"], "second.features=fasa"], "cannot join it"),
    ],
)
def test_refused_second_stage(tmp_path, tiny_set, tiny_recipe, overrides, message):
    """Before the first one has trained."""
    assert message in refusal(tailfin.train, tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_schema_has_the_options_of_the_modules():
    """By name and default; a recipe is checked against the schema without them."""
    assert list(CLASSIFIERS) == list(box_heads.HEADS)
    bricks = {
        "cosine": NormedLinear.__init__,
        "weight_cosine": WeightNormCosine.__init__,
        "tde": TDEHead.__init__,
        "forest": GrownForest.__init__,
        "disalign": align,
        "simcal": simcal.with_twin,
    }
    own = {name: call.__kwdefaults__ for name, call in bricks.items()} | {"linear": {}}
    own["pcb"] = {"step_weights": STEP_WEIGHTS}
    for name, kind in CLASSIFIERS.items():
        options = kind().model_dump()
        assert (options.pop("base", None) is not None) == bool(kind.bases)
        assert options == own[name], name
        assert kind.second_stage == (box_heads.HEADS[name].wrap is not None)
        # whatever a recipe may be built with as an inner classifier is a layer
        assert all(box_heads.HEADS[inner].layer is not None for inner in kind.bases)


def test_options_have_their_types():
    options = Classifier(name="tde", num_heads="4", tau="1e1", keep_background="no").options
    assert options == {"num_heads": 4, "tau": 10.0, "keep_background": False}
    assert isinstance(options["num_heads"], int)
    for wrong in ({"num_heads": 2.5}, {"tau": "strong"}, {"keep_background": 3}, {"alpha": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Classifier(name="tde", **wrong)


def test_bare_names_and_overrides(tiny_recipe):
    recipe = load_recipe(tiny_recipe, ["detector.classifier=cosine", "detector.classifier.temperature=1e1"])
    assert recipe.detector.classifier.options == {"temperature": 10.0}
    again = load_recipe(tiny_recipe, ["detector.classifier={name: cosine, temperature: 5}", "detector.classifier=tde"])
    assert again.detector.classifier.options == {}
    model, _ = build_detector(recipe, STATS, start=False)
    assert model.roi_heads.predictor.cls_score.temperature == 10
