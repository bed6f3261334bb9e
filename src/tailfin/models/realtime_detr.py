"""D-FINE (Peng et al., ICLR'25), RT-DETR v2 (Lv et al., 2024) and RF-DETR (Robinson et al., 2025).

    images -> batch -> backbone -> network (`realtime_detr_networks`) -> losses (`realtime_detr_criterion`), detections

One adapter for the three: the architecture is transformers', built from the recipe's section without a download; the
classification term is any loss. Queries are the rows of the loss, the best pairs of query and class are reported, and
there is no suppression. D-FINE and RT-DETR v2 know no padding: a batch is filled up to its largest picture, their boxes
are fractions of that canvas, and pictures of one size are what they are for. RF-DETR leaves padding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert
from transformers import DFineConfig as DFineSettings
from transformers import RfDetrConfig as RFDETRSettings
from transformers import RTDetrV2Config as RTDETRv2Settings

from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.models.backbones import Backbone
from tailfin.models.bodies import build_body
from tailfin.models.constants import constant
from tailfin.models.detections import best_pairs
from tailfin.models.detector import Compared, Detections, Detector, Limits, Targets, reported, valid_cells
from tailfin.models.detr_criterion import Objects, pad_objects, places_of
from tailfin.models.detr_geometry import valid_mask
from tailfin.models.images import size_limits
from tailfin.models.precision import in_float32
from tailfin.models.realtime_detr_criterion import Bins, RealTimeCriterion
from tailfin.models.realtime_detr_networks import Found, grouped_network, grouped_pass, hybrid_network, hybrid_pass
from tailfin.schema.backbones import RF_DINOV2
from tailfin.schema.realtime_detr import DFineConfig, HybridDETRConfig, RealTimeDETRConfig, RFDETRConfig, RTDETRv2Config
from tailfin.schema.recipe import Recipe

COARSEST = 32  # pixels per cell of the last level


class Outputs(NamedTuple):
    """What a batch's losses and detections are made of."""

    found: Found
    sizes: Tensor  # [B, 4] width, height, width, height of the pictures in pixels
    canvas: Tensor  # [B, 4] the same of what boxes are fractions of
    padded: tuple[int, int]  # height and width of the batch

    @property
    def logits(self) -> Tensor:
        """[L, B, Q, K] of the queries."""
        return self.found.queries.logits

    @property
    def boxes(self) -> Tensor:
        """[L, B, Q, 4] of the queries, centre and size in fractions of the canvas."""
        return self.found.queries.boxes


