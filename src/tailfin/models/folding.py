"""A detector made fast for inference: norms folded into the convolutions before them, weights with channels last.

    for_inference(model)    # in place; what it finds is the same to rounding

A norm in evaluation is a factor and an offset per channel, which the convolution before it can do in its own weights.
Which norm follows which convolution is read from the order of their definition, as networks are written; a probe
picture says whether it was so, and a body whose features differ stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tailfin.models.backbones import Body
from tailfin.models.detector import Detector
from tailfin.models.frozen_norms import pairs, same_features, separate
from tailfin.models.precision import depthwise_in_float32


@torch.no_grad()
def for_inference(model: Detector) -> int:
    """Fold the norms of the backbone's body and lay weights out with channels last; returns the number of norms."""
    model.eval()
    backbone: Any = model.backbone
    folded = 0
    body = getattr(backbone, "body", None)
    if isinstance(body, Body):
        other = copy.deepcopy(body)
        folded = fold_norms(other)
        if folded and same_features(body, other):
            backbone.body = other
        else:
            folded = 0
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.channels_last = True
    return folded


def fold_norms(module: nn.Module) -> int:
    """Fold each norm that is defined right after a convolution of its width into it, in place; returns how many."""
    found = [pair for pair in pairs(module) if not pair[-1].training]
    for parent, conv, name, norm in found:
        separate(conv)
        _fold(conv, norm)
        setattr(parent, name, getattr(norm, "act", None) or nn.Identity())
    depthwise_in_float32(module)
    return len(found)


# ---- details ---------------------------------------------------------------------------------------------------------


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    factor = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    before = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    offset = norm.bias.double() + (before.double() - norm.running_mean.double()) * factor
    conv.weight = nn.Parameter((conv.weight.double() * factor[:, None, None, None]).to(conv.weight), False)
    conv.bias = nn.Parameter(offset.to(conv.weight), False)
