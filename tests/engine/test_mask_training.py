"""Detectors with masks through the whole line: they learn their pictures, and every method trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file

import tailfin
from same_draws import first_rows
from tailfin import checkpoint
from tailfin.config import check_recipe, load_recipe
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.errors import UserError
from tailfin.models import build_detector, rpn
from tailfin.models.heads import roi_heads
from tailfin.recipe_values import assign, split_override
from tailfin.stats import ClassStats
from tailfin.training_log import TrainingLog

pytestmark = pytest.mark.usefixtures("quick_training")
BOTH = "evaluation.iou=[bbox, segm]"
MASKS = [
    "detector.name=mask_rcnn",
    "detector.mask_channels=16",
    "detector.mask_layers=2",
    BOTH,
]
CASCADE = ["detector.name=cascade_rcnn", "detector.masks=true", *MASKS[1:]]
SHORT = ["schedule.epochs=1", "schedule.warmup=0", "schedule.milestones=[]"]
SECOND = "second.schedule={epochs: 1, batch: 4, lr: 0.01, warmup: 0, milestones: []}"


def outlined(path: Path) -> Path:
    """Give every object of a file an octagon in its box."""
    document: dict[str, Any] = json.loads(path.read_text())
    for annotation in document["annotations"]:
        left, top, wide, tall = annotation["bbox"]
        angle = (np.arange(8) + 0.5) * np.pi / 4
        corners = [left + wide / 2 * (1 + np.cos(angle) / np.cos(np.pi / 8)), top + tall / 2 * (1 + np.sin(angle))]
        annotation["segmentation"] = [np.stack(corners, axis=1).ravel().round(2).tolist()]
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def masked_set(tmp_path_factory: pytest.TempPathFactory, make_set: Any) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("masked")
    return outlined(make_set(folder / "train", 26, 0)), outlined(make_set(folder / "val", 9, 1))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, make_set: Any) -> Path:
    """Eight pictures with objects and one without."""
    return outlined(make_set(tmp_path_factory.mktemp("few") / "train", 9, 3))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.parametrize("detector", [MASKS, CASCADE], ids=["mask", "cascade"])
def test_it_learns_its_pictures(few, tiny_recipe, tmp_path, detector):
    changes = [
        *("schedule.epochs=90", "schedule.batch=8", "schedule.lr=0.03", "schedule.milestones=[75]", "schedule.clip=10"),
        *("sampler=plain", "data.flip=0.5", "detector.roi_batch=32", "evaluation.batch=9", "logging.every=20"),
    ]
    out = tailfin.train(tiny_recipe, train=few, val=few, out=tmp_path / "run", overrides=[*detector, *changes])
    metrics = json.loads((out / "metrics.json").read_text())
    # three seeds of both gave 0.84 to 0.99, and the order of a sum is as good as a seed; untrained it is below 0.01
    assert metrics["bbox"]["AP50"] > 0.6 and metrics["segm"]["AP50"] > 0.6, metrics


def test_objects_pasted_along_their_masks(masked_set, tiny_recipe, tmp_path):
    """Copy-paste gives the pasted objects' masks, and cuts those that they cover; training takes both."""
    seen: list[dict[str, torch.Tensor]] = []
    recipe = load_recipe(tiny_recipe, [*MASKS, "data.copy_paste=true"])
    source = open_source(recipe.data.train.model_copy(update={"annotations": str(masked_set[0])}), "", "train")
    dataset = TrainingDataset(source, recipe.data, 0).with_masks()
    plain = TrainingDataset(source, recipe.data.model_copy(update={"copy_paste": False}), 0)
    for row in range(25):
        _, target = dataset.sample(0, row, 0)
        seen.append(target)
        assert target["masks"].shape[0] == len(target["boxes"]) == len(target["mask_valid"])
    assert sum(len(target["boxes"]) for target in seen) > sum(
        len(plain.sample(0, row, 0)[1]["boxes"]) for row in range(6)
    )
    for target in seen:
        for mask, (left, top, right, bottom) in zip(
            target["masks"], target["boxes"].round().int().tolist(), strict=True
        ):
            assert mask.any() and mask[top : bottom + 1, left : right + 1].sum() > 0.9 * mask.sum()
    out = tailfin.train(
        tiny_recipe, train=masked_set[0], out=tmp_path / "run", overrides=[*MASKS, *SHORT, "data.copy_paste=true"]
    )
    losses = [json.loads(line) for line in (out / "stages/1-train/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_mask"] > 0 for line in losses)


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "detector",
    [[*MASKS, "loss=seesaw", "detector.mask_predictor=normed"], [*CASCADE, "loss=ecm"]],
    ids=["mask", "cascade"],
)
def test_stopped_and_resumed_to_the_bit(masked_set, tiny_recipe, tmp_path, monkeypatch, detector):
    changes = [*detector, "schedule.epochs=2", "schedule.ema=0.9"]
    straight = tailfin.train(tiny_recipe, train=masked_set[0], out=tmp_path / "straight", overrides=changes)
    out, add = tmp_path / "run", TrainingLog.add

    def stopping(self, parts, rate, done):
        add(self, parts, rate, done)
        if done == 8:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingLog, "add", stopping)
        tailfin.train(tiny_recipe, train=masked_set[0], out=out, overrides=changes)
    assert checkpoint.load_resume_point(out / "stages" / "1-train")["iteration"] == 5
    tailfin.train("", out=out, resume=True)
    first, last = weights(straight), weights(out)
    assert first.keys() == last.keys()
    assert [key for key in first if not torch.equal(first[key], last[key])] == []


