"""The two fully connected layers that a box head's classifier and box layer share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead

MANY = 512  # rows from which a convolution over a row's cells is faster than a matrix product over the same numbers


class SharedLayers(TwoMLPHead):
    """torchvision's `TwoMLPHead`: pooled features [N, C, m, m] to [N, width].

    Without gradients, for many rows on a CPU, the first layer is the same sum as a convolution with one position, which
    takes the rows as pooling lays them out: half the time at 1,000 proposals of 7 x 7 x 256.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self._as_convolution(x):
            result: Tensor = super().forward(x)
            return result
        weight = self.fc6.weight.view(-1, *x.shape[1:])
        hidden = F.conv2d(x, weight, self.fc6.bias).flatten(1).relu_()
        return F.relu(self.fc7(hidden))

    def _as_convolution(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or x.ndim != 4 or x.device.type != "cpu" or x.dtype != torch.float32:
            return False
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        return len(x) >= MANY and x.shape[1] >= 256 and x.is_contiguous(memory_format=torch.channels_last)
