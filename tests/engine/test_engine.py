"""The training loop in this process: rate, accumulation, clipping, averages, early stop, logs and broken losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tailfin
from tailfin import api, checkpoint, engine
from tailfin import run as run_module
from tailfin.data.dataset import TrainingDataset
from tailfin.errors import UserError
from tailfin.schedule import build_optimizer, learning_rate
from tailfin.schema.training import Schedule

pytestmark = pytest.mark.usefixtures("quick_training")


@pytest.fixture
def train(tmp_path, tiny_set, tiny_recipe):
    """Train the tiny recipe in this process with changes: `train("name", {"schedule.epochs": 1}) -> run folder`."""

    def call(name: str, changes: dict[str, Any] | None = None, val: bool = False) -> Path:
        short = {"schedule.epochs": 1, "schedule.lr": 0.02}
        return tailfin.train(
            tiny_recipe,
            train=tiny_set[0],
            val=tiny_set[1] if val else None,
            out=tmp_path / name,
            overrides={**short, **(changes or {})},
        )

    return call


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "stages/1-train/metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in log(run) if "loss" in line]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in log(run) if "eval" in line]


def equal(first: Path, second: Path) -> bool:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ---- learning rate ---------------------------------------------------------------------------------------------------

schedules = st.builds(
    Schedule,
    lr=st.floats(1e-4, 1.0),
    warmup=st.integers(0, 50),
    warmup_ratio=st.floats(0, 1),
    decay=st.sampled_from(["multistep", "cosine", "constant"]),
    gamma=st.floats(0.05, 1.0),
)


@given(schedule=schedules, total=st.integers(1, 300), data=st.data())
@settings(max_examples=200, deadline=None)
def test_learning_rate(schedule, total, data):
    milestones = sorted(data.draw(st.lists(st.integers(1, total), max_size=3)))
    rates = [learning_rate(i, total, milestones, schedule) for i in range(total)]
    assert rates == [learning_rate(i, total, milestones, schedule) for i in range(total)]
    assert all(0 <= rate <= schedule.lr * (1 + 1e-9) for rate in rates)
    after = rates[schedule.warmup :]
    assert all(second <= first * (1 + 1e-9) for first, second in zip(after, after[1:], strict=False))
    if schedule.decay == "constant":
        assert all(rate == schedule.lr for rate in after)
    if schedule.decay == "multistep":
        for i in range(schedule.warmup, total):
            passed = sum(milestone <= i for milestone in milestones)
            assert rates[i] == pytest.approx(schedule.lr * schedule.gamma**passed)
    if schedule.decay == "cosine":
        assert learning_rate(total, total, milestones, schedule) == pytest.approx(0, abs=1e-12)
    if schedule.warmup and schedule.decay == "constant":
        assert rates[0] == pytest.approx(schedule.lr * schedule.warmup_ratio)
        climb = rates[: schedule.warmup + 1]
        assert all(first <= second for first, second in zip(climb, climb[1:], strict=False))


def test_a_worked_rate():
    schedule = Schedule(lr=0.02, warmup=4, warmup_ratio=0.5, gamma=0.1)
    rates = [learning_rate(i, 20, [8, 16], schedule) for i in (0, 2, 4, 7, 8, 15, 16)]
    assert rates == pytest.approx([0.01, 0.015, 0.02, 0.02, 0.002, 0.002, 0.0002])
    cosine = Schedule(lr=0.02, warmup=0, decay="cosine")
    assert [learning_rate(i, 20, [], cosine) for i in (0, 10, 20)] == pytest.approx([0.02, 0.01, 0])


def test_the_run_follows_the_rate(train):
    run = train("run", {"schedule.warmup": 3, "schedule.epochs": 2, "schedule.milestones": [1]})
    rates = [line["lr"] for line in steps(run)]
    schedule = Schedule(lr=0.02, warmup=3)
    first = next(line["iteration"] for line in steps(run) if line["epoch"] >= 1)
    assert rates == pytest.approx([learning_rate(i, len(rates), [first], schedule) for i in range(len(rates))])
    assert rates[-1] == pytest.approx(0.002)


def test_weight_decay_spares_norms():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.GroupNorm(2, 4))
    model[0].bias.requires_grad_(False)
    for optimizer in ("sgd", "adamw"):
        whole = build_optimizer(model, Schedule(optimizer=optimizer, weight_decay=0.1))
        assert [len(group["params"]) for group in whole.param_groups] == [5]
        spared = build_optimizer(model, Schedule(optimizer=optimizer, weight_decay=0.1, norm_decay=False))
        assert [(len(g["params"]), g["weight_decay"]) for g in spared.param_groups] == [(1, 0.1), (4, 0.0)]


# ---- determinism and precision ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits(train):
    first, second, other = train("first"), train("second"), train("other", {"seed": 1})
    assert equal(first, second)
    assert not equal(first, other)
    drop = ("images_per_second", "seconds")
    assert [{k: v for k, v in line.items() if k not in drop} for line in log(first)] == [
        {k: v for k, v in line.items() if k not in drop} for line in log(second)
    ]


def test_bf16_trains_and_precisions_may_follow_one_another(train):
    """Accelerate keeps one precision for a process; a second run in another one must still get its own."""
    half = train("half", {"schedule.precision": "bf16"})
    assert AcceleratorState().mixed_precision == "bf16"
    full = train("full")
    assert AcceleratorState().mixed_precision == "no"
    assert all(math.isfinite(line["loss"]) for line in steps(half))
    assert not equal(half, full)
    assert {value.dtype for value in load_file(half / "model.safetensors").values()} <= {torch.float32, torch.int64}
    pairs = zip(steps(half), steps(full), strict=True)
    assert all(one["loss"] == pytest.approx(two["loss"], rel=0.3) for one, two in pairs)
    assert equal(full, train("again"))


def test_evaluation_uses_the_precision_of_the_run(train):
    run = train("run", {"schedule.precision": "bf16"}, val=True)
    api.predict_to_results(run / "model.safetensors", *api.validation_files(run), run / "again", max_dets=20)
    assert (run / "again/results.bbox.json").read_bytes() == (run / "results.bbox.json").read_bytes()


def test_adamw_and_cosine(train):
    run = train("run", {"schedule.optimizer": "adamw", "schedule.lr": 1e-3, "schedule.decay": "cosine"})
    assert steps(run)[-1]["loss"] < steps(run)[0]["loss"]


# ---- the step --------------------------------------------------------------------------------------------------------


def test_accumulation_sees_the_same_pictures(train, monkeypatch):
    seen: list[list[int]] = []

    def step(model, images, targets):
        seen.append([int(target["image_id"]) for target in targets])
        return engine.detector_step(model, images, targets)

    original = run_module.Run.stage

    def stage(self, name, model, **options):
        return original(self, name, model, **{**options, "step": step})

    monkeypatch.setattr(run_module.Run, "stage", stage)
    run = train("whole")
    whole, seen[:] = list(seen), []
    parts = train("parts", {"schedule.accumulation": 2})
    assert [first + second for first, second in zip(seen[::2], seen[1::2], strict=True)] == whole
    assert all(len(rows) == 2 for rows in seen)
    assert [line["iteration"] for line in steps(run)] == [line["iteration"] for line in steps(parts)]
    # the first loss, before any step: the mean over half batches of mean losses; RPN and RoI rows are drawn differently
    assert steps(parts)[0]["loss"] == pytest.approx(steps(run)[0]["loss"], rel=0.1)


def test_accumulated_gradients_are_those_of_the_batch(train, monkeypatch):
    """With a loss that is a mean over pictures, two halves and one whole batch give the same weights."""

    def step(model, images, targets):
        features = model.backbone(torch.stack([image[:, :48, :48].float() / 255 for image in images]))
        return {"loss": torch.stack([value.square().mean() for value in features.values()]).sum()}

    original = run_module.Run.stage

    def stage(self, name, model, **options):
        return original(self, name, model, **{**options, "step": step})

    monkeypatch.setattr(run_module.Run, "stage", stage)
    changes = {"schedule.lr": 1e-4, "detector.norm": "gn", "schedule.warmup": 0}
    one, two = train("one", changes), train("two", {**changes, "schedule.accumulation": 2})
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)
    assert [line["loss"] for line in steps(one)] == pytest.approx([line["loss"] for line in steps(two)], rel=1e-4)


def test_clipping_is_logged(train):
    run = train("run", {"schedule.clip": 0.5, "schedule.warmup": 0})
    norms = [line["grad_norm"] for line in steps(run)]
    assert len(norms) == len(steps(run)) and max(norms) > 0.5  # the norm before it was cut
    first = steps(run)[0]
    parts = [value for name, value in first.items() if name.startswith("loss_")]
    assert first["loss"] == pytest.approx(sum(parts))
    assert "grad_norm" not in steps(train("plain"))[0]
    assert not equal(run, train("unclipped", {"schedule.clip": 1e6, "schedule.warmup": 0}))
    assert equal(train("a", {"schedule.clip": 1e6}), train("b"))


def test_average_of_the_weights(train, monkeypatch):
    """The final model is the moving average: worked out by hand from the weights after every step."""
    history: list[torch.Tensor] = []
    original = engine.AveragedModel.update_parameters
    key = "roi_heads.predictor.cls_score.weight"

    def update(self, model):
        history.append(model.state_dict()[key].clone())
        original(self, model)

    monkeypatch.setattr(engine.AveragedModel, "update_parameters", update)
    run = train("run", {"schedule.ema": 0.7})
    expected = history[0]
    for value in history[1:]:
        expected = 0.7 * expected + 0.3 * value
    found = load_file(run / "model.safetensors")[key]
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, history[-1], atol=1e-5)


def test_compiled_backbones_change_nothing_but_the_way(train, monkeypatch):
    """By torch.compile's front end alone, whose graphs are run as they are: the same weights under the same names."""
    graphs = []

    def run_as_it_is(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(engine, "COMPILER", {"backend": run_as_it_is})
    straight, compiled = train("straight"), train("compiled", {"schedule.compile": True, "schedule.ema": None})
    assert graphs
    assert equal(straight, compiled)


def test_several_iterations_per_line(train):
    every, thirds = train("every"), train("thirds", {"logging.every": 3})
    assert equal(every, thirds)
    lines, total = steps(thirds), steps(every)[-1]["iteration"]
    assert [line["iteration"] for line in lines] == [*range(3, total, 3), total]
    assert lines[0]["loss"] == pytest.approx(sum(line["loss"] for line in steps(every)[:3]) / 3, rel=1e-5)


def test_trackers_write_files(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("run", {"logging.trackers": ["tensorboard"], "evaluation.every": 1, "schedule.epochs": 2}, val=True)
    folders = {path.parent for path in run.rglob("events.out.tfevents.*")}
    scalars: dict[str, list] = {}
    for folder in folders:
        events = EventAccumulator(str(folder))
        events.Reload()
        scalars.update({tag: events.Scalars(tag) for tag in events.Tags()["scalars"]})
    values = scalars["train/loss"]
    assert [event.step for event in values] == [line["iteration"] for line in steps(run)]
    assert [event.value for event in values] == pytest.approx([line["loss"] for line in steps(run)], rel=1e-5)
    assert "eval/bbox/AP" in scalars
    assert equal(run, train("untracked", {"evaluation.every": 1, "schedule.epochs": 2}, val=True))


# ---- losses that are not finite --------------------------------------------------------------------------------------


def test_diverged_weights_are_named(train, tmp_path):
    with pytest.raises(UserError) as error:
        train("run", {"schedule.lr": 1e38, "schedule.warmup": 0, "logging.checkpoint_every": 1000})
    message = str(error.value)
    assert "resume point" not in message or (tmp_path / "run/stages/1-train/last").exists()
    for part in ("the loss is not finite at iteration", "stage train", "learning rate 1e+38", ".png", "schedule.lr"):
        assert part in message
    assert "the weights have diverged in an earlier step (first: backbone" in message
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists()
    state = checkpoint.load_resume_point(run / "stages/1-train")
    assert state is None or state["iteration"] < 3


def test_a_broken_loss_leaves_the_resume_point(train, tmp_path, monkeypatch):
    """NaN from one batch: the message names it and its pictures; the run goes on from its last resume point, to the
    bits of the run that never stopped."""
    straight = train("straight", {"schedule.epochs": 2})
    original = TrainingDataset.sample
    counted = {"samples": 0}

    def poisoned(self, *key):
        image, target = original(self, *key)
        counted["samples"] += 1
        if counted["samples"] > 4 * 7:  # from the eighth batch on
            target["boxes"] = target["boxes"] * math.nan
        return image, target

    monkeypatch.setattr(TrainingDataset, "sample", poisoned)
    with pytest.raises(UserError, match="the weights have not diverged: look at these pictures' boxes") as error:
        train("run", {"schedule.epochs": 2})
    assert "at iteration 7 of stage train" in str(error.value)
    run = tmp_path / "run"
    assert f"The resume point {run}/stages/1-train/last is intact" in str(error.value)
    assert checkpoint.load_resume_point(run / "stages/1-train")["iteration"] == 5
    assert not (run / "model.safetensors").exists()
    monkeypatch.setattr(TrainingDataset, "sample", original)
    tailfin.train("", out=run, resume=True)
    assert equal(run, straight)


# ---- evaluation while training ---------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations give the listed APs, one after another, and note the weights that they saw."""

    def install(*values: float) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        left = iter(values)

        def measure(self, model, keep=False):
            seen.append(model.state_dict()["roi_heads.predictor.cls_score.weight"].clone())
            value = next(left)
            metrics = {"AP": value, "APr": 0.0}
            return {"protocol": "lvis", "bbox": metrics, "per_category": []}

        monkeypatch.setattr(run_module.Run, "measure", measure)
        return seen

    return install


KEY = "roi_heads.predictor.cls_score.weight"


def test_patience_stops_early(train, scripted):
    scripted(0.1, 0.3, 0.2, 0.25, 0.9)  # the last one is the final evaluation
    run = train("run", {"schedule.epochs": 8, "evaluation.every": 1, "evaluation.patience": 2}, val=True)
    found = evaluations(run)
    assert [line["eval"]["bbox"]["AP"] for line in found] == [0.1, 0.3, 0.2, 0.25]
    assert found[-1]["epoch"] == 4.0
    assert steps(run)[-1]["iteration"] == found[-1]["iteration"]
    assert (run / "model.safetensors").exists()
    assert not (run / "stages/1-train/best.safetensors").exists()


def test_a_stopped_run_stays_stopped(train, scripted, tmp_path, monkeypatch):
    """Killed between the early stop and the final model: resuming does not train past the stop."""
    scripted(0.3, 0.2, 0.0)
    save = run_module.save_model
    monkeypatch.setattr(run_module, "save_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    changes = {"schedule.epochs": 8, "evaluation.every": 1, "evaluation.patience": 1}
    with pytest.raises(KeyboardInterrupt):
        train("run", changes, val=True)
    monkeypatch.setattr(run_module, "save_model", save)
    run = tmp_path / "run"
    last = steps(run)[-1]["iteration"]
    tailfin.train("", out=run, resume=True)
    assert steps(run)[-1]["iteration"] == last and len(evaluations(run)) == 2


@pytest.mark.parametrize("values, best", [((0.1, 0.4, 0.2), 1), ((0.1, 0.2, 0.4), 2)], ids=["middle", "end"])
def test_select_best(train, scripted, values, best):
    """The final model is the best evaluated one, the end of training included."""
    seen = scripted(*values, 0.0)
    changes = {"schedule.epochs": 3, "evaluation.every": 1, "evaluation.select": "best"}
    run = train("run", changes, val=True)
    assert len(evaluations(run)) == 3
    weights = load_file(run / "model.safetensors")[KEY]
    assert torch.equal(weights, seen[best])
    assert not any(torch.equal(weights, other) for number, other in enumerate(seen[:3]) if number != best)
    assert torch.equal(seen[3], weights)  # which is the one that is measured
    assert not (run / "stages/1-train/best.safetensors").exists()


def test_select_last(train, scripted):
    seen = scripted(0.5, 0.1, 0.1)
    run = train("run", {"schedule.epochs": 2, "evaluation.every": 1}, val=True)
    assert len(evaluations(run)) == 1  # the end is measured once, as the result of the run
    assert torch.equal(load_file(run / "model.safetensors")[KEY], seen[-1])


def test_evaluating_does_not_change_training(train):
    assert equal(
        train("plain", {"schedule.epochs": 2}), train("often", {"schedule.epochs": 2, "evaluation.every": 1}, True)
    )
