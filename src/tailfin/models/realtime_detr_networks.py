"""The networks of D-FINE, RT-DETR v2 and RF-DETR: transformers' modules, and what goes between them.

    network = hybrid_network("d_fine", settings, widths, loss)         D-FINE's or RT-DETR v2's, without its backbone
    found = hybrid_pass(network, maps, loss, objects)                  maps of the backbone, finest first
    network = grouped_network(settings, loss)                          RF-DETR's
    found = grouped_pass(network, maps, loss, masks, padded)

`settings` are configurations of transformers. Class heads are as wide as the classification loss wants them, and its
scores choose the queries. From the encoder's output on everything is float32, under autocast too. Names of weights are
transformers', but for the backbone, which is none of the network.

As in transformers, and unlike D-FINE's own code: the last layer's distributions have no loss of their own, the layer
before the last has no loss at all, and the distributions of every other layer go with the boxes of the one before it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import HGNetV2Config
from transformers.models.d_fine.modeling_d_fine import (
    DFineMLP,
    DFineModel,
    DFineMultiscaleDeformableAttention,
    get_contrastive_denoising_training_group,
)
from transformers.models.rf_detr.modeling_rf_detr import RfDetrMLPPredictionHead, RfDetrModel, refine_bboxes
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
    RTDetrV2MLPPredictionHead,
    RTDetrV2Model,
    RTDetrV2MultiscaleDeformableAttention,
)

from tailfin.losses.base import ClassificationLoss, at_least_float32
from tailfin.losses.focal import Focal
from tailfin.models.detr_criterion import Objects
from tailfin.models.detr_geometry import grid

FOCAL_BIAS = -math.log(99.0)  # focal loss starts at a probability of 0.01, as in published detectors
PROPOSAL_SIDE = 0.05  # of a proposal on the first level
SMALLEST_PROPOSAL, LARGEST_PROPOSAL = 0.01, 0.99  # a proposal with a coordinate outside does not count
# the smallest there is: transformers' models want a backbone, which is dropped
NO_BACKBONE: dict[str, Any] = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 8, 8],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 8, 8],
    "hidden_sizes": [8, 8, 8, 8],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "out_indices": [2, 3, 4],
}


class Rows(NamedTuple):
    """Queries after each of L layers, float32."""

    logits: Tensor  # [L, B, N, K], K the width of the classification loss
    boxes: Tensor  # [L, B, N, 4] centre and size, in fractions
    corners: Tensor | None = None  # [L', B, N, 4 (bins + 1)] logits of the sides' distributions, of D-FINE
    references: Tensor | None = None  # [L', B, N, 4] boxes that the distances are from
    teacher: Tensor | None = None  # [B, N, K] logits of the last layer, whose distributions the others learn from


class Found(NamedTuple):
    """What a network makes of a batch."""

    queries: Rows
    hidden: Tensor  # [L, B, Q, d] the queries that class heads see
    features: list[Tensor]  # [B, d, h, w] per level, projected
    encoder: Rows  # of one layer: the proposals that queries start from
    noisy: Rows | None = None  # queries of objects with noise
    matched: list[Tensor] | None = None  # per picture int64 [groups M]: which of these shall find its objects, in turn
    groups: int = 1  # of objects with noise


def width_bias(loss: ClassificationLoss) -> Tensor:
    """The class heads' first bias."""
    return torch.full((loss.num_logits,), FOCAL_BIAS) if type(loss) is Focal else loss.prior_bias()


def ranking(loss: ClassificationLoss, logits: Tensor) -> Tensor:
    """[B, S, K] to [B, S]: the best class's score, by which queries are chosen."""
    scores: Tensor = loss.scores(at_least_float32(logits.detach()).flatten(0, 1))
    return scores.amax(dim=1).unflatten(0, logits.shape[:2])


# ---- D-FINE and RT-DETR v2 -------------------------------------------------------------------------------------------


