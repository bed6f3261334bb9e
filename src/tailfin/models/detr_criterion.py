"""The training side of Deformable DETR: one-to-one matching of queries and objects, and losses of the matched pairs.

    loss = class_weight * classification + box_weight * L1 + giou_weight * (1 - GIoU)

for every decoder layer and for the encoder's proposals, each with a matching of its own. Boxes are (centre x, centre y,
width, height) in fractions of the picture; box losses are sums over matched pairs, divided by the number of objects of
all processes per process (`normalizer: process`: at least one for each, as released). The classification loss is any
`ClassificationLoss`: its rows are the queries of a layer, the unmatched ones are background. One with `normalizer`
among its `row_facts` gets the number of objects, as in focal loss; others keep their own mean over rows.

Everything is worked out for all layers at once on the device; the matching costs go to the host in one transfer, where
scipy solves the assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.focal import Focal
from tailfin.models.detector import known_classes
from tailfin.models.images import pictures_of
from tailfin.schema.detectors import DeformableDETRConfig
from tailfin.stats import ClassStats

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # of the matching cost and of the proposals' loss
WORST = 1e9  # cost in the place of one that is no finite number


class Outputs(NamedTuple):
    """What Deformable DETR says about a batch, in float32: L decoder layers, B pictures, Q queries, S tokens."""

    logits: Tensor  # [L, B, Q, K], K the width of the classification loss
    boxes: Tensor  # [L, B, Q, 4]
    hidden: Tensor  # [L, B, Q, d] the queries after every layer, what the class heads see
    features: list[Tensor]  # per level [B, d, h, w]: outputs of `input_proj`
    masks: list[Tensor]  # per level bool [B, h, w]: True where the picture is, False on its padding
    sizes: Tensor  # [B, 4] width, height, width, height of the pictures in pixels
    encoder_logits: Tensor | None = None  # [B, S, E] of a two-stage detector: the last one is that of a proposal
    encoder_boxes: Tensor | None = None  # [B, S, 4]


class Objects(NamedTuple):
    """The targets of a batch, padded to the largest number M of objects in a picture."""

    boxes: Tensor  # [B, M, 4], fractions; (0.5, 0.5, 1, 1) where there is none
    labels: Tensor  # int64 [B, M]
    counts: list[int]


class Weights(NamedTuple):
    """Of the three terms: in a loss, or in the cost of a pair."""

    classes: float
    l1: float
    giou: float


class Pairs(NamedTuple):
    """Matched pairs of all layers, int64 [P] each."""

    layer: Tensor
    picture: Tensor
    query: Tensor
    object: Tensor  # within the picture


class SetCriterion(nn.Module):
    """Losses of an `Outputs`; holds the classification loss, whose running statistics are part of the model.

    The statistics move once per step, by the last decoder layer, whose scores are the detector's: `momentum`s keep
    their meaning whatever the number of layers. The other layers see the same statistics and leave them alone.
    """

    def __init__(self, loss: ClassificationLoss, config: DeformableDETRConfig) -> None:
        super().__init__()
        self.loss = loss
        self.weights = Weights(config.class_weight, config.box_weight, config.giou_weight)
        self.costs = Weights(config.class_cost, config.box_cost, config.giou_cost)
        self.auxiliary = config.auxiliary
        self.one_per_process = config.normalizer == "process"
        logits = 1 + (loss.num_classes if config.encoder_head == "classes" else 0)
        self.proposal_loss = Focal(_blank(logits), focal_alpha=FOCAL_ALPHA, focal_gamma=FOCAL_GAMMA)

    def forward(self, outputs: Outputs, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weighted losses: `loss_classifier`, `loss_box_l1`, `loss_giou` of the last layer, `loss_auxiliary` of the
        others, `loss_encoder` of the proposals. Targets: boxes [M, 4] (xyxy, pixels of the picture given), labels [M].
        """
        objects = pad_objects(targets, outputs.sizes)
        first = 0 if self.auxiliary else len(outputs.logits) - 1
        logits, boxes = outputs.logits[first:], outputs.boxes[first:]
        costs, found = [matching_cost(self.scores(logits), boxes, objects, self.costs)], [boxes]
        proposals = None  # logits [1, B, S, E]
        if outputs.encoder_logits is not None and outputs.encoder_boxes is not None:
            proposals = outputs.encoder_logits[None]
            found.append(outputs.encoder_boxes[None])
            one_class = objects._replace(labels=torch.full_like(objects.labels, outputs.encoder_logits.shape[2] - 1))
            costs.append(matching_cost(proposals.sigmoid(), found[1], one_class, self.costs))
        matched = assign(costs, objects.counts)

        normalizer = objects_per_process(boxes, objects, one_each=self.one_per_process)
        others, weights = len(logits) - 1, self.weights
        parts = [others, 1] if others else [1]
        classes = class_losses(self.loss, logits, objects, matched[0], normalizer, targets, parts=parts)
        # the proposals' boxes are those of one more layer
        chosen = [boxes[pairs.layer, pairs.picture, pairs.query] for boxes, pairs in zip(found, matched, strict=True)]
        pairs = joined(matched, len(logits))
        l1, giou = box_losses(torch.cat(chosen), objects, pairs, len(logits) + len(found) - 1)
        losses = last_layer(weights, classes[-1], l1[others], giou[others], normalizer)
        box_terms = (weights.l1 * l1 + weights.giou * giou) / normalizer
        if others:
            losses["loss_auxiliary"] = weights.classes * classes[0] + box_terms[:others].sum()
        if proposals is not None:
            own = matched[1]
            width = proposals.shape[3]
            labels = torch.full(proposals.shape[1:3], width, device=logits.device)
            labels[own.picture, own.query] = width - 1
            rows = proposals.reshape(-1, width)
            value = self.proposal_loss(rows, labels.flatten(), normalizer=normalizer, every_row=True)
            losses["loss_encoder"] = weights.classes * value + box_terms[-1]
        return losses

    def scores(self, logits: Tensor) -> Tensor:
        """[..., K] logits to [..., C] foreground scores."""
        return foreground_scores(self.loss, logits)

    def match(self, logits: Tensor, boxes: Tensor, objects: Objects) -> Pairs:
        """The cheapest pairs of every layer [L, B, Q, K], [L, B, Q, 4]."""
        return assign([matching_cost(self.scores(logits), boxes, objects, self.costs)], objects.counts)[0]


