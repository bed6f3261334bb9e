"""Cosine classifiers: logits that depend on directions, not on the lengths of features and class weights.

Weight lengths grow with a class's number of samples; without them a rare class is not outvoted by length alone. Use one
in place of the last linear layer, with any loss::

    loss = losses.build("seesaw", stats)
    classifier = NormedLinear(1024, loss.num_logits)     # temperature 20, as Seesaw and ECM use it
    value = loss(classifier(features), labels)           # features [N, 1024]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.losses.base import ClassificationLoss, at_least_float32
from tailfin.models.precision import in_float32


class NormedLinear(nn.Linear):
    """temperature * x / (|x|^power + eps) . w / (|w|^power + eps) + bias, as in mmdetection's Seesaw and ECM's models.

    Args:
        in_features: D, length of a feature.
        out_features: number of logits.
        bias: whether a bias is added (it starts at 0).
        temperature: length of a logit vector's scale; 1 for a loss with a scale of its own (LDAM).
        power: exponent of the lengths; 1 for the cosine.
        eps: added to the lengths.

    Weights start from N(0, 0.01). Lengths are taken in float32 at least, whatever the autocast. A feature of zeros gets
    the bias as logits; its gradient is large (temperature / eps), as in the original.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        temperature: float = 20.0,
        power: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        for name, value in (("temperature", temperature), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0 (given: {value})")
        super().__init__(in_features, out_features, bias)
        self.temperature = temperature
        self.power = power
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def start(self, loss: ClassificationLoss) -> None:
        """Begin as the classifier of `loss`, with its first bias."""
        self.reset_parameters()
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(loss.prior_bias())

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] to logits [N, out_features]."""
        weight = self._over_length(self.weight)
        return in_float32(F.linear, self._over_length(features) * self.temperature, weight, self.bias)

    def _over_length(self, vectors: Tensor) -> Tensor:
        vectors = at_least_float32(vectors)
        return vectors / (length(vectors).pow(self.power) + self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}, power={self.power}"


class WeightNormCosine(nn.Module):
    """temperature * g_c v_c / |v_c| . x / (|x| + eps): cosines with a learnt length per class, as in RIO (ICML'21).

    Parameters: `weight_v` [out_features, D] gives directions, `weight_g` [out_features, 1] lengths. They start as
    direction and length of an ordinary linear layer's weights, uniform in +-1/sqrt(D). No bias. `temperature` and `eps`
    as in `NormedLinear`.
    """

    def __init__(self, in_features: int, out_features: int, *, temperature: float = 48.0, eps: float = 1e-5) -> None:
        for name, value in (("temperature", temperature), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0 (given: {value})")
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.temperature = temperature
        self.eps = eps
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight_v, -bound, bound)
        with torch.no_grad():
            self.weight_g.copy_(length(self.weight_v))

    def start(self, loss: ClassificationLoss) -> None:
        """Begin as the classifier of `loss`; `ValueError` for one that wants a first bias."""
        refuse_prior_bias(loss)

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] to logits [N, out_features]."""
        features, direction = at_least_float32(features), at_least_float32(self.weight_v)
        features = features / (length(features) + self.eps)
        return in_float32(F.linear, features * self.temperature, self.weight_g * direction / length(direction))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, temperature={self.temperature}"


def length(vectors: Tensor) -> Tensor:
    """Euclidean length of the last dimension, which is kept with size 1."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def refuse_prior_bias(loss: ClassificationLoss) -> None:
    """Raise `ValueError` for a loss that starts with a bias, in a classifier that has none."""
    if bool(loss.prior_bias().any()):
        raise ValueError(f"it has no bias, which {type(loss).__name__} starts with: take linear or cosine, or softmax")
