"""The backbone contract: what a body states is what its pictures turn into."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.ops import FrozenBatchNorm2d

from tailfin.errors import UserError
from tailfin.models.backbones import load_body, pyramid_backbone, resnet_body, small_body
from tailfin.models.frozen_norms import FrozenNorm


def bodies():
    return {
        "resnet18": resnet_body("resnet18", norm="bn"),
        "resnet50": resnet_body("resnet50", norm="frozen_bn"),
        "small": small_body((32, 32, 64, 64, 96), (1, 2, 1, 1), norm="gn"),
    }


@pytest.mark.parametrize("name", bodies())
def test_a_body_says_what_its_layers_are(name):
    body = bodies()[name].eval()
    with torch.no_grad():
        layers = body.layers(torch.rand(2, 3, 64, 96))
    assert list(layers) == body.layer_names == ["layer1", "layer2", "layer3", "layer4"]
    for layer, found in layers.items():
        stride = body.strides[layer]
        assert found.shape == (2, body.channels[layer], 64 // stride, 96 // stride)
    assert (body.mean, body.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_layers_taken_are_those_of_the_whole_network():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    body = resnet_body("resnet18", norm="bn").eval()
    load_body(body, network.state_dict(), "test")
    body.take({"layer2": "fine", "layer3": "coarse"})
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = body(picture)
        expected = network.layer2(network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(picture))))))
        assert torch.equal(found["fine"], expected)
        assert torch.equal(found["coarse"], network.layer3(expected))
    assert list(found) == ["fine", "coarse"]
    assert body.layer_names == ["layer1", "layer2", "layer3"] and "layer4" not in body  # nothing runs for nobody


@pytest.mark.parametrize("count", range(6))
def test_freezing_from_below(count):
    body = resnet_body("resnet18", norm="bn")
    body.freeze(count)
    groups = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    for number, group in enumerate(groups):
        for name in group:
            assert all(parameter.requires_grad == (number >= count) for parameter in body[name].parameters())


def test_a_pyramid_in_two_steps_is_that_in_one():
    backbone = pyramid_backbone(resnet_body("resnet18", norm="bn"), layers=(2, 3, 4), channels=16, pool=True).eval()
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        levels, again = backbone(picture), backbone.pyramid(backbone.layers(picture))
    assert list(levels) == ["0", "1", "2", "pool"]
    assert all(torch.equal(levels[name], again[name]) for name in levels)
    assert backbone.strides == {"0": 8, "1": 16, "2": 32}


def test_weights_that_do_not_fit():
    told = "do not fit the backbone: .* are missing .*layer1.0.conv3.weight.*have another shape"
    with pytest.raises(UserError, match=told):
        load_body(resnet_body("resnet50", norm="bn"), torchvision.models.resnet18().state_dict(), "file")


def test_a_frozen_norm_is_torchvisions_in_its_inputs_type():
    torch.manual_seed(0)
    own, theirs = FrozenNorm(6), FrozenBatchNorm2d(6)
    for name, buffer in own.named_buffers():
        buffer.copy_(torch.rand(6) + 0.5)
        getattr(theirs, name).copy_(buffer)
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-6, atol=1e-6)  # one rounding less
    half = own(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), theirs(x.bfloat16()).float(), rtol=2**-6, atol=2**-6)


def test_a_frozen_body_keeps_half_precision_activations():
    """What the backward pass keeps under autocast is half of what float32 keeps, where norms are frozen too."""
    body = resnet_body("resnet18", norm="frozen_bn").take({"layer3": "0"})
    pictures = torch.rand(1, 3, 64, 64)

    def kept(precision: torch.dtype) -> int:
        sizes: dict[int, int] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            if value.ndim == 4 and len(value) == 1:  # of the picture, not a weight
                sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        half = torch.autocast("cpu", precision, enabled=precision != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), half:
            held = body(pictures)["0"]
        assert held.grad_fn is not None
        return sum(sizes.values())

    body.requires_grad_(True)
    assert kept(torch.bfloat16) < 0.6 * kept(torch.float32)
