"""DINOv3's ConvNeXts as bodies: features equal transformers' own, weights by its names, frozen stages."""

from __future__ import annotations

import pytest
import torch
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import bodies, build_detector, dinov3_body
from tailfin.models.backbones import load_body
from tailfin.stats import ClassStats

NAME = "transformers/dinov3_convnext_tiny"
SMALL = ((1, 1, 2, 1), (8, 16, 24, 32))
STATS = ClassStats(image_count=[5, 5], instance_count=[5, 5], num_images=9)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network of the same kind that is made in no time."""
    monkeypatch.setitem(dinov3_body.SIZES, "tiny", SMALL)


@pytest.fixture
def twin():
    torch.manual_seed(0)
    config = DINOv3ConvNextConfig(
        depths=list(SMALL[0]), hidden_sizes=list(SMALL[1]), layer_scale_init_value=0.5, out_indices=[1, 2, 3, 4]
    )
    return config, DINOv3ConvNextModel(config).eval()


def test_features_are_those_of_transformers(twin):
    _, model = twin
    body = dinov3_body.dinov3_body(NAME)
    load_body(body, dinov3_body.body_state(model.state_dict()), "test")
    picture = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = body.eval().layers(picture)
        hidden = model(picture, output_hidden_states=True).hidden_states[1:]
    assert list(found) == ["stage1", "stage2", "stage3", "stage4"] and len(hidden) == 4
    for (name, own), wanted in zip(found.items(), hidden, strict=True):
        assert own.shape == (2, body.channels[name], 64 // body.strides[name], 96 // body.strides[name])
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "frozen"), [(0, ()), (1, ("stem",)), (3, ("stem", "stage1", "stage2"))])
def test_frozen_layers(count, frozen):
    body = dinov3_body.dinov3_body(NAME)
    body.freeze(count)
    assert {key.split(".")[0] for key, value in body.named_parameters() if not value.requires_grad} == set(frozen)


@pytest.mark.parametrize("source", ["imagenet", "file"])
def test_a_detector_on_it(source, twin, monkeypatch, tmp_path):
    _, model = twin
    state = model.state_dict()
    monkeypatch.setattr(bodies.dinov3_body, "load_published", lambda backbone: state)
    torch.save(state, tmp_path / "theirs.pth")
    weights = "imagenet" if source == "imagenet" else str(tmp_path / "theirs.pth")
    values = {"backbone": NAME, "weights": weights, "detector": {"norm": "own", "fpn_channels": 32, "roi_size": 3}}
    detector, lines = build_detector(check_recipe(values, "test"), STATS)
    assert lines == [f"backbone: {weights}"]
    found = detector.backbone.body.state_dict()
    assert torch.equal(found["stage4.layers.0.gamma"], state["model.stages.3.layers.0.gamma"])
    assert torch.equal(found["stem.0.weight"], state["model.stages.0.downsample_layers.0.weight"])
    losses = detector.train()(
        [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    )
    torch.stack(list(losses.values())).sum().backward()
    assert found.keys() and detector.backbone.body["stage4"].layers[0].gamma.grad is not None
    assert detector.backbone.body["stem"][0].weight.grad is None  # frozen_layers 2


def test_mistakes(monkeypatch):
    for values, why in (
        ({"backbone": NAME, "weights": "imagenet"}, "has layer norms of its own; use own"),
        ({"backbone": "transformers/dinov3_convnext_tiy"}, "is not a choice.*dinov3_convnext_tiny"),
    ):
        with pytest.raises(UserError, match=why):
            check_recipe(values, "test")

    def fail(*_, **__):
        raise OSError("gated")

    monkeypatch.setattr(DINOv3ConvNextModel, "from_pretrained", fail)
    with pytest.raises(UserError, match="facebook/dinov3-convnext-tiny-pretrain-lvd1689m.*gated.*licence"):
        dinov3_body.load_published(NAME)
