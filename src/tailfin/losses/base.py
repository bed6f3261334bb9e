"""The one interface that keeps methods apart from detectors: `ClassificationLoss`.

It owns the three things in which long-tail methods differ: how many logits the classifier has, the loss, and how logits
become the foreground scores that NMS sees at test time; plus the classifier's initial bias. It works with any plain
torchvision or transformers detector and without tailfin's engine::

    loss = losses.build("softmax", stats)
    classifier = torch.nn.Linear(1024, loss.num_logits)
    torch.nn.init.normal_(classifier.weight, std=0.01)
    classifier.bias.data.copy_(loss.prior_bias())
    value = loss(classifier(features), labels)      # labels int64 [N]: 0..C-1, background C, ignored -1
    scores = loss.scores(classifier(features))      # [N, C]
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.stats import ClassStats

PICTURES = 2  # of a process in the published runs (8 x 2), whose draws and means are per process
DROP = 1e30  # a logit lowered by this has probability, loss and gradient 0; finite, so that 0 * DROP = 0
PRIOR_BIAS = -math.log(999.0)  # sigmoid(-log(999)) = 0.001, the prior of long-tail sigmoid classifiers (BACL, EQL v2)
PERCENT_BIAS = -math.log(99.0)  # 0.01, that of the DETRs and of ACSL


class ExactBuffers(nn.Module):
    """A module with buffers that keep their precision; the losses and some feature modules are built on it."""

    _exact: tuple[str, ...] = ()

    def register_exact(self, name: str, value: Any, *, persistent: bool = True) -> None:
        """A buffer that stays float64 (float32 on MPS) whatever `.to`, `.half` or `.bfloat16` asks of the module.

        For constants derived from class counts (`persistent=False`: rebuilt from the counts, not stored) and for sums
        that run over the whole training. Cast it to the logits' dtype on use: `self.name.to(logits.dtype)`.
        """
        self._exact = (*self._exact, name)
        self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64).clone(), persistent=persistent)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = {name: self._buffers.pop(name) for name in self._exact}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            assert value is not None
            device = fn(torch.empty(0, device=value.device)).device
            precision = torch.float32 if device.type == "mps" else torch.float64
            self._buffers[name] = value.to(device=device, dtype=precision)
        return self


class ClassificationLoss(ExactBuffers):
    """Base of all classification losses; a subclass sets `num_logits` and writes `loss` and `scores`.

    Shapes: logits [N, num_logits] of any float dtype (computed in float32 at least), labels int64 [N] with foreground
    classes 0..C-1, background C and ignored -1. Rows labelled -1 are removed before anything else, so N in every
    formula is the number of the others. An input without rows gives 0, attached to the graph.
    """

    num_logits: int
    classes_first: bool = True  # the first C logits are those of the classes, which `known` can leave out
    alone: bool = True  # False for a term that has no scores of its own and cannot be a detector's whole loss
    # True: a sum over rows over `normalizer`, so that rows of several layers may come in one call while the module does
    # not train (a training one may move its statistics by the rows of a call)
    additive: bool = False
    # Keywords of `loss` that a detector fills where it knows them; others keep their default. Of each row, [N]:
    # "gt_index", its object over the batch (-1: none); "memory", whether it comes from a feature memory; "quality", the
    # IoU of its predicted box with its object (0 on background); "picture", its place in the batch, int64 (rows of no
    # picture have one behind the last). Of all rows: "pictures", how many places there are; "iter_id", the pass of an
    # iterative box head that they come from; "normalizer", the number of objects, where these are matched to rows one
    # to one.
    row_facts: tuple[str, ...] = ()

    def __init__(self, stats: ClassStats) -> None:
        super().__init__()
        self.num_classes: int = stats.num_classes
        self.parts: dict[str, Tensor] = {}  # named, detached terms of the last call, for logging

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The options of a recipe: the keyword-only arguments of the constructor."""
        code = cls.__init__.__code__  # type: ignore[misc]
        return code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        known: Tensor | None = None,
        every_row: bool = False,
        **keywords: Any,
    ) -> Tensor:
        """The loss, a scalar. `keywords` are those of the method; tensors with one entry per row are filtered too.

        `known`, bool [N, C], says which classes somebody looked for in the row's picture: the others, but for the row's
        own label, have no part in the row's loss, neither value nor gradient nor statistics. `every_row`: no label is
        -1, so that nothing need be looked for (on an accelerator that is a read back).
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_logits:
            raise ValueError(f"logits must be [N, {self.num_logits}], these are {list(logits.shape)}")
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must be [{logits.shape[0]}], these are {list(labels.shape)}")
        rows = logits.shape[0]
        if not every_row and not bool((keep := labels >= 0).all()):
            logits, labels = logits[keep], labels[keep]
            known = None if known is None else known[keep]
            keywords = {
                key: value[keep] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows else value
                for key, value in keywords.items()
            }
        self.parts = {}
        logits = at_least_float32(logits)
        return self.loss(self.checked(logits, labels, known), labels, **keywords)

    def checked(self, logits: Tensor, labels: Tensor, known: Tensor | None) -> Tensor:
        """Logits [N, K] with those of classes that nobody looked for (`known`, see `forward`) out of sight."""
        if known is None:
            return logits
        if not self.classes_first:
            raise ValueError(f"{type(self).__name__} has no logit per class that could be left out")
        width = logits.shape[1]
        known = F.pad(known, (0, width - self.num_classes), value=True)
        own = torch.arange(width, device=labels.device) == labels[:, None]
        return torch.where(known | own, logits, -DROP)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of rows without ignored ones; logits are float32 or float64."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def scores(self, logits: Tensor) -> Tensor:
        """[N, num_logits] logits to [N, C] foreground scores in 0..1."""
        raise TypeError(f"{type(self).__name__} defines no scores")

    def prior_bias(self) -> Tensor:
        """[num_logits] initial bias of the classifier, float32; 0 unless the method says otherwise."""
        return torch.zeros(self.num_logits)

    def at_epoch(self, epoch: float) -> None:
        """Told before every iteration where the training is, in epochs of the stage; most methods do not care."""


def at_least_float32(value: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay as they are."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def one_hot(labels: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[N] labels to [N, width] targets; a label >= width (background without a column of its own) is a zero row."""
    inside = (labels < width).to(dtype)
    targets = torch.zeros((labels.shape[0], width), dtype=dtype, device=labels.device)
    return targets.scatter_(1, labels.clamp(max=width - 1)[:, None], inside[:, None])


