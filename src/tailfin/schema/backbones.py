"""Names of backbones and of the weights that they start from."""

from __future__ import annotations

from tailfin.errors import nearest

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
TIMM = "timm/"  # before any name of timm's
PACKAGED = "timm/tf_efficientnet_lite0"  # the backbone that `weights: packaged` is for
NAMED_WEIGHTS = ("none", "imagenet", "packaged")  # values of `weights` that are no file


def known_backbone(name: str) -> str:
    """`name` if it is a ResNet or begins with "timm/", else a `ValueError`; what follows is checked with timm."""
    if name in RESNETS or (name.startswith(TIMM) and name != TIMM):
        return name
    raise ValueError(f'"{name}" is not a choice{nearest(name, (*RESNETS, f"{TIMM}NAME"))}')


def check_backbone(backbone: str, weights: str, norm: str) -> None:
    """Whether the weights and the norm are for this backbone, else a `ValueError`."""
    timm = backbone.startswith(TIMM)
    if weights == "packaged" and backbone.partition(".")[0] != PACKAGED:
        raise ValueError(f"weights: packaged is for backbone {PACKAGED}, not {backbone}")
    if norm == "own" and not timm:
        raise ValueError(
            f'detector.norm "own" is for timm backbones; {backbone} takes frozen_bn, frozen_stats, bn or gn'
        )
    if norm == "gn" and timm:
        raise ValueError(f'detector.norm "gn" does not fit {backbone}, which has norms of its own: use "own"')
