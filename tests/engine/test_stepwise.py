"""Step-wise learning: what trains, what is handed on, and that an interrupted run ends as the straight one."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_detr import DETR

import tailfin
from tailfin import exemplar_scores
from tailfin.checkpoint import content_hash, save_model
from tailfin.config import load_recipe
from tailfin.data.index import open_index
from tailfin.data.smooth_tail import planned_steps
from tailfin.errors import UserError
from tailfin.methods import stepwise
from tailfin.methods.stepwise import freeze_but
from tailfin.models import build_detector
from tailfin.models.detr_criterion import pad_objects
from tailfin.models.transfer import Transfer, class_logits
from tailfin.schema.stepwise import Distillation
from tailfin.stats import ClassStats
from tailfin.stop_signals import Interrupted
from tailfin.training_log import TrainingLog

pytestmark = pytest.mark.usefixtures("quick_training")
RECIPE = (
    DETR
    + """\
method: stepwise
schedule: {epochs: 1, batch: 4, optimizer: adamw, lr: 1e-3, warmup: 0, milestones: [], clip: 0.1}
stepwise:
  division: [10]
  exemplars: {shard: 4}
  head: {per_head_class: 8, per_tail_class: 2, lr: 1e-3}
  tail: {per_head_class: 4, lr: 1e-3, photometric: false}
