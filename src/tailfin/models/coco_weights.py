"""`weights: coco`: published detectors trained on COCO, by `detector.name`, through their libraries' own loaders.

    state = coco_state("faster_rcnn", "resnet50")

torchvision's Faster R-CNN, Mask R-CNN and RetinaNet R50-FPN (COCO_V1). Their frozen norms add nothing to the variance,
where tailfin's add 1e-5: that is taken off the variances, and outputs are the same. `load_published` is the one place
that may download something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor

from tailfin.errors import UserError
from tailfin.models.released import without_eps
from tailfin.schema.detectors import DetectorSection

PUBLISHED = {
    "faster_rcnn": "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
    "mask_rcnn": "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
    "retinanet": "RetinaNet_ResNet50_FPN_Weights.COCO_V1",
}
# keys of the recipe with which the outputs are those of the published detectors
TWO_STAGE = {"anchor_style": "torchvision", "roi_aligned": False, "roi_sampling": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "faster_rcnn": TWO_STAGE,
    "mask_rcnn": TWO_STAGE,
    "retinanet": {"fpn_convs": "pyramid", "fpn_convs_relu": True, "anchor_style": "torchvision"},
}


def load_published(name: str) -> dict[str, Tensor]:
    """torchvision's weights by the name of an entry; downloaded once, offline the message says what is missing."""
    weights: Any = torchvision.models.get_weight(name)
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"weights: coco needs {Path(weights.url).name}, which could not be downloaded ({error}); place the file in "
            f"{folder}, or start from ImageNet with weights=imagenet"
        ) from None


def coco_state(detector: str) -> dict[str, Tensor]:
    """The published weights for `detector.name`, in their library's names."""
    if detector not in PUBLISHED:
        raise UserError(f"weights: coco has {', '.join(PUBLISHED)}, no {detector}")
    return without_eps(load_published(PUBLISHED[detector]))


def differing_settings(config: DetectorSection) -> list[str]:
    """Lines about keys of the recipe with which the detector is another one than the published."""
    wanted = SETTINGS.get(config.name, {})
    return [
        f"  published with detector.{key}={value}, this recipe has {getattr(config, key)}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
