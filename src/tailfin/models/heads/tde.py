"""De-confound-TDE (Tang et al., NeurIPS'20): a classifier that tracks the optimiser's momentum and removes it.

Momentum carries all features towards the head classes. Training keeps that direction e, the discounted sum of mean
foreground features; at test time its share of each logit (the "bad" causal effect) is taken off. With K heads (slices
of the feature), w_k' = w_k / (|w_k| + gamma) and tau / K = 8:

    training    z = sum_k  tau/K  x_k / |x_k| . w_k'             e <- mu e + mean(foreground x)
    evaluation  z' = z - sum_k  tau/K alpha cos(x_k, e_k) e_k / |e_k| . w_k'
                background keeps its probability of softmax(z); the rest is shared as softmax over the foreground of z'

(`keep_background=False`: z' for all classes.) It is a plain module for softmax losses::

    head = TDEHead(1024, num_classes)
    value = F.cross_entropy(head(features, labels), labels)      # train mode
    scores = head.eval()(features).softmax(1)[:, :-1]            # [N, C]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import ClassificationLoss, ExactBuffers, at_least_float32
from tailfin.models.heads.cosine import refuse_prior_bias
from tailfin.models.precision import in_float32

EPS = 1e-9  # added to the features' lengths, in the logits but not in the cosine, as in the original


class TDEHead(ExactBuffers):
    """TDE classifier: [N, D] to [N, C + 1] logits, background last.

    Args:
        in_features: D, divisible by `num_heads`.
        num_classes: C, foreground classes.
        num_heads: K, slices of the feature that are normalised one by one.
        tau: scale of the logits, shared by the heads.
        gamma: added to the weights' lengths.
        alpha: strength of the removal at test time (the classification code's default is 3).
        mu: decay of the running feature sum; 0.9998 = 1 - (1 - 0.9) 0.002 at the detector's learning rate.
        keep_background: whether background's probability comes from the logits before the removal.
        released: how the authors' detection code behaves. It takes label > 0 for foreground although background is the
            last label, so class 0 is left out of e and background is in; and `keep_background` gives probabilities,
            which the box head puts through softmax again. By default labels 0..C-1 are foreground, and logits are such
            that their softmax is the intended probability.

    Parameter `weight` [C + 1, D], uniform in +-1/sqrt(D), no bias. State `embedding` [1, D], the sum e: it starts at 0
    and changes in train mode where labels are given; float64 (float32 on MPS) whatever the module is cast to. The mean
    is over the foreground rows of all ranks (the released code lets each rank keep its own); without any, e stays.
    """

    embedding: Tensor
    takes_labels = True  # a box head gives those of its training rows

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_heads: int = 2,
        tau: float = 16.0,
        gamma: float = 1 / 32,
        alpha: float = 1.5,
        mu: float = 0.9998,
        keep_background: bool = True,
        released: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or in_features % num_heads:
            raise ValueError(f"in_features {in_features} cannot be shared by {num_heads} heads")
        if not 0 <= mu <= 1:
            raise ValueError(f"mu must be in 0..1 (given: {mu})")
        if not gamma >= 0:
            raise ValueError(f"gamma must not be negative (given: {gamma})")
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_heads = num_heads
        self.tau = tau
        self.gamma = gamma
        self.alpha = alpha
        self.mu = mu
        self.keep_background = keep_background
        self.released = released
        self.weight = nn.Parameter(torch.empty(num_classes + 1, in_features))
        # thousands of times as long as what a step adds: half precision would lose all of it
        self.register_exact("embedding", torch.zeros((1, in_features)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights; the embedding starts at 0 again."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        self.embedding.zero_()

    def start(self, loss: ClassificationLoss) -> None:
        """Begin as the classifier of `loss`; `ValueError` for one whose scores are not a plain softmax."""
        refuse_prior_bias(loss)
        probe = torch.linspace(1, 9, 4 * loss.num_logits).square().sin().view(4, -1)
        scores = loss.scores(probe)
        softmax = probe.softmax(dim=1)[:, :-1]
        if scores.shape != softmax.shape or not torch.allclose(scores, softmax, atol=1e-6):
            raise ValueError(
                f"its logits are made for a plain softmax, which the scores of {type(loss).__name__} are not"
            )

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N, D] and, for training, labels int64 [N] (0..C-1, background C, ignored -1) to [N, C + 1] logits.

        In train mode labels move the embedding; every rank must then call it in every step.
        """
        features = at_least_float32(features)
        if self.training and labels is not None:
            self.track(features, labels)
        heads = self._heads(features)
        weight = self._heads(at_least_float32(self.weight))
        weight = weight / (torch.linalg.vector_norm(weight, dim=-1, keepdim=True) + self.gamma)
        logits = self._scale(in_float32(F.linear, _unit(heads, EPS).flatten(1), weight.flatten(1)))
        if self.training:
            return logits
        bad = _unit(self._heads(self.embedding)).to(features.dtype)
        along = (_unit(heads) * bad).sum(dim=-1, keepdim=True) * bad  # [N, K, D / K], each head's part along e
        removed = self._scale(in_float32(F.linear, along.flatten(1), weight.flatten(1)))
        debiased = logits - self.alpha * removed
        if not self.keep_background:
            return debiased
        log_probability = keep_background(logits, debiased)
        return log_probability.exp() if self.released else log_probability

    @torch.no_grad()
    def track(self, features: Tensor, labels: Tensor) -> None:
        """e <- mu e + mean of the foreground features of all ranks."""
        chosen = labels > 0 if self.released else (labels >= 0) & (labels < self.num_classes)
        exact = features.to(self.embedding.dtype)
        total, rows = sum_over_ranks((exact * chosen[:, None]).sum(dim=0), chosen.sum().to(exact.dtype))
        moved = self.embedding * self.mu + total / rows.clamp(min=1)
        self.embedding.copy_(torch.where(rows > 0, moved, self.embedding))

    def _heads(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(1, (self.num_heads, -1))

    def _scale(self, cosines: Tensor) -> Tensor:
        return cosines * (self.tau / self.num_heads)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, num_classes={self.num_classes}, num_heads={self.num_heads}"


def keep_background(logits: Tensor, debiased: Tensor) -> Tensor:
    """[N, C + 1] log probabilities: background's of `logits`, the rest shared as in the foreground of `debiased`."""
    before = logits.log_softmax(dim=1)
    foreground = before[:, :-1].logsumexp(dim=1, keepdim=True) + debiased[:, :-1].log_softmax(dim=1)
    return torch.cat((foreground, before[:, -1:]), dim=1)


def _unit(vectors: Tensor, eps: float = 0.0) -> Tensor:
    """Vectors of the last dimension over their length + eps; zeros stay zeros and get no huge gradient."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths + eps, 1)
