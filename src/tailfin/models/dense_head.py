"""The head of a dense detector, the same weights on every level of the pyramid, and how its classifier starts.

head = DenseHead(256, anchors=9, num_logits=loss.num_logits, bias=starting_bias(loss, 0.01))
logits, deltas, quality = head(levels)                         # lists, one map per level
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tailfin.losses.base import ClassificationLoss
from tailfin.models.precision import in_float32


class DenseHead(nn.Module):
    """Two towers, and convolutions on them that give logits, deltas and, where wanted, a quality per anchor.

    `scaled`: a factor of the deltas that is learnt per level.
    """

    def __init__(
        self,
        channels: int,
        anchors: int,
        num_logits: int,
        bias: Tensor,
        *,
        convs: int = 4,
        norm: str = "none",
        quality: bool = False,
        scaled: int = 0,
    ) -> None:
        """`bias` [num_logits] is the classifier's first; `scaled` the number of levels with a scale, 0 for none."""
        super().__init__()
        self.class_tower = _tower(channels, convs, norm)
        self.box_tower = _tower(channels, convs, norm)
        self.classifier = nn.Conv2d(channels, anchors * num_logits, 3, padding=1)
        self.box = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        self.quality = nn.Conv2d(channels, anchors, 3, padding=1) if quality else None
        self.scales = nn.Parameter(torch.ones(scaled)) if scaled else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            cast(Tensor, self.classifier.bias).copy_(bias.repeat(anchors))
            # logits come anchor by anchor, as they are read; at a thousand classes CPUs are 1.5 times as fast so
            self.classifier.weight.data = self.classifier.weight.contiguous(memory_format=torch.channels_last)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits, deltas and quality per level, computed in float32 under autocast too."""
        logits = [in_float32(self.classifier, self.class_tower(level)) for level in levels]
        deltas, quality = [], []
        for number, level in enumerate(levels):
            tower = self.box_tower(level)
            found = in_float32(self.box, tower)
            deltas.append(found if self.scales is None else found * self.scales[number])
            if self.quality is not None:
                quality.append(in_float32(self.quality, tower))
        return logits, deltas, quality


def _tower(channels: int, convs: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none"))
        if norm == "gn":
            layers.append(nn.GroupNorm(32, channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def starting_bias(loss: ClassificationLoss, prior: float) -> Tensor:
    """[num_logits] first bias of a dense classifier: nearly all anchors are background, a class starts at `prior`.

    C sigmoids start at `prior`; with further columns, which stand for background, those start at 1 - `prior`. A softmax
    (scores that stay when all logits grow alike), or several, has the column of background raised until all classes
    together have `prior`: that is the last one, or whichever lowers the scores most. Without it the first steps are
    lost to the loss of a hundred thousand easy negatives.
    """
    odds = math.log((1 - prior) / prior)
    zero = torch.zeros((1, loss.num_logits))
    start = loss.scores(zero)
    if torch.allclose(loss.scores(zero + 1), start, atol=1e-5):
        bias = zero[0]
        column = int(loss.scores(torch.eye(loss.num_logits)).sum(dim=1).argmin())
        bias[column] = odds + float(torch.logit(start.double().sum().clamp(max=1 - 1e-9)))
        if not math.isclose(float(loss.scores(bias[None]).sum()), prior, rel_tol=0.01):  # of another scale, or several
            low, high = 0.0, 100.0
            for _ in range(60):  # bisection: the scores fall with it
                bias[column] = (low + high) / 2
                above = float(loss.scores(bias[None]).sum()) > prior
                low, high = ((low + high) / 2, high) if above else (low, (low + high) / 2)
        return bias
    bias = torch.full((loss.num_logits,), -odds)
    bias[loss.num_classes :] = odds
    return bias
