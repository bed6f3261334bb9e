"""Contrast of two views: the losses, the queue of negatives, and the small networks in front of them.

    InfoNCE   -log( e^{q.k/t} / (e^{q.k/t} + sum_j e^{q.n_j/t}) ), negatives from a queue  (MoCo; 2DRCL, eqs. 1 and 2)
    NT-Xent   the same with the rest of the batch as negatives                             (SimCLR; boxes: AlignDet)
    cosine    2 - 2 q.k, no negatives                                                      (BYOL; boxes: SoCo)

Rows are unit vectors: queries [N, D] that carry gradients, keys [N, D] that may, negatives [K, D] that never do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tailfin.collectives import (
    gather_over_ranks,
    gather_with_gradients,
    several_ranks,
    sum_over_ranks,
    sum_with_gradients,
    this_rank,
)
from tailfin.losses.base import at_least_float32
from tailfin.schema.pretraining import Contrast


def info_nce(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    rows: float | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """InfoNCE of queries [N, D] and their keys [N, D] against the negatives [K, D]: the mean over rows, a scalar.

    `rows` is what the sum is divided by instead of N (a process's share of all rows). No row gives 0 in the graph.
    `left_out` bool [N, K]: pairs that are no negatives.
    Neither the [N, K] similarities nor the negatives are kept for the backward pass, so the negatives may be
    overwritten before it: the gradient to a query is the softmax-weighted sum of keys and negatives, [N, D].
    """
    with torch.autocast(queries.device.type, enabled=False):
        dtype = torch.promote_types(queries.dtype, torch.float32)
        total = _InfoNCE.apply(queries.to(dtype), keys.to(dtype), negatives.to(dtype), temperature, left_out)
    return total / max(len(queries) if rows is None else rows, 1)


class _InfoNCE(torch.autograd.Function):
    """Sum over rows of InfoNCE."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, left_out: Tensor | None
    ) -> Tensor:
        positive = (queries * keys).sum(1, keepdim=True) / temperature
        weights = (queries @ negatives.T).div_(temperature)  # [N, K], turned into the softmax in place
        if left_out is not None:
            weights.masked_fill_(left_out, -torch.inf)
        top = torch.maximum(positive, weights.amax(1, keepdim=True)) if weights.shape[1] else positive
        weights = weights.sub_(top).exp_()
        own = (positive - top).exp()
        total = own + weights.sum(1, keepdim=True)
        missing = 1 - own / total  # probability that is not on the positive
        pull = (weights @ negatives).div_(total).sub_(missing * keys).div_(temperature)
        ctx.save_for_backward(pull, queries * (-missing / temperature) if ctx.needs_input_grad[1] else None)
        return (total.log() + top - positive).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        to_queries, to_keys = ctx.saved_tensors
        return gradient * to_queries, None if to_keys is None else gradient * to_keys, None, None, None


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent of the two views' rows [N, D]: every row against all others of both views and of all processes.

    The gathered rows carry gradients to where they came from, so N processes give what one gives on the joined batch.
    """
    count = len(first)
    own = torch.cat([first, second]).float()
    every, before = gather_with_gradients(own), this_rank()[0] * len(own)
    similarity = own @ every.T / temperature
    places = torch.arange(len(own), device=own.device)
    similarity = similarity.masked_fill(places[:, None] + before == torch.arange(len(every), device=own.device), -1e9)
    return F.cross_entropy(similarity, (places + count) % max(len(own), 1) + before) if count else own.sum()


def box_nt_xent(queries: Tensor, query_ids: Tensor, keys: Tensor, key_ids: Tensor, temperature: float) -> Tensor:
    """Contrast of RoIs that belong to boxes: rows of the same box in the other view against rows of other boxes.

    Queries [N, D] and keys [M, D] with the box of each, int64, counted on this process. A pair of one box is weighed
    against all rows of other boxes in both views and of all processes; the mean over a query's pairs, then over the
    queries of all processes that have one. The mean of the processes' values is what one gives on the joined batch.
    """
    rank, ranks = this_rank()
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float()
        query_ids, key_ids = query_ids * ranks + rank, key_ids * ranks + rank  # unlike those of other processes
        keys, key_ids = gather_over_ranks(keys.float(), key_ids)
        every = torch.cat([keys, gather_with_gradients(queries)])
        ids = torch.cat([key_ids, *gather_over_ranks(query_ids)])
        similarity = queries @ every.T / temperature
        same = query_ids[:, None] == ids
        others = similarity.masked_fill(same, -1e9).logsumexp(1, keepdim=True)
        pairs = same[:, : len(keys)]
        each = F.softplus(others - similarity[:, : len(keys)]) * pairs
        found = pairs.sum(1)
        (matched,) = sum_over_ranks((found > 0).sum().to(queries.dtype))
        return (each.sum(1) / found.clamp(min=1)).sum() * ranks / matched.clamp(min=1)


def same_class(labels: Tensor, others: Tensor) -> Tensor:
    """bool [N, K]: both are of one class; -1 is of none."""
    return (labels[:, None] == others) & (labels >= 0)[:, None]


def cosine_distance(queries: Tensor, keys: Tensor, *, rows: float | None = None) -> Tensor:
    """2 - 2 cos of unit rows [N, D] with their keys: the mean over rows, or the sum divided by `rows`."""
    total = (2 - 2 * (queries.float() * keys.float()).sum(1)).sum()
    return total / max(len(queries) if rows is None else rows, 1)


class RingQueue(nn.Module):
    """The newest `size` keys, unit rows [size, dim] in float32; random directions before the first keys come.

    `rows`, `labels` (the class of each, -1 for none) and `place` are buffers, so a checkpoint has them. Any number of
    keys goes in, the end wraps to the start.
    """

    rows: Tensor
    labels: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))  # of the next key

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Store keys [n, dim], and the class of each, in their order, the newest in place of the oldest."""
        size = len(self.rows)
        places = self.place + torch.arange(len(keys), device=self.rows.device)
        kept = keys[-size:] if len(keys) else keys  # of more than fit only the newest
        places = places[len(keys) - len(kept) :] % size
        self.rows.index_copy_(0, places, kept.to(self.rows))
        self.labels[places] = -1 if labels is None else labels[-size:].to(self.labels)
        self.place.add_(len(keys)).remainder_(size)


