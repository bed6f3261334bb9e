"""Names of backbones and of the weights that they start from."""

from __future__ import annotations

from tailfin.errors import nearest

CAFFE = {"resnet50_caffe": "resnet50", "resnet101_caffe": "resnet101"}  # stride in the first 1x1 of a block
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", *CAFFE)
TIMM = "timm/"  # before any name of timm's
DINOV3 = "transformers/dinov3_convnext_"  # before its size
DINOV3_NAMES = tuple(f"{DINOV3}{size}" for size in ("tiny", "small", "base", "large"))
# of the query-based detectors made for speed: D-FINE's, RT-DETR v2's, RF-DETR's (by the size of its pictures)
HUB = "transformers/"
HGNETS = tuple(f"{HUB}hgnet_v2_{size}" for size in ("b0", "b2", "b4", "b5"))
RESNETS_VD = tuple(f"{HUB}resnet{depth}_vd" for depth in (18, 34, 50))
RF_DINOV2 = tuple(f"{HUB}rf_detr_dinov2_{side}" for side in (384, 512, 576, 704))
HUB_NAMES = (*HGNETS, *RESNETS_VD, *RF_DINOV2)
PACKAGED = "timm/tf_efficientnet_lite0"  # the backbone that `weights: packaged` is for
NAMED_WEIGHTS = ("none", "imagenet", "packaged", "coco")  # values of `weights` that are no file


def known_backbone(name: str) -> str:
    """`name` if it is a ResNet, one of transformers' networks here or begins with "timm/", else a `ValueError`; what
    follows is checked with timm."""
    known = (*RESNETS, *DINOV3_NAMES, *HUB_NAMES)
    if name in known or (name.startswith(TIMM) and name != TIMM):
        return name
    raise ValueError(f'"{name}" is not a choice{nearest(name, (*known, f"{TIMM}NAME"))}')


def check_backbone(backbone: str, weights: str, norm: str) -> None:
    """Whether the weights and the norm are for this backbone, else a `ValueError`."""
    timm = backbone.startswith(TIMM)
    if backbone in DINOV3_NAMES:
        if norm != "own":
            raise ValueError(f'detector.norm "{norm}": {backbone} has layer norms of its own; use own')
        return
    if backbone in HUB_NAMES:
        norms = ("own",) if backbone in RF_DINOV2 else ("frozen_bn", "bn")
        if norm not in norms:
            raise ValueError(f'detector.norm "{norm}": {backbone} takes {" or ".join(norms)}')
        if weights in ("imagenet", "packaged"):
            raise ValueError(f"weights: {weights} has no {backbone}: start from coco, a file or none")
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
