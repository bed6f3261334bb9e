"""What RetinaNet and ATSS share: a batch equals its pictures, many processes one; losses train, parts learn."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou

import tailfin
from tailfin import engine, losses
from tailfin.config import check_recipe
from tailfin.models import build_detector
from tailfin.models.assigners import atss, atss_batch, max_iou, max_iou_batch, pad_targets
from tailfin.models.dense import Matched, Outputs
from tailfin.models.dense_head import starting_bias
from tailfin.models.dense_ops import flatten_map
from tailfin.models.detections import FIRST_CANDIDATES, best_detections, nms_per_class
from tailfin.models.detector import Limits
from tailfin.models.transfer import Transfer
from tailfin.schema.stepwise import Distillation
from tailfin.stats import ClassStats
from tailfin.stop_signals import Interrupted

pytestmark = pytest.mark.usefixtures("quick_training")
STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
SMALL = {
    "norm": "bn",
    "frozen_layers": 0,
    "fpn_channels": 32,
    "fpn_layers": [2, 3],
    "fpn_convs": "none",
    "head_convs": 1,
}
DETECTORS = {
    "retinanet": {"name": "retinanet", **SMALL, "anchor_scale": 1.5, "octaves": 2, "anchor_ratios": [1.0]},
    "atss": {"name": "atss", **SMALL, "anchor_scales": [2]},
}
TRAINING = {
    "weights": "none", "backbone": "resnet18",
    "data": {"resize": "square", "sizes": [64], "workers": 0, "flip": 0.0, "group_by_aspect": False},
    "evaluation": {"max_dets": 20}, "logging": {"every": 1},
}  # fmt: skip


@pytest.fixture(params=DETECTORS)
def name(request) -> str:
    return request.param


def build(name: str, loss: object = "focal", **options):
    torch.manual_seed(0)
    values = {"weights": "none", "backbone": "resnet18", "detector": {**DETECTORS[name], **options}, "loss": loss}
    return build_detector(check_recipe(values, "test"), STATS)[0]


def boxes(count: int, seed: int, span: float = 60.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = span * torch.rand((count, 2), generator=generator)
    return torch.cat([corner, corner + 6 + 25 * torch.rand((count, 2), generator=generator)], 1)


def batch(counts=(3, 0, 6)) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand((3, 80, 96), generator=generator) for _ in counts]
    labels = [torch.randint(3, (count,), generator=generator) for count in counts]
    return pictures, [{"boxes": boxes(n, n), "labels": own} for n, own in zip(counts, labels, strict=True)]


# ---- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(3, 0, 6, 1), (0, 0), (5,)])
def test_a_batch_is_assigned_as_its_pictures(name, counts):
    anchors = build(name).anchors([(10, 12), (5, 6)], (80, 96))
    targets = batch(counts)[1]
    padded, labels, valid = pad_targets(targets, torch.device("cpu"))
    assert labels.shape == valid.shape == padded.shape[:2] == (len(counts), max(1, *counts))
    for many, one in (
        (atss_batch(anchors, padded, valid), lambda own: atss(anchors, own)),
        (max_iou_batch(torch.cat(anchors), padded, valid), lambda own: max_iou(torch.cat(anchors), own)),
        (
            max_iou_batch(torch.cat(anchors), padded, valid, 0.3, 0.2, low_quality=False),
            lambda own: max_iou(torch.cat(anchors), own, 0.3, 0.2, low_quality=False),
        ),
    ):
        assert torch.equal(many, torch.stack([one(target["boxes"]) for target in targets]))
        assert (many >= 0).any() == (max(counts) > 0)


def test_an_anchor_keeps_its_object():
    """Two objects of one best anchor: taken by the later one, or by the one that it overlaps most."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    objects = torch.tensor([[[0.0, 0.0, 10.0, 4.0], [0.0, 0.0, 10.0, 2.0]]])
    valid = torch.ones((1, 2), dtype=torch.bool)
    assert max_iou_batch(anchors, objects, valid).tolist() == [[1, -1]]
    assert max_iou_batch(anchors, objects, valid, keep_owner=True).tolist() == [[0, -1]]


# ---- losses ----------------------------------------------------------------------------------------------------------

