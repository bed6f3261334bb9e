"""The training side of D-FINE, RT-DETR v2 and RF-DETR: matching one to one, losses of the pairs.

    loss = class_weight * classification + box_weight * L1 + giou_weight * (1 - GIoU)

for every layer, for the proposals and for the queries of objects with noise, whose pairs are known. Each layer, and in
RF-DETR each group of queries, has a matching of its own. D-FINE adds, for layers but the last,

    fgl_weight * sum over sides of IoU * cross-entropy(distribution, the two bins beside the side's distance)
  + ddf_weight * KL(distribution of the last layer || distribution), at a temperature of 5

Sums over pairs are divided by the objects of all processes per process, at least one each, times the groups. The
classification loss is any `ClassificationLoss`; one that asks for `quality` gets the IoU of a query's box with its
object. Statistics of a loss move once per step, by the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from tailfin.losses.base import ClassificationLoss
from tailfin.models.constants import constant
from tailfin.models.detr_criterion import (
    Objects,
    Pairs,
    Weights,
    assign,
    box_losses,
    class_losses,
    foreground_scores,
    last_layer,
    matching_cost,
    objects_per_process,
)
from tailfin.models.images import pictures_of
from tailfin.models.realtime_detr_networks import Found, Rows
from tailfin.schema.realtime_detr import DFineConfig, RealTimeDETRConfig

TEMPERATURE = 5.0  # at which distributions learn from those of the last layer


class Bins(NamedTuple):
    """D-FINE's bins of a side's distance: the last one's number, what they stand for, and the scale of it."""

    last: int
    up: Tensor  # [1]
    scale: Tensor  # [1]


