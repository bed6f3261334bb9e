"""With equal weights and its plain settings, RetinaNet is torchvision's: losses, gradients, detections."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection import RetinaNet as TheirRetinaNet
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models.convert_torchvision import convert_retinanet, is_torchvision_retinanet
from tailfin.models.detector import Limits
from tailfin.stats import ClassStats

CLASSES = 7
SIZES = ((96, 128), (128, 96), (120, 96))
PLAIN = {
    "name": "retinanet", "fpn_convs": "pyramid", "anchor_style": "torchvision", "low_quality": "keep_owner",
    "normalizer": "picture", "frozen_layers": 0,
}  # fmt: skip


def theirs(norm: str = "none", classes: int = CLASSES, limits: Limits = Limits(0.05, 300, 0.5)) -> TheirRetinaNet:
    """torchvision's detector with weights larger than those of a fresh start, so that rounding decides nothing."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )  # fmt: skip
    sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    layer = (lambda channels: torch.nn.GroupNorm(32, channels)) if norm == "gn" else None
    head = RetinaNetHead(256, 9, classes, norm_layer=layer)
    model = TheirRetinaNet(
        backbone, classes, head=head, anchor_generator=anchors, min_size=96, max_size=128,
        score_thresh=limits.score_threshold, nms_thresh=limits.nms, detections_per_img=limits.max_dets,
    )  # fmt: skip
    for module in model.modules():  # frozen norms of random weights: keep what passes through at the size of 1
        if hasattr(module, "running_var"):
            module.running_var.fill_(2.0)
    with torch.no_grad():
        for name, value in head.named_parameters():
            if name.endswith("weight") and value.ndim == 4:
                value.normal_(0, 0.02)
        head.classification_head.cls_logits.weight.normal_(0, 0.5 if norm == "none" else 0.02)
    return model


def ours(state: dict, norm: str = "none", classes: int = CLASSES, tmp_path=None, names=None, classes_map="", **recipe):
    """tailfin's detector from a file of torchvision's weights."""
    torch.save(state, tmp_path / "theirs.pth")
    values = {
        "weights": str(tmp_path / "theirs.pth"), "backbone": "resnet18", "loss": "focal",
        "detector": {**PLAIN, "head_norm": norm}, "classes": {"map": classes_map},
        "evaluation": {"score_threshold": 0.05, "nms": 0.5, "max_dets": 300}, **recipe,
    }  # fmt: skip
    count = [10] * classes
    stats = ClassStats(image_count=count, instance_count=count, num_images=100, names=names)
    return build_detector(check_recipe(values, "test"), stats)


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((3, *size), generator=generator) for size in SIZES]