LOSSES = ["focal", "sigmoid", "efl", "eqfl", "ecm", "objectness", "fcbl", "eqlv2", "seesaw", "softmax", "ebl"]
LOSSES += [{"name": "fedloss", "num_classes": 2}, {"name": "fedloss", "base": "focal"}]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients_reach_all_parts(name, loss):
    """With objects and without any; a first loss of a sane size, whatever the classification loss."""
    model = build(name, loss).train()
    pictures, targets = batch()
    for given, learns in ((targets, True), ([targets[1]] * 3, False)):
        model.zero_grad()
        found = model(pictures, given)
        assert all(torch.isfinite(value) for value in found.values()) and found["loss_classifier"] < 60
        torch.stack(list(found.values())).sum().backward()
        assert all(value.grad is not None for value in model.parameters()), "a parameter that no loss reaches"
        for part, module in model.parts().items():
            size = sum(float(value.grad.abs().sum()) for value in module.parameters())
            assert size > 0 or (part == "box" and not learns), part
    assert (found["loss_box_reg"] == 0) and all(found[key] == 0 for key in found if key != "loss_classifier")


def test_a_mean_over_rows_becomes_a_sum_over_positives(name):
    """Sigmoid and focal without focus and balance are the same loss: one is a mean over rows, one takes a divisor."""
    pictures, targets = batch()
    found = []
    for loss in ("sigmoid", {"name": "focal", "focal_alpha": -1, "focal_gamma": 0}):
        model = build(name, loss).train()
        found.append(model(pictures, targets)["loss_classifier"])
    assert found[0] > 0
    torch.testing.assert_close(found[0], found[1])


def test_facts_of_rows(name):
    model = build(name, "eqfl")
    pictures, targets = batch()
    outputs = model.outputs(pictures)
    matched = model.match(outputs, targets)
    quality = model.facts(matched, targets)["quality"]
    decoded = model.decoded(matched).detach()
    wanted = box_iou(decoded, matched.boxes).diagonal()
    torch.testing.assert_close(quality[matched.picture, matched.place], wanted)
    assert quality[matched.labels == 3].sum() == 0 and quality.shape == matched.labels.shape
    index = build(name, "ebl").facts(matched, targets)["gt_index"]
    everything = torch.cat([target["boxes"] for target in targets])
    assert torch.equal(everything[index[matched.picture, matched.place]], matched.boxes)
    assert (index[matched.labels == 3] == -1).all()