logging: {every: 1, checkpoint_every: 2}
"""
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny_stepwise.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def straight(recipe, tiny_set, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("straight") / "run"
    tailfin.train(recipe, train=tiny_set[0], val=tiny_set[1], out=out)
    return out


def stage(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / name / "model.safetensors")


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in after if not torch.equal(before[key], after[key])}


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "stages" / name / "metrics.jsonl").read_text().splitlines()]


class TestRun:
    def test_only_class_specific_layers_change(self, straight):
        base, head, tail = (stage(straight, name) for name in ("1-base", "2-head", "3-tail"))
        for before, after in ((base, head), (head, tail)):
            keys = changed(before, after)
            assert keys and all(key.startswith(("input_proj.", "class_embed.")) for key in keys)
        # every one of them: the projections, both decoder heads, and the encoder's
        assert {key for key in base if key.startswith(("input_proj.", "class_embed."))} == changed(base, tail)
        assert changed(tail, load_file(straight / "model.safetensors")) == set()

    def test_each_step_names_the_one_before(self, straight):
        def parents(name: str) -> list[str]:
            with safe_open(straight / "stages" / name / "model.safetensors", "pt") as file:
                return json.loads(file.metadata()["parents"])

        hashes = [content_hash(straight / "stages" / name / "model.safetensors") for name in ("1-base", "2-head")]
        assert [parents(name) for name in ("1-base", "2-head", "3-tail")] == [[], hashes[:1], hashes]
        assert json.loads((straight / "exemplars.json").read_text())["model"] == hashes[0]

    def test_every_step_is_measured(self, straight):
        measured = [
            json.loads((straight / "stages" / name / "metrics.json").read_text()) for name in ("1-base", "2-head")
        ]
        assert all("APr" in metrics["bbox"] for metrics in measured)
        last = json.loads((straight / "stages" / "3-tail" / "metrics.json").read_text())
        assert last == json.loads((straight / "metrics.json").read_text())

    def test_what_is_logged(self, straight):
        assert "loss_class_distillation" not in lines(straight, "2-head")[-1]
        for line in lines(straight, "3-tail"):
            assert line["loss_class_distillation"] >= 0 and line["loss_feature_distillation"] >= 0
        # student and teacher start as one
        assert lines(straight, "3-tail")[0]["loss_class_distillation"] == pytest.approx(0, abs=1e-6)
        assert lines(straight, "3-tail")[0]["loss_feature_distillation"] == 0
        assert lines(straight, "3-tail")[-1]["loss_feature_distillation"] > 0
        rates = [line["lr"] for line in lines(straight, "3-tail")]
        assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4)

    def test_exemplars(self, straight, tiny_set):
        document = json.loads((straight / "exemplars.json").read_text())
        index = open_index(tiny_set[0])
        assert not (straight / "exemplars.shards").exists()
        assert [len(entry["exemplars"]) for entry in document["classes"]] == np.bincount(index.labels).tolist()
        own = dict(zip(index.annotation_ids.tolist(), index.category_ids[index.labels].tolist(), strict=True))
        for entry in document["classes"]:
            assert {own[exemplar["annotation"]] for exemplar in entry["exemplars"]} == {entry["id"]}
            assert all(0 < exemplar["score"] < 1 for exemplar in entry["exemplars"])

    def test_the_model_file_stands_alone(self, straight):
        detector = tailfin.load(straight / "model.safetensors", "cpu")
        assert detector.recipe.method == "baseline" and detector.recipe.stepwise is None


class Stopped(Exception):
    pass


@pytest.mark.parametrize("where", ["exemplars", "head", "tail"])
def test_interrupted_and_resumed(straight, recipe, tmp_path, monkeypatch, where):
    out = tmp_path / "run"
    shutil.copytree(straight, out)  # a run that has come to the step in question
    for made in ("model.safetensors", "metrics.json", "results.bbox.json"):
        (out / made).unlink()
    for later in {"exemplars": ("2-head", "3-tail"), "head": ("2-head", "3-tail"), "tail": ("3-tail",)}[where]:
        shutil.rmtree(out / "stages" / later)
    if where == "exemplars":
        (out / "exemplars.json").unlink()
    with monkeypatch.context() as patch:
        if where == "exemplars":
            write, written = exemplar_scores._write, []

            def write_or_stop(path, found):
                write(path, found)
                written.append(path)
                if len(written) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

            patch.setattr(exemplar_scores, "_write", write_or_stop)
        else:
            add = TrainingLog.add

            def add_or_stop(log, parts, rate, done):
                add(log, parts, rate, done)
                if log.name == where and done == 3:
                    raise Stopped

            patch.setattr(TrainingLog, "add", add_or_stop)
        with pytest.raises((Stopped, Interrupted)) as stop:
            tailfin.train(recipe, out=out, resume=True)
    assert where != "exemplars" or (stop.value.exit_code, stop.value.run) == (143, out)
    assert not (out / "model.safetensors").exists()
    assert where in ("exemplars", "head") or (out / "stages" / "3-tail" / "last").exists()
    if where == "exemplars":
        shards = sorted((out / "exemplars.shards").iterdir())
        assert len(shards) == 3 and not (out / "exemplars.json").exists()
        before = shards[0].stat().st_mtime_ns
        load = exemplar_scores.read_scores

        def read(folder, annotations):
            assert (folder / shards[0].name).stat().st_mtime_ns == before, "a finished shard was made again"
            return load(folder, annotations)

        monkeypatch.setattr("tailfin.methods.stepwise.read_scores", read)
    tailfin.train(recipe, out=out, resume=True)
    assert changed(load_file(straight / "model.safetensors"), load_file(out / "model.safetensors")) == set()
    assert (out / "exemplars.json").read_text().splitlines()[9:] == (
        (straight / "exemplars.json").read_text().splitlines()[9:]
    )


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["stepwise.tail=null"], ["1-base", "2-head"]),  # fine-tuning alone
        (["stepwise.head=null"], ["1-base", "2-tail"]),  # knowledge transfer alone: the teacher is step 0
        (["stepwise.division=[4,15]", "stepwise.tail.epochs=1"], ["1-base", "2-head", "3-tail1", "4-tail2"]),
        (
            [
                *("stepwise.base=head", "stepwise.head=null", "stepwise.tail.per_head_class=0"),
                *("stepwise.tail.trains=[all]", "stepwise.both={per_head_class: 3, per_tail_class: all}"),
            ],
            ["1-base", "2-tail", "3-both"],
        ),
    ],
    ids=["FT", "KT", "three parts", "head, tail, both"],
)
def test_switches(recipe, tiny_set, tmp_path, overrides, stages):
    tailfin.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == stages
    final = load_file(tmp_path / "run" / "model.safetensors")
    assert changed(stage(tmp_path / "run", stages[-1]), final) == set()
    keys = changed(stage(tmp_path / "run", stages[0]), final)
    whole = "stepwise.tail.trains=[all]" in overrides
    assert any(key.startswith("backbone.") for key in keys) == whole
    if stages[-1] == "2-tail":
        assert lines(tmp_path / "run", "2-tail")[0]["loss_class_distillation"] == pytest.approx(0, abs=1e-6)


def test_a_given_detector_takes_the_place_of_step_0(straight, recipe, tiny_set, tmp_path):
    """With the weights of step 0 the rest is what it was in the straight run, also after its file has gone."""
    weights = tmp_path / "base.safetensors"
    weights.write_bytes((straight / "stages" / "1-base" / "model.safetensors").read_bytes())
    out = tmp_path / "run"
    tailfin.train(recipe, train=tiny_set[0], out=out, weights=weights, overrides=["stepwise.base=given"])
    assert changed(load_file(straight / "model.safetensors"), load_file(out / "model.safetensors")) == set()
    assert sorted(path.name for path in (out / "stages").iterdir()) == ["0-base", "1-head", "2-tail"]
    weights.unlink()
    (out / "model.safetensors").unlink()
    (out / "stages" / "2-tail" / "model.safetensors").unlink()
    tailfin.train(recipe, out=out, resume=True)
    assert changed(load_file(straight / "model.safetensors"), load_file(out / "model.safetensors")) == set()
    with pytest.raises(UserError, match="needs a trained detector"):
        tailfin.train(recipe, train=tiny_set[0], out=tmp_path / "none", overrides=["stepwise.base=given"])
    assert not (tmp_path / "none").exists()


def test_selection_does_not_depend_on_the_processes(straight, recipe, tiny_set, tmp_path, train_on_ranks):
    out = tmp_path / "run"
    arguments = {"train": tiny_set[0], "out": out, "weights": straight / "stages" / "1-base" / "model.safetensors"}
    overrides = ["stepwise.base=given", "stepwise.head=null", "stepwise.tail.epochs=1"]
    train_on_ranks(lambda rank: tailfin.train(recipe, **arguments, overrides=overrides))
    lists = [json.loads((run / "exemplars.json").read_text())["classes"] for run in (straight, out)]
    assert lists[0] == lists[1]
    keys = changed(stage(out, "0-base"), load_file(out / "model.safetensors"))
    assert keys and all(key.startswith(("input_proj.", "class_embed.")) for key in keys)


class TestTransfer:
    """Student and teacher outside of a run: who gets which gradient."""

    @pytest.fixture
    def parts(self, recipe, tiny_set):
        loaded = load_recipe(recipe)
        index = open_index(tiny_set[0])
        torch.manual_seed(0)
        student, _ = build_detector(loaded, ClassStats.from_index(index), start=False)
        teacher = copy.deepcopy(student)
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                if name.startswith(("class_embed", "input_proj")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        images = [torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), torch.randint(0, 255, (3, 48, 64)).byte()]
        boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [10.0, 20.0, 30.0, 45.0]])
        targets = [
            {"boxes": boxes, "labels": torch.tensor([0, 2])},
            {"boxes": boxes[1:], "labels": torch.tensor([2])},
        ]
        freeze_but(student, ())
        return student, teacher, images, targets

    def shell(self, parts, **options) -> Transfer:
        student, teacher, _, _ = parts
        return Transfer(student, teacher, torch.tensor([True, True, False]), Distillation(**options)).train()

    def gradients(self, parts, term: str, **options) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        losses = self.shell(parts, **options)(*parts[2:])
        losses[f"loss_{term}_distillation"].backward()
        return {
            name: p.grad for name, p in parts[0].named_parameters() if p.grad is not None and bool((p.grad != 0).any())
        }

    def test_class_term_reaches_the_decoder_heads_alone(self, parts):
        found = self.gradients(parts, "class")
        assert set(found) == {f"class_embed.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
        assert all(gradient[2].abs().max() == 0 for gradient in found.values()), "a tail class has a gradient"
        assert all(gradient[:2].abs().min() > 0 for name, gradient in found.items() if name.endswith("bias"))

    def test_without_shared_queries_it_reaches_the_features(self, parts):
        found = self.gradients(parts, "class", shared_queries=False)
        assert any(name.startswith("input_proj") for name in found)

    def test_feature_term_reaches_the_projections_alone(self, parts):
        found = self.gradients(parts, "feature")
        assert found and all(name.startswith("input_proj") for name in found)

    def test_the_teacher_never_changes(self, parts):
        student, teacher, images, targets = parts
        shell = self.shell(parts)
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in shell.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        frozen = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
        for _ in range(2):
            torch.stack(list(shell(images, targets).values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not teacher.training
        assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
        assert not any(key.startswith("teacher") or "_teacher" in key for key in shell.state_dict())
        own = dict(student.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in frozen.items())

    def test_equal_networks_have_nothing_to_learn(self, parts):
        student, _, images, targets = parts
        shell = Transfer(student, copy.deepcopy(student), torch.tensor([True, True, False]), Distillation())
        losses = shell.train()(images, targets)
        assert losses["loss_class_distillation"].item() == pytest.approx(0, abs=1e-7)
        # dropout is inactive before the projections, so features are equal whatever the mode
        assert losses["loss_feature_distillation"] == 0
        taught = shell.teacher.outputs(images)
        assert torch.equal(student.classify(taught.hidden), taught.logits)

    def test_no_head_object_no_feature_term(self, parts):
        _, _, images, targets = parts
        only_tail = [{**target, "labels": torch.full_like(target["labels"], 2)} for target in targets]
        assert self.shell(parts)(images, only_tail)["loss_feature_distillation"] == 0

    def test_switched_off(self, parts):
        losses = self.shell(parts, feature=0, classes=0)(*parts[2:])
        assert not any("distillation" in name for name in losses)

    def test_the_teacher_runs_no_second_backbone(self, parts):
        """With the backbone shared the terms are those of a teacher that has its own."""
        student, teacher, images, targets = parts
        shell, calls = self.shell(parts), []
        teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        shared = shell(images, targets)
        assert not calls
        next(student.backbone.parameters()).requires_grad_(True)  # it might change: the teacher's own is asked
        torch.manual_seed(1)
        alone = shell(images, targets)
        assert calls and all(torch.equal(shared[name], alone[name]) for name in alone)


class TestFasterRCNN:
    SECTION = (
        "{division: [10], head: {per_head_class: 8, per_tail_class: 2, lr: .01}, tail: {per_head_class: 4, lr: .01}}"
    )

    def run(self, tmp_path, tiny_set, tiny_recipe, *overrides) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(tiny_recipe.read_text() + f"method: stepwise\nstepwise: {self.SECTION}\n")
        overrides = ["schedule.epochs=1", "schedule.milestones=[]", *overrides]
        tailfin.train(path, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
        return tmp_path / "run"

    @pytest.mark.parametrize("loss", ["fcbl", "bags"])
    def test_any_loss(self, tmp_path, tiny_set, tiny_recipe, loss):
        run = self.run(tmp_path, tiny_set, tiny_recipe, f"loss={loss}")
        keys = changed(stage(run, "1-base"), load_file(run / "model.safetensors"))
        own = ("roi_heads.predictor.cls_score.", "roi_heads.predictor.bbox_pred.")
        statistics = "roi_heads.loss."  # of the loss, not a layer
        assert {key for key in keys if not key.startswith(statistics)} == {
            f"{layer}{kind}" for layer in own for kind in ("weight", "bias")
        }
        log = lines(run, "3-tail")
        assert log[0]["loss_class_distillation"] == pytest.approx(0, abs=1e-6)
        assert log[-1]["loss_class_distillation"] > 0
        assert "loss_feature_distillation" not in log[0]  # no feature layer trains

    def test_class_agnostic_boxes_stay(self, tmp_path, tiny_set, tiny_recipe):
        run = self.run(tmp_path, tiny_set, tiny_recipe, "detector.box_regression=class_agnostic")
        keys = changed(stage(run, "1-base"), load_file(run / "model.safetensors"))
        assert keys == {f"roi_heads.predictor.cls_score.{kind}" for kind in ("weight", "bias")}

    def test_pyramid(self, tmp_path, tiny_set, tiny_recipe):
        trains = [f"stepwise.{step}.trains=[classifier,fpn]" for step in ("head", "tail")]
        run = self.run(tmp_path, tiny_set, tiny_recipe, *trains)
        keys = changed(stage(run, "1-base"), load_file(run / "model.safetensors"))
        assert all(key.startswith(("backbone.fpn.", "roi_heads.predictor.cls_score.")) for key in keys)
        log = lines(run, "3-tail")
        assert log[0]["loss_feature_distillation"] == pytest.approx(0, abs=1e-9)
        assert log[-1]["loss_feature_distillation"] > 0

    def test_unknown_part(self, tmp_path, tiny_set, tiny_recipe):
        with pytest.raises(UserError, match='no part "clasifier".*classifier'):
            self.run(tmp_path, tiny_set, tiny_recipe, "stepwise.head.trains=[clasifier]")


def test_scores_by_hand(recipe, tiny_set):
    """An annotation's score is that of the query matched with it; the largest over classes, or its own class's."""
    loaded = load_recipe(recipe)
    stats = ClassStats.from_index(open_index(tiny_set[0]))
    torch.manual_seed(0)
    model = build_detector(loaded, stats, start=False)[0].eval()
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[5.0, 5.0, 30.0, 30.0], [20.0, 20.0, 60.0, 60.0]]), "labels": torch.tensor([2, 0])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with torch.inference_mode():
        outputs = model.outputs([image] * 2)
        scores = outputs.logits[-1].sigmoid()
        objects = pad_objects([target, empty], outputs.sizes)
        pairs = model.criterion.match(outputs.logits[-1:], outputs.boxes[-1:], objects)
        query, found = pairs.query, pairs.object
        largest = exemplar_scores.annotation_scores(model, [image] * 2, [target, empty])
        own = exemplar_scores.annotation_scores(model, [image] * 2, [empty, target], "gt_class")
    query = query[found.argsort()]
    torch.testing.assert_close(largest, scores[0, query].amax(1))
    torch.testing.assert_close(own, scores[1, query, target["labels"]])


def test_more_objects_than_queries(recipe, tiny_set):
    loaded = load_recipe(recipe, ["detector.queries=2"])
    stats = ClassStats.from_index(open_index(tiny_set[0]))
    model = build_detector(loaded, stats, start=False)[0].eval()
    corners = torch.arange(5)[:, None] * 8.0
    target = {"boxes": torch.cat([corners, corners, corners + 20, corners + 20], 1), "labels": torch.zeros(5).long()}
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        scores = exemplar_scores.annotation_scores(model, [image], [target])
    assert (scores > 0).sum() == 2 and (scores == 0).sum() == 3


def test_the_command_on_processes(recipe, tiny_set, tmp_path, run_tailfin):
    """`data smooth-tail` writes the same files whatever the number of processes, and one of them writes."""
    model = tmp_path / "model.safetensors"
    stats = ClassStats.from_index(open_index(tiny_set[0]))
    loaded = load_recipe(recipe, ["method=baseline", "stepwise=null"])
    torch.manual_seed(0)
    save_model(model, build_detector(loaded, stats, start=False)[0], loaded, stats)
    options = ["--annotations", tiny_set[0], "--division", "10", "--head", "6,1", "--tail", "4,all"]
    names = ("curves.html", "d_head.json", "d_tail.json", "exemplars.json")
    for number in (1, 2):
        out = tmp_path / f"sets{number}"
        done = run_tailfin("data", "smooth-tail", model, *options, "--out", out, processes=number)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("annotations per class") == 1
        assert sorted(file.name for file in out.iterdir()) == list(names)
    for name in names[1:]:
        assert (tmp_path / "sets1" / name).read_bytes() == (tmp_path / "sets2" / name).read_bytes(), name
    again = run_tailfin("data", "smooth-tail", model, *options, "--out", tmp_path / "sets2", processes=2)
    assert again.returncode and "add --overwrite to replace it" in again.stderr


def test_steps_that_cannot_be_are_told_before_step_0(tmp_path, tiny_set, tiny_recipe):
    """A part that is frozen whole, a part that this detector has not, a teacher for one that cannot be taught."""
    path = tmp_path / "tiny.yaml"
    section = "method: stepwise\nstepwise: {division: [10], tail: {distillation: null}}\n"
    path.write_text(tiny_recipe.read_text() + section)
    cases = {
        'step tail trains "mask", this detector has no such part': [
            "stepwise.tail.trains=[mask]", "detector.name=cascade_rcnn",
        ],
        "has one per stage; step tail has a teacher": ["detector.name=cascade_rcnn", "stepwise.tail.distillation={}"],
    }  # fmt: skip
    for message, overrides in cases.items():
        with pytest.raises(UserError, match=message):
            tailfin.train(path, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
        assert not (tmp_path / "run").exists()
    loaded = load_recipe(path, ["stepwise.head.trains=[backbone]"])
    stats = ClassStats.from_index(open_index(tiny_set[0]))
    model, _ = build_detector(loaded, stats, start=False)
    model.backbone.requires_grad_(False)
    with pytest.raises(UserError, match="step head trains backbone, all of which the detector's section freezes"):
        stepwise.check_trains(model, planned_steps(loaded.stepwise, np.array([0, 0, 1])))


@pytest.mark.parametrize("layers", ["class_embed", "bbox_embed"])
def test_a_diverged_network_is_told_by_the_engine(recipe, tiny_set, tmp_path, monkeypatch, layers):
    """Logits or boxes that are no numbers: the message names iteration, stage and pictures, not the assignment."""
    build = stepwise.start

    def diverged(run):
        model = build(run)
        getattr(model, layers)[0].get_parameter("bias" if layers == "class_embed" else "layers.2.bias").data.fill_(
            torch.nan
        )
        return model

    monkeypatch.setattr(stepwise, "start", diverged)
    with pytest.raises(
        UserError, match="the loss is not finite at iteration 0 of stage base .* pictures .*have diverged"
    ):
        tailfin.train(recipe, train=tiny_set[0], out=tmp_path / "run")


def test_logits_of_classes():
    """Grouped logits are read through their scores, all others by their first columns."""
    from tailfin import losses

    stats = ClassStats(image_count=[100, 50, 5, 2], instance_count=[200, 60, 5, 2], num_images=150)
    for name in ("softmax", "sigmoid", "seesaw", "fcbl"):
        loss = losses.build(name, stats)
        logits = torch.randn(3, 2, loss.num_logits)
        assert torch.equal(class_logits(loss, logits), logits[..., :4])
    bags = losses.build("bags", stats)
    logits = torch.randn(3, 2, bags.num_logits)
    found = class_logits(bags, logits)
    assert found.shape == (3, 2, 4)
    torch.testing.assert_close(found.exp().flatten(0, 1), bags.scores(logits.flatten(0, 1)))


def test_a_control_has_the_same_iterations_and_rates(straight, recipe, tiny_set, tmp_path):
    """The base model trained on: all annotations and layers, no teacher, as many steps of the optimiser, same rates."""
    control = [
        f"stepwise.{step}.{change}"
        for step in ("head", "tail")
        for change in ("shows=all", "trains=[all]", "rfs=plain", "distillation=null")
    ]
    run = tmp_path / "run"
    tailfin.train(recipe, train=tiny_set[0], out=run, overrides=control, stage1=straight / "stages" / "1-base")
    index = open_index(tiny_set[0])
    for name in ("2-head", "3-tail"):
        before, after = lines(straight, name), lines(run, name)
        assert [line["iteration"] for line in after] == [line["iteration"] for line in before]
        assert [line["lr"] for line in after] == pytest.approx([line["lr"] for line in before])
        step = json.loads((run / "stages" / name / "step.json").read_text())
        assert step["annotations"] == np.bincount(index.labels).tolist() and step["images"] == 25
    keys = changed(stage(run, "1-base"), stage(run, "3-tail"))
    assert any(key.startswith("encoder.") for key in keys) and any(key.startswith("backbone.") for key in keys)
