"""Batch norms with fixed statistics, computed as part of the convolution before them.

    norm = FrozenNorm(64)                 in the type of its input, nothing of it trains
    norm = FixedStatistics(64)            scale and shift train (mmdetection's `norm_eval`)
    join_norms(body)                      in place: the convolutions of a body do the norms behind them

A norm with fixed statistics is a factor and an offset per channel. As an operation of its own it reads and writes every
activation once more in the forward and in the backward pass. The convolution before it can have the factor in its
weights and the offset as its bias, which costs a pass over the weights: worth it wherever a batch has more cells than
an output channel has weights (early layers, large pictures), and chosen call by call. A trained scale gains most:
its gradient then comes from the weights' and not from the convolution's output, which need not be kept.

Parameters, their names and gradients stay as they are; results are the same to rounding.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

TOLERANCE = 1e-3  # of the largest feature
PROBE = 64  # pixels
WORTH = 2  # output cells per weight of an output channel, from which on the weights' two passes cost less


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's batch norm with fixed statistics, in the type of its input: under autocast torchvision's gives
    float32, and every activation behind it would be kept in that."""

    joined = False  # the convolution before it does its work

    def forward(self, x: Tensor) -> Tensor:
        return x if self.joined else self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        """The norm of [B, C, H, W], whoever asks."""
        scale, shift = (one.to(x.dtype)[:, None, None] for one in self.scale_and_shift())
        return torch.addcmul(shift, x, scale)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and offset [C] of the channels, in the buffers' type."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class FixedStatistics(FrozenNorm):
    """`FrozenNorm` whose scale and shift train, as mmdetection's detectors have it (`norm_eval`)."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        for name in ("weight", "bias"):
            value = self._buffers.pop(name)
            self.register_parameter(name, nn.Parameter(value))  # type: ignore[arg-type]


def pairs(module: nn.Module) -> list[tuple[nn.Module, nn.Conv2d, str, Any]]:
    """(parent, convolution, name of the norm, norm) of every norm with statistics that is defined right after a
    convolution of its width, as networks are written; whether it also follows it, features tell (`same_features`)."""
    found = []
    for parent in module.modules():
        children: list[tuple[str, Any]] = list(parent.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and _has_statistics(norm) and len(norm.running_mean) == conv.out_channels:
                found.append((parent, conv, name, norm))
    return found


@torch.no_grad()
def same_features(one: nn.Module, other: nn.Module) -> bool:
    """Whether two bodies have the same features of a picture of noise, to rounding."""
    weights = next(one.parameters())
    probe = torch.rand((1, 3, PROBE, PROBE), generator=torch.Generator().manual_seed(0)).to(weights)
    theirs = other(probe)
    return all(
        bool((value - theirs[level]).abs().max() <= TOLERANCE * value.abs().max().clamp(min=1e-6))
        for level, value in one(probe).items()
    )


def join_norms(body: nn.Module) -> int:
    """Let the convolutions of a body, which gives features by name, do the frozen norms right behind them; returns how
    many. A body whose features would differ stays as it is, and so does one without values (on the meta device)."""
    if not _joinable(body) or any(value.is_meta for value in body.parameters()):
        return 0
    plain, trial = (_unsettled(copy.deepcopy(body)) for _ in range(2))
    _join(trial)
    return _join(body) if same_features(plain, trial) else 0


@contextmanager
def norms_apart(module: nn.Module) -> Iterator[None]:
    """For a while every norm does its own work, so that a hook on it sees what reaches it."""
    joined = [norm for norm in module.modules() if isinstance(norm, FrozenNorm) and norm.joined]
    for norm in joined:
        norm.joined = False
    try:
        yield
    finally:
        for norm in joined:
            norm.joined = True


def separate(conv: nn.Conv2d) -> None:
    """Undo `join_norms` for one convolution, in place."""
    if isinstance(conv, _Normed):
        conv.norm_behind[0].joined = False
        del conv.norm_behind
        kinds = type(conv).__mro__
        conv.__class__ = kinds[kinds.index(_Normed) + 1]


# ---- details ---------------------------------------------------------------------------------------------------------


def _has_statistics(norm: Any) -> bool:
    parts = ("running_mean", "running_var", "weight", "bias", "eps")
    return all(getattr(norm, part, None) is not None for part in parts)


class _Normed:
    """Before a class of convolutions."""

    norm_behind: tuple[FrozenNorm]  # in a tuple: it is not a part of this module

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self
        (norm,) = self.norm_behind
        if not norm.joined:
            return super().forward(x)  # type: ignore[misc]
        if not _pays(conv, x):
            return norm.normed(super().forward(x))  # type: ignore[misc]
        scale, shift = norm.scale_and_shift()
        weight = (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype)
        bias = (shift if conv.bias is None else shift + conv.bias * scale).to(weight.dtype)
        return _convolve(conv, x, weight, bias)


def _pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the weights are less work than the output; in a graph that is compiled or exported they are constants."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    cells = x.shape[0] * (x.shape[2] // conv.stride[0]) * (x.shape[3] // conv.stride[1])
    return cells > WORTH * conv.weight[0].numel()


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    same = _same_padding(conv)
    if same is not None:
        return same(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return conv._conv_forward(x, weight, bias)


def _same_padding(conv: nn.Conv2d) -> Any:
    """timm's function for convolutions with TensorFlow's padding, if this is one of them."""
    for kind in type(conv).__mro__:
        if kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm."):
            return sys.modules[kind.__module__].conv2d_same
    return None


def _joinable(body: nn.Module) -> list[tuple[nn.Conv2d, FrozenNorm]]:
    """Pairs of which the norm is a frozen one and the convolution computes as torch's or timm's does."""
    return [
        (conv, norm)
        for _, conv, _, norm in pairs(body)
        if isinstance(norm, FrozenNorm)
        and not isinstance(conv, _Normed)
        and (type(conv) is nn.Conv2d or _same_padding(conv) is not None)
    ]


def _join(body: nn.Module) -> int:
    found = _joinable(body)
    for conv, norm in found:
        kind = type(conv)
        norm.joined = True
        conv.__class__ = type(kind.__name__, (_Normed, kind), {})
        conv.norm_behind = (norm,)  # type: ignore[assignment]
    return len(found)


@torch.no_grad()
def _unsettled(body: nn.Module) -> nn.Module:
    """With statistics and weights that are not those of a start, which would hide a norm in the wrong place."""
    generator = torch.Generator().manual_seed(1)
    for norm in body.modules():
        if isinstance(norm, FrozenNorm):
            for name, low in (("weight", 0.5), ("bias", -0.2), ("running_mean", -0.2), ("running_var", 0.5)):
                value = getattr(norm, name)
                value.copy_(torch.rand(value.shape, generator=generator) + low)
    return body.eval()
