"""The pre-training shell: which terms there are, what their gradients reach, and what a weight of 0 costs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from small_shell import DETECTION, dense_detector, detector, samples, section, shell, total
from torch import Tensor, nn

from tailfin.errors import UserError
from tailfin.models.backbones import Body, pyramid_backbone, small_body
from tailfin.models.images import batch_images
from tailfin.pretraining.image import pooled
from tailfin.pretraining.shell import PreTrainer, gradient_ratios, momentum_of
from tailfin.pretraining.term import Features, View
from tailfin.schema.presets import PRESETS, TERMS, terms

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
    assert ("reconstruction" in own.terms) == bool(wanted & {"ar", "sr"})
    assert bool(own.average) == bool(wanted & {"hcl", "lcl"}), "no momentum network without contrast"
    contrasts = {part for part, term in (("image", "hcl"), ("box", "lcl")) if term in wanted}
    assert set(own.heads.projectors) == set(own.terms) - {"detection", "reconstruction"} == contrasts
    assert set(own.heads.queues) == set(own.heads.projectors)


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


@pytest.mark.parametrize("name", ["retinanet", "atss"])
@pytest.mark.parametrize("preset", ["drcl", "soco", "moco_v2"])
def test_a_one_stage_detector(name, preset):
    """Boxes pass pooled cells of every level and two layers that belong to the term; nothing is left without gradient,
    and the momentum network has a copy of these layers."""
    for boxes in (3, 0):
        own = PreTrainer(dense_detector(name), section(preset=preset, freeze_backbone=False), iterations=10).train()
        before = set(own.detector.state_dict())
        losses = own(*samples(boxes=boxes))
        assert all(torch.isfinite(value) for value in losses.values())
        total(losses).backward()
        assert not [key for key, p in own.named_parameters() if p.requires_grad and p.grad is None]
    assert set(own.detector.state_dict()) == before
    if preset == "moco_v2":
        return
    term = own.terms["box"]
    assert "trunk" in own.average and "head" not in own.average
    assert {"p6", "p7"} < set(term.pool.featmap_names)
    if preset == "drcl":
        assert {"loss_classifier", "loss_box_reg", "loss_hcl", "loss_lcl", "loss_ar", "loss_sr"} <= losses.keys()
        assert all(p.requires_grad for p in own.detector.parts()["classifier"].parameters())
    copied = own.average["trunk"].fc6.weight.clone()
    with torch.no_grad():
        term.trunk.fc6.weight.add_(1.0)
    own(*samples())
    moved = own.average["trunk"].fc6.weight - copied
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - own.config.momentum), rtol=0.05, atol=1e-6)


LOSSES = {
    **{term: {f"loss_{term}"} for term in ("hcl", "lcl", "dense", "emd", "ar", "sr")},
    "slots": {"loss_group", "loss_slot"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_trains_exactly_its_terms(preset):
    own = shell(preset=preset, freeze_backbone=False)
    detection = DETECTION - ({"loss_classifier"} if preset == "aligndet" else set())
    wanted = set().union(*({**LOSSES, "det": detection}[term] for term in terms(preset)))
    assert own(*samples()).keys() == wanted
    assert {term for term in TERMS if getattr(own.config.weights, term)} == set(terms(preset))


def test_aligndet_freezes_the_backbone_and_has_no_copy_of_it():
    own = shell(preset="aligndet", freeze_backbone=True)
    assert set(own.average.copies) == {"fpn", "head", "rpn", "box_projector"}
    before = {key: value.clone() for key, value in own.detector.backbone.body.state_dict().items()}
    total(own(*samples())).backward()
    after = own.detector.backbone.body.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "running statistics stay too"
    assert {"loss_rpn_objectness", "loss_rpn_box_reg", "loss_box_reg", "loss_lcl"} == own(*samples()).keys()


def test_simclr_has_neither_queue_nor_momentum_network():
    own = shell(preset="simclr")
    assert not own.heads.queues and not own.average and not own.heads.predictors


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
    for part in (own.terms["reconstruction"].generator, own.detector.backbone.body):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())


def test_sr_of_a_perfect_reconstruction_without_mask_is_zero(monkeypatch):
    own = shell(weights={"hcl": 0, "lcl": 0, "det": 0, "ar": 0}, reconstruction={"mask_fraction": 0.0})
    images, targets = samples(width=50)  # padded to 64
    pictures = batch_images(images).tensors
    monkeypatch.setattr(own.terms["reconstruction"].generator, "forward", lambda features: pictures)
    assert own(images, targets)["loss_sr"].item() == 0
    masked = shell(weights={"hcl": 0, "lcl": 0, "det": 0, "ar": 0})
    monkeypatch.setattr(masked.terms["reconstruction"].generator, "forward", lambda features: pictures)
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
        own.heads.projectors["image"].out.bias.add_(1.0)
    before = own.average["image_projector"].out.bias.clone()
    queue = own.heads.queues["image"].rows.clone()
    seen: list[Tensor] = []
    own.average["image_projector"].register_forward_hook(
        lambda module, inputs, output: seen.append(nn.functional.normalize(output, dim=1).clone())
    )
    loss = own(images, targets)["loss_hcl"]
    torch.testing.assert_close(own.average["image_projector"].out.bias, before + 0.5)
    rows = own.heads.queues["image"].rows
    torch.testing.assert_close(rows[:2], seen[0])
    assert torch.equal(rows[2:], queue[2:]) and int(own.heads.queues["image"].place) == 2
    # the loss saw the queue as it was before: recompute it from the hooks
    again = shell(momentum=0.5, weights={"lcl": 0, "ar": 0, "sr": 0, "det": 0})
    with torch.no_grad():
        again.heads.projectors["image"].out.bias.add_(1.0)
    again.heads.queues["image"].enqueue = lambda keys: None
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
    monkeypatch.setattr("tailfin.pretraining.momentum.follow", lambda *args: moved.append(args))
    for _ in range(3):
        own(*samples())
    assert len(moved) == expected * len(own.average)


def test_padding_does_not_count_in_the_holistic_feature():
    feature = torch.randn(2, 512, 2, 2)
    view = View(batch_images([torch.zeros(3, 64, 64), torch.zeros(3, 64, 30)]), [])
    means = pooled(Features({"layer3": torch.zeros(2, 8, 4, 4), "layer4": feature}, {}), view)
    torch.testing.assert_close(means[0], feature[0].mean((1, 2)))
    torch.testing.assert_close(means[1], feature[1, :, :, :1].mean((1, 2)))


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
        {"preset": "densecl", "symmetric": True},
        {"preset": "slotcon", "symmetric": False},
        {"preset": "self_emd", "third_view": False},
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
    layers = own.detector.backbone.layers(pictures)
    assert list(layers) == body.layer_names == ["layer1", "layer2", "layer3", "layer4"]
    for name, value in own.detector.backbone(pictures).items():
        assert torch.equal(own.detector.backbone.pyramid(layers)[name], value)


def test_any_body_is_pre_trained_by_what_it_states():
    """Another width, depth and naming than a ResNet's, and pictures of another mean and deviation."""
    small = small_body((6, 8, 10, 12, 14), (1, 1, 1, 1), norm="bn")
    names = {name: name.replace("layer", "block") for name in small}
    stated = ({names[name]: value for name, value in own.items()} for own in (small.channels, small.strides))
    body = Body({names[name]: part for name, part in small.items()}, *stated, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = detector()
    model.backbone = pyramid_backbone(body, layers=(2, 3, 4), channels=8, pool=False)
    model.mean, model.std = body.mean, body.std
    for preset in ("drcl", "densecl"):
        own = PreTrainer(model, section(preset=preset)).train()
        assert own.heads.projectors["image"].hidden.in_features == 14
        images, targets = samples(width=50)
        seen = own.look_at(images, targets)
        torch.testing.assert_close(seen.view(0).batch.tensors[0, :, :, :50], (images[0] / 255 - 0.5) / 0.25)
        losses = own(images, targets)
        total(losses).backward()
        assert all(torch.isfinite(value) for value in losses.values())
    generator = PreTrainer(model, section()).terms["reconstruction"].generator
    assert generator.layers[0].in_channels == 14


def test_a_copy_of_the_shell_follows_its_own_detector():
    """An average of the weights over training copies the shell."""
    own = shell(momentum=0.5)
    other = copy.deepcopy(own)
    images, targets = samples()
    with torch.no_grad():
        other.heads.projectors["image"].out.bias.add_(1.0)
    other(images, targets)
    moved = other.average["image_projector"].out.bias - own.average["image_projector"].out.bias
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5))
    assert int(other.heads["image"].queue.place) == 2 and int(own.heads["image"].queue.place) == 0


