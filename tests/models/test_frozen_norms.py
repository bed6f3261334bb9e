"""Frozen norms as part of the convolution before them: the same features and gradients, less kept, nothing renamed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tailfin.models.backbones import Backbone, Body, resnet_body, small_body
from tailfin.models.frozen_norms import FixedStatistics, FrozenNorm, join_norms, norms_apart, separate
from tailfin.models.timm_body import timm_body


def unsettled(body: nn.Module) -> nn.Module:
    """With statistics and weights of norms that are not those of a start."""
    generator = torch.Generator().manual_seed(1)
    for norm in body.modules():
        if isinstance(norm, FrozenNorm):
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(norm, name)
                value.data.copy_(torch.rand(value.shape, generator=generator) + 0.3)
    return body


BODIES = {
    "resnet18": (lambda: resnet_body("resnet18", norm="frozen_bn"), 20),
    "caffe": (lambda: resnet_body("resnet50_caffe", norm="frozen_bn"), 53),
    "fixed statistics": (lambda: resnet_body("resnet18", norm="frozen_stats"), 20),
    "lite0": (lambda: timm_body("timm/tf_efficientnet_lite0", norm="frozen_bn"), 49),
}


@pytest.mark.parametrize("name", BODIES)
def test_features_and_gradients_stay(name: str) -> None:
    make, norms = BODIES[name]
    torch.manual_seed(0)
    body = make()
    plain = unsettled(body.take({layer: layer for layer in body.layer_names[:3]})).double()
    joined = copy.deepcopy(plain)
    assert 0 < join_norms(joined) <= norms
    assert list(joined.state_dict()) == list(plain.state_dict())
    assert [key for key, _ in joined.named_parameters()] == [key for key, _ in plain.named_parameters()]
    pictures = torch.rand((3, 3, 64, 96), generator=torch.Generator().manual_seed(0)).double()
    ends = []
    for body in (plain, joined):
        found = body(pictures)
        weights = torch.Generator().manual_seed(2)
        sum((value * torch.rand(value.shape, generator=weights)).sum() for value in found.values()).backward()
        ends.append((found, {key: value.grad for key, value in body.named_parameters()}))
    for level, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][level], value, rtol=1e-9, atol=1e-9 * float(value.detach().abs().max()))
    for key, grad in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][key], grad, rtol=1e-8, atol=1e-9 * float(grad.abs().max()), msg=key)


def test_both_ways_are_taken() -> None:
    """Early layers join, late ones of small pictures do not: their weights are more than their cells."""
    body = resnet_body("resnet18", norm="frozen_bn")
    join_norms(body)
    seen: dict[str, Tensor] = {}
    for name in ("layer1", "layer4"):
        norm = body[name][0].bn1
        norm.normed = lambda x, own=norm, name=name: seen.setdefault(name, FrozenNorm.normed(own, x))
    body(torch.rand(4, 3, 128, 128))
    assert list(seen) == ["layer4"]


def test_a_trained_scale_keeps_no_output() -> None:
    """What the backward pass keeps of a norm with a trained scale: the convolution's output, or the weights alone."""

    def kept(body: Body) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            found = body(torch.rand(4, 3, 96, 96))["layer2"]
        assert found.grad_fn is not None
        return sum(sizes.values())

    plain = resnet_body("resnet18", norm="frozen_stats").take({"layer2": "layer2"})
    joined = copy.deepcopy(plain)
    join_norms(joined)
    assert kept(joined) < 0.75 * kept(plain)


def test_a_copy_has_norms_of_its_own() -> None:
    """Pre-training's momentum network is a copy: changing one must not change the other."""
    body = small_body([8, 8, 16, 16, 16], [1, 1, 1, 1], norm="frozen_bn")
    join_norms(body)
    pictures = torch.rand(2, 3, 64, 64)
    before = body(pictures)["layer1"]
    other = copy.deepcopy(body)
    unsettled(other)
    assert torch.equal(body(pictures)["layer1"], before)
    assert not torch.allclose(other(pictures)["layer1"], before)
    norm = other["layer1"][0].conv1.norm_behind[0]
    assert norm is other["layer1"][0].bn1


def test_a_network_in_another_order_stays() -> None:
    """Defined behind the convolution, called before it."""

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), FrozenNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x))

    body = Body({"layer1": Before()}, {"layer1": 3}, {"layer1": 1}).take({"layer1": "0"})
    assert join_norms(body) == 0
    assert not body["layer1"].norm.joined
    assert type(body["layer1"].conv) is nn.Conv2d


def test_joined_once_and_separated() -> None:
    body = resnet_body("resnet18", norm="frozen_stats").take({"layer2": "0"})
    pictures = torch.rand(2, 3, 64, 64)
    before = body(pictures)["0"]
    backbone = Backbone(body)
    assert isinstance(body["bn1"], FixedStatistics)
    assert body["bn1"].joined
    assert join_norms(body) == 0
    torch.testing.assert_close(backbone(pictures)["0"], before, rtol=1e-4, atol=1e-5)
    for conv in [own for own in body.modules() if isinstance(own, nn.Conv2d)]:
        separate(conv)
        assert type(conv) is nn.Conv2d
    assert not any(norm.joined for norm in body.modules() if isinstance(norm, FrozenNorm))
    torch.testing.assert_close(body(pictures)["0"], before)


@pytest.mark.parametrize("half", [False, True])
def test_in_the_type_of_the_pictures(half: bool) -> None:
    body = unsettled(resnet_body("resnet18", norm="frozen_bn").take({"layer3": "0"}))
    pictures = torch.rand(2, 3, 64, 64)
    before = body(pictures)["0"]
    join_norms(body)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = body(pictures)["0"]
    assert found.dtype == (torch.bfloat16 if half else torch.float32)
    largest = float(before.detach().abs().max())
    torch.testing.assert_close(found.float(), before, rtol=0.1 if half else 1e-4, atol=0.03 * largest)


def test_apart_for_a_while() -> None:
    """A hook on a norm sees the convolution's output then, and the body computes the same."""
    body = resnet_body("resnet18", norm="frozen_bn").take({"layer1": "0"})
    unsettled(body)
    join_norms(body)
    pictures = torch.rand(2, 3, 64, 64)
    before = body(pictures)["0"]
    reached: list[Tensor] = []
    handle = body["bn1"].register_forward_pre_hook(lambda _, arguments: reached.append(arguments[0]))
    with norms_apart(body):
        torch.testing.assert_close(body(pictures)["0"], before, rtol=1e-4, atol=1e-4)
    handle.remove()
    conv = copy.deepcopy(body["conv1"])
    separate(conv)
    torch.testing.assert_close(reached[0], conv(pictures))
    assert body["bn1"].joined
    assert torch.equal(body(pictures)["0"], before)