class RealTimeCriterion(nn.Module):
    """Losses of a `Found`; holds the classification loss, whose running statistics are part of the model."""

    def __init__(self, loss: ClassificationLoss, config: RealTimeDETRConfig) -> None:
        super().__init__()
        self.loss = loss
        self.weights = Weights(config.class_weight, config.box_weight, config.giou_weight)
        self.costs = Weights(config.class_cost, config.box_cost, config.giou_cost)
        self.bounded = config.name != "rf_detr"  # boxes are cut at the border before they are compared
        self.groups = getattr(config, "groups", 1)
        self.local_weights = (config.fgl_weight, config.ddf_weight) if isinstance(config, DFineConfig) else None

    def scores(self, logits: Tensor) -> Tensor:
        """[..., K] logits to [..., C] foreground scores."""
        return foreground_scores(self.loss, logits)

    def forward(
        self, found: Found, objects: Objects, targets: Sequence[dict[str, Tensor]], bins: Bins | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses: `loss_classifier`, `loss_box_l1`, `loss_giou` of the last layer, `loss_auxiliary` of the
        others, `loss_encoder` of the proposals, `loss_denoising` of queries with noise, `loss_local` of distributions.
        """
        rows = self._cut(found.queries)
        proposals = self._cut(found.encoder)
        others = len(rows.logits) - 1
        # auxiliary layers, the proposals, the last layer: the last one moves statistics
        logits = torch.cat([rows.logits[:-1], proposals.logits, rows.logits[-1:]])
        boxes = torch.cat([rows.boxes[:-1], proposals.boxes, rows.boxes[-1:]])
        groups = self.groups if self.training else 1
        pairs = self.match(logits, boxes, objects, groups)
        normalizer = objects_per_process(boxes, objects) * groups
        parts = [others, 1, 1] if others else [1, 1]
        classes, l1, giou = self._terms(logits, boxes, objects, pairs, normalizer, targets, parts)
        weights = self.weights
        box_terms = (weights.l1 * l1 + weights.giou * giou) / normalizer
        losses = last_layer(weights, classes[-1], l1[-1], giou[-1], normalizer)
        losses["loss_encoder"] = weights.classes * classes[-2] + box_terms[others]
        if others:
            losses["loss_auxiliary"] = weights.classes * classes[0] + box_terms[:others].sum()
        local = []
        if bins is not None and rows.corners is not None and others:
            each = sum(min(count, rows.logits.shape[2]) for count in objects.counts)
            own = Pairs(*(value[: others * each] for value in pairs))  # they are sorted by layer
            local.append(self._local(rows, objects, own, others, normalizer, bins))
        if found.noisy is not None and found.matched is not None:
            noisy, known = self._cut(found.noisy), known_pairs(found.matched, len(found.noisy.logits), objects)
            scale = normalizer * found.groups
            layers = [len(noisy.logits)]
            terms = self._terms(noisy.logits, noisy.boxes, objects, known, scale, targets, layers, moves=False)
            (noisy_classes,), l1, giou = terms
            box_terms = (weights.l1 * l1 + weights.giou * giou) / scale
            losses["loss_denoising"] = weights.classes * noisy_classes + box_terms.sum()
            if bins is not None and noisy.corners is not None:
                local.append(self._local(noisy, objects, known, len(noisy.logits), scale, bins))
        if local:
            losses["loss_local"] = torch.stack(local).sum()
        return losses

    def match(self, logits: Tensor, boxes: Tensor, objects: Objects, groups: int = 1) -> Pairs:
        """The cheapest pairs of every layer [L, B, Q, K], of each of its groups of queries on its own."""
        layers, pictures, queries = boxes.shape[:3]
        cost = matching_cost(self.scores(logits), boxes, objects, self.costs)
        if groups == 1:
            return assign([cost], objects.counts)[0]
        own = queries // groups
        apart = cost.unflatten(2, (groups, own)).transpose(1, 2).flatten(0, 1)  # [L G, B, Q / G, M]
        pairs = assign([apart], objects.counts)[0]
        return pairs._replace(layer=pairs.layer // groups, query=pairs.query + pairs.layer % groups * own)

    def _cut(self, rows: Rows) -> Rows:
        return rows._replace(boxes=rows.boxes.clamp(0, 1)) if self.bounded else rows

    def _terms(
        self,
        logits: Tensor,
        boxes: Tensor,
        objects: Objects,
        pairs: Pairs,
        normalizer: Tensor,
        targets: Sequence[dict[str, Tensor]],
        parts: Sequence[int],
        *,
        moves: bool = True,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The classification loss summed over `parts` of the layers; per layer [L] the sums of L1 and 1 - GIoU."""
        own = boxes[pairs.layer, pairs.picture, pairs.query]
        quality = paired_iou(own, objects, pairs) if "quality" in self.loss.row_facts else None
        given = (logits, objects, pairs, normalizer, targets)
        classes = class_losses(self.loss, *given, parts=parts, quality=quality, moves=moves)
        return classes, *box_losses(own, objects, pairs, len(logits))

    def _local(self, rows: Rows, objects: Objects, pairs: Pairs, layers: int, normalizer: Tensor, bins: Bins) -> Tensor:
        """D-FINE's terms of the first `layers` layers; the last distributions are the teacher's."""
        assert rows.corners is not None and rows.references is not None and rows.teacher is not None
        assert self.local_weights is not None
        at = (pairs.layer, pairs.picture, pairs.query)
        quality = paired_iou(rows.boxes[at], objects, pairs)
        wanted = objects.boxes[pairs.picture, pairs.object]
        left, right = side_targets(rows.references[at].detach(), wanted, bins)
        logits = rows.corners[at].unflatten(1, (4, -1))
        fgl = (quality[:, None] * two_bins(logits, left, right)).sum() / normalizer
        taught = self.scores(rows.teacher).amax(dim=-1).detach()
        ddf = rows.corners.new_zeros(())
        weights = taught.expand(layers, -1, -1).clone().index_put_(at, quality)
        matched = torch.zeros_like(weights, dtype=torch.bool).index_put_(at, torch.ones_like(quality, dtype=torch.bool))
        for layer in range(min(layers, len(rows.corners) - 1)):  # the last one would learn from itself
            ddf = ddf + distilled(rows.corners[layer], rows.corners[-1], weights[layer], matched[layer])
        return self.local_weights[0] * fgl + self.local_weights[1] * ddf


def known_pairs(matched: Sequence[Tensor], layers: int, objects: Objects) -> Pairs:
    """Pairs of queries with noise: the same in every layer, `matched` per picture for its objects in turn."""
    device = objects.boxes.device
    counts = [len(own) for own in matched]
    picture = pictures_of(counts, device)
    own = torch.cat([torch.arange(size) % max(number, 1) for size, number in zip(counts, objects.counts, strict=True)])
    query = torch.cat(list(matched))
    layer = torch.arange(layers).repeat_interleave(len(query))
    return Pairs(layer.to(device), picture.repeat(layers), query.repeat(layers), own.repeat(layers).to(device))


@torch.no_grad()
def paired_iou(boxes: Tensor, objects: Objects, pairs: Pairs) -> Tensor:
    """[P] IoU of each pair's box [P, 4] with its object."""
    both = torch.stack([boxes, objects.boxes[pairs.picture, pairs.object]])
    centre, side = both.split(2, dim=-1)
    low, high = (centre - side / 2).amax(0), (centre + side / 2).amin(0)
    inner = (high - low).clamp(min=0).prod(1)
    return inner / (side.prod(2).sum(0) - inner).clamp(min=torch.finfo(inner.dtype).tiny)


def side_targets(references: Tensor, boxes: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:
    """The bin before each side's distance, int64 [P, 4], and the share of the one behind it [P, 4].

    Both arguments [P, 4] are centre and size; distances are those of D-FINE's eq. 2, in units of its function W(n).
    """
    edges = box_convert(boxes, "cxcywh", "xyxy")
    scale = bins.scale.abs()
    unit = references[:, 2:] / scale + 1e-16
    before = (references[:, :2] - edges[:, :2]) / unit - 0.5 * scale
    behind = (edges[:, 2:] - references[:, :2]) / unit - 0.5 * scale
    distance = torch.cat([before, behind], dim=1)
    values = bin_values(bins)
    place = (values <= distance[..., None]).sum(-1) - 1
    low = place.clamp(0, bins.last - 1)
    to_low, to_high = (distance - values[low]).abs(), (values[low + 1] - distance).abs()
    share = to_low / (to_low + to_high)
    share = torch.where(place < 0, 0.0, torch.where(place >= bins.last, 1.0, share))
    return low, share


def bin_values(bins: Bins) -> Tensor:
    """[last + 1] what the bins stand for, the function W(n) of D-FINE with c = `scale` and a = `up`; `last` is even."""
    middle = bins.last // 2 - 1
    number = constant(range(-middle, middle + 1), bins.up.device)
    bound = bins.up[:1].abs() * bins.scale.abs()
    inner = number.sign() * ((bound + 1) ** (2 / (bins.last - 2) * number.abs()) - 1)
    return torch.cat([-2 * bound, inner, 2 * bound])


def two_bins(logits: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[P, 4] cross-entropy of distributions [P, 4, bins + 1] with bin `left` and the next, whose share is `right`."""
    found = -F.log_softmax(logits, dim=-1)
    first, second = (found.gather(-1, place[..., None])[..., 0] for place in (left, left + 1))
    return first * (1 - right) + second * right


def distilled(corners: Tensor, taught: Tensor, weights: Tensor, matched: Tensor) -> Tensor:
    """D-FINE's self-distillation of a layer: corners and those of the teacher [B, N, 4 (bins + 1)], weights [B, N] and
    which queries have an object, bool [B, N]. Those with and without are averaged apart."""
    width = corners.shape[-1] // 4
    own, wanted = (value.unflatten(2, (4, width)) / TEMPERATURE for value in (corners, taught.detach()))
    divergence = F.kl_div(F.log_softmax(own, -1), F.softmax(wanted, -1), reduction="none").sum(-1)
    every = weights[..., None] * TEMPERATURE**2 * divergence
    counts = torch.stack([matched.sum(), (~matched).sum()]) * 4
    sums = torch.stack([(every * matched[..., None]).sum(), (every * ~matched[..., None]).sum()])
    means = sums / counts.clamp(min=1)
    shares = (counts / len(corners)).sqrt()
    return (means * shares).sum() / shares.sum()
