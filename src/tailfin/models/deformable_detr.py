"""Deformable DETR (Zhu et al., ICLR'21) on the layers of transformers, one- or two-stage, with or without refinement.

    images -> batch -> backbone -> input_proj -> encoder -> proposals -> decoder -> heads -> losses or detections

The layers are transformers'; this file is what goes between them. Boxes, reference points and logits are float32 under
autocast as well. `criterion` has the classification loss, which decides how wide the class heads are and what a score
is; there is no NMS.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert
from transformers import DeformableDetrConfig, ResNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrMLPPredictionHead,
)

from tailfin.losses.base import ClassificationLoss
from tailfin.losses.focal import Focal
from tailfin.models.backbones import Backbone
from tailfin.models.bodies import build_body
from tailfin.models.deformable_attention import DeformableAttention, EncoderLayer
from tailfin.models.detections import best_pairs
from tailfin.models.detector import Compared, Detections, Detector, Limits, Targets, reported
from tailfin.models.detr_criterion import Outputs, SetCriterion, pad_objects, places_of
from tailfin.models.detr_geometry import Shapes, box_code, cells_of, inverse_sigmoid, levels_of, position_code
from tailfin.models.images import size_limits
from tailfin.models.precision import in_float32
from tailfin.schema.detectors import DeformableDETRConfig
from tailfin.schema.recipe import Recipe

FOCAL_BIAS = -math.log(99.0)  # focal loss starts at a probability of 0.01 here, as in the published detector
PROPOSAL_SIDE = 0.05  # of a proposal on the first level; doubled per level
SMALLEST_PROPOSAL, LARGEST_PROPOSAL = 0.01, 0.99  # a proposal with a coordinate outside does not count


class DeformableDETR(Detector):
    """A query-based detector; see `Detector` for how it is called.

    `input_proj` is a list of (convolution, group norm) per level; `class_embed` and `bbox_embed` have one head per
    decoder layer, then the encoder's. Without refinement one head serves all layers, as published.
    """

    def __init__(
        self,
        backbone: Backbone,
        loss: ClassificationLoss,
        config: DeformableDETRConfig,
        *,
        limits: Limits = Limits(0.0, 300),
        channels_last: bool = False,
    ) -> None:
        body = backbone.body
        super().__init__(backbone, limits, divisor=1, channels_last=channels_last, mean=body.mean, std=body.std)
        widths = [body.channels[layer] for layer in body.taken]
        layers = transformers_config(config)
        channels = config.channels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1), nn.GroupNorm(32, channels)) for width in widths
        )
        if len(widths) < config.levels:
            down = nn.Conv2d(widths[-1], channels, 3, stride=2, padding=1)
            self.input_proj.append(nn.Sequential(down, nn.GroupNorm(32, channels)))
        self.level_embed = nn.Parameter(torch.empty(config.levels, channels))
        self.encoder = nn.ModuleList(EncoderLayer(layers) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DeformableDetrDecoderLayer(layers) for _ in range(config.decoder_layers))
        for layer in self.encoder:
            layer.self_attn = DeformableAttention(layers, config.heads, config.points)
        for layer in self.decoder:
            layer.encoder_attn = DeformableAttention(layers, config.heads, config.points)
        heads = config.decoder_layers if config.refine else 1
        self.class_embed = _clones(nn.Linear(channels, loss.num_logits), heads)
        self.bbox_embed = _clones(DeformableDetrMLPPredictionHead(channels, channels, 4, 3), heads)
        if config.two_stage:
            # the last logit ranks proposals, those of classes come before it
            self.class_embed.append(
                nn.Linear(channels, 1 + (loss.num_classes if config.encoder_head == "classes" else 0))
            )
            self.bbox_embed.append(copy.deepcopy(self.bbox_embed[0]))
            self.enc_output = nn.Linear(channels, channels)
            self.enc_output_norm = nn.LayerNorm(channels)
            self.pos_trans = nn.Linear(2 * channels, 2 * channels)
            self.pos_trans_norm = nn.LayerNorm(2 * channels)
        else:
            self.query_embed = nn.Embedding(config.queries, 2 * channels)
            self.reference_points = nn.Linear(channels, 2)
        self.criterion = SetCriterion(loss, config)
        self.queries, self.refine, self.two_stage = config.queries, config.refine, config.two_stage
        self.checkpointing = config.checkpointing
        self._reset(loss, packed=config.attention_init == "packed")

    def losses(self, outputs: Outputs, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named losses with their weights: `SetCriterion.forward`."""
        return self.criterion(outputs, targets)

    def parts(self) -> dict[str, nn.Module]:
        """Parts that a stage may train, by name."""
        return {
            "classifier": self.class_embed,
            "box": self.bbox_embed,
            "projection": self.input_proj,
            "encoder": self.encoder,
            "decoder": self.decoder,
            "backbone": self.backbone,
        }

    def class_specific(self) -> tuple[str, ...]:
        """The class heads, and the input projections as in the released code of step-wise learning."""
        return ("classifier", "projection")

    @property
    def loss(self) -> ClassificationLoss:
        return self.criterion.loss

    # ---- the network -----------------------------------------------------------------------------------------------

    def outputs(self, images: Sequence[Tensor], targets: Targets | None = None) -> Outputs:
        """Everything that losses, detections and distillation read, for pictures as in `forward`."""
        batch = self.batch(images)
        return self.from_maps(batch, list(self.backbone(batch.tensors).values()))

    def from_maps(self, batch: ImageList, maps: list[Tensor], sizes: Tensor | None = None) -> Outputs:
        """`outputs` from the backbone's feature maps of a batch on, for what has them already, and `Outputs.sizes`."""
        full = batch.tensors.shape[-2:]
        if sizes is None:
            sizes = size_limits(batch.image_sizes, batch.tensors.device)
        return self.from_sizes(full, sizes, any(size != tuple(full) for size in batch.image_sizes), maps)

    def from_sizes(self, full: Sequence[int], sizes: Tensor, padded: bool, maps: list[Tensor]) -> Outputs:
        """`from_maps` for a batch of `full` (H, W) pixels whose pictures have `sizes` [B, 4] (width, height, twice);
        without padding the masks are left out."""
        maps = maps + [maps[-1]] * (len(self.input_proj) - len(maps))
        features = [project(level) for project, level in zip(self.input_proj, maps, strict=True)]
        shapes: Shapes = [(level.shape[-2], level.shape[-1]) for level in features]
        levels, counts = levels_of(shapes, full, sizes.device), [height * width for height, width in shapes]
        cells = cells_of(levels, sizes)
        valid, ratios, centres = cells.valid.all(2), cells.ratios, cells.centres
        masks = [own.unflatten(1, shape) for own, shape in zip(valid.split(counts, dim=1), shapes, strict=True)]
        mask = valid if padded else None

        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in features], dim=1).float()
        like = cells if padded else cells_of(levels, sizes[:1])
        code = position_code(levels, like, self.level_embed.shape[1] // 2).split(counts, dim=1)
        places = torch.cat([level + own for level, own in zip(code, self.level_embed, strict=True)], dim=1)
        reference = centres[:, :, None] * ratios[:, None]
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.encoder:
            memory = (functools.partial(checkpoint, layer, use_reentrant=False) if again else layer)(
                memory,
                mask,
                spatial_position_embeddings=places,
                reference_points=reference,
                spatial_shapes_list=shapes,
            )

        encoder_logits = encoder_boxes = None
        if self.two_stage:
            encoder_logits, raw = self._proposals(memory, mask, centres, shapes)
            encoder_boxes = raw.sigmoid()
            queries, content, reference = self._queries_of(encoder_logits, raw, mask)
        else:
            queries, content = self.query_embed.weight.expand(sizes.shape[0], -1, -1).chunk(2, dim=2)
            reference = in_float32(self.reference_points, queries).sigmoid()
        hidden, boxes = self._decode(queries, content, reference, memory, mask, ratios, shapes)
        return Outputs(self.classify(hidden), boxes, hidden, features, masks, sizes, encoder_logits, encoder_boxes)

    def classify(self, hidden: Tensor) -> Tensor:
        """Queries after each decoder layer [L, B, Q, d] to class logits [L, B, Q, K], float32."""
        return torch.stack([in_float32(self._head(self.class_embed, layer), own) for layer, own in enumerate(hidden)])

    def _decode(
        self,
        queries: Tensor,
        content: Tensor,
        reference: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        ratios: Tensor,
        shapes: Shapes,
    ) -> tuple[Tensor, Tensor]:
        """Queries after each layer [L, B, Q, d] and their boxes [L, B, Q, 4]."""
        hidden, boxes = [], []
        for number, layer in enumerate(self.decoder):
            scale = ratios if reference.shape[-1] == 2 else ratios.repeat(1, 1, 2)
            content = layer(
                content,
                queries,
                reference[:, :, None] * scale[:, None],
                spatial_shapes_list=shapes,
                encoder_hidden_states=memory,
                encoder_attention_mask=mask,
            )
            delta = in_float32(self._head(self.bbox_embed, number), content)  # a refined box is a small change
            start = inverse_sigmoid(reference)
            box = (delta + start if start.shape[-1] == 4 else delta + nn.functional.pad(start, (0, 2))).sigmoid()
            if self.refine:
                reference = box.detach()
            hidden.append(content)
            boxes.append(box)
        return torch.stack(hidden), torch.stack(boxes)

    def _proposals(self, memory: Tensor, mask: Tensor | None, centres: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Class logits [B, S, E] of every token, the last one that of a proposal, and box logits [B, S, 4]; infinite
        boxes where no proposal can be.
        """
        sides = torch.cat(
            [centres.new_full((h * w, 2), PROPOSAL_SIDE * 2**level) for level, (h, w) in enumerate(shapes)]
        )
        anchors = torch.cat([centres, sides.expand_as(centres)], dim=2)
        valid = ((anchors > SMALLEST_PROPOSAL) & (anchors < LARGEST_PROPOSAL)).all(2, keepdim=True)
        if mask is not None:
            valid = valid & mask[..., None]
        found = self.enc_output_norm(self.enc_output(memory * valid))
        delta = in_float32(self.bbox_embed[-1], found)
        return in_float32(self.class_embed[-1], found), delta + anchors.logit().masked_fill(~valid, math.inf)

    def _queries_of(self, logits: Tensor, raw: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(position part, content part, boxes) of the queries: the best proposals, without a gradient to them."""
        ranked = logits[..., -1].detach()
        if mask is not None:
            ranked = ranked.masked_fill(~mask, -math.inf)
        best = ranked.topk(min(self.queries, ranked.shape[1]), dim=1).indices
        reference = raw.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        code = self.pos_trans_norm(self.pos_trans(box_code(reference, self.level_embed.shape[1] // 2)))
        queries, content = code.float().chunk(2, dim=2)
        return queries, content, reference

    def _head(self, heads: nn.ModuleList, layer: int) -> nn.Module:
        return heads[layer if self.refine else 0]

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        """The best pairs of query and class."""
        scores = reported(self, self.criterion.scores(outputs.logits[-1]))
        return best_pairs(self.pixels(outputs), scores, limits)

    def pixels(self, outputs: Outputs) -> Tensor:
        """[B, Q, 4] boxes (xyxy, pixels) of the last layer within their pictures."""
        return box_convert(outputs.boxes[-1], "cxcywh", "xyxy").clamp(0, 1) * outputs.sizes[:, None]

    # ---- what methods ask ------------------------------------------------------------------------------------------

    def annotation_scores(self, images: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Scores of the query that the Hungarian matching of the last layer gives to each annotation."""
        outputs = self.outputs(images)
        logits, objects = outputs.logits[-1:], pad_objects(targets, outputs.sizes)
        pairs = self.criterion.match(logits, outputs.boxes[-1:], objects)
        return self.criterion.scores(logits)[0, pairs.picture, pairs.query], places_of(objects, pairs)

    def compared(self, teacher: Detector, images: Sequence[Tensor], targets: Targets, *, shared: bool) -> Compared:
        """Eq. 2 on the outputs of `input_proj`, eq. 3 on the teacher's object queries."""
        taught_by = cast(DeformableDETR, teacher)
        batch = self.batch(images)
        maps = list(self.backbone(batch.tensors).values())
        outputs = self.from_maps(batch, maps)
        losses = self.losses(outputs, targets)
        with torch.no_grad():
            taught = taught_by.from_maps(batch, self.maps_of(taught_by, batch, maps), outputs.sizes)
        logits = self.classify(taught.hidden) if shared else outputs.logits
        return Compared(losses, outputs.features, taught.features, outputs.masks, outputs.sizes, logits, taught.logits)

    # ---- initial weights -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reset(self, loss: ClassificationLoss, *, packed: bool) -> None:
        """The published start: Xavier in the transformer, sampling in a star, priors in the class heads, boxes that
        stay where their reference is.
        """
        transformer: list[nn.Module] = [self.encoder, self.decoder]
        transformer += [self.enc_output, self.pos_trans] if self.two_stage else [self.reference_points]
        for part in transformer:
            for name, parameter in part.named_parameters():
                if parameter.ndim > 1:
                    # a matrix for queries, keys and values has three times the rows: a bound smaller by sqrt(2)
                    joint = packed and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
                    nn.init.xavier_uniform_(parameter, gain=math.sqrt(0.5) if joint else 1.0)
                elif name.endswith(("proj.bias", "reference_points.bias")):
                    nn.init.zeros_(parameter)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                _reset_sampling(module)
        for projection in self.input_proj:
            convolution = projection.get_submodule("0")
            nn.init.xavier_uniform_(convolution.get_parameter("weight"))
            nn.init.zeros_(convolution.get_parameter("bias"))
        bias = torch.full((loss.num_logits,), FOCAL_BIAS) if type(loss) is Focal else loss.prior_bias()
        decoder = len(self.class_embed) - self.two_stage
        for number, own in enumerate(head.get_parameter("bias") for head in self.class_embed):
            own.copy_(bias if number < decoder else torch.full_like(own, FOCAL_BIAS))
        for number, head in enumerate(self.bbox_embed):
            *_, last = head.get_submodule("layers").children()
            nn.init.zeros_(last.get_parameter("weight"))
            nn.init.zeros_(last.get_parameter("bias"))
            if number == 0 and not self.two_stage:
                last.get_parameter("bias")[2:] = -2.0  # learned queries start with small boxes


def build_deformable_detr(
    recipe: Recipe, loss: ClassificationLoss, body_state: dict[str, Tensor] | None, source: str
) -> DeformableDETR:
    """The recipe's Deformable DETR.

    `body_state` are weights of the backbone's body; `source` is where they come from, for messages.
    """
    config = cast(DeformableDETRConfig, recipe.detector)
    body = build_body(recipe, config, body_state, source)
    used = body.layer_names[-min(config.levels, 3) :]
    backbone = Backbone(body.take({layer: str(level) for level, layer in enumerate(used)}))
    limits = Limits(recipe.evaluation.score_threshold, recipe.evaluation.max_dets)
    return DeformableDETR(backbone, loss, config, limits=limits, channels_last=recipe.schedule.channels_last)


def transformers_config(config: DeformableDETRConfig) -> DeformableDetrConfig:
    """The settings that transformers' layers read."""
    warnings.filterwarnings("ignore", message="You'd better set embed_dim")  # about a CUDA kernel that is not used here
    return DeformableDetrConfig(
        backbone_config=ResNetConfig(),
        d_model=config.channels,
        num_queries=config.queries,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        encoder_n_points=config.points,
        decoder_n_points=config.points,
        encoder_ffn_dim=config.feedforward,
        decoder_ffn_dim=config.feedforward,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        activation_dropout=config.dropout,
        num_feature_levels=config.levels,
        two_stage=config.two_stage,
        with_box_refine=config.refine,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )


# ---- details ---------------------------------------------------------------------------------------------------------


def _reset_sampling(module: DeformableAttention) -> None:
    """No attention at first; the points of a head lie on a ray of its own, one step further each."""
    angles = torch.arange(module.n_heads) * (2.0 * math.pi / module.n_heads)
    rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rays = rays / rays.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, module.n_points + 1).float()
    star = rays[:, None, None] * steps[None, None, :, None]
    module.sampling_offsets.bias.copy_(star.expand(-1, module.n_levels, -1, -1).flatten())
    nn.init.zeros_(module.sampling_offsets.weight)
    nn.init.zeros_(module.attention_weights.weight)
    nn.init.zeros_(module.attention_weights.bias)


def _clones(module: nn.Module, count: int) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))
