"""The pre-training shell: which terms there are, what their gradients reach, and what a weight of 0 costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.images import batch_images
from tailfin.pretraining.shell import PreTrainer, body_layers, pyramid
from tailfin.schema.pretraining import PRESETS, Pretraining
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
DETECTION = {"loss_classifier", "loss_box_reg", "loss_rpn_objectness", "loss_rpn_box_reg"}
SMALL: dict[str, Any] = {
    "image": {"queue": 20, "hidden": 16, "dim": 8},
    "box": {"queue": 30, "hidden": 16, "dim": 8},
    "dense": {"queue": 20, "hidden": 16, "dim": 8},
    "reconstruction": {"widths": [16, 8, 8]},
}


def section(**values: Any) -> Pretraining:
    merged = {key: {**SMALL.get(key, {}), **values.get(key, {})} for key in SMALL}
    return Pretraining.model_validate({**merged, **{k: v for k, v in values.items() if k not in SMALL}})


def shell(layers: tuple[int, ...] = (2, 3, 4), norm: str = "bn", **values: Any) -> PreTrainer:
    torch.manual_seed(0)
    recipe = check_recipe(
        {
            "backbone": "resnet18",
            "detector": {
                "norm": norm, "frozen_layers": 0, "fpn_channels": 8, "fpn_layers": list(layers), "fpn_pool": False,
                "anchor_sizes": [12, 24, 40][: len(layers)], "rpn_batch": 16, "rpn_pre_nms": [60, 60],
                "rpn_post_nms": [30, 30], "roi_size": 3, "roi_batch": 16, "head_channels": 16,
            },
        },
        "test",
    )  # fmt: skip
    detector, _ = build_detector(recipe, STATS)
    assert isinstance(detector, FasterRCNN)
    return PreTrainer(detector, section(**values), iterations=10).train()


def samples(count: int = 2, seed: int = 0, boxes: int = 3, width: int = 64) -> tuple[list[Tensor], list[dict]]:
    rng = np.random.default_rng(seed)

    def picture(across: int = 64) -> Tensor:
        return torch.from_numpy(rng.integers(0, 255, (3, 64, across), dtype=np.uint8))

    def some(n: int) -> Tensor:
        corner, side = rng.uniform(0, 24, (n, 2)), rng.uniform(10, 36, (n, 2))
        return torch.from_numpy(np.concatenate([corner, corner + side], 1).astype(np.float32))

    targets = [
        {"boxes": some(1), "labels": torch.tensor([number % 3]), "view": picture(), "proposals": some(boxes),
         "view_proposals": some(boxes), "third": picture(), "third_proposals": some(boxes)}
        for number in range(count)
    ]  # fmt: skip
    return [picture(width) for _ in range(count)], targets


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# ---- terms -----------------------------------------------------------------------------------------------------------


def test_the_default_has_every_term_of_equation_8():
    losses = shell()(*samples())
    assert losses.keys() == DETECTION | {"loss_hcl", "loss_lcl", "loss_ar", "loss_sr"}
    assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())


ABLATION = {  # table 5
    "hcl": {"lcl": 0, "ar": 0, "sr": 0},
    "lcl": {"hcl": 0, "ar": 0, "sr": 0},
    "hcl+lcl": {"ar": 0, "sr": 0},
    "hcl+lcl+ar": {"sr": 0},
    "ar": {"hcl": 0, "lcl": 0, "sr": 0},
    "sr": {"hcl": 0, "lcl": 0, "ar": 0},
}


@pytest.mark.parametrize("name", ABLATION)
def test_each_switch_gives_its_subset_and_costs_nothing_more(name):
    own = shell(weights=ABLATION[name])
    wanted = set(name.split("+"))
    assert own(*samples()).keys() == DETECTION | {f"loss_{term}" for term in wanted}
    assert hasattr(own, "generator") == bool(wanted & {"ar", "sr"})
    assert bool(own.average) == bool(wanted & {"hcl", "lcl"}), "no momentum network without contrast"
    assert set(own.projectors) == {part for part, term in (("image", "hcl"), ("box", "lcl")) if term in wanted}
    assert set(own.queues) == set(own.projectors)


def test_weights_scale_their_terms():
    images, targets = samples()
    weights = {"hcl": 1.0, "lcl": 1.0, "ar": 1.0, "sr": 1.0}
    found = []
    for factors in ({}, weights):
        own = shell(weights=factors)
        torch.manual_seed(1)
        found.append(own(images, targets))
    for name, factor in {"loss_hcl": 0.1, "loss_lcl": 0.05, "loss_ar": 0.1, "loss_sr": 0.9}.items():
        torch.testing.assert_close(found[0][name], factor * found[1][name])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_all_that_it_leaves_trainable(preset):
    """Also without proposals: a parameter without gradient would hang training on several processes."""
    for boxes in (3, 0):
        own = shell(preset=preset, freeze_backbone=False)
        losses = own(*samples(boxes=boxes))
        assert all(torch.isfinite(value) for value in losses.values())
        total(losses).backward()
        without = [name for name, p in own.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, without
    parts = {name: any(p.requires_grad for p in part.parameters()) for name, part in own.detector.parts().items()}
    boxes_too = preset in ("drcl", "soco", "aligndet")
    assert (parts["fpn"], parts["head"]) == (boxes_too, boxes_too)
    assert parts["classifier"] == (preset == "drcl")


def test_aligndet_freezes_the_backbone_and_has_no_copy_of_it():
    own = shell(preset="aligndet", freeze_backbone=True)
    assert set(own.average) == {"fpn", "head", "rpn", "box_projector"}
    before = {key: value.clone() for key, value in own.detector.backbone.body.state_dict().items()}
    total(own(*samples())).backward()
    after = own.detector.backbone.body.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "running statistics stay too"
    assert {"loss_rpn_objectness", "loss_rpn_box_reg", "loss_box_reg", "loss_lcl"} == own(*samples()).keys()


def test_simclr_has_neither_queue_nor_momentum_network():
    own = shell(preset="simclr")
    assert not own.queues and not own.average and not own.predictors


def test_detection_losses_are_the_detectors_own_on_shared_features(monkeypatch):
    own = shell(weights={"hcl": 0, "lcl": 0, "sr": 0})
    images, targets = samples()
    plain = shell().detector.train()
    torch.manual_seed(3)
    expected = plain(images, targets)
    torch.manual_seed(3)
    calls = []
    layer = own.detector.backbone.body["layer1"]
    layer.register_forward_hook(lambda *_: calls.append(1))
    found = own(images, targets)
    assert len(calls) == 1, "one pass of the backbone serves all terms"
    assert {name: found[name].item() for name in expected} == {name: value.item() for name, value in expected.items()}


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_contrast_does_not_reach_the_momentum_network():
    own = shell(weights={"ar": 0, "sr": 0, "det": 0})
    total(own(*samples())).backward()
    assert not any(p.requires_grad or p.grad is not None for p in own.average.parameters())
    grads = [p.grad for p in own.detector.backbone.body.parameters()]
    assert all(grad is not None and grad.any() for grad in grads)


def test_the_optimizer_has_no_momentum_parameter():
    own = shell()
    trained = {id(p) for p in own.parameters() if p.requires_grad}
    assert trained.isdisjoint(id(p) for p in own.average.parameters())


@pytest.mark.parametrize("term", ["ar", "sr"])
def test_reconstruction_reaches_generator_and_backbone(term):
    own = shell(weights={"hcl": 0, "lcl": 0, "det": 0, "ar": 0, "sr": 0, term: 1})
    losses = own(*samples())
    assert losses.keys() == {f"loss_{term}"}
    total(losses).backward()
    for part in (own.generator, own.detector.backbone.body):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())


def test_sr_of_a_perfect_reconstruction_without_mask_is_zero(monkeypatch):
    own = shell(weights={"hcl": 0, "lcl": 0, "det": 0, "ar": 0}, reconstruction={"mask_fraction": 0.0})
    images, targets = samples(width=50)  # padded to 64
    pictures = batch_images(images).tensors
    monkeypatch.setattr(own.generator, "forward", lambda features: pictures)
    assert own(images, targets)["loss_sr"].item() == 0
    masked = shell(weights={"hcl": 0, "lcl": 0, "det": 0, "ar": 0})
    monkeypatch.setattr(masked.generator, "forward", lambda features: pictures)
    assert masked(images, targets)["loss_sr"].item() > 0


def test_sr_of_a_share_of_the_pictures_is_the_sr_of_these():
    images, targets = samples(4)
    weights = {"hcl": 0, "lcl": 0, "det": 0, "ar": 0}
    half = shell(weights=weights, reconstruction={"share": 0.5, "mask_fraction": 0}, norm="gn")(images, targets)
    whole = shell(weights=weights, reconstruction={"mask_fraction": 0}, norm="gn")(images[:2], targets[:2])
    torch.testing.assert_close(half["loss_sr"], whole["loss_sr"])


def test_reconstructions_leave_no_trace_in_the_running_statistics():
    images, targets = samples()
    one, other = shell(weights={"sr": 0.9}), shell(weights={"sr": 0.0})
    for own in (one, other):
        own(images, targets)
    first, second = (own.detector.backbone.body.state_dict() for own in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- momentum network and queues -------------------------------------------------------------------------------------


def test_the_momentum_network_moves_before_its_keys_and_keys_enter_after_the_loss():
    own = shell(momentum=0.5, weights={"lcl": 0, "ar": 0, "sr": 0, "det": 0})
    images, targets = samples()
    with torch.no_grad():
        own.projectors["image"].out.bias.add_(1.0)
    before = own.average["image_projector"].out.bias.clone()
    queue = own.queues["image"].rows.clone()
    seen: list[Tensor] = []
    own.average["image_projector"].register_forward_hook(
        lambda module, inputs, output: seen.append(nn.functional.normalize(output, dim=1).clone())
    )
    loss = own(images, targets)["loss_hcl"]
    torch.testing.assert_close(own.average["image_projector"].out.bias, before + 0.5)
    rows = own.queues["image"].rows
    torch.testing.assert_close(rows[:2], seen[0])
    assert torch.equal(rows[2:], queue[2:]) and int(own.queues["image"].place) == 2
    # the loss saw the queue as it was before: recompute it from the hooks
    again = shell(momentum=0.5, weights={"lcl": 0, "ar": 0, "sr": 0, "det": 0})
    with torch.no_grad():
        again.projectors["image"].out.bias.add_(1.0)
    again.queues["image"].enqueue = lambda keys: None
    torch.testing.assert_close(again(images, targets)["loss_hcl"], loss, atol=0, rtol=0)


def test_evaluation_changes_nothing():
    own = shell().eval()
    before = {key: value.clone() for key, value in own.state_dict().items()}
    own.detector.train()  # losses are asked for
    own.detector.backbone.eval()
    with torch.no_grad():
        own(*samples())
    after = own.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("accumulation", "expected"), [(1, 3), (3, 1)])
def test_the_momentum_network_moves_once_per_optimiser_step(accumulation, expected, monkeypatch):
    own = shell(momentum_schedule="cosine")
    own.accumulation = accumulation
    moved = []
    monkeypatch.setattr("tailfin.pretraining.shell.follow", lambda *args: moved.append(args))
    for _ in range(3):
        own(*samples())
    assert len(moved) == expected * len(own.average)


def test_padding_does_not_count_in_the_holistic_feature():
    own = shell(weights={"lcl": 0, "ar": 0, "sr": 0, "det": 0}, norm="gn")
    feature = torch.randn(2, 512, 2, 2)
    from tailfin.pretraining.shell import Features, View

    view = View(batch_images([torch.zeros(3, 64, 64), torch.zeros(3, 64, 30)]), [])
    pooled = own.pooled(Features({"layer4": feature}, {}), view)
    torch.testing.assert_close(pooled[0], feature[0].mean((1, 2)))
    torch.testing.assert_close(pooled[1], feature[1, :, :, :1].mean((1, 2)))


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"reconstruction": {"bridge": "bilinear"}},
        {"reconstruction": {"bridge": "half_target"}},
        {"reconstruction": {"mask_proposals": "all", "mask_fill": "noise", "stop_gradient": True, "layers": [3, 4]}},
        {"reconstruction": {"share": 0.5}},
        {"symmetric": True, "third_view": True},
        {"box": {"levels": "all"}, "image": {"loss": "cosine"}},
        {"det_loss": "class_agnostic"},
        {"image": {"loss": "nt_xent"}, "momentum_schedule": "cosine"},
        {"weights": {"dense": 1.0}},
    ],
)
@pytest.mark.parametrize("width", [64, 50])
def test_options_train(values, width):
    own = shell(**values)
    losses = own(*samples(width=width))
    total(losses).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in own.parameters())


def test_a_backbone_that_ends_at_stride_16_is_enough_and_one_at_8_is_not():
    assert shell(layers=(2, 3))(*samples())["loss_sr"] > 0
    with pytest.raises(UserError, match="ends at stride 8"):
        shell(layers=(1, 2))


def test_layers_and_pyramid_are_the_backbones_own():
    own = shell().eval()
    pictures = batch_images(samples()[0]).tensors
    body = own.detector.backbone.body
    layers = body_layers(body, pictures)
    assert list(layers) == ["layer1", "layer2", "layer3", "layer4"]
    for name, value in own.detector.backbone(pictures).items():
        assert torch.equal(pyramid(own.detector.backbone.fpn, body, layers)[name], value)


def test_bf16_autocast():
    own = shell()
    with torch.autocast("cpu", torch.bfloat16):
        losses = own(*samples())
    assert all(value.dtype == torch.float32 for value in losses.values())
    total(losses).backward()
    assert own.queues["image"].rows.dtype == torch.float32


# ---- the section -----------------------------------------------------------------------------------------------------


def test_a_preset_fills_what_is_not_given():
    moco = Pretraining.model_validate({"preset": "moco_v2", "image": {"queue": 64}, "sampler": {"threshold": 0.1}})
    assert (moco.image.queue, moco.image.dim, moco.image.predictor) == (64, 128, False)
    assert (moco.weights.hcl, moco.weights.lcl, moco.det_loss) == (1, 0, "none")
    assert (moco.sampler.name, moco.sampler.threshold) == ("plain", 0.1)
    given = Pretraining.model_validate({"preset": "moco_v2", "weights": {"lcl": 0.5}, "momentum": 0.9})
    assert (given.weights.hcl, given.weights.lcl, given.momentum) == (1, 0.5, 0.9)
    assert Pretraining.model_validate(moco.model_dump(mode="json")) == moco


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"hcl": 0, "lcl": 0, "ar": 0, "sr": 0, "det": 0}}, "every weight is 0"),
        ({"weights": {"hcl": 0, "lcl": 0, "ar": 0, "sr": 0}, "det_loss": "none"}, "every weight is 0"),
        ({"box": {"rois": "assigned"}}, "needs box.loss nt_xent"),
        ({"box": {"rois": "assigned", "loss": "nt_xent"}}, "det_loss class_agnostic"),
        ({"box": {"loss": "nt_xent"}}, 'needs box.rois "assigned"'),
        ({"preset": "aligndet", "symmetric": True}, "one way"),
        ({"keep_predictor": True, "det_loss": "class_agnostic"}, "keep_predictor needs det_loss class_aware"),
        ({"preset": "moco_v2", "freeze_backbone": True}, "leaves nothing to train"),
        ({"reconstruction": {"layers": [4, 3]}}, "must ascend"),
        ({"weights": {"dense": 1}, "dense": {"loss": "cosine"}}, "dense.loss cannot be cosine"),
    ],
)
def test_refused_sections(values, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check_recipe({"detector": {"norm": "bn", "frozen_layers": 0}, "pretraining": values}, "test")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pretraining": {"preset": "aligndet"}}, "cannot freeze the backbone"),
        ({"pretraining": {"schedule": {"precision": "bf16"}}}, "a run has one precision"),
        ({"pretraining": {"preset": "moco"}}, 'pretraining.preset: "moco" is not a choice'),
        ({"pretraining": {"wieghts": {}}}, 'did you mean "weights"'),
    ],
)
def test_refused_recipes(values, message):
    with pytest.raises(UserError) as caught:
        check_recipe({"detector": {"norm": "bn", "frozen_layers": 0}, **values}, "test")
    assert message in str(caught.value)


# ---- several processes -----------------------------------------------------------------------------------------------


def _train_on_rank(rank: int) -> dict[str, Any]:
    own = shell(layers=(2, 3))
    model = torch.nn.parallel.DistributedDataParallel(own, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        images, targets = samples(2, seed=10 * step + rank, boxes=0 if (step, rank) == (1, 0) else 2 + rank)
        total(model(images, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {key: value.numpy() for key, value in own.state_dict().items() if key.startswith(("queues", "average"))}
    return {key: value for key, value in state.items() if "running" not in key and "num_batches" not in key}


def test_two_processes_keep_identical_queues_and_momentum_networks(run_on_ranks):
    one, two = run_on_ranks(_train_on_rank)
    assert all((one[key] == two[key]).all() for key in one)
    assert one["queues.image.place"] == 3 * 4
    assert one["queues.box.place"] == 2 * 2 * 2 + 3 * 2 * 3, "all boxes of both, none of rank 0 in one step"
