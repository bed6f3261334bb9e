"""Sigmoid cross-entropy against one-hot labels with its gradient from the same pass, and the hook for such losses.

Losses on thousands of classes spend their time in passes over [N, width] arrays. Where the gradient has a closed form
it is written down once and handed to autograd, which then has nothing to rebuild::

    moved = torch.sub(logits.detach(), unwanted, alpha=DROP)     # drops elements where `unwanted` is 1
    total = one_hot_bce(logits, labels, moved)

First derivatives only: a backward pass that is to be differentiated again (`create_graph=True`) is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR_ABOVE = 40.0  # softplus(z) = z to double precision


def one_hot_bce(logits: Tensor, labels: Tensor, moved: Tensor | None = None) -> Tensor:
    """Sum over all elements of BCE(z, t), t the one-hot target.

    Args:
        logits: [N, width], float32 or float64.
        labels: [N] int64; a label >= width is a row of zeros (background without a column of its own).
        moved: [N, width], the logits plus constants, detached: takes the place of z except in the element of a row's
            own label.
    """
    with torch.no_grad():
        column = labels.clamp(max=logits.shape[1] - 1)[:, None]
        own = labels[:, None] < logits.shape[1]
        z = logits if moved is None else moved
        chosen = torch.where(own, -logits.gather(1, column), z.gather(1, column))  # BCE(z, 1) = BCE(-z, 0)
        value = softplus(z).scatter_(1, column, softplus(chosen)).sum()
        if not logits.requires_grad:
            return value
        slope = chosen.sigmoid()
        gradient = z.sigmoid().scatter_(1, column, torch.where(own, -slope, slope))
    return known_gradient(logits, value, gradient)


def softplus(logits: Tensor) -> Tensor:
    """log(1 + exp(z)) = BCE(z, 0), exact for any z; the threshold of torch's default is a float32 one."""
    return F.softplus(logits, threshold=LINEAR_ABOVE)


def known_gradient(logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The scalar `value`, attached to the graph of `logits` with d value / d logits = `gradient`."""
    return _KnownGradient.apply(logits, value, gradient)  # type: ignore[no-any-return]


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # the stored gradient would count as a constant
            raise RuntimeError("this loss has no second derivative (backward with create_graph=True)")
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None
