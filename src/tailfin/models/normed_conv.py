"""A mask predictor of cosines: what `NormedLinear` is for classes, for the pixels of a mask head.

temperature * x / (|x|^power + eps) convolved with w / (|w|^power + eps), plus a bias: mmdetection's predictor of the
Seesaw models with normalised masks. |x| is over the channels of a pixel, |w| over the input channels at each position
of the kernel, or over the whole filter::

    predictor = NormedConv2d(256, num_classes, 1)      # temperature 20
    logits = predictor(features)                       # [P, 256, 28, 28] -> [P, num_classes, 28, 28]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.losses.base import at_least_float32
from tailfin.models.precision import in_float32


class NormedConv2d(nn.Conv2d):
    """A convolution of directions.

    Args:
        in_channels, out_channels, kernel_size, conv: as of `nn.Conv2d`.
        temperature: scale of the features.
        power: exponent of the lengths; 1 for the cosine.
        eps: added to the lengths, not under their root.
        norm_over_kernel: lengths of whole filters instead of one for each position of the kernel; the same where the
            kernel is 1 x 1.
        learnable: the root of the temperature is a parameter, as in FRACAL's models (which start at 4.5: 20.25).

    Weights start from Kaiming's normal distribution over the outputs, the bias at 0. Lengths are taken in float32 at
    least. A pixel of zeros gets the bias as logits.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        temperature: float = 20.0,
        power: float = 1.0,
        eps: float = 1e-6,
        norm_over_kernel: bool = False,
        learnable: bool = False,
        **conv: Any,
    ) -> None:
        for name, value in (("temperature", temperature), ("power", power), ("eps", eps)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 (given: {value})")
        super().__init__(in_channels, out_channels, kernel_size, **conv)
        self.temperature = temperature
        self.power = power
        self.eps = eps
        self.norm_over_kernel = norm_over_kernel
        self.temperature_parameter = nn.Parameter(torch.tensor(math.sqrt(temperature))) if learnable else None

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H', W']."""
        return in_float32(self._conv_forward, *self.directions(features), self.bias)

    def directions(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What is convolved: the features' directions times the temperature, and the weights' directions."""
        scale = self.temperature if self.temperature_parameter is None else self.temperature_parameter.square()
        weight = self._over_length(self.weight, (1, 2, 3) if self.norm_over_kernel else (1,))
        return self._over_length(features, (1,)) * scale, weight

    def _over_length(self, vectors: Tensor, over: tuple[int, ...]) -> Tensor:
        vectors = at_least_float32(vectors)
        length = torch.linalg.vector_norm(vectors, dim=over, keepdim=True)
        if self.power != 1:  # 0^power has an infinite slope where power < 1
            length = torch.where(length > 0, torch.where(length > 0, length, 1).pow(self.power), 0)
        return vectors / (length + self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}, power={self.power}"
