"""Names of backbones and of the weights that they start from."""

from __future__ import annotations

from tailfin.errors import nearest

CAFFE = {"resnet50_caffe": "resnet50", "resnet101_caffe": "resnet101"}  # stride in the first 1x1 of a block
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", *CAFFE)
TIMM = "timm/"  # before any name of timm's
DINOV3 = "transformers/dinov3_convnext_"  # before its size
DINOV3_NAMES = tuple(f"{DINOV3}{size}" for size in ("tiny", "small", "base", "large"))
PACKAGED = "timm/tf_efficientnet_lite0"  # the backbone that `weights: packaged` is for
NAMED_WEIGHTS = ("none", "imagenet", "packaged", "coco")  # values of `weights` that are no file


def known_backbone(name: str) -> str:
    """`name` if it is a ResNet, a ConvNeXt of DINOv3 or begins with "timm/", else a `ValueError`; what follows is
    checked with timm."""
    if name in (*RESNETS, *DINOV3_NAMES) or (name.startswith(TIMM) and name != TIMM):
        return name
    raise ValueError(f'"{name}" is not a choice{nearest(name, (*RESNETS, *DINOV3_NAMES, f"{TIMM}NAME"))}')


def check_backbone(backbone: str, weights: str, norm: str) -> None:
    """Whether the weights and the norm are for this backbone, else a `ValueError`."""
    timm = backbone.startswith(TIMM)
    if backbone in DINOV3_NAMES:
        if norm != "own":
            raise ValueError(f'detector.norm "{norm}": {backbone} has layer norms of its own; use own')
        return
    if weights in ("imagenet", "coco") and backbone in CAFFE:
        raise ValueError(
            f"weights: {weights} are of a ResNet with the stride in its 3x3 convolutions, not of {backbone}: set "
            f"backbone={CAFFE[backbone]}"
        )
    if weights == "coco" and norm == "gn":
        raise ValueError('weights: coco has batch norm and does not fit detector.norm "gn": use frozen_bn or bn')
    if weights == "packaged" and backbone.partition(".")[0] != PACKAGED:
        raise ValueError(f"weights: packaged is for backbone {PACKAGED}, not {backbone}")
    if norm == "own" and not timm:
        raise ValueError(
            f'detector.norm "own" is for timm backbones; {backbone} takes frozen_bn, frozen_stats, bn or gn'
        )
    if norm == "gn" and timm:
        raise ValueError(f'detector.norm "gn" does not fit {backbone}, which has norms of its own: use "own"')
