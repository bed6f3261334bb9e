"""`weights: coco`: published detectors trained on COCO, by `detector.name`, through their libraries' own loaders.

    state = coco_state(recipe.detector)

torchvision's Faster R-CNN, Mask R-CNN and RetinaNet R50-FPN (COCO_V1). Their frozen norms add nothing to the variance,
where tailfin's add 1e-5: that is taken off the variances, and outputs are the same. Deformable DETR's are those of
transformers' hub, which its authors' were converted to, at fixed revisions; so are those of D-FINE, RT-DETR v2 and
RF-DETR, by `detector.size`. `load_published` is the one place that may download something.
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
from tailfin.schema.detectors import DeformableDETRConfig, DetectorSection
from tailfin.schema.realtime_detr import RealTimeDETRConfig

PUBLISHED = {
    "faster_rcnn": "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
    "mask_rcnn": "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
    "retinanet": "RetinaNet_ResNet50_FPN_Weights.COCO_V1",
}
# by (two_stage, refine): name on transformers' hub and the commit that is taken
DEFORMABLE_DETR = {
    (True, True): ("SenseTime/deformable-detr-with-box-refine-two-stage", "e74bff70d69f3e825f6cefaf179bfba707f92054"),
    (False, True): ("SenseTime/deformable-detr-with-box-refine", "2e9e461623a8fdc296e19666c46c8a4389a3a6fe"),
    (False, False): ("SenseTime/deformable-detr", "83ecd26945199939cb82806f988debdb71e6f43e"),
}
# by (detector, size): name on transformers' hub and commit. The revisions are those that others' public code pins; they
# could not be looked up at the hub itself.
REALTIME_DETR = {
    ("d_fine", "n"): ("ustc-community/dfine-nano-coco", "066438d3d8f0da137a37b38fdf3368fd4afceced"),
    ("rt_detr_v2", "r18"): ("PekingU/rtdetr_v2_r18vd", "5650961749fa93567c0d46fc7f43ea4f9e914107"),
    ("rt_detr_v2", "r34"): ("PekingU/rtdetr_v2_r34vd", "5d60d8fb5eb2a3ee5575bf200ecbce4e2cfa420c"),
    ("rt_detr_v2", "r50"): ("PekingU/rtdetr_v2_r50vd", "282494075698cab9faa1096ae26856890030c817"),
    ("rf_detr", "medium"): ("Roboflow/rf-detr-medium", "1b5b672408f86dd38e05dd3cf3f2e0834e545a59"),
    ("rf_detr", "large"): ("Roboflow/rf-detr-large", "f62f7dd5252b61097cbace33886045816dadbde9"),
}
# keys of the recipe with which the outputs are those of the published detectors
TWO_STAGE = {"anchor_style": "torchvision", "roi_aligned": False, "roi_sampling": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "faster_rcnn": TWO_STAGE,
    "mask_rcnn": TWO_STAGE,
    "retinanet": {"fpn_convs": "pyramid", "fpn_convs_relu": True, "anchor_style": "torchvision"},
}


def load_published(name: str, revision: str = "") -> dict[str, Tensor]:
    """torchvision's weights by the name of an entry, or, with a revision, those of a detector by its name on
    transformers' hub; downloaded once, offline the message says what is missing."""
    if revision:
        from transformers import AutoModelForObjectDetection  # takes seconds to import

        try:
            model = AutoModelForObjectDetection.from_pretrained(name, revision=revision)
        except Exception as error:  # each of its ways to download fails in its own way
            raise UserError(
                f"weights: coco needs {name} of transformers' hub, which could not be downloaded "
                f"({type(error).__name__}: {' '.join(str(error).split())[:160]}); start from weights=imagenet or a file"
            ) from None
        return dict(model.state_dict())
    weights: Any = torchvision.models.get_weight(name)
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"weights: coco needs {Path(weights.url).name}, which could not be downloaded ({error}); place the file in "
            f"{folder}, or start from ImageNet with weights=imagenet"
        ) from None


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Weights of a detector of transformers in a folder with its config.json, by the names of its present version."""
    from transformers import AutoModelForObjectDetection

    try:
        model = AutoModelForObjectDetection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # a configuration or a file that transformers does not know
        raise UserError(
            f"weights {folder}: transformers cannot load it ({' '.join(str(error).split())[:160]})"
        ) from None
    return dict(model.state_dict())


def coco_state(config: DetectorSection) -> dict[str, Tensor]:
    """The published weights for a recipe's detector, in their library's names."""
    if isinstance(config, DeformableDETRConfig):
        return load_published(*DEFORMABLE_DETR[config.two_stage, config.refine])
    if isinstance(config, RealTimeDETRConfig):
        return load_published(*REALTIME_DETR[config.name, config.size])
    if config.name not in PUBLISHED:
        raise UserError(f"weights: coco has {', '.join(PUBLISHED)} and deformable_detr, no {config.name}")
    return without_eps(load_published(PUBLISHED[config.name]))


def differing_settings(config: DetectorSection) -> list[str]:
    """Lines about keys of the recipe with which the detector is another one than the published."""
    wanted = SETTINGS.get(config.name, {})
    return [
        f"  published with detector.{key}={value}, this recipe has {getattr(config, key)}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