def test_bf16_autocast():
    own = shell()
    with torch.autocast("cpu", torch.bfloat16):
        losses = own(*samples())
    assert all(value.dtype == torch.float32 for value in losses.values())
    total(losses).backward()
    assert own.heads.queues["image"].rows.dtype == torch.float32


# ---- several processes -----------------------------------------------------------------------------------------------


JOINED = {
    "byol": {},
    "simclr": {},
    "moco_v2": {},
    "soco": {},
    "densecl": {},
    "slotcon": {},
    "self_emd": {},
    "drcl": {"weights": {"det": 0, "ar": 0, "sr": 0, "hcl": 1.0, "lcl": 1.0}},
}


@pytest.mark.parametrize("preset", JOINED)
def test_two_processes_are_one_on_the_joined_batch(preset, run_on_ranks):
    """Losses, gradients, queues and running statistics of the contrast; what the backbone's norm sees is each
    picture alone here, since batch norm of a backbone is each process's own."""

    def seen(rank: int | None) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
        own = shell(norm="gn", preset=preset, **JOINED[preset])
        images, targets = samples(4)
        part = {0: slice(0, 2), 1: slice(2, 4), None: slice(None)}[rank]
        losses = own(images[part], targets[part])
        total(losses).backward()
        state = own.state_dict()
        kept = {key: state[key].numpy() for key in state if key.startswith("heads.")}
        gradients = {key: p.grad.numpy() for key, p in own.named_parameters() if p.grad is not None}
        return {key: value.item() for key, value in losses.items()}, gradients, kept

    losses, gradients, kept = seen(None)
    first, second = run_on_ranks(seen)
    for key, value in losses.items():
        assert (first[0][key] + second[0][key]) / 2 == pytest.approx(value, rel=1e-4), key
    largest = max(np.abs(value).max() for value in gradients.values())
    for key, value in gradients.items():
        mean = (first[1][key] + second[1][key]) / 2  # as they are averaged over processes
        np.testing.assert_allclose(mean, value, rtol=1e-3, atol=1e-5 * largest, err_msg=key)
    for key, value in kept.items():
        if "queues" not in key or key.endswith("place"):
            np.testing.assert_allclose(first[2][key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        else:  # a symmetric or boxed term's keys come in another order
            np.testing.assert_allclose(np.sort(first[2][key], 0), np.sort(value, 0), rtol=1e-3, atol=1e-5)


def _train_on_rank(rank: int) -> dict[str, Any]:
    own = shell(layers=(2, 3))
    model = torch.nn.parallel.DistributedDataParallel(own, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        images, targets = samples(2, seed=10 * step + rank, boxes=0 if (step, rank) == (1, 0) else 2 + rank)
        total(model(images, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        key: value.numpy() for key, value in own.state_dict().items() if key.startswith(("heads.queues", "average"))
    }
    return {key: value for key, value in state.items() if "running" not in key and "num_batches" not in key}


def test_two_processes_keep_identical_queues_and_momentum_networks(run_on_ranks):
    one, two = run_on_ranks(_train_on_rank)
    assert all((one[key] == two[key]).all() for key in one)
    assert one["heads.queues.image.place"] == 3 * 4
    assert one["heads.queues.box.place"] == 2 * 2 * 2 + 3 * 2 * 3, "all boxes of both, none of rank 0 in one step"


def test_momentum_of_short_stages():
    """The average remembers a share of the stage at most: what is published for long stages is left alone."""
    published = section(momentum_horizon=0.05)
    assert momentum_of(published, 90_000) == published.momentum == 0.999
    assert momentum_of(published, 1000) == pytest.approx(1 - 1 / 50)
    assert momentum_of(published, 10) == 0.0 and momentum_of(published, 0) == 0.999
    assert momentum_of(section(momentum_horizon=0), 10) == 0.999


def test_diagnostics_come_every_so_often_and_change_nothing():
    plain, looking = shell(), shell()
    looking.diagnose_every = 2
    for call in range(3):
        values = []
        for own in (plain, looking):
            own.zero_grad()
            torch.manual_seed(call)
            losses = own(*samples(seed=call))
            total(losses).backward()
            values.append((losses, {name: p.grad for name, p in own.named_parameters() if p.grad is not None}))
        assert all(torch.equal(values[0][0][name], values[1][0][name]) for name in values[0][0])
        assert values[0][1].keys() == values[1][1].keys()
        assert all(torch.equal(values[0][1][name], values[1][1][name]) for name in values[0][1])
        wanted = {f"{kind}_{term}" for kind in ("accuracy", "spread") for term in ("hcl", "lcl")}
        wanted |= {"unexplained_pictures", *(f"gradient_{term}" for term in ("hcl", "lcl", "ar", "sr"))}
        assert plain.diagnostics == {} and set(looking.diagnostics) == (wanted if call % 2 == 0 else set())


def test_gradient_ratios_are_those_of_the_last_shared_weights():
    own = shell()
    losses = own(*samples())
    found = gradient_ratios(losses, own.detector)
    weights = [p for p in own.detector.backbone.body.parameters() if p.requires_grad and p.ndim > 1][-1]

    def length(names: list[str]) -> float:
        return float(torch.autograd.grad(sum(losses[name] for name in names), weights, retain_graph=True)[0].norm())

    detection = length(sorted(DETECTION))
    for term in ("hcl", "lcl", "ar", "sr"):
        assert found[f"gradient_{term}"].item() == pytest.approx(length([f"loss_{term}"]) / detection, rel=1e-4)
    alone = gradient_ratios({"loss_hcl": losses["loss_hcl"]}, own.detector)
    assert alone["gradient_hcl"].item() == pytest.approx(1)
