"""`weights: coco`: torchvision's published detectors, with a checkpoint made here in the place of the download."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

import tailfin
from tailfin.config import check_recipe
from tailfin.convert import convert
from tailfin.errors import UserError
from tailfin.models import build_detector, coco_weights
from tailfin.models.detector import Limits
from tailfin.stats import ClassStats

NAMES = ["unicorn", "person", "hair drier"]
COCO = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
ENTRIES = {
    "faster_rcnn": ("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", detection.fasterrcnn_resnet50_fpn),
    "mask_rcnn": ("MaskRCNN_ResNet50_FPN_Weights.COCO_V1", detection.maskrcnn_resnet50_fpn),
    "retinanet": ("RetinaNet_ResNet50_FPN_Weights.COCO_V1", detection.retinanet_resnet50_fpn),
}
SETTINGS = {"retinanet": {"fpn_convs": "pyramid", "anchor_style": "torchvision"}}


def published(name: str, monkeypatch):
    """torchvision's detector of 91 rows with norms that add nothing to the variance; its weights are the download."""
    torch.manual_seed(0)
    entry, make = ENTRIES[name]
    twin = make(weights=None, weights_backbone=None, num_classes=91, min_size=96, max_size=128, box_score_thresh=0.0)
    for module in twin.modules():
        if hasattr(module, "running_var"):
            module.eps = 0.0
            module.running_var.copy_(2 + torch.rand(len(module.running_var)))
            module.running_var[0] = 3e-5  # where 1e-5 more would matter
            module.weight.data[0] = 3e-3
    if name != "retinanet":  # a trained one gives ids that no object has next to nothing of its softmax
        unused = [row for row, own in enumerate(COCO) if own == "N/A"]
        twin.roi_heads.box_predictor.cls_score.bias.data[unused] = -30
        twin.roi_heads.box_predictor.cls_score.weight.data *= 5
    # the published ones have frozen norms, which count no batches
    state = {key: value.clone() for key, value in twin.state_dict().items() if "num_batches" not in key}
    wanted = []

    def load(given: str):
        wanted.append(given)
        return state

    monkeypatch.setattr(coco_weights, "load_published", load)
    return twin.eval(), wanted, entry


@pytest.mark.parametrize("name", list(ENTRIES))
def test_a_recipe_starts_from_coco(name, monkeypatch):
    """Rows by name, a new class by the prior, the three numbers; features and boxes equal torchvision's."""
    twin, wanted, entry = published(name, monkeypatch)
    values = {"weights": "coco", "detector": {"name": name, **SETTINGS.get(name, {})}}
    values["loss"] = "focal" if name == "retinanet" else "softmax"
    stats = ClassStats(image_count=[5] * 3, instance_count=[5] * 3, num_images=9, names=NAMES)
    model, lines = build_detector(check_recipe(values, "test"), stats)
    said = " ".join(lines)
    assert wanted == [entry] and '2 kept, 1 new ("unicorn"), 78 of the file left out' in said
    assert "published with" not in said
    person = COCO.index("person")
    if name == "retinanet":
        own = model.head.classifier.weight.view(9, 3, 256, 3, 3)
        theirs = twin.head.classification_head.cls_logits.weight.view(9, 91, 256, 3, 3)
        assert torch.equal(own[:, 1], theirs[:, person]) and not torch.equal(own[:, 0], theirs[:, 0])
    else:
        own, theirs = model.roi_heads.predictor, twin.roi_heads.box_predictor
        assert torch.equal(own.cls_score.weight[1], theirs.cls_score.weight[person])
        assert torch.equal(own.cls_score.weight[3], theirs.cls_score.weight[0])  # background
        assert torch.equal(own.bbox_pred.weight[4:8], theirs.bbox_pred.weight[4 * person : 4 * person + 4])
    if name == "mask_rcnn":
        assert torch.equal(
            model.mask.predictor.conv.weight[1], twin.roi_heads.mask_predictor.mask_fcn_logits.weight[person]
        )
    images = torch.rand((1, 3, 96, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, theirs = model.eval().backbone(images), twin.backbone(images)
    for key, value in theirs.items():
        error = (found[key] - value).abs().max() / value.abs().max()
        assert error < 1e-5, f"{key}: {error:.1e}"


def test_what_does_not_fit_is_said(monkeypatch):
    published("retinanet", monkeypatch)
    stats = ClassStats(image_count=[5] * 3, instance_count=[5] * 3, num_images=9, names=NAMES)
    values = {"weights": "coco", "loss": "focal", "detector": {"name": "retinanet"}}
    _, lines = build_detector(check_recipe(values, "test"), stats)
    assert "published with detector.fpn_convs=pyramid, this recipe has body" in " ".join(lines)
    for wrong, why in (
        ({"detector": {"name": "atss"}}, "weights: coco has no atss"),
        ({"backbone": "resnet101"}, "weights: coco is for backbone resnet50, not resnet101"),
        ({"backbone": "resnet50_caffe"}, "not of resnet50_caffe: set backbone=resnet50"),
        ({"detector": {"norm": "gn"}}, "does not fit detector.norm"),
    ):
        with pytest.raises(UserError, match=why):
            check_recipe({"weights": "coco", **wrong}, "test")


def test_offline_the_file_is_named(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"weights: coco needs fasterrcnn_resnet50_fpn_coco-\w+.pth, .*no route"):
        coco_weights.load_published(ENTRIES["faster_rcnn"][0])


def test_the_published_detector_as_a_model_file(monkeypatch, tmp_path):
    """`tailfin convert coco`: detections are torchvision's own, of the 80 classes by name."""
    twin, _, _ = published("faster_rcnn", monkeypatch)
    names = [name for name in COCO if name not in ("__background__", "N/A")]
    turned = names[40:] + names[:40]
    (tmp_path / "classes.txt").write_text("\n".join(turned))
    lines = convert("coco", "coco/faster_rcnn_r50_softmax", tmp_path / "classes.txt", tmp_path / "m.safetensors")
    assert "80 kept, 0 new, 0 of the file left out" in " ".join(lines)
    model = tailfin.load(tmp_path / "m.safetensors", device="cpu").model.eval()
    image = torch.rand((3, 96, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model([image], limits=Limits(0.0, 60, 0.5))[0]
        wanted = twin([image])[0]
    count = min(len(found["scores"]), len(wanted["scores"]), 40)
    assert count == 40
    torch.testing.assert_close(found["scores"][:count], wanted["scores"][:count], rtol=1e-4, atol=1e-5)
    ours = [turned[label] for label in found["labels"][:count]]
    assert ours == [COCO[label] for label in wanted["labels"][:count]]