BACL = ["method=bacl", "loss=objectness", "second.loss=fcbl", "second.features=hallucination", SECOND]
DECOUPLED = ["method=decoupled", "loss=softmax", SECOND]
LOCE = ["second.loss=ebl", "second.features=feature_memory", "second.trains=[classifier, box, rpn]"]


@pytest.mark.parametrize(
    ("detector", "changes", "trained"),
    [
        (MASKS, BACL, {"roi_heads.predictor", "roi_heads.loss", "rpn"}),
        (CASCADE, BACL, {"roi_heads.stages", "rpn"}),
        (MASKS, [*DECOUPLED, "second.trains=[classifier, mask]"], {"roi_heads.predictor", "mask"}),
        (CASCADE, [*DECOUPLED, "second.loss=bags", "second.trains=[classifier, mask]"], {"roi_heads.stages", "masks"}),
        (MASKS, [*DECOUPLED, *LOCE], {"roi_heads.predictor", "rpn"}),
        (MASKS, [*DECOUPLED, "second.classifier=simcal", "second.trains=[classifier]"], None),
        (MASKS, [*DECOUPLED, "second.classifier=disalign", "second.trains=[classifier]"], None),
    ],
    ids=["bacl", "bacl on a cascade", "masks in stage 2", "bags on a cascade", "loce", "simcal", "disalign"],
)
def test_two_stages(masked_set, tiny_recipe, tmp_path, detector, changes, trained):
    """What the second stage does not name keeps its bits; its detections still have masks."""
    out = tailfin.train(
        tiny_recipe,
        train=masked_set[0],
        val=masked_set[1],
        out=tmp_path / "run",
        overrides=[*detector, *SHORT, *changes],
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) >= {"bbox", "segm"}
    if trained is None:
        return
    first = load_file(next((out / "stages").glob("1-*")) / "model.safetensors")
    last = weights(out)
    differ = {key for key in first.keys() & last.keys() if not torch.equal(first[key], last[key])}
    assert {next((part for part in trained if key.startswith(f"{part}.")), key) for key in differ} <= trained
    for part in trained - {"roi_heads.loss"}:
        assert any(key.startswith(f"{part}.") for key in differ), part


@pytest.mark.parametrize("detector", [MASKS, CASCADE], ids=["mask", "cascade"])
@pytest.mark.parametrize(
    "changes",
    [
        ["loss={name: pcb, base: softmax, start_epoch: 0}", "detector.classifier=pcb"],
        ["features=fasa"],
        ["detector.classifier=tde"],
        ["detector.classifier=forest", "detector.rpn_nms_resampling=discrete"],
        ["detector.classifier={name: weight_cosine, temperature: 48}", "features={name: rio, max_images: 100}"],
        ["loss=balanced_sigmoid", "features=meta_reweighting"],
        ["loss=fcbl", "features=hallucination"],
    ],
    ids=["pcb", "fasa", "tde", "forest", "rio", "balms", "bacl end to end"],
)
def test_one_stage_methods(masked_set, tiny_recipe, tmp_path, detector, changes):
    """They train beside the masks; what needs one box head says so of a cascade."""
    given = [*detector, *SHORT, "schedule.epochs=0.5", *changes]
    if detector is CASCADE and "features=meta_reweighting" in changes:
        with pytest.raises(UserError, match="needs one box head"):
            load_recipe(tiny_recipe, given)
        return
    out = tailfin.train(tiny_recipe, train=masked_set[0], val=masked_set[1], out=tmp_path / "run", overrides=given)
    lines = [json.loads(line) for line in (out / "stages/1-train/metrics.jsonl").read_text().splitlines()]
    assert lines and all(np.isfinite(line["loss"]) for line in lines)
    assert set(json.loads((out / "metrics.json").read_text())) >= {"bbox", "segm"}


def test_stepwise_learning_on_masks(masked_set, tiny_recipe, tmp_path):
    """The teacher's rows reach the student's mask branch; a cascade says that it cannot be taught."""
    step = "{per_head_class: 4, per_tail_class: 2, lr: 0.01}"
    changes = [
        *("method=stepwise", "loss=softmax", "sampler=plain", "stepwise.division=[10]"),
        *("stepwise.exemplars.shard=4", f"stepwise.head={step}", "stepwise.tail={per_head_class: 4, lr: 0.01}"),
    ]
    out = tailfin.train(
        tiny_recipe, train=masked_set[0], val=masked_set[1], out=tmp_path / "run", overrides=[*MASKS, *SHORT, *changes]
    )
    assert "segm" in json.loads((out / "metrics.json").read_text())
    with pytest.raises(UserError, match="cascade"):
        tailfin.train(tiny_recipe, train=masked_set[0], out=tmp_path / "other", overrides=[*CASCADE, *SHORT, *changes])