def foreground_scores(loss: ClassificationLoss, logits: Tensor) -> Tensor:
    """[..., K] logits to [..., C] foreground scores."""
    return loss.scores(logits.flatten(0, -2)).reshape(*logits.shape[:-1], loss.num_classes)


def objects_per_process(boxes: Tensor, objects: Objects, *, one_each: bool = True) -> Tensor:
    """Objects of all processes per process, a scalar; at least one for each, or one for all."""
    total, ranks = sum_over_ranks(boxes.new_full((), sum(objects.counts)), boxes.new_ones(()))
    return (total / ranks).clamp(min=1) if one_each else total.clamp(min=1) / ranks


def last_layer(weights: Weights, classes: Tensor, l1: Tensor, giou: Tensor, normalizer: Tensor) -> dict[str, Tensor]:
    """The weighted losses of the layer whose detections are reported, each term a scalar."""
    return {
        "loss_classifier": weights.classes * classes,
        "loss_box_l1": weights.l1 * l1 / normalizer,
        "loss_giou": weights.giou * giou / normalizer,
    }


def places_of(objects: Objects, pairs: Pairs) -> Tensor:
    """Of every pair the place of its object over the batch, int64 [P]."""
    first = torch.tensor(np.cumsum([0, *objects.counts[:-1]]), device=pairs.picture.device)
    return first[pairs.picture] + pairs.object


