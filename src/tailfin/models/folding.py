"""A detector made fast for inference: norms folded into the convolutions before them, weights with channels last.

    for_inference(model)    # in place; what it finds is the same to rounding

A norm in evaluation is a factor and an offset per channel, which the convolution before it can do in its own weights.
Which norm follows which convolution is read from the order of their definition, as networks are written; a probe
picture says whether it was so, and a body whose features differ stays as it is.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.models.backbones import Body
from tailfin.models.detector import Detector

TOLERANCE = 1e-3  # of the largest feature
PROBE = 64  # pixels


@torch.no_grad()
def for_inference(model: Detector) -> int:
    """Fold the norms of the backbone's body and lay weights out with channels last; returns the number of norms."""
    model.eval()
    backbone: Any = model.backbone
    folded = 0
    body = getattr(backbone, "body", None)
    if isinstance(body, Body):
        device = next(model.parameters()).device
        probe = torch.rand((1, 3, PROBE, PROBE), generator=torch.Generator().manual_seed(0)).to(device)
        other = copy.deepcopy(body)
        folded = fold_norms(other)
        if folded and _same(body(probe), other(probe)):
            backbone.body = other
        else:
            folded = 0
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.channels_last = True
    return folded


def fold_norms(module: nn.Module) -> int:
    """Fold each norm that is defined right after a convolution of its width into it, in place; returns how many."""
    folded = 0
    for parent in module.modules():
        children: list[tuple[str, Any]] = list(parent.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and _is_norm(norm) and len(norm.running_mean) == conv.out_channels:
                _fold(conv, norm)
                setattr(parent, name, getattr(norm, "act", None) or nn.Identity())
                folded += 1
    return folded


# ---- details ---------------------------------------------------------------------------------------------------------


def _is_norm(module: Any) -> bool:
    """Whether it is a batch norm with statistics, frozen or in evaluation."""
    parts = ("running_mean", "running_var", "weight", "bias", "eps")
    return all(getattr(module, part, None) is not None for part in parts) and not module.training


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    factor = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    before = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    offset = norm.bias.double() + (before.double() - norm.running_mean.double()) * factor
    conv.weight = nn.Parameter((conv.weight.double() * factor[:, None, None, None]).to(conv.weight), False)
    conv.bias = nn.Parameter(offset.to(conv.weight), False)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(
        bool((value - other[level]).abs().max() <= TOLERANCE * value.abs().max().clamp(min=1e-6))
        for level, value in one.items()
    )