def own_column(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[N] labels to the column of each row's own class, int64 [N, 1], and whether it has one, bool [N, 1]; background
    (a label >= width) has none and points to the last."""
    return labels.clamp(max=width - 1)[:, None], labels[:, None] < width


def per_object(total: Tensor, labels: Tensor, width: int, normalizer: float | Tensor | None) -> Tensor:
    """`total / normalizer`; where none is given by the foreground rows (labels below `width`), at least 1."""
    return total / ((labels < width).sum().clamp(min=1) if normalizer is None else normalizer)


def places_in(seen: Tensor, length: int) -> Tensor:
    """[length] where each of 0..length-1 stands in `seen` int64 [S], 0 for those that do not."""
    place = torch.zeros(length, dtype=torch.int64, device=seen.device)
    place[seen] = torch.arange(len(seen), device=seen.device)
    return place


def counts_of(index: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[length] how often each of 0..length-1 is in `index` int64 [N]: `bincount` without a read back to the host."""
    return torch.zeros(length, dtype=dtype, device=index.device).index_add_(
        0, index, torch.ones(index.shape, dtype=dtype, device=index.device)
    )


def mean_over_rows(total: Tensor, rows: int) -> Tensor:
    """`total / rows`, or `total` (a 0 in the graph) where there are no rows."""
    return total / max(rows, 1)
