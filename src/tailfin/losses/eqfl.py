"""Equalized quality focal loss (Li et al., CVPR'22): the equalized focal loss on C logits with IoU targets.

    element = (gamma_c / focal_gamma) |q - p|^gamma_c BCE(z, q)    summed and divided by `normalizer`

q is the row's `quality` on its own class and 0 elsewhere; there are no alpha weights. gamma_c, the statistics and the
normaliser are those of `tailfin.losses.efl`; with q = 1 everywhere this is that loss without its alpha.
"""

from __future__ import annotations

from torch import Tensor

from tailfin.losses.efl import EFL
from tailfin.stats import ClassStats


class EQFL(EFL):
    """Equalized quality focal loss; options as in `EFL`.

    Call keywords: `quality` [N] in 0..1, for instance the IoU of the predicted box with its ground truth (1 everywhere
    if not given; unused on background rows), taken as a constant; `normalizer` as in `EFL`.
    """

    row_facts = ("quality", "normalizer")

    def __init__(self, stats: ClassStats, *, focal_gamma: float = 2.0, scale_factor: float = 8.0) -> None:
        super().__init__(stats, focal_gamma=focal_gamma, scale_factor=scale_factor, focal_alpha=-1.0)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        normalizer: float | Tensor | None = None,
        quality: Tensor | None = None,
    ) -> Tensor:
        if quality is None:
            return super().loss(logits, labels, normalizer)
        if quality.shape != labels.shape:
            raise ValueError(f"quality must be [{len(labels)}], this is {list(quality.shape)}")
        return self.equalized(logits, labels, quality.detach(), normalizer)
