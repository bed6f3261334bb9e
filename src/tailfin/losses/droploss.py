"""DropLoss (Hsieh et al., AAAI'21): EQL, and negatives of rare classes from background rows are dropped at random.

Sigmoid on C logits; background rows have the all-zero target::

    loss = sum over rows and classes of (1 - drop (1 - t)) * BCE(z, t), divided by all rows

T are the classes with f_c < lambda_ as in `eql`. On foreground rows every class of T is dropped. On background rows
each element (row, class of T) is dropped where u > rho, u uniform, rho the fraction of the foreground rows whose own
class is in T; a batch without foreground drops nothing. No state; rho is the batch's own on each rank, as in the
authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailfin.losses.base import DROP, PRIOR_BIAS, ClassificationLoss, at_least_float32, mean_over_rows
from tailfin.losses.eql import below_frequency
from tailfin.losses.fused import one_hot_bce
from tailfin.stats import ClassStats


class DropLoss(ClassificationLoss):
    """DropLoss on C logits; divided by the number of rows. `lambda_`: image frequency below which a class is rare."""

    tail: Tensor

    def __init__(self, stats: ClassStats, *, lambda_: float = 1.77e-3) -> None:
        super().__init__(stats)
        self.num_logits = self.num_classes
        self.register_buffer("tail", below_frequency(stats, lambda_), persistent=False)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        draws: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`draws` are u, [N, C] in 0..1; without them `generator`, by default torch's of the device, draws."""
        if draws is None:
            draws = uniform(logits.shape, logits.device, generator)
        elif draws.shape != logits.shape:
            raise ValueError(f"draws must be {list(logits.shape)}, these are {list(draws.shape)}")
        foreground = labels < self.num_classes
        own_in_tail = foreground & self.tail[labels.clamp(max=self.num_classes - 1)]
        rho = own_in_tail.sum(dtype=draws.dtype) / foreground.sum()  # 0 / 0 = NaN: no draw is above it
        drop = torch.gt(draws, rho, out=torch.empty_like(logits))
        drop = torch.maximum(drop, foreground[:, None].to(drop.dtype), out=drop)
        moved = torch.addcmul(logits.detach(), drop, self.tail.to(drop.dtype), value=-DROP)
        return mean_over_rows(one_hot_bce(logits, labels, moved), len(labels))

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)


def uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform draws in 0..1, float32; on the CPU on a grid of 2^-16, four of each random number, which is faster."""
    if device.type != "cpu":
        return torch.rand(shape, device=device, generator=generator)
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: shape.numel()].view(shape).float().add_(2**15 + 0.5).mul_(2**-16)