def hybrid_network(kind: str, settings: Any, widths: list[int], loss: ClassificationLoss) -> Any:
    """A network with random weights for maps of `widths` channels."""
    settings.backbone_config = HGNetV2Config(**{**NO_BACKBONE, "out_indices": list(range(5 - len(widths), 5))})
    fine = kind == "d_fine"
    network: Any = (DFineModel if fine else RTDetrV2Model)(settings)
    del network.backbone
    inner, channels, layers = settings.encoder_hidden_dim, settings.d_model, settings.decoder_layers
    network.encoder_input_proj = nn.ModuleList(
        nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)) for width in widths
    )
    network.enc_score_head = nn.Linear(channels, loss.num_logits)
    decoder = network.decoder
    decoder.class_embed = nn.ModuleList(nn.Linear(channels, loss.num_logits) for _ in range(layers))
    if fine:
        decoder.bbox_embed = nn.ModuleList(
            DFineMLP(channels, channels, 4 * (settings.max_num_bins + 1), 3) for _ in range(layers)
        )
    else:
        decoder.bbox_embed = nn.ModuleList(
            RTDetrV2MLPPredictionHead(channels, channels, 4, num_layers=3) for _ in range(layers)
        )
    _reset_hybrid(network, loss)
    return network


def hybrid_pass(network: Any, maps: list[Tensor], loss: ClassificationLoss, objects: Objects | None) -> Found:
    """`objects`, boxes in fractions of the batch's canvas, add queries with noise in training."""
    features = [project(level) for project, level in zip(network.encoder_input_proj, maps, strict=True)]
    levels = network.encoder(list(features)).last_hidden_state
    levels = [project(level) for project, level in zip(network.decoder_input_proj, levels, strict=True)]
    with torch.autocast(levels[0].device.type, enabled=False):
        return _decoded(network, features, [at_least_float32(level) for level in levels], loss, objects)


def _decoded(
    network: Any, features: list[Tensor], levels: list[Tensor], loss: ClassificationLoss, objects: Objects | None
) -> Found:
    settings = network.config
    shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
    memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    anchors, valid = _anchors(shapes, memory)
    tokens = network.enc_output(valid * memory)
    logits, raw = network.enc_score_head(tokens), network.enc_bbox_head(tokens) + anchors
    count = min(settings.num_queries, memory.shape[1])
    best = ranking(loss, logits).topk(count, dim=1).indices[..., None]
    start, content = _picked(raw, best), _picked(tokens, best).detach()
    proposals = Rows(_picked(logits, best)[None], start.sigmoid()[None])
    mask, noise = None, {}
    if objects is not None and settings.num_denoising:
        own = [
            {"class_labels": labels[:number], "boxes": boxes[:number]}
            for labels, boxes, number in zip(objects.labels, objects.boxes, objects.counts, strict=True)
        ]
        classes, boxes, mask, noise = get_contrastive_denoising_training_group(
            own,
            loss.num_classes,
            count,
            network.denoising_class_embed,
            settings.num_denoising,
            settings.label_noise_ratio,
            settings.box_noise_scale,
        )
        if classes is not None:
            start, content = torch.cat([boxes, start], 1), torch.cat([classes, content], 1)
    decoded = network.decoder(
        inputs_embeds=content,
        encoder_hidden_states=memory,
        encoder_attention_mask=mask,
        reference_points=start.detach(),
        spatial_shapes=torch.tensor(shapes),  # on the host: a layer looks whether they make up the memory
        spatial_shapes_list=list(shapes),
    )
    fine = isinstance(network, DFineModel)
    hidden = decoded.intermediate_hidden_states if fine else decoded.intermediate_hidden_states.transpose(0, 1)
    logits = decoded.intermediate_logits.transpose(0, 1)
    boxes = decoded.intermediate_reference_points.transpose(0, 1)
    if not fine:
        every = Rows(logits, boxes)
    else:
        corners = decoded.intermediate_predicted_corners.transpose(0, 1)
        every = Rows(logits, boxes, corners, decoded.initial_reference_points.transpose(0, 1), logits[-1])
    if not noise:
        queries = _without_last_but_one(every)
        if network.training:  # every weight has a gradient, or several processes would wait for each other
            unused = every.logits[-2].sum() if len(every.logits) > 1 else queries.logits.sum()
            if settings.num_denoising:
                unused = unused + network.denoising_class_embed.weight.sum()
            queries = queries._replace(logits=queries.logits + 0 * unused)
        return Found(queries, hidden, features, proposals)
    noisy = noise["dn_num_split"][0]
    first = _part(every, slice(0, noisy))
    return Found(
        _without_last_but_one(_part(every, slice(noisy, None))),
        hidden[:, :, noisy:],
        features,
        proposals,
        first._replace(logits=first.logits[: settings.decoder_layers], boxes=first.boxes[: settings.decoder_layers]),
        list(noise["dn_positive_idx"]),
        noise["dn_num_group"],
    )


