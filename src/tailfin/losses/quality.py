"""What the losses share whose target of a row's own class is how well its box lies: `varifocal.py`, `ia_bce.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from tailfin.losses.base import own_column, per_object


def own_logits(logits: Tensor, labels: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of every row of [N, C] the logit of its own class (background: of some class), and its quality, [N, 1] each.

    `quality` [N] is the IoU of the row's box with its object, a constant for the gradient; none is 1.
    """
    z = logits.gather(1, own_column(labels, logits.shape[1])[0])
    return z, torch.ones_like(z) if quality is None else quality.detach().to(z.dtype)[:, None]


def over_objects(others: Tensor, own: Tensor, labels: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """The sum of `others` [N, C], with `own` [N, 1] in the place of a foreground row's own class, per object."""
    column, inside = own_column(labels, others.shape[1])
    total = others.sum() + torch.where(inside, own - others.gather(1, column), 0.0).sum()
    return per_object(total, labels, others.shape[1], normalizer)
