"""A small detector in the shell, and batches for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailfin.config import check_recipe
from tailfin.models import build_detector
from tailfin.models.dense import DenseDetector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.pretraining.shell import PreTrainer
from tailfin.schema.presets import OWNERS, terms
from tailfin.schema.pretraining import Pretraining
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
DETECTION = {"loss_classifier", "loss_box_reg", "loss_rpn_objectness", "loss_rpn_box_reg"}
SMALL: dict[str, Any] = {
    "image": {"queue": 20, "hidden": 16, "dim": 8},
    "box": {"queue": 30, "hidden": 16, "dim": 8},
    "dense": {"queue": 20, "hidden": 16, "dim": 8},
    "slots": {"prototypes": 6, "hidden": 16, "dim": 8},
    "transport": {"hidden": 16, "dim": 8},
    "reconstruction": {"widths": [16, 8, 8]},
}


def section(**values: Any) -> Pretraining:
    have = set(terms(values.get("preset", "drcl")))
    small = {key: own for key, own in SMALL.items() if have & set(OWNERS[key])}
    merged = {key: {**own, **values.get(key, {})} for key, own in small.items()}
    own = {"momentum_horizon": 0, **{k: v for k, v in values.items() if k not in small}}  # stages of few iterations
    return Pretraining.model_validate({**merged, **own})


def detector(layers: tuple[int, ...] = (2, 3, 4), norm: str = "bn") -> FasterRCNN:
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
    made, _ = build_detector(recipe, STATS)
    assert isinstance(made, FasterRCNN)
    return made


def dense_detector(name: str) -> DenseDetector:
    torch.manual_seed(0)
    own = {"name": name, "norm": "bn", "frozen_layers": 0, "fpn_channels": 32, "head_convs": 1, "fpn_convs": "pyramid"}
    recipe = check_recipe({"backbone": "resnet18", "detector": own, "loss": "focal"}, "test")
    made, _ = build_detector(recipe, STATS)
    assert isinstance(made, DenseDetector)
    return made


def shell(layers: tuple[int, ...] = (2, 3, 4), norm: str = "bn", **values: Any) -> PreTrainer:
    return PreTrainer(detector(layers, norm), section(**values), iterations=10).train()


def samples(count: int = 2, seed: int = 0, boxes: int = 3, width: int = 64) -> tuple[list[Tensor], list[dict]]:
    rng = np.random.default_rng(seed)

    def picture(across: int = 64) -> Tensor:
        return torch.from_numpy(rng.integers(0, 255, (3, 64, across), dtype=np.uint8))

    def some(n: int) -> Tensor:
        corner, side = rng.uniform(0, 24, (n, 2)), rng.uniform(10, 36, (n, 2))
        return torch.from_numpy(np.concatenate([corner, corner + side], 1).astype(np.float32))

    targets = [
        {"boxes": some(1), "labels": torch.tensor([number % 3]), "view": picture(), "proposals": some(boxes),
         "view_proposals": some(boxes), "third": picture(), "third_proposals": some(boxes),
         "overlap": torch.tensor([[16.0, 8.0, 64.0, 64.0], [0.0, 0.0, 40.0, 64.0]]),
         "flipped": torch.tensor([False, number % 2 == 0])}
        for number in range(count)
    ]  # fmt: skip
    return [picture(width) for _ in range(count)], targets


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()