def _part(rows: Rows, queries: slice) -> Rows:
    return Rows(*(None if value is None else value[..., queries, :] for value in rows))  # type: ignore[arg-type]


def _without_last_but_one(rows: Rows) -> Rows:
    """Of D-FINE in training the layers that have a loss, see the top of the file; of RT-DETR v2 all."""
    if rows.corners is None or len(rows.logits) == 1:
        return rows
    logits, boxes = (torch.cat([value[:-2], value[-1:]]) for value in (rows.logits, rows.boxes))
    return rows._replace(logits=logits, boxes=boxes)


def _picked(values: Tensor, places: Tensor) -> Tensor:
    return values.gather(1, places.expand(-1, -1, values.shape[2]))


def _anchors(shapes: tuple[tuple[int, int], ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [1, S, 4] of a box around every cell, and whether it counts [1, S, 1]; of the others they are huge."""
    one = like.new_ones((1, 2))
    boxes = []
    for level, shape in enumerate(shapes):
        centres = grid(shape, one)
        boxes.append(torch.cat([centres, torch.full_like(centres, PROPOSAL_SIDE * 2**level)], dim=2))
    anchors = torch.cat(boxes, dim=1)
    valid = ((anchors > SMALLEST_PROPOSAL) & (anchors < LARGEST_PROPOSAL)).all(2, keepdim=True)
    return anchors.logit().masked_fill(~valid, torch.finfo(like.dtype).max), valid.to(like.dtype)


@torch.no_grad()
def _reset_hybrid(network: Any, loss: ClassificationLoss) -> None:
    """The published start: PyTorch's own in every layer, Xavier where queries are made, sampling in a star, priors in
    the class heads, boxes that stay where their reference is."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
            module.reset_parameters()
    for module in network.modules():
        if isinstance(module, DFineMultiscaleDeformableAttention | RTDetrV2MultiscaleDeformableAttention):
            network._init_weights(module)
        if type(module).__name__ in ("DFineGate", "DFineLQE"):
            network._init_weights(module)
    decoder = network.decoder
    linear = [network.enc_output[0], *decoder.query_pos_head.layers]
    for layer in linear:
        nn.init.xavier_uniform_(layer.weight)
    for projection in network.encoder_input_proj:
        nn.init.xavier_uniform_(projection[0].weight)
    bias = width_bias(loss)
    for head in (network.enc_score_head, *decoder.class_embed):
        nn.init.xavier_uniform_(head.weight)
        head.bias.copy_(bias)
    pre = [decoder.pre_bbox_head] if hasattr(decoder, "pre_bbox_head") else []
    for head in (network.enc_bbox_head, *decoder.bbox_embed, *pre):
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    if hasattr(network, "denoising_class_embed"):
        nn.init.xavier_uniform_(network.denoising_class_embed.weight)
        network.denoising_class_embed.weight[-1].zero_()  # of no class


# ---- RF-DETR ---------------------------------------------------------------------------------------------------------


def grouped_network(settings: Any, loss: ClassificationLoss) -> Any:
    """A network with random weights; its backbone's maps are as `settings.backbone_config` says."""
    network: Any = RfDetrModel(settings)
    del network.backbone.backbone
    channels = settings.d_model
    network.class_embed = nn.Linear(channels, loss.num_logits)
    network.bbox_embed = RfDetrMLPPredictionHead(channels, channels, 4, num_layers=3)
    network.enc_out_class_embed = nn.ModuleList(
        nn.Linear(channels, loss.num_logits) for _ in range(settings.group_detr)
    )
    bias = width_bias(loss)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm):
                module.reset_parameters()
            if type(module).__name__ == "RfDetrMultiscaleDeformableAttention":
                network._init_weights(module)
        for head in (network.class_embed, *network.enc_out_class_embed):
            head.bias.copy_(bias)
        for head in (network.bbox_embed, *network.enc_out_bbox_embed):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        nn.init.zeros_(network.reference_point_embed.weight)
    return network


def grouped_pass(network: Any, maps: list[Tensor], loss: ClassificationLoss, mask: Tensor) -> Found:
    """mask: bool [B, h, w], cells of a picture. Groups of queries lie one behind the other; evaluation has one."""
    level = network.backbone.projector(tuple(maps))
    with torch.autocast(level.device.type, enabled=False):
        return _grouped(network, at_least_float32(level), loss, mask)


def _grouped(network: Any, level: Tensor, loss: ClassificationLoss, mask: Tensor) -> Found:
    settings = network.config
    shape = (level.shape[2], level.shape[3])
    memory = level.flatten(2).transpose(1, 2)
    ratios = torch.stack([mask[:, 0].float().mean(1), mask[:, :, 0].float().mean(1)], dim=1)
    centres = grid(shape, ratios)
    anchors = torch.cat([centres, torch.full_like(centres, PROPOSAL_SIDE)], dim=2)
    valid = ((anchors > SMALLEST_PROPOSAL) & (anchors < LARGEST_PROPOSAL)).all(2, keepdim=True)
    valid = valid & mask.flatten(1)[..., None]
    anchors, tokens = anchors * valid, memory * valid
    groups = settings.group_detr if network.training else 1
    count = min(settings.num_queries, memory.shape[1])
    logits, boxes = [], []
    for group in range(groups):
        own = network.enc_output_norm[group](network.enc_output[group](tokens))
        found = network.enc_out_class_embed[group](own)
        ranked = ranking(loss, found).masked_fill(~valid[..., 0], -1.0)
        best = ranked.topk(count, dim=1).indices[..., None]
        boxes.append(_picked(refine_bboxes(anchors, network.enc_out_bbox_embed[group](own)), best))
        logits.append(_picked(found, best))
    proposals = Rows(torch.cat(logits, 1)[None], torch.cat(boxes, 1)[None])
    places = torch.cat([torch.arange(count) + group * settings.num_queries for group in range(groups)])
    places = places.to(level.device)
    start = refine_bboxes(
        proposals.boxes[0].detach(), network.reference_point_embed.weight[places].expand(len(level), -1, -1)
    )
    content = network.query_feat.weight[places].expand(len(level), -1, -1)
    decoded = network.decoder(
        inputs_embeds=content,
        reference_points=start,
        spatial_shapes=torch.tensor([shape]),
        spatial_shapes_list=[shape],
        valid_ratios=ratios[:, None],
        encoder_hidden_states=memory,
        encoder_attention_mask=mask.flatten(1),
    )
    hidden = decoded.intermediate_hidden_states
    reference = decoded.intermediate_reference_points
    queries = Rows(network.class_embed(hidden), refine_bboxes(reference, network.bbox_embed(hidden)))
    return Found(queries, hidden, [level], proposals)
