"""ResNet + FPN from torchvision bricks, with the norm and freezing of detection practice.

`weights: imagenet` loads torchvision's published classification weights through torchvision's own loader; a random
start switches the norm to "bn" or "gn", since frozen statistics of nothing cannot train.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tailfin.errors import UserError

IMAGENET_WEIGHTS = {
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet34": "ResNet34_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "frozen_bn": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "gn": functools.partial(nn.GroupNorm, 32),
}


def resnet_fpn(
    name: str,
    *,
    norm: str,
    layers: tuple[int, ...],
    channels: int,
    pool: bool,
    frozen_layers: int,
    state: dict[str, Tensor] | None = None,
    source: str = "backbone weights",
) -> BackboneWithFPN:
    """A ResNet body with a feature pyramid on the outputs of `layers` (1..4, strides 4..32).

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        norm: a key of `NORMS`, used in the body; the pyramid has none.
        channels: width of every pyramid level.
        pool: one more level, max-pooled from the last.
        frozen_layers: how many of (stem, layer1, ..., layer4) do not train.
        state: body weights in torchvision's naming (`imagenet_state` or a file's); none is a random start.
        source: the name of `state` in messages.
    """
    body = getattr(torchvision.models, name)(weights=None, norm_layer=NORMS[norm])
    widths = [getattr(body, f"layer{layer}")[-1].conv2.out_channels for layer in layers]
    if name not in ("resnet18", "resnet34"):
        widths = [getattr(body, f"layer{layer}")[-1].conv3.out_channels for layer in layers]
    if state is not None:
        load_body(body, state, source)
    for part in (["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"])[:frozen_layers]:
        for module in part:
            getattr(body, module).requires_grad_(False)
    return BackboneWithFPN(
        body,
        return_layers={f"layer{layer}": str(level) for level, layer in enumerate(layers)},
        in_channels_list=widths,
        out_channels=channels,
        extra_blocks=LastLevelMaxPool() if pool else _NoExtraLevel(),
    )


def load_body(body: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load classification weights into the body; the classifier (`fc.*`) is left out, all else must fit."""
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    result = body.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if not key.startswith("fc.") and "num_batches_tracked" not in key]
    unexpected = [key for key in result.unexpected_keys if "num_batches_tracked" not in key]
    if missing or unexpected:
        raise UserError(
            f"{source}: the weights do not fit the backbone: {len(missing)} are missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} are unknown ({', '.join(unexpected[:3])})"
        )


def imagenet_state(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of a ResNet; downloaded once, offline the message says what is missing."""
    weights = torchvision.models.get_weight(IMAGENET_WEIGHTS[name])
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"weights: imagenet needs {Path(weights.url).name}, which could not be downloaded ({error}); "
            f"place the file in {folder}, or start from random weights with weights=none detector.norm=bn "
            f"detector.frozen_layers=0"
        ) from None


class _NoExtraLevel(LastLevelMaxPool):
    """Stands for "no more levels": torchvision reads a missing block as the max-pooled level."""

    def forward(self, x: list[Tensor], y: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return x, names
