"""What pre-training asks of a backbone: every layer's output, the pyramid over them, channels and strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def layer_modules(body: nn.Module) -> dict[str, nn.Module]:
    """A ResNet body's layer1..layer4, as many as it has."""
    return {name: module for name, module in body.items() if name.startswith("layer")}  # type: ignore[operator]


def body_layers(body: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
    """Outputs of all layers of a ResNet body, not of those alone that the pyramid takes."""
    found = {}
    for name, module in body.items():  # type: ignore[operator]
        pictures = module(pictures)
        if name.startswith("layer"):
            found[name] = pictures
    return found


def pyramid(fpn: nn.Module, body: Any, layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pyramid over those layers that it was built for."""
    return fpn({name: layers[layer] for layer, name in body.return_layers.items()})


def deepest(body: nn.Module) -> tuple[int, int]:
    """(channels, stride) of the last layer."""
    name, layer = list(layer_modules(body).items())[-1]
    block = layer[-1]  # type: ignore[index]
    channels = (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels
    return channels, 2 ** (1 + int(name.removeprefix("layer")))
