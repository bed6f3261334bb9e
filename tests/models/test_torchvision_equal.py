"""With torchvision's loss and settings, tailfin's detector is torchvision's `FasterRCNN`: same losses, same detections.

The peer and the copy of the weights are those of `benchmarks/training_speed.py`, so the benchmark compares equal work.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from same_draws import recorded
from tailfin.config import check_recipe
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.schema.recipe import Recipe

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training_speed.py"
CLASSES = 7
SIZES = ((96, 128), (128, 96), (100, 90))  # padded to a common size, so borders and true sizes matter


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT.name} comes with the source tree only")
    sys.path.insert(0, str(SCRIPT.parent))  # it imports its neighbours
    return importlib.import_module("training_speed")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    values = {
        "weights": "none",
        "backbone": "resnet18",
        "detector": {
            "norm": "bn",
            "frozen_layers": 0,
            "fpn_channels": 32,
            "anchor_sizes": [8, 16, 32, 64, 128],
            "box_loss": "smooth_l1",
            "rpn_batch": 64,
            "rpn_pre_nms": [300, 200],
            "rpn_post_nms": [150, 100],
            "roi_batch": 48,
            "head_channels": 64,
        },
        "evaluation": {"max_dets": 100, "score_threshold": 0.02},
    }
    return check_recipe(values, "test")


@pytest.fixture(scope="module")
def model(benchmark, recipe) -> FasterRCNN:
    """Weights larger than those of a fresh start: scores and boxes differ clearly, so that rounding decides nothing."""
    model = benchmark.detector(recipe, CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer, std in (
            (model.rpn.head.cls_logits, 0.3),
            (model.rpn.head.bbox_pred, 0.05),
            (model.roi_heads.predictor.cls_score, 0.15),
            (model.roi_heads.predictor.bbox_pred, 0.3),
        ):
            layer.weight.normal_(0, std, generator=generator)
            layer.bias.normal_(0, 0.1, generator=generator)
    return model


def pictures(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((3, *size), generator=generator) for size in SIZES]


def targets(seed: int = 0, counts: tuple[int, ...] = (3, 1, 5)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        corner = 50 * torch.rand((count, 2), generator=generator)
        boxes = torch.cat([corner, corner + 5 + 35 * torch.rand((count, 2), generator=generator)], 1)
        found.append({"boxes": boxes, "labels": torch.randint(CLASSES, (count,), generator=generator)})
    return found


@pytest.mark.parametrize("counts", [(3, 1, 5), (2, 0, 30)], ids=["objects everywhere", "one picture without objects"])
def test_losses_and_gradients(benchmark, recipe, model, counts):
    model.train()
    twin = benchmark.torchvision_twin(model, recipe)
    wanted = targets(counts=counts)
    with recorded() as draws:
        ours = model(pictures(), wanted)
    draws.give(twin.rpn, 0)
    draws.give(twin.roi_heads, 1, objects=list(counts))
    theirs = twin(pictures(), benchmark.for_torchvision(wanted))
    ours["loss_objectness"] = ours.pop("loss_rpn_objectness")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value > 0
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )

    model.zero_grad()
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    expected = {name: value.grad for name, value in twin.named_parameters()}
    found = benchmark.torchvision_names({name: value.grad for name, value in model.named_parameters()})
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 2e-3, f"{name}: {error:.2e}"


def test_rows_drawn_for_the_box_head(benchmark, recipe, model):
    """The same boxes are sampled and matched to the same objects, row by row."""
    model.train()
    twin = benchmark.torchvision_twin(model, recipe)
    generator = torch.Generator().manual_seed(5)
    wanted = targets(counts=(3, 0, 5))
    proposals = []
    for target in wanted:  # near the objects and elsewhere
        corner = 60 * torch.rand((80, 2), generator=generator)
        near = target["boxes"].repeat(8, 1) + 4 * torch.rand((8 * len(target["boxes"]), 4), generator=generator)
        proposals.append(torch.cat([near, torch.cat([corner, corner + 20], 1)]))
    with recorded() as draws:
        boxes, labels, matched, *_ = model.roi_heads.sample(proposals, wanted)
    draws.give(twin.roi_heads, 0, objects=[3, 0, 5])
    their_boxes, _, their_labels, their_deltas = twin.roi_heads.select_training_samples(
        list(proposals), benchmark.for_torchvision(wanted)
    )
    assert [len(own) for own in boxes] == [recipe.detector.roi_batch] * 3
    torch.testing.assert_close(boxes, their_boxes, rtol=0, atol=0)
    theirs = torch.cat(their_labels)
    assert torch.equal(labels, torch.where(theirs == 0, CLASSES, theirs - 1))
    foreground = labels < CLASSES
    assert 12 < foreground.sum() <= 24  # a quarter of 48 rows in the two pictures with objects
    deltas = model.roi_heads.box_coder.encode_single(matched[foreground], torch.cat(boxes)[foreground])
    torch.testing.assert_close(deltas, torch.cat(their_deltas)[foreground], rtol=0, atol=0)


@pytest.mark.parametrize("max_dets", [100, 300])
def test_detections(benchmark, recipe, model, max_dets):
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"max_dets": max_dets})})
    model.eval()
    limits = model.limits.replaced(max_dets=max_dets)
    twin = benchmark.torchvision_twin(model, recipe)
    with torch.no_grad():
        ours, theirs = model(pictures(), limits=limits), twin(pictures())
    assert len(torch.cat([own["labels"] for own in ours]).unique()) > 2
    for own, other in zip(ours, theirs, strict=True):
        assert 50 < len(own["scores"]) <= max_dets
        assert torch.equal(own["labels"] + 1, other["labels"])
        torch.testing.assert_close(own["scores"], other["scores"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
