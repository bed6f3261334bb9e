"""Contrast of maps by optimal transport: Self-EMD (Liu et al., "Self-EMD: Self-Supervised Object Detection without
ImageNet", 2020).

BYOL without pooling: every cell of the deepest layer is projected (and predicted), and two views are as far apart as
the cheapest way to carry the one's cells to the other's.

    cost[i, j]     1 - cos(x_i, y_j)
    mass of x_i    max(x_i . mean of y, 0), in sum 1; of y_j alike: cells without a partner weigh little
    flow           argmin sum flow cost - epsilon entropy(flow), by Sinkhorn's iterations; constant in the gradient
    loss           2 sum flow cost, which for maps of one cell is BYOL's 2 - 2 cos
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tailfin.pretraining.contrast import ContrastHead
from tailfin.pretraining.reconstruction import real_cells
from tailfin.pretraining.term import Iteration, Term
from tailfin.schema.pretraining import TransportContrast as Config

LEAST = 1e-3  # mass of a cell that resembles nothing, before masses are made to sum to 1


class TransportContrast(Term):
    """`loss_emd` of every pair of views."""

    averages = ("backbone",)

    def __init__(self, weight: float, head: ContrastHead, config: Config) -> None:
        super().__init__()
        self.weight, self.head, self.config = weight, head, config

    def followed(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {**super().followed(parts), self.head.average: self.head.projector}

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        queries = {number: self.cells(seen, number) for number in sorted({one for one, _ in seen.pairs})}
        keys = {number: self.cells(seen, number, keys=True) for number in sorted({other for _, other in seen.pairs})}
        each = [earth_mover(*queries[one], *keys[other], self.config) for one, other in seen.pairs]
        return {"loss_emd": self.weight * torch.stack(each).mean()}

    def cells(self, seen: Iteration, number: int, *, keys: bool = False) -> tuple[Tensor, Tensor]:
        """Unit rows [B, cells, dim] of a view, and which are the picture's own, bool [B, cells]."""
        feature = (seen.keys(number) if keys else seen.features(number)).deepest
        rows = feature.flatten(2).transpose(1, 2).flatten(0, 1)
        found = self.head.keys(rows, seen.average[self.head.average]) if keys else self.head.queries(rows)
        real = real_cells(seen.view(number), feature).flatten(1)
        return found.view(len(feature), -1, found.shape[-1]), real


def earth_mover(own: Tensor, own_real: Tensor, other: Tensor, other_real: Tensor, config: Config) -> Tensor:
    """2 sum flow (1 - cos) of unit rows [B, N, D] and [B, M, D], the mean over pictures; of the others bool [B, N]."""
    cost = 1 - own @ other.transpose(1, 2)
    with torch.no_grad():
        masses = masses_of(own, own_real, other, other_real), masses_of(other, other_real, own, own_real)
        flow = sinkhorn(cost, *masses, config.epsilon, config.iterations)
    return 2 * (flow * cost).sum((1, 2)).mean()


def masses_of(own: Tensor, own_real: Tensor, other: Tensor, other_real: Tensor) -> Tensor:
    """[B, N]: how much of the other map each row resembles, in sum 1; 0 for padding."""
    mean = (other * other_real[..., None]).sum(1) / other_real.sum(1, keepdim=True)
    mass = ((own @ mean[..., None]).squeeze(-1).clamp(min=0) + LEAST) * own_real
    return mass / mass.sum(1, keepdim=True)


def sinkhorn(cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The flow [B, N, M] of entropic transport between masses [B, N] and [B, M]; its columns sum to theirs, its rows
    the more nearly the more iterations there are. Computed in logarithms, so that no epsilon is too small."""
    kernel = -cost / epsilon
    log_rows, log_columns = rows.log(), columns.log()
    right = torch.zeros_like(columns)
    left = torch.zeros_like(rows)
    for _ in range(iterations):
        left = log_rows - (kernel + right[:, None]).logsumexp(2)
        right = log_columns - (kernel + left[:, :, None]).logsumexp(1)
    return (kernel + left[:, :, None] + right[:, None]).exp()
