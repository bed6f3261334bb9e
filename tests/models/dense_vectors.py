"""Raw outputs and targets of the reference vectors of dense detectors, as tailfin's `Outputs`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tailfin.config import check_recipe
from tailfin.models import build_detector
from tailfin.models.dense import DenseDetector, Outputs
from tailfin.stats import ClassStats


def tensor(value: Any, dtype: torch.dtype) -> torch.Tensor:
    found = torch.from_numpy(np.asarray(value))
    return found.to(dtype) if found.is_floating_point() else found


def detector(file: dict, case: str, name: str, loss: str = "focal", **options: Any) -> DenseDetector:
    """A small detector with a vector's classes and limits; its own weights play no part."""
    get = lambda key: file[f"{case}/hp/{key}"]  # noqa: E731
    classes, levels = int(file[f"{case}/num_classes"]), len(file[f"{case}/strides"])
    values = {
        "weights": "none",
        "backbone": "resnet18",
        "detector": {
            "name": name, "norm": "bn", "frozen_layers": 0, "fpn_channels": 32, "head_convs": 0,
            "fpn_convs": "none" if levels == 3 else options.pop("fpn_convs", "pyramid"), **options,
        },
        "loss": loss,
        "evaluation": {
            "score_threshold": float(get("score_thr")), "nms": float(get("nms_iou")),
            "max_dets": int(get("max_per_img")),
        },
    }  # fmt: skip
    count = np.full(classes, 10)
    stats = ClassStats(image_count=count, instance_count=count, num_images=100)
    return build_detector(check_recipe(values, "test"), stats)[0]


def outputs(file: dict, case: str, dtype: torch.dtype) -> Outputs:
    """The stored maps, as leaves that gradients reach; anchors are the stored ones too."""
    levels = range(len(file[f"{case}/strides"]))

    def maps(name: str) -> list[torch.Tensor]:
        if f"{case}/level0/{name}" not in file:
            return []
        return [tensor(file[f"{case}/level{level}/{name}"], dtype).requires_grad_() for level in levels]

    pictures = range(int(file[f"{case}/num_images"]))
    return Outputs(
        [tuple(file[f"{case}/img{picture}/shape"].tolist()) for picture in pictures],
        {},
        [tensor(file[f"{case}/level{level}/anchors"], dtype) for level in levels],
        maps("cls_logits"),
        maps("box_deltas"),
        maps("centerness_logits"),
    )


def targets(file: dict, case: str) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "boxes": tensor(file[f"{case}/img{picture}/gt_boxes"], torch.float32),
            "labels": torch.from_numpy(file[f"{case}/img{picture}/gt_labels"]),
        }
        for picture in range(int(file[f"{case}/num_images"]))
    ]


def assigned(file: dict, case: str) -> torch.Tensor:
    """int64 [B, N] of the vector; ignored anchors, which some have as background without weight, are -2."""
    found = []
    for picture in range(int(file[f"{case}/num_images"])):
        own = torch.from_numpy(file[f"{case}/img{picture}/assigned_gt_index"])
        weight = torch.from_numpy(file[f"{case}/img{picture}/label_weights"])
        found.append(torch.where(weight == 0, -2, own))
    return torch.stack(found)


def check_detections(model: DenseDetector, file: dict, case: str) -> None:
    """Boxes, scores and classes of the vector, in its order."""
    with torch.no_grad():
        found = model.detections(outputs(file, case, torch.float64), model.limits)
    for picture, own in enumerate(found):
        prefix = f"{case}/img{picture}/test"
        np.testing.assert_allclose(own["scores"], file[f"{prefix}/det_scores"], rtol=1e-6)
        np.testing.assert_array_equal(own["labels"], file[f"{prefix}/det_labels"])
        np.testing.assert_allclose(own["boxes"], file[f"{prefix}/det_boxes"], rtol=1e-6, atol=1e-4)


def check_gradients(found: Outputs, losses: dict[str, torch.Tensor], file: dict, case: str) -> None:
    """Gradients of the sum of all losses on the stored maps."""
    torch.stack(list(losses.values())).sum().backward()
    for level in range(len(found.logits)):
        for name, own in (("cls", found.logits), ("box", found.deltas), ("centerness", found.quality)):
            if own:
                wanted = file[f"{case}/level{level}/grad_{name}"]
                np.testing.assert_allclose(own[level].grad, wanted, rtol=1e-4, atol=1e-7, err_msg=f"{name} {level}")