def test_pretraining_reaches_the_mask_head(masked_set, tiny_recipe, tmp_path):
    changes = [
        *("detector.fpn_layers=[2, 3]", "pretraining.preset=drcl", "pretraining.proposals.source=gt"),
        *("pretraining.schedule={epochs: 1, batch: 4, warmup: 0, milestones: []}", "pretraining.freeze_backbone=false"),
        "pretraining.keep_predictor=false",
    ]
    out = tailfin.train(
        tiny_recipe, train=masked_set[0], val=masked_set[1], out=tmp_path / "run", overrides=[*MASKS, *SHORT, *changes]
    )
    log = [json.loads(line) for line in (out / "stages/1-pretrain/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_mask"] > 0 for line in log)
    exported = load_file(out / "pretrained.safetensors")
    assert any(key.startswith("mask.head.") for key in exported)
    assert not any(key.startswith("mask.predictor.") for key in exported)


def _losses_of(name: str, loss: str, count: int) -> dict[str, torch.Tensor]:
    """Losses and statistics of `count` copies of a picture, all draws the first rows."""
    first_rows()
    changes = [f"loss={loss}", *(CASCADE if name == "cascade_rcnn" else MASKS), "detector.classifier=cosine"]
    values = {"weights": "none", "detector": {"norm": "bn", "frozen_layers": 0, "fpn_channels": 16, "roi_batch": 32}}
    for change in changes:
        assign(values, *split_override(change))
    counts = np.array([1, 5, 20])
    torch.manual_seed(0)
    recipe = check_recipe({**values, "backbone": "resnet18"}, "test")
    model = build_detector(recipe, ClassStats(image_count=counts, instance_count=counts, num_images=20))[0].train()
    masks = torch.zeros(2, 96, 96, dtype=torch.uint8)
    masks[0, 10:40, 10:30] = masks[1, 50:90, 40:60] = 1
    target = {
        "boxes": torch.tensor([[10.0, 10, 50, 40], [40, 50, 90, 90]]),
        "labels": torch.tensor([0, 2]),
        "masks": masks,
    }
    picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    found = {}
    for step in range(2):  # the second step reads the statistics of the first
        losses = model([picture] * count, [target] * count)
        found |= {f"{name}/{step}": value.detach() for name, value in losses.items()}
    return found


@pytest.mark.parametrize(("name", "loss"), [("mask_rcnn", "seesaw"), ("cascade_rcnn", "fcbl")])
def test_two_processes_have_the_losses_of_one(run_on_ranks, monkeypatch, name, loss):
    for module in (rpn, roi_heads):
        monkeypatch.setattr(module, "sample_rows", module.sample_rows)  # put back afterwards
    one = _losses_of(name, loss, 2)
    ranks = run_on_ranks(lambda rank: {key: value.item() for key, value in _losses_of(name, loss, 1).items()})
    for key, value in one.items():
        assert ranks[0][key] == pytest.approx(ranks[1][key], rel=1e-6)
        assert ranks[0][key] == pytest.approx(value.item(), rel=1e-4), key


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ("2drcl/3b/seesaw/lvis_v1/r50", {"bbox", "segm"}),
        ("bacl/XIV/bacl/lvis_v1/r101", {"bbox", "segm"}),
        ("bacl/XII/bacl/lvis_v1/r101/cascade_faster_rcnn", {"bbox"}),
    ],
)
def test_a_published_row_trains(masked_set, tmp_path, row, kinds):
    """As it stands, but for its size."""
    small = [
        *(
            "weights=none",
            "backbone=resnet18",
            "detector.norm=bn",
            "detector.frozen_layers=0",
            "detector.head_channels=32",
        ),
        *("detector.fpn_channels=16", "detector.roi_batch=32", "detector.mask_channels=16", "schedule.epochs=1"),
        *("schedule.batch=4", "schedule.warmup=0", "schedule.milestones=[]", "data.workers=0", "evaluation.batch=3"),
        *("detector.rpn_post_nms=[60, 40]", "data.train.images=", "data.val.images="),
    ]
    if row.startswith("bacl"):
        small += ["data.sizes=[64]", "data.test_size=64", "data.test_max_size=96", "second.schedule.epochs=1"]
        small += ["second.schedule.batch=4", "second.schedule.warmup=0", "second.schedule.milestones=[]"]
        small += ["second.data.sizes=[64]", "second.data.max_size=96"]
    else:
        small += ["data.sizes=[64]", "data.max_size=96"]
    if kinds == {"bbox"}:
        small.remove("detector.mask_channels=16")
    out = tailfin.train(row, train=masked_set[0], val=masked_set[1], out=tmp_path / "run", overrides=small)
    metrics = json.loads((out / "metrics.json").read_text())
    assert kinds <= set(metrics) and ("segm" in metrics) == ("segm" in kinds)
