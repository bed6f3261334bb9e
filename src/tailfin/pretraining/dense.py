"""Contrast of matched cells (DenseCL, Wang et al., CVPR'21).

The deepest features of both views are averaged to a grid; a cell of one view and the cell of the other whose features
are most alike are a pair; negatives are the mean keys of earlier pictures.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.pretraining.contrast import ContrastHead
from tailfin.pretraining.term import Iteration, Term

GRID = 7  # cells per side


class DenseContrast(Term):
    """`loss_dense`: InfoNCE of cells against the queue of mean keys."""

    averages = ("backbone",)

    def __init__(self, weight: float, head: ContrastHead) -> None:
        super().__init__()
        self.weight, self.head = weight, head

    def followed(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {**super().followed(parts), self.head.average: self.head.projector}

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        each, means = [], []
        for one, other in seen.pairs:
            queries, keys, mean = self._cells(seen, one, other)
            each.append(self.head.loss(queries, keys))
            means.append(mean)
        if self.training:
            self.head.remember(means)
        return {"loss_dense": self.weight * torch.stack(each).mean()}

    def _cells(self, seen: Iteration, one: int, other: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, dim] of cells, the keys of the most alike cells of the other view, and the mean keys [B, dim]."""
        cells, others = (
            F.adaptive_avg_pool2d(own.deepest.float(), GRID).flatten(2).transpose(1, 2)  # [B, cells, C]
            for own in (seen.features(one), seen.keys(other))
        )
        count = cells.shape[1]
        with torch.no_grad():
            alike = torch.einsum("bsc,btc->bst", F.normalize(cells, dim=2), F.normalize(others, dim=2)).argmax(2)
            every = self.head.keys(others.flatten(0, 1), seen.average[self.head.average])
            means = F.normalize(every.view(len(others), count, -1).mean(1), dim=1)
            first = torch.arange(len(others), device=alike.device)[:, None] * count
        return self.head.queries(cells.flatten(0, 1)), every[(alike + first).flatten()], means