class JoinedBatchNorm(nn.BatchNorm1d):
    """Batch norm of rows [N, D] over the rows of all processes: what one process does with the joined batch.

    A process has few pictures, often two, and rows normalised by each other's values alone give each other away. Unlike
    `SyncBatchNorm` it runs on any device, and processes may have different numbers of rows, also none. With fewer than
    two rows in all, where batch statistics mean nothing, the running ones serve. In training every process has to call
    it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training or (not several_ranks() and len(rows) < 2):
            return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if not several_ranks():
            return super().forward(rows)
        with torch.autocast(rows.device.type, enabled=False):
            exact = at_least_float32(rows)
            summed = sum_with_gradients(torch.cat([exact.sum(0), exact.new_full((1,), len(rows))]))
            count = summed[-1].detach()
            mean = summed[:-1] / count.clamp(min=1)
            variance = sum_with_gradients((exact - mean).square().sum(0)) / count.clamp(min=1)
            enough = count > 1
            self._move(mean.detach(), variance.detach(), count, enough)
            mean = torch.where(enough, mean, self.running_mean)
            variance = torch.where(enough, variance, self.running_var)
            normed = (exact - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return normed.to(rows.dtype)

    def _move(self, mean: Tensor, variance: Tensor, count: Tensor, enough: Tensor) -> None:
        """The running statistics, where there are rows to take them from."""
        assert self.momentum is not None
        share = self.momentum * enough.to(mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean), share.to(self.running_mean))
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_var.lerp_(unbiased.to(self.running_var), share.to(self.running_var))
        self.num_batches_tracked += enough


class ProjectionMLP(nn.Module):
    """Linear, norm, ReLU, linear: [N, in] to [N, out]; `norm` is "batch" (`JoinedBatchNorm`), "layer" or "none"."""

    def __init__(self, channels: int, hidden: int, dim: int, *, norm: str = "batch") -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.norm = {"batch": JoinedBatchNorm, "layer": nn.LayerNorm}[norm](hidden) if norm != "none" else None
        self.out = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.hidden(features)
        return self.out(F.relu(hidden if self.norm is None else self.norm(hidden)))


@dataclass(frozen=True)
class ContrastHead:
    """What stands between the vectors of one term and its loss: the networks, which others own, and the queue."""

    name: str
    config: Contrast
    projector: nn.Module
    predictor: nn.Module | None  # on the trained side only
    queue: RingQueue | None

    @property
    def average(self) -> str:
        """The name under which a momentum network has the copy of the projector."""
        return f"{self.name}_projector"

    def queries(self, vectors: Tensor) -> Tensor:
        """Unit rows float32 [N, dim] of vectors [N, C], with gradients."""
        rows = self.projector(vectors)
        return F.normalize((rows if self.predictor is None else self.predictor(rows)).float(), dim=1)

    @torch.no_grad()
    def keys(self, vectors: Tensor, projector: nn.Module) -> Tensor:
        """Unit rows float32 [N, dim] by the projector's momentum copy."""
        return F.normalize(projector(vectors).float(), dim=1)

    @property
    def looks_at_classes(self) -> bool:
        """Whether keys of a query's own class are no negatives."""
        return self.queue is not None and self.config.same_class == "left_out"

    def loss(self, queries: Tensor, keys: Tensor, *, rows: float | None = None, labels: Tensor | None = None) -> Tensor:
        """Cosine distance, or InfoNCE against the queue as it is; `rows` as in `info_nce`. With the queries' `labels`
        [N] keys of the same class (-1 is none) are left out."""
        if self.queue is None:
            return cosine_distance(queries, keys, rows=rows)
        same = None if labels is None else same_class(labels, self.queue.labels)
        return info_nce(queries, keys, self.queue.rows, self.config.temperature, rows=rows, left_out=same)

    def remember(self, keys: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> None:
        """Keys of all processes into the queue, where there is one."""
        if self.queue is None:
            return
        joined = torch.cat(list(keys))
        if labels is None:
            self.queue.enqueue(gather_over_ranks(joined.detach())[0])
        else:  # a class is a small whole number: exact in float32
            (both,) = gather_over_ranks(torch.cat([joined, torch.cat(list(labels))[:, None].to(joined)], dim=1))
            self.queue.enqueue(both[:, :-1], both[:, -1].round().long())

    @torch.no_grad()
    def diagnosed(self, queries: Tensor, keys: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """How the contrast goes: `accuracy`, the share of queries to which their own key is nearer than any negative;
        `spread`, the deviation of queries per dimension over that of evenly spread ones: 0 is a collapse, 1 even."""
        if not len(queries):
            return {}
        found = {"spread": queries.std(dim=0, correction=0).square().sum().sqrt()}
        if self.queue is not None:
            negatives = queries @ self.queue.rows.to(queries).T
            if labels is not None:
                negatives = negatives.masked_fill(same_class(labels, self.queue.labels), -torch.inf)
            found["accuracy"] = ((queries * keys).sum(1) > negatives.amax(1)).float().mean()
        return found


class ContrastHeads(nn.Module):
    """The heads of all contrastive terms: `heads[name]`.

    Networks are made and stored kind by kind, all projectors first, so that one seed gives the same start whatever
    module asks for them.

    Args:
        options: by name the section of the recipe, and the channels of the vectors.
    """

    def __init__(self, options: Mapping[str, tuple[Contrast, int]]) -> None:
        super().__init__()
        self.configs = {name: own for name, (own, _) in options.items()}
        predicted = {name: own for name, own in self.configs.items() if own.predictor}
        queued = {name: own for name, own in self.configs.items() if own.loss == "info_nce"}
        self.projectors = nn.ModuleDict({name: _mlp(own, channels) for name, (own, channels) in options.items()})
        self.predictors = nn.ModuleDict({name: _mlp(own, own.dim) for name, own in predicted.items()})
        self.queues = nn.ModuleDict({name: RingQueue(own.queue, own.dim) for name, own in queued.items()})

    def __getitem__(self, name: str) -> ContrastHead:
        queue = dict(self.queues.items()).get(name)
        assert queue is None or isinstance(queue, RingQueue)
        predictor = dict(self.predictors.items()).get(name)
        return ContrastHead(name, self.configs[name], self.projectors[name], predictor, queue)


def _mlp(own: Contrast, channels: int) -> ProjectionMLP:
    return ProjectionMLP(channels, own.hidden, own.dim, norm=own.norm)
