"""Detectors with masks through the whole line: they learn their pictures, and every method trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from conftest import make_tiny_set
from safetensors.torch import load_file

import tailfin
from tailfin import checkpoint
from tailfin.config import load_recipe
from tailfin.models import build_detector
from tailfin.stats import ClassStats
from tailfin.training_log import TrainingLog

pytestmark = pytest.mark.usefixtures("quick_training")
BOTH = "evaluation.iou=[bbox, segm]"
MASKS = [
    "detector.name=mask_rcnn",
    "detector.mask_channels=16",
    "detector.mask_layers=2",
    BOTH,
]
CASCADE = ["detector.name=cascade_rcnn", "detector.masks=true", *MASKS[1:]]
SHORT = ["schedule.epochs=1", "schedule.warmup=0", "schedule.milestones=[]"]
SECOND = "second.schedule={epochs: 1, batch: 4, lr: 0.01, warmup: 0, milestones: []}"


def outlined(path: Path) -> Path:
    """Give every object of a file an octagon in its box."""
    document: dict[str, Any] = json.loads(path.read_text())
    for annotation in document["annotations"]:
        left, top, wide, tall = annotation["bbox"]
        angle = (np.arange(8) + 0.5) * np.pi / 4
        corners = [left + wide / 2 * (1 + np.cos(angle) / np.cos(np.pi / 8)), top + tall / 2 * (1 + np.sin(angle))]
        annotation["segmentation"] = [np.stack(corners, axis=1).ravel().round(2).tolist()]
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def masked_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("masked")
    return outlined(make_tiny_set(folder / "train", 26, 0)), outlined(make_tiny_set(folder / "val", 9, 1))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures with objects and one without."""
    return outlined(make_tiny_set(tmp_path_factory.mktemp("few") / "train", 9, 3))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.parametrize("detector", [MASKS, CASCADE], ids=["mask", "cascade"])
def test_it_learns_its_pictures(few, tiny_recipe, tmp_path, detector):
    changes = [
        *("schedule.epochs=90", "schedule.batch=8", "schedule.lr=0.03", "schedule.milestones=[75]", "schedule.clip=10"),
        *("sampler=plain", "data.flip=0.5", "detector.roi_batch=32", "evaluation.batch=9", "logging.every=20"),
    ]
    out = tailfin.train(tiny_recipe, train=few, val=few, out=tmp_path / "run", overrides=[*detector, *changes])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["bbox"]["AP50"] > 0.9 and metrics["segm"]["AP50"] > 0.9, metrics
