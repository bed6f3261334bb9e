"""Norms folded into convolutions: the same features and detections; a body whose order misleads stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tailfin import ClassStats
from tailfin.config import load_recipe
from tailfin.models import build_detector
from tailfin.models.backbones import Body, resnet_body
from tailfin.models.folding import fold_norms, for_inference
from tailfin.models.timm_body import timm_body

STATS = ClassStats(image_count=[9, 5], instance_count=[9, 5], num_images=9)


def unsettled(module: nn.Module) -> nn.Module:
    """With statistics and weights of norms that are not those of a start."""
    generator = torch.Generator().manual_seed(1)
    for own in module.modules():
        if hasattr(own, "running_mean"):
            for name, low in (("weight", 0.5), ("bias", -0.2), ("running_mean", -0.2), ("running_var", 0.5)):
                getattr(own, name).data.uniform_(low, low + 1, generator=generator)
    return module.eval()


@pytest.mark.parametrize(("name", "norm"), [("resnet18", "bn"), ("resnet50", "frozen_bn"), ("lite0", "frozen_bn")])
def test_features_stay_and_norms_go(name: str, norm: str) -> None:
    body = resnet_body(name, norm=norm) if name != "lite0" else timm_body("timm/tf_efficientnet_lite0", norm=norm)
    body = unsettled(body)
    layers = list(body.channels) if hasattr(body, "channels") else body.layer_names
    body = body.take({layer: layer for layer in layers[-2:]})
    other = copy.deepcopy(body)
    assert fold_norms(other) >= 20 if name != "lite0" else fold_norms(other) >= 40
    assert not any(hasattr(own, "running_mean") for own in other.modules())
    picture = torch.rand((1, 3, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for level, value in body(picture).items():
            assert torch.allclose(value, other(picture)[level], rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_a_detector_finds_the_same() -> None:
    torch.manual_seed(0)
    recipe = load_recipe("fod/faster_rcnn_r18_softmax", {"evaluation.score_threshold": 0.2, "data.sizes": [64]})
    model = unsettled(build_detector(recipe, STATS, start=False)[0])
    picture = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model([picture])[0]
        assert for_inference(model) == 20
        after = model([picture])[0]
    assert len(before["scores"]) == len(after["scores"]) > 0
    assert torch.allclose(before["scores"], after["scores"], atol=1e-4)


def test_a_body_whose_order_misleads_stays() -> None:
    class Swapped(Body):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.taken = {"a": "a"}

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": self.conv(self.norm(x))}  # the norm comes first

    torch.manual_seed(0)
    recipe = load_recipe("fod/faster_rcnn_r18_softmax")
    model = build_detector(recipe, STATS, start=False)[0].eval()
    model.backbone.body = unsettled(Swapped())  # type: ignore[assignment]
    assert for_inference(model) == 0 and isinstance(model.backbone.body.norm, nn.BatchNorm2d)