def test_ranks_equal_one_process(name, run_on_ranks):
    """Losses are divided by the positives of all processes: two halves give what the whole batch does. EFL's sums are
    those of the losses as returned, so they grow with the processes; the ratio, which enters, does not."""
    pictures, targets = batch((3, 1, 6, 0))

    def step(which: slice) -> tuple[list[float], np.ndarray, np.ndarray]:
        model = build(name, "efl")
        for value in model.backbone.body.parameters():
            value.requires_grad_(False)  # batch statistics are those of a process
        model.train()
        found = model(pictures[which], targets[which])
        torch.stack(list(found.values())).sum().backward()
        gradient = torch.cat([value.grad.flatten() for value in model.head.parameters()])
        values = [float(value.detach()) for value in found.values()]
        return values, gradient.numpy(), model.loss.pos_neg.numpy()

    whole, gradient, state = step(slice(0, 4))
    halves = run_on_ranks(lambda rank: step(slice(2 * rank, 2 * rank + 2)))
    for number, value in enumerate(whole):
        assert sum(half[0][number] for half in halves) / 2 == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(sum(half[1] for half in halves) / 2), torch.from_numpy(gradient), rtol=1e-4, atol=1e-6
    )
    for half in halves:
        torch.testing.assert_close(torch.from_numpy(half[2]), torch.from_numpy(state), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("normalizer", ["batch", "positives", "picture"])
def test_normalizers(normalizer):
    model = build("retinanet", normalizer=normalizer)
    picture = torch.tensor([0, 0, 0, 2])
    labels = torch.zeros((3, 9), dtype=torch.int64)
    nothing = torch.zeros((4, 4))
    matched = Matched(labels, picture, picture, picture, nothing, nothing, nothing)
    divisor, weight = model.divide_by(matched, torch.full((4,), 0.5))
    assert divisor.tolist() == {"batch": [5, 5, 5], "positives": [4, 4, 4], "picture": [9, 3, 3]}[normalizer]
    assert weight == 2


def test_each_picture_is_a_call_of_its_own():
    """With a divisor per picture, a loss that takes means over pictures has one picture at a time."""
    model = build("retinanet", {"name": "bags", "others_sample_ratio": 1e6}, normalizer="picture").eval()
    pictures, targets = batch((3,))
    one, five = (model.losses(model.outputs(pictures * n), targets * n)["loss_classifier"] for n in (1, 5))
    torch.testing.assert_close(five, one)


SOFTMAX = ["softmax", "seesaw", "logit_adjusted", "bags", "ldam"]


@pytest.mark.parametrize("loss", ["focal", "ecm", "objectness", *SOFTMAX])
def test_classes_start_at_the_prior(loss):
    built = losses.build(loss, STATS)
    scores = built.scores(starting_bias(built, 0.01)[None])[0]
    if loss not in SOFTMAX:
        assert scores.max() <= 0.01 + 1e-6
        assert loss != "focal" or torch.allclose(scores, torch.tensor(0.01))
    else:
        assert float(scores.sum()) == pytest.approx(0.01, rel=1e-4)


# ---- detections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_dets", [-1, 0, 7, 100])
def test_best_candidates_first_change_nothing(max_dets):
    """NMS over a growing number of candidates gives what NMS over all gives, ties included."""
    count = 3000
    assert count > FIRST_CANDIDATES * max_dets
    generator = torch.Generator().manual_seed(0)
    corner = 30 * torch.rand((count, 2), generator=generator)
    own = torch.cat([corner, corner + 20], 1)
    scores = torch.randint(1, 200, (count,), generator=generator) / 200
    labels = torch.randint(2, (count,), generator=generator)
    found = best_detections(own, scores, labels, Limits(0.0, max_dets, 0.5))
    keep = nms_per_class(own, scores, labels, 0.5)
    keep = keep[:max_dets] if max_dets >= 0 else keep
    assert torch.equal(found["boxes"], own[keep]) and torch.equal(found["labels"], labels[keep])


def test_candidates_of_a_level(name):
    """The best pairs of anchor and class, found through the best anchors, are those of a full sort."""
    model = build(name)
    model.pre_nms = 25
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand((2, 60, 3), generator=generator)
    quality = torch.rand((2, 60, 1), generator=generator)
    for rank, by in (("class", scores), ("product", scores * quality)):
        model.rank = rank
        values, place, labels = model._level_best(scores, quality)
        wanted = by.flatten(1).topk(25).indices
        assert torch.equal(place * 3 + labels, wanted)
        assert torch.equal(values, scores.flatten(1).gather(1, wanted))


def test_padding_is_no_place_for_detections(name):
    model = build(name).eval()
    pictures = [torch.rand(3, 40, 50), torch.rand(3, 96, 64)]
    with torch.no_grad():
        found = model(pictures, limits=Limits(0.0, -1, 1.0))
    for own, picture in zip(found, pictures, strict=True):
        assert (own["boxes"] >= 0).all() and (own["boxes"][:, 2] <= picture.shape[2]).all()
        assert (own["boxes"][:, 3] <= picture.shape[1]).all() and (own["boxes"][:, 2:] > own["boxes"][:, :2]).all()


def test_annotation_scores_are_those_of_the_nearest_box(name):
    model = build(name).eval()
    pictures, targets = batch()
    with torch.no_grad():
        scores, place = model.annotation_scores(pictures, targets)
        found = model(pictures, limits=Limits(0.0, -1, 1.0))
    assert place.tolist() == list(range(9))
    nearest = box_iou(targets[0]["boxes"][:1], found[0]["boxes"])[0]
    best = found[0]["labels"][nearest == nearest.max()], found[0]["scores"][nearest == nearest.max()]
    for label, score in zip(*best, strict=True):
        assert float(score) == pytest.approx(float(scores[0, label]), rel=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_knowledge_transfer(name, shared):
    """A student learns from a teacher of the same kind; a copy of it has nothing to learn."""
    student, teacher = build(name), build(name)
    transfer = Transfer(student, teacher, torch.tensor([True, True, False]), Distillation(shared_queries=shared))
    student.eval()
    found = transfer(*batch())
    assert {"loss_classifier", "loss_box_reg", "loss_class_distillation", "loss_feature_distillation"} <= set(found)
    assert found["loss_class_distillation"].abs() < 1e-6 and found["loss_feature_distillation"] < 1e-6
    with torch.no_grad():
        for value in teacher.parameters():
            value.add_(0.02 * torch.randn_like(value))
    found = transfer(*batch())
    assert found["loss_class_distillation"] > 1e-6 and found["loss_feature_distillation"] > 1e-6
    found["loss_class_distillation"].backward()
    assert student.head.classifier.weight.grad.abs().sum() > 0
    assert (student.head.class_tower[0].weight.grad is None) == shared


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory, make_set):
    return make_set(tmp_path_factory.mktemp("sixteen") / "train", 17, 3)  # the last one has no object


def trained(name, data, out, loss="focal", epochs=40, **overrides):
    schedule = {
        "epochs": epochs, "batch": 8, "optimizer": "adamw", "lr": 2e-3, "warmup": 10, "decay": "cosine",
        "milestones": [], "clip": 10.0,
    }  # fmt: skip
    recipe = check_recipe({**TRAINING, "detector": DETECTORS[name], "loss": loss, "schedule": schedule}, "test")
    return tailfin.train(recipe, train=data, val=data, out=out, overrides=overrides)


def test_overfits_sixteen_pictures(name, sixteen, tmp_path):
    run = trained(name, sixteen, tmp_path / "run")
    assert json.loads((run / "metrics.json").read_text())["bbox"]["AP50"] > 0.9


@pytest.mark.parametrize("loss", ["efl", "eqfl", "ecm", "seesaw"])
def test_losses_of_the_long_tail_train(name, loss, sixteen, tmp_path):
    run = trained(name, sixteen, tmp_path / "run", loss, epochs=12)
    lines = [json.loads(line) for line in (run / "stages/1-train/metrics.jsonl").read_text().splitlines()]
    values = [line["loss_classifier"] for line in lines if "loss_classifier" in line]
    assert sum(values[-4:]) < 0.7 * sum(values[:4])


def test_a_resumed_run_is_the_straight_one(name, sixteen, tmp_path, monkeypatch):
    """Stopped after its fifth step and resumed: the same bits, EFL's statistics too."""
    straight = trained(name, sixteen, tmp_path / "straight", "efl", epochs=4)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_agree", lambda *_: signal.SIGTERM if next(calls) == 4 else 0)
        with pytest.raises(Interrupted):
            trained(name, sixteen, tmp_path / "broken", "efl", epochs=4)
    broken = tailfin.train("", out=tmp_path / "broken", resume=True)
    first, second = (tailfin.load(run, "cpu").model.state_dict() for run in (straight, broken))
    assert first.keys() == second.keys() and any("pos_grad" in key for key in first)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_outputs_can_be_made_of_features(name):
    """What pre-training and tools have: the body's layers, then the pyramid, then the head."""
    model = build(name).eval()
    images = model.batch(batch()[0])
    with torch.no_grad():
        levels = model.backbone.pyramid(model.backbone.layers(images.tensors))
        found, wanted = model.from_features(levels, images), model.outputs(batch()[0])
    assert isinstance(found, Outputs)
    assert all(torch.equal(own, other) for own, other in zip(found.logits, wanted.logits, strict=True))


def test_the_classifier_keeps_its_layout_through_loading():
    """Logits then come cell by cell and anchor by anchor: rows of a level are a view of its map."""
    recipe = check_recipe({"backbone": "resnet18", "detector": DETECTORS["retinanet"], "loss": "focal"}, "test")
    model, _ = build_detector(recipe, STATS, start=False)
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    last = model.head.classifier
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    level = torch.randn(2, 32, 6, 9)
    with torch.no_grad():
        (logits,), _, _ = model.head([level])
        plain = F.conv2d(model.head.class_tower(level), last.weight.contiguous(), last.bias, padding=1)
    torch.testing.assert_close(logits, plain)
    assert flatten_map(logits, STATS.num_classes).data_ptr() == logits.data_ptr()
