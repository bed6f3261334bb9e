"""Float32 under autocast: for what must not be rounded, and for what a CPU computes slowly in half precision.

A half-precision linear layer gives logits in steps of 0.06 to 0.125 at |z| = 20: hundreds of equal scores among
proposals x classes, in whatever type they are kept afterwards. So classifiers and box layers compute in float32, also
where the layers before them do not::

    logits = in_float32(classifier, features)

And depthwise convolutions of a backbone on a CPU: their gradients in bfloat16 take up to ten times as long as in
float32, so that a network of them trains slower in bfloat16 than without it::

    depthwise_in_float32(body)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def in_float32(module: Callable[..., Any], features: Tensor, *more: Any) -> Any:
    """`module(features, *more)` without autocast, on `features` in float32 (float64 stays)."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    with torch.autocast(features.device.type, enabled=False):
        return module(features, *more)


def depthwise_in_float32(network: nn.Module) -> None:
    """Let the depthwise convolutions of a network compute in float32 under a CPU's autocast, in place; what they give
    has the type of what they were given. Parameters, their names and other devices stay as they are."""
    for module in network.modules():
        kind = type(module)
        if isinstance(module, _Depthwise) or not isinstance(module, nn.Conv2d):
            continue
        if 1 < module.groups == module.in_channels:
            # another class, not another `forward`: that would belong to this module in its copies, too
            module.__class__ = type(kind.__name__, (_Depthwise, kind), {})


class _Depthwise:
    """Before a class of convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        convolve: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return convolve(x)
        with torch.autocast("cpu", enabled=False):
            return convolve(x.float()).to(x.dtype)
