"""DINOv3's ConvNeXts (Simeoni et al., 2025) of transformers as bodies.

    body = dinov3_body("transformers/dinov3_convnext_tiny")       a `Body`: stem and stages of strides 4, 8, 16, 32
    state = load_published("transformers/dinov3_convnext_tiny")   the published weights, by transformers' names
    load_body(body, body_state(state), "weights")

The published weights are behind a licence at their hub: transformers' own loader asks for it. Norms are layer norms
over the channels and train (`detector.norm: own`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tailfin.errors import UserError
from tailfin.models.backbones import Body
from tailfin.schema.backbones import DINOV3

# depths and widths of the four stages
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
HUB = "facebook/dinov3-convnext-{}-pretrain-lvd1689m"
RENAMED = (  # transformers' names, of the network alone or in a model
    (r"^(?:model\.)?stages\.0\.downsample_layers\.", "stem."),
    (r"^(?:model\.)?stages\.0\.layers\.", "stage1."),
    (r"^(?:model\.)?stages\.1\.", "stage2."),
    (r"^(?:model\.)?stages\.2\.", "stage3."),
    (r"^(?:model\.)?stages\.3\.", "stage4."),
)
LEFT_OUT = re.compile(r"^(?:model\.)?layer_norm\.|^norm\.")  # behind the last stage


def dinov3_body(backbone: str) -> Body:
    """A ConvNeXt with random weights; its stem is the first strided convolution with its norm."""
    model, config = _transformers(backbone)
    stages = list(model.model.stages)
    parts: dict[str, nn.Module] = {"stem": nn.Sequential(*stages[0].downsample_layers)}
    parts["stage1"] = nn.Sequential(*stages[0].layers)
    parts |= {f"stage{number}": stage for number, stage in enumerate(stages[1:], start=2)}
    widths = {f"stage{number}": width for number, width in enumerate(config.hidden_sizes, start=1)}
    return Body(parts, widths, {name: 4 * 2**place for place, name in enumerate(widths)})


def body_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by transformers' names to those of the body; the norm behind the last stage is left out."""
    found = {}
    for key, value in state.items():
        if not LEFT_OUT.search(key):
            name = key
            for pattern, ours in RENAMED:
                name = re.sub(pattern, ours, name)
            found[name] = value
    return found


def load_published(backbone: str) -> dict[str, Tensor]:
    """The published weights; downloaded once, offline or without the licence the message says what is missing."""
    from transformers import DINOv3ConvNextModel

    name = HUB.format(_size(backbone))
    try:
        return dict(DINOv3ConvNextModel.from_pretrained(name).state_dict())
    except Exception as error:  # each of its ways to download fails in its own way
        raise UserError(
            f"weights: imagenet needs {name}, which could not be downloaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); it is behind a licence that the hub asks for; or name a file of "
            "its weights, or start from random weights with weights=none detector.frozen_layers=0"
        ) from None


def _transformers(backbone: str) -> tuple[Any, Any]:
    try:
        from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel
    except ImportError:
        raise UserError(f"backbone {backbone} needs a transformers that has DINOv3's ConvNeXt") from None
    depths, widths = SIZES[_size(backbone)]
    config = DINOv3ConvNextConfig(depths=list(depths), hidden_sizes=list(widths))
    return DINOv3ConvNextModel(config), config


def _size(backbone: str) -> str:
    return backbone.removeprefix(DINOV3)
