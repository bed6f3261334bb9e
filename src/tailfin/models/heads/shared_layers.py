"""The two fully connected layers that a box head's classifier and box layer share, and matrix products of many rows.

`product(layer, rows)` is `layer(rows)`. For many rows on a CPU it is computed as a convolution with one position, which
takes half the time of a matrix product where the latter is MKL's and the processor is AMD's (R50 at 1,000 proposals).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead

MANY = 512  # rows from which a convolution over a row's numbers is faster than a matrix product with them
SIDE = 8  # of the convolution's kernel where the rows have no sides of their own


def product(layer: nn.Linear, rows: Tensor) -> Tensor:
    """[N, in] to [N, out]."""
    if not _many(rows) or rows.ndim != 2 or rows.shape[1] % SIDE**2 or rows.shape[1] < 512:
        result: Tensor = layer(rows)
        return result
    square = (SIDE, SIDE, rows.shape[1] // SIDE**2)
    cells = rows.unflatten(1, square).permute(0, 3, 1, 2)
    weight = layer.weight.unflatten(1, square).permute(0, 3, 1, 2)
    return F.conv2d(cells, weight, layer.bias).flatten(1)


def _many(x: Tensor) -> bool:
    """Whether a convolution is allowed, and faster."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or len(x) < MANY:
        return False
    return not (torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


class SharedLayers(TwoMLPHead):
    """torchvision's `TwoMLPHead`: pooled features [N, C, m, m] to [N, width].

    The first layer takes many rows as pooling lays them out.
    """

    def forward(self, x: Tensor) -> Tensor:
        by_cells = x.ndim == 4 and x.shape[1] >= 256 and x.is_contiguous(memory_format=torch.channels_last)
        if not by_cells or not _many(x):
            result: Tensor = super().forward(x)
            return result
        weight = self.fc6.weight.view(-1, *x.shape[1:])
        hidden = F.conv2d(x, weight, self.fc6.bias).flatten(1).relu_()
        return product(self.fc7, hidden).relu_()