def class_losses(
    loss: ClassificationLoss,
    logits: Tensor,
    objects: Objects,
    pairs: Pairs,
    normalizer: Tensor,
    targets: Sequence[dict[str, Tensor]],
    *,
    parts: Sequence[int],
    quality: Tensor | None = None,
    moves: bool = True,
) -> list[Tensor]:
    """The classification losses of layers [L, B, Q, K], summed over `parts`: the first so many layers, the next, ...

    Queries without an object are background. quality: [P], of the pairs, for a loss that asks for it; moves: whether
    the last layer, a part of its own, moves the loss's statistics.
    """
    layers, pictures, queries = logits.shape[:3]
    at = (pairs.layer, pairs.picture, pairs.query)
    labels = torch.full((layers, pictures, queries), loss.num_classes, device=logits.device)
    labels[at] = objects.labels[pairs.picture, pairs.object]
    keywords: dict[str, Any] = {}
    if "normalizer" in loss.row_facts:
        keywords["normalizer"] = normalizer
    if "pictures" in loss.row_facts:
        keywords["pictures"] = pictures
    rows = known_classes(targets, [queries] * pictures)  # the same in every layer
    if "picture" in loss.row_facts:
        rows["picture"] = torch.arange(pictures, device=logits.device).repeat_interleave(queries)
    own: dict[str, Tensor] = {}  # [L, B, Q]
    if "gt_index" in loss.row_facts:
        own["gt_index"] = torch.full_like(labels, -1).index_put(at, places_of(objects, pairs))
    if "quality" in loss.row_facts and quality is not None:
        own["quality"] = logits.new_zeros(labels.shape).index_put(at, quality.detach().to(logits.dtype))

    def some(first: int, last: int) -> Tensor:
        repeated = {name: value.repeat(last - first, *[1] * (value.ndim - 1)) for name, value in rows.items()}
        theirs = {name: value[first:last].flatten() for name, value in own.items()}
        given = logits[first:last].flatten(0, 2), labels[first:last].flatten()
        return loss(*given, every_row=True, **keywords, **repeated, **theirs)

    found, first = [], 0
    training = loss.training
    for number in parts:
        last = first + number
        loss.train(training and moves and last == layers)
        at_once = number if loss.additive and not loss.training else 1
        found.append(sum_of([some(i, i + at_once) for i in range(first, last, at_once)]))
        first = last
    loss.train(training)
    return found


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Of scalars."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()


@torch.no_grad()
def matching_cost(scores: Tensor, boxes: Tensor, objects: Objects, weights: Weights) -> Tensor:
    """Cost of every pair, [L, B, Q, M]: scores [L, B, Q, C] and boxes [L, B, Q, 4] against the objects."""
    layers, pictures, queries, _ = scores.shape
    own = objects.labels[None, :, None].expand(layers, pictures, queries, -1)
    p = scores.gather(3, own)
    hit = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + 1e-8).log()
    miss = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + 1e-8).log()
    cost = weights.classes * (hit - miss)
    cost += weights.l1 * torch.cdist(boxes, objects.boxes[None], p=1)
    return cost.sub_(giou(boxes[:, :, :, None], objects.boxes[None, :, None]), alpha=weights.giou)


def pad_objects(targets: Sequence[dict[str, Tensor]], sizes: Tensor) -> Objects:
    """Targets with boxes in pixels (xyxy) to `Objects`; sizes [B, 4] as in `Outputs`."""
    counts = [len(target["labels"]) for target in targets]
    boxes = sizes.new_full((len(counts), max(counts), 4), 0.5)
    boxes[..., 2:] = 1.0
    labels = torch.zeros(boxes.shape[:2], dtype=torch.int64, device=sizes.device)
    if total := sum(counts):
        # counts are known to the host, so are the places of all objects: two uploads, whatever the batch
        picture = pictures_of(counts, sizes.device)
        free = np.cumsum([0, *(max(counts) - count for count in counts[:-1])])  # padding before each picture's rows
        place = torch.from_numpy(np.arange(total) + np.repeat(free, counts)).to(sizes.device, non_blocking=True)
        own = box_convert(torch.cat([target["boxes"] for target in targets]).float(), "xyxy", "cxcywh")
        boxes.view(-1, 4)[place] = own / sizes[picture]
        labels.view(-1)[place] = torch.cat([target["labels"] for target in targets])
    return Objects(boxes, labels, counts)


