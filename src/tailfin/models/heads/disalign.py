"""DisAlign (Zhang et al., CVPR'21): a trained classifier, frozen, is aligned to a balanced prediction.

Second stage of a decoupled training. With features x, logits z = classifier(x) and conf = sigmoid(v . x + b0):

    foreground   z'_c = conf (scale_c z_c + bias_c) + (1 - conf) z_c
    background   z'   = z, untouched
    loss = sum over rows of w_y CE(z', y) / sum over rows of w_y     (generalised re-weighting)
    w_c = (n_c / sum n)^-exponent, scaled to a mean of 1 over the C classes; 1 for background

Only scale, bias and the confidence layer train. Scores are the plain softmax of z'::

    head = DisAlign(classifier, 1024, num_classes)
    loss = GeneralizedReweight(stats)
    value = loss(head(features), labels)

(The authors' classification code writes (1 + conf s) z + conf bias, the same function with scale = 1 + s.)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.losses.base import ClassificationLoss, at_least_float32
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.models.precision import in_float32
from tailfin.stats import ClassStats


class DisAlign(nn.Module):
    """A classifier, adapted: [N, D] to [N, C + 1] logits, background last.

    Args:
        classifier: module from [N, D] to [N, C + 1] logits. Its parameters are frozen here (`requires_grad` off) and
            it is kept in evaluation mode.
        in_features: D.
        num_classes: C.

    Parameters: `logit_scale` [C] starts at 1, `logit_bias` [C] at 0, `confidence` (linear, D to 1) with weights from
    N(0, 0.01) and bias 0; the head starts as the classifier itself.
    """

    def __init__(self, classifier: nn.Module, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classifier = classifier.requires_grad_(False)
        self.confidence = nn.Linear(in_features, 1)
        self.logit_scale = nn.Parameter(torch.empty(num_classes))
        self.logit_bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()
        self.train(self.training)

    def reset_parameters(self) -> None:
        """The identity: scale 1, bias 0; the classifier is left alone."""
        nn.init.ones_(self.logit_scale)
        nn.init.zeros_(self.logit_bias)
        nn.init.normal_(self.confidence.weight, std=0.01)
        nn.init.zeros_(self.confidence.bias)

    def train(self, mode: bool = True) -> DisAlign:
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] to aligned logits [N, C + 1]."""
        logits = in_float32(self.classifier, features)
        if logits.shape[1] != self.num_classes + 1:
            raise ValueError(f"the classifier must give {self.num_classes + 1} logits, it gives {logits.shape[1]}")
        confidence = in_float32(self.confidence, features).sigmoid()  # [N, 1]
        foreground = logits[:, :-1]
        change = foreground * (self.logit_scale - 1) + self.logit_bias
        return torch.cat((foreground + confidence * change, logits[:, -1:]), dim=1)


def align(heads: RoIHeads, stats: ClassStats, *, exponent: float = 0.8) -> RoIHeads:
    """The box head `heads` with its trained classifier aligned, in place."""
    width = heads.predictor.bbox_pred.in_features
    heads.loss = GeneralizedReweight(stats, exponent=exponent)
    heads.predictor.cls_score = DisAlign(heads.predictor.cls_score, width, stats.num_classes)
    return heads


class GeneralizedReweight(ClassificationLoss):
    """Softmax CE with class weights n^-exponent on C + 1 logits, background last; divided by the rows' sum of weights.

    Args:
        exponent: how strongly rare classes are weighted up, >= 0 (0: plain CE; 0.8 in the plain LVIS v0.5 model).

    n are instance counts, those of 0 as 1. Stateless.
    """

    weight: Tensor

    def __init__(self, stats: ClassStats, *, exponent: float = 0.8) -> None:
        super().__init__(stats)
        if not (exponent >= 0 and math.isfinite(exponent)):
            raise ValueError(f"exponent must not be negative (given: {exponent})")
        self.num_logits = self.num_classes + 1
        self.exponent = exponent
        weight = np.maximum(stats.instance_count, 1).astype(np.float64) ** -exponent
        self.register_exact("weight", np.append(weight / weight.mean(), 1.0), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weight = self.weight.to(logits.dtype)
        total = F.cross_entropy(logits, labels, weight=weight, reduction="sum")
        return total / weight[labels].sum() if len(labels) else total

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).softmax(dim=1)[:, :-1]