def targets(counts=(3, 1, 5)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in counts:
        corner = 50 * torch.rand((count, 2), generator=generator)
        boxes = torch.cat([corner, corner + 8 + 35 * torch.rand((count, 2), generator=generator)], 1)
        found.append({"boxes": boxes, "labels": torch.randint(CLASSES, (count,), generator=generator)})
    return found


@pytest.mark.parametrize("norm", ["none", "gn"])
@pytest.mark.parametrize("counts", [(3, 1, 5), (2, 0, 30)], ids=["objects everywhere", "one picture without objects"])
def test_losses_and_gradients(tmp_path, norm, counts):
    twin = theirs(norm).train()
    model, lines = ours(twin.state_dict(), norm, tmp_path=tmp_path)
    own = len(model.state_dict()) - len(model.loss.state_dict())
    assert f"{own} of {len(model.state_dict())} weights loaded" in lines[0]
    assert "7 kept, 0 new, 0 of the file left out" in " ".join(lines) and "in the order of the data's" in lines[-1]
    model.train()
    found, wanted = model(pictures(), targets(counts)), twin(pictures(), targets(counts))
    pairs = {"loss_classifier": "classification", "loss_box_reg": "bbox_regression"}
    for own, other in pairs.items():
        assert wanted[other] > 0
        torch.testing.assert_close(found[own], wanted[other], rtol=1e-4, atol=1e-6)
    sum(found.values()).backward()
    sum(wanted.values()).backward()
    gradients = {name: value.grad for name, value in twin.named_parameters()}
    expected = convert_retinanet(gradients)
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        error = (value.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: {error:.2e}"


@pytest.mark.parametrize("limits", [Limits(0.05, 300, 0.5), Limits(0.01, 50, 0.3), Limits(0.0, 2000, 0.7)])
def test_detections(tmp_path, limits):
    twin = theirs(limits=limits).eval()
    model, _ = ours(twin.state_dict(), tmp_path=tmp_path)
    model.eval()
    with torch.no_grad():
        found, wanted = model(pictures(), limits=limits), twin(pictures())
    assert len(torch.cat([own["labels"] for own in found]).unique()) > 2
    for own, other in zip(found, wanted, strict=True):
        assert 20 < len(own["scores"]) == len(other["scores"]) <= limits.max_dets
        # in any order: scores of random weights lie closer together than two ways to round them
        pairs = own["labels"][:, None] == other["labels"]
        pairs &= torch.isclose(own["scores"][:, None], other["scores"], rtol=1e-4, atol=1e-6)
        pairs &= torch.isclose(own["boxes"][:, None], other["boxes"], rtol=1e-4, atol=1e-3).all(dim=2)
        assert pairs.any(dim=0).all() and pairs.any(dim=1).all()
        torch.testing.assert_close(own["scores"], other["scores"], rtol=1e-4, atol=1e-6)


def test_classes_of_a_checkpoint(tmp_path):
    """By name from COCO's 91, in their order with or without the row of label 0; another number is refused. What COCO
    lacks, and what is of a loss of another kind, starts anew and is said."""
    categories = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    twin = theirs(classes=91)
    state = twin.state_dict()
    assert is_torchvision_retinanet(state) and not is_torchvision_retinanet(twin.backbone.state_dict())
    rows = state["head.classification_head.cls_logits.bias"] = torch.arange(9 * 91).float()
    names = ["zebra", "Person", "car"]
    model, _ = ours(state, classes=3, tmp_path=tmp_path, names=names)
    wanted = rows.view(9, 91)[:, [categories.index(name.lower()) for name in names]]
    assert torch.equal(model.head.classifier.bias.view(9, 3), wanted)
    model, lines = ours(state, classes=2, tmp_path=tmp_path, names=["zebras", "bus"])
    assert '1 kept, 1 new ("zebras"), 79 of the file left out' in " ".join(lines)
    bias = model.head.classifier.bias.view(9, 2)
    assert torch.equal(bias[:, 1], rows.view(9, 91)[:, categories.index("bus")])
    assert torch.allclose(bias[:, 0].sigmoid(), torch.tensor(0.01))  # the loss's prior
    (tmp_path / "map.yaml").write_text("zebras: [Zebra, zebra]")
    model, _ = ours(
        state, classes=2, tmp_path=tmp_path, names=["zebras", "bus"], classes_map=str(tmp_path / "map.yaml")
    )
    assert torch.equal(model.head.classifier.bias.view(9, 2)[:, 0], rows.view(9, 91)[:, categories.index("zebra")])
    (tmp_path / "map.yaml").write_text("zebrs: zebra")
    with pytest.raises(UserError, match='"zebrs" is no class of the data.*zebras'):
        ours(state, classes=2, tmp_path=tmp_path, names=["zebras", "bus"], classes_map=str(tmp_path / "map.yaml"))
    model, _ = ours(theirs(classes=4).state_dict(), classes=3, tmp_path=tmp_path)
    assert model.head.classifier.bias.shape == (27,)
    with pytest.raises(UserError, match="classifier has 7 classes, the training file 5"):
        ours(theirs().state_dict(), classes=5, tmp_path=tmp_path)
    _, lines = ours(theirs().state_dict(), tmp_path=tmp_path, loss="ecm")
    assert "its classifier is of another kind" in " ".join(lines)


def test_names_of_older_versions(tmp_path):
    """Published files name convolutions without the index of the layer in its block."""
    twin = theirs()
    older = {}
    for key, value in twin.state_dict().items():
        if "_head.conv." in key or "_blocks." in key:
            key = key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        older[key] = value
    first, second = ours(twin.state_dict(), tmp_path=tmp_path)[0], ours(older, tmp_path=tmp_path)[0]
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