def assign(costs: Sequence[Tensor], counts: Sequence[int]) -> list[Pairs]:
    """The cheapest one-to-one pairs for each of the costs [L, B, Q, M]: every object gets a query while there are any.

    Pairs are sorted by layer, picture and query. One transfer to the host serves all of them, and one goes back.
    """
    # a network that has diverged: pairs of any kind, and losses that are not finite, which the engine explains
    flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    np.nan_to_num(flat, copy=False, nan=WORST, posinf=WORST, neginf=-WORST)
    found, offset = [], 0
    for cost in costs:
        layers, _, queries, width = cost.shape
        values = flat[offset : offset + cost.numel()].reshape(cost.shape)
        offset += cost.numel()
        rows = [np.zeros((4, 0), dtype=np.int64)]
        for layer in range(layers):
            for picture, count in enumerate(counts):
                if count and queries and width:
                    query, own = linear_sum_assignment(values[layer, picture, :, :count])
                    rows.append(np.stack([np.full_like(query, layer), np.full_like(query, picture), query, own]))
        found.append(np.concatenate(rows, axis=1))
    device = costs[0].device
    both = torch.from_numpy(np.concatenate(found, axis=1)).to(device)
    return [Pairs(*part) for part in both.split([part.shape[1] for part in found], dim=1)]


def joined(matched: Sequence[Pairs], layers: int) -> Pairs:
    """Pairs of the decoder's layers and, where there are, of the proposals, as those of a layer behind the last."""
    if len(matched) == 1:
        return matched[0]
    decoder, proposals = matched
    moved = proposals._replace(layer=proposals.layer + layers)
    return Pairs(*(torch.cat(both) for both in zip(decoder, moved, strict=True)))


def box_losses(boxes: Tensor, objects: Objects, pairs: Pairs, layers: int) -> tuple[Tensor, Tensor]:
    """Sums over the matched pairs of every layer, [L] each: the L1 distance, and 1 - GIoU; boxes [P, 4] are theirs."""
    wanted = objects.boxes[pairs.picture, pairs.object]
    nothing = boxes.new_zeros(layers)
    l1 = nothing.index_add(0, pairs.layer, (boxes - wanted).abs().sum(-1))
    return l1, nothing.index_add(0, pairs.layer, 1 - giou(boxes, wanted))


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR'19) of boxes (centre, size) that broadcast: [..., 4] to [...]."""
    (centre, side), (other_centre, other_side) = boxes.split(2, dim=-1), others.split(2, dim=-1)
    half, other_half = side / 2, other_side / 2
    low, high = centre - half, centre + half
    other_low, other_high = other_centre - other_half, other_centre + other_half
    inner = _area((torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0))
    outer = _area(torch.maximum(high, other_high) - torch.minimum(low, other_low))
    union = _area(side) + _area(other_side) - inner
    return inner / union.clamp(min=1e-12) - (outer - union) / outer.clamp(min=1e-12)


def _area(sides: Tensor) -> Tensor:
    """[..., 2] to [...]; the gradient of `prod` is a dozen operations, as it minds zeros."""
    width, height = sides.unbind(-1)
    return width * height


def _blank(classes: int) -> ClassStats:
    """Counts that mean nothing, for a loss that does not look at them."""
    return ClassStats(image_count=np.ones(classes), instance_count=np.ones(classes), num_images=1)