class RealTimeDETR(Detector):
    """A query-based detector; see `Detector` for how it is called.

    Args:
        settings: transformers' configuration of the network, see `transformers_settings`.
    """

    def __init__(
        self,
        backbone: Backbone,
        loss: ClassificationLoss,
        config: RealTimeDETRConfig,
        settings: Any,
        *,
        limits: Limits = Limits(0.0, 300),
        channels_last: bool = False,
    ) -> None:
        body = backbone.body
        self.grouped = config.name == "rf_detr"
        divisor = COARSEST
        if self.grouped:
            divisor = settings.backbone_config.patch_size * settings.backbone_config.num_windows
        super().__init__(backbone, limits, divisor=divisor, channels_last=channels_last, mean=body.mean, std=body.std)
        if self.grouped:
            self.network = grouped_network(settings, loss)
        else:
            self.network = hybrid_network(config.name, settings, [body.channels[layer] for layer in body.taken], loss)
        self.criterion = RealTimeCriterion(loss, config)

    # ---- the three steps -------------------------------------------------------------------------------------------

    def outputs(self, images: Sequence[Tensor], targets: Targets | None = None) -> Outputs:
        batch = self.batch(images)
        return self.from_maps(batch, list(self.backbone(batch.tensors).values()), targets)

    def from_maps(self, batch: ImageList, maps: list[Tensor], targets: Targets | None = None) -> Outputs:
        """`outputs` from the backbone's maps of a batch on; in training `targets` give queries with noise."""
        sizes = size_limits(batch.image_sizes, batch.tensors.device)
        return self.from_sizes(batch.tensors.shape[-2:], sizes, True, maps, targets)

    def from_sizes(
        self, full: Sequence[int], sizes: Tensor, padded: bool, maps: list[Tensor], targets: Targets | None = None
    ) -> Outputs:
        """`from_maps` for a batch of `full` (H, W) pixels whose pictures have `sizes` [B, 4]."""
        loss, height, width = self.criterion.loss, full[0], full[1]
        if self.grouped:
            mask = valid_mask((maps[0].shape[2], maps[0].shape[3]), full, sizes)
            return Outputs(grouped_pass(self.network, maps, loss, mask), sizes, sizes, (height, width))
        canvas = constant([width, height, width, height], sizes.device).expand_as(sizes)
        objects = pad_objects(targets, canvas) if self.training and targets is not None else None
        return Outputs(hybrid_pass(self.network, maps, loss, objects), sizes, canvas, (height, width))

    def losses(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Named losses with their weights: `RealTimeCriterion.forward`."""
        decoder = self.network.decoder
        bins = Bins(decoder.max_num_bins, decoder.up, decoder.reg_scale) if hasattr(decoder, "reg_scale") else None
        return self.criterion(outputs.found, self.objects(outputs, targets), targets, bins)

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        """The best pairs of query and class."""
        scores = reported(self, self.criterion.scores(outputs.logits[-1]))
        return best_pairs(self.pixels(outputs), scores, limits)

    def pixels(self, outputs: Outputs) -> Tensor:
        """[B, Q, 4] boxes (xyxy, pixels) of the last layer within their pictures."""
        boxes = box_convert(outputs.boxes[-1], "cxcywh", "xyxy") * outputs.canvas[:, None]
        return torch.minimum(boxes.clamp(min=0), outputs.sizes[:, None])

    def objects(self, outputs: Outputs, targets: Targets) -> Objects:
        """Targets in fractions of what the outputs' boxes are fractions of."""
        return pad_objects(targets, outputs.canvas)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        own = self.network
        decoder = own.decoder
        if self.grouped:
            queries = nn.ModuleList([own.reference_point_embed, own.query_feat])
            return {
                "classifier": nn.ModuleList([own.class_embed, own.enc_out_class_embed]),
                "box": nn.ModuleList([own.bbox_embed, own.enc_out_bbox_embed]),
                "projection": own.backbone.projector,
                "encoder": nn.ModuleList([own.enc_output, own.enc_output_norm]),
                "decoder": nn.ModuleList([decoder, queries]),
                "backbone": self.backbone,
            }
        heads = [decoder.class_embed, own.enc_score_head]
        if hasattr(own, "denoising_class_embed"):
            heads.append(own.denoising_class_embed)
        boxes = [decoder.bbox_embed, own.enc_bbox_head]
        boxes += [getattr(decoder, name) for name in ("pre_bbox_head", "lqe_layers") if hasattr(decoder, name)]
        return {
            "classifier": nn.ModuleList(heads),
            "box": nn.ModuleList(boxes),
            "projection": nn.ModuleList([own.encoder_input_proj, own.decoder_input_proj]),
            "encoder": nn.ModuleList([own.encoder, own.enc_output]),
            "decoder": nn.ModuleList([decoder.layers, decoder.query_pos_head]),
            "backbone": self.backbone,
        }

    def class_specific(self) -> tuple[str, ...]:
        """The class heads, and the projections, as of Deformable DETR in the released code of step-wise learning."""
        return ("classifier", "projection")

    @property
    def loss(self) -> ClassificationLoss:
        return self.criterion.loss

    # ---- what methods ask ------------------------------------------------------------------------------------------

    def classify(self, hidden: Tensor) -> Tensor:
        """Queries after each decoder layer [L, B, Q, d] to class logits [L, B, Q, K], float32. D-FINE adds to all
        columns of a row what it thinks of its box, which is left out here."""
        own = self.network
        if self.grouped:
            return cast(Tensor, in_float32(own.class_embed, hidden))
        heads = own.decoder.class_embed
        return torch.stack([in_float32(head, layer) for head, layer in zip(heads, hidden, strict=True)])

    def annotation_scores(self, images: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Scores of the query that the matching of the last layer gives to each annotation."""
        outputs = self.outputs(images)
        logits, boxes = outputs.logits[-1:], outputs.boxes[-1:]
        objects = self.objects(outputs, targets)
        pairs = self.criterion.match(logits, boxes, objects)
        return self.criterion.scores(logits)[0, pairs.picture, pairs.query], places_of(objects, pairs)

    def compared(self, teacher: Detector, images: Sequence[Tensor], targets: Targets, *, shared: bool) -> Compared:
        """Eq. 2 on the projected maps, eq. 3 on the teacher's object queries."""
        taught_by = cast(RealTimeDETR, teacher)
        batch = self.batch(images)
        maps = list(self.backbone(batch.tensors).values())
        outputs = self.from_maps(batch, maps, targets)
        losses = self.losses(outputs, targets)
        with torch.no_grad():
            taught = taught_by.from_maps(batch, self.maps_of(taught_by, batch, maps))
            wanted = taught_by.classify(taught.found.hidden)
        # of several groups of queries the first one, which is that of evaluation
        own = outputs.found.hidden[:, :, : wanted.shape[2]]
        logits = self.classify(taught.found.hidden if shared else own)
        levels = outputs.found.features
        valid = [valid_cells(level.shape[-2:], outputs.padded, outputs.sizes) for level in levels]
        return Compared(losses, levels, taught.found.features, valid, outputs.sizes, logits, wanted)


def transformers_settings(config: RealTimeDETRConfig, classes: int, backbone: Any = None) -> Any:
    """transformers' configuration of a section; RF-DETR's says what its `backbone` is."""
    if isinstance(config, RFDETRConfig):
        return RFDETRSettings(
            num_labels=classes,  # type: ignore[call-arg]
            backbone_config=backbone,
            num_queries=config.queries,
            d_model=config.channels,
            decoder_layers=config.decoder_layers,
            decoder_ffn_dim=config.feedforward,
            decoder_self_attention_heads=config.heads,
            decoder_cross_attention_heads=config.cross_heads,
            decoder_n_points=config.points,
            dropout=config.dropout,
            group_detr=config.groups,
            c2f_num_blocks=config.projector_blocks,
            hidden_expansion=config.projector_expansion,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    assert isinstance(config, HybridDETRConfig)
    values: dict[str, Any] = {
        "num_labels": classes,
        "num_queries": config.queries,
        "d_model": config.channels,
        "decoder_layers": config.decoder_layers,
        "decoder_ffn_dim": config.feedforward,
        "decoder_attention_heads": config.heads,
        "encoder_attention_heads": config.heads,
        "encoder_hidden_dim": config.encoder_channels,
        "encoder_ffn_dim": config.encoder_feedforward,
        "encoder_layers": config.encoder_layers,
        "encoder_in_channels": [config.encoder_channels] * config.levels,  # projections are made for the backbone
        "decoder_in_channels": [config.encoder_channels] * config.levels,
        "feat_strides": [COARSEST // 2**level for level in reversed(range(config.levels))],
        "encode_proj_layers": [config.levels - 1],
        "hidden_expansion": config.encoder_expansion,
        "num_feature_levels": config.levels,
        "num_denoising": config.denoising,
        "label_noise_ratio": config.label_noise,
        "box_noise_scale": config.box_noise,
        "dropout": config.dropout,
        "attn_implementation": "sdpa",
    }
    if isinstance(config, DFineConfig):
        return DFineSettings(
            **values,
            depth_mult=config.encoder_depth,
            decoder_n_points=list(config.points),
            max_num_bins=config.bins,
            reg_scale=config.reg_scale,
            up=config.reg_bound,
        )
    assert isinstance(config, RTDETRv2Config)
    return RTDETRv2Settings(**values, decoder_n_levels=config.levels, decoder_n_points=config.points)


def build_realtime_detr(
    recipe: Recipe, loss: ClassificationLoss, body_state: dict[str, Tensor] | None, source: str
) -> RealTimeDETR:
    """The recipe's detector. `body_state` are weights of the backbone's body; `source` is where they come from."""
    config = cast(RealTimeDETRConfig, recipe.detector)
    if isinstance(config, RFDETRConfig) != (recipe.backbone in RF_DINOV2):
        theirs = f"one of {', '.join(RF_DINOV2)}" if config.name == "rf_detr" else "none of RF-DETR's"
        raise UserError(f"detector.name {config.name} needs {theirs} as backbone, not {recipe.backbone}")
    body = build_body(recipe, config, body_state, source)
    names = body.layer_names
    taken = names if config.name == "rf_detr" else names[-cast(HybridDETRConfig, config).levels :]
    backbone = Backbone(body.take({layer: str(level) for level, layer in enumerate(taken)}))
    inner: Any = getattr(body["network"], "config", None) if config.name == "rf_detr" else None
    return RealTimeDETR(
        backbone,
        loss,
        config,
        transformers_settings(config, loss.num_classes, inner),
        limits=Limits(recipe.evaluation.score_threshold, recipe.evaluation.max_dets),
        channels_last=recipe.schedule.channels_last,
    )
