"""Sections of the query-based detectors made for speed, whose networks are transformers': D-FINE, RT-DETR v2, RF-DETR.

`size` sets the keys of a published model where they are not given (`SIZES`), and says which backbone `weights: coco` is
for. Without a size every key has its default, and any backbone will do (RF-DETR's is its own).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tailfin.schema.base import Count, Fraction, NotNegative, Positive
from tailfin.schema.detector_section import DetectorSection

BACKBONE = "backbone"  # in a row of `SIZES`: that of the published model, no key of the section


class RealTimeDETRConfig(DetectorSection):
    """What the three have in common; weights and costs are those of all of them."""

    PARTS: ClassVar[tuple[str, ...]] = ("classifier", "box", "projection", "encoder", "decoder", "backbone")
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {}
    PUBLISHED: ClassVar[tuple[str, ...]] = ()  # sizes that `weights: coco` has
    size: str = ""
    queries: Count = 300
    channels: Count = 256  # of the decoder
    decoder_layers: Count = 3
    heads: Count = 8
    feedforward: Count = 1024  # of the decoder
    dropout: Fraction = 0.0
    class_weight: NotNegative = 1.0
    box_weight: NotNegative = 5.0  # L1
    giou_weight: NotNegative = 2.0
    class_cost: NotNegative = 2.0  # of the matching
    box_cost: NotNegative = 5.0
    giou_cost: NotNegative = 2.0

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        if not size:
            return values
        if size not in cls.SIZES:
            raise ValueError(f'size: "{size}" is not a choice ({", ".join(cls.SIZES)})')
        own = {key: value for key, value in cls.SIZES[size].items() if key != BACKBONE}
        return {**own, **values}

    @model_validator(mode="after")
    def _check(self) -> RealTimeDETRConfig:
        if self.channels % self.heads:
            raise ValueError(f"channels {self.channels} is not a multiple of heads {self.heads}")
        return self

    @property
    def coco_backbone(self) -> str:
        return str(self.SIZES[self.size][BACKBONE]) if self.size in self.PUBLISHED else ""


class HybridDETRConfig(RealTimeDETRConfig):
    """RT-DETR's form, which D-FINE keeps: a pyramid with attention on its coarsest level, queries from its cells, and
    queries of objects with noise that learn to undo it."""

    levels: Annotated[int, Field(ge=1, le=4)] = 3  # the last layers of the backbone
    encoder_channels: Count = 256
    encoder_layers: Annotated[int, Field(ge=0)] = 1  # of attention, on the last level
    encoder_feedforward: Count = 1024
    encoder_expansion: Positive = 1.0  # width of the pyramid's blocks
    denoising: Annotated[int, Field(ge=0)] = 100  # queries with noise, about; 0: none
    label_noise: Fraction = 0.5
    box_noise: NotNegative = 1.0

    @model_validator(mode="after")
    def _check_encoder(self) -> HybridDETRConfig:
        if self.encoder_channels % self.heads or self.encoder_channels % 4:
            raise ValueError(f"encoder_channels must be a multiple of heads and of 4 (given: {self.encoder_channels})")
        return self


class RTDETRv2Config(HybridDETRConfig):
    """RT-DETR v2; defaults are those of its R50 model, but for the decoder's layers."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "r18": {BACKBONE: "transformers/resnet18_vd", "encoder_expansion": 0.5, "decoder_layers": 3},
        "r34": {BACKBONE: "transformers/resnet34_vd", "encoder_expansion": 0.5, "decoder_layers": 4},
        "r50": {BACKBONE: "transformers/resnet50_vd", "decoder_layers": 6},
    }
    PUBLISHED: ClassVar[tuple[str, ...]] = ("r18", "r34", "r50")
    name: Literal["rt_detr_v2"]
    points: Count = 4  # sampled per level and head


class DFineConfig(HybridDETRConfig):
    """D-FINE: boxes are sums over distributions of their sides, which every layer refines."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "n": {
            BACKBONE: "transformers/hgnet_v2_b0",
            "levels": 2,
            "channels": 128,
            "feedforward": 512,
            "encoder_channels": 128,
            "encoder_feedforward": 512,
            "encoder_expansion": 0.34,
            "encoder_depth": 0.5,
            "points": (6, 6),
        },
        "s": {BACKBONE: "transformers/hgnet_v2_b0", "encoder_expansion": 0.5, "encoder_depth": 0.34},
        "m": {BACKBONE: "transformers/hgnet_v2_b2", "encoder_depth": 0.67, "decoder_layers": 4},
        "l": {BACKBONE: "transformers/hgnet_v2_b4", "decoder_layers": 6},
        "x": {
            BACKBONE: "transformers/hgnet_v2_b5",
            "encoder_channels": 384,
            "encoder_feedforward": 2048,
            "decoder_layers": 6,
        },
    }
    PUBLISHED: ClassVar[tuple[str, ...]] = ("n",)
    name: Literal["d_fine"]
    encoder_depth: Positive = 1.0  # blocks of the pyramid, as a share of 3
    points: tuple[Count, ...] = (3, 6, 3)  # sampled per level, of every head
    bins: Annotated[int, Field(ge=4)] = 32  # of a side's distribution
    reg_scale: Positive = 4.0  # the larger, the finer the bins in the middle
    reg_bound: Positive = 0.5  # of the distance of a side, in sides of the box
    fgl_weight: NotNegative = 0.15  # of the distributions against the objects
    ddf_weight: NotNegative = 1.5  # of the distributions against those of the last layer

    @model_validator(mode="after")
    def _check_points(self) -> DFineConfig:
        if len(self.points) != self.levels:
            raise ValueError(f"points needs a number per level: {self.levels} levels, {len(self.points)} numbers")
        if self.bins % 2:
            raise ValueError(f"bins must be even (given: {self.bins})")
        return self


class RFDETRConfig(RealTimeDETRConfig):
    """RF-DETR: one level from a windowed DINOv2, groups of queries in training."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "nano": {BACKBONE: "transformers/rf_detr_dinov2_384", "decoder_layers": 2},
        "small": {BACKBONE: "transformers/rf_detr_dinov2_512", "decoder_layers": 3},
        "medium": {BACKBONE: "transformers/rf_detr_dinov2_576", "decoder_layers": 4},
        "large": {BACKBONE: "transformers/rf_detr_dinov2_704", "decoder_layers": 4},
    }
    PUBLISHED: ClassVar[tuple[str, ...]] = ("medium", "large")
    name: Literal["rf_detr"]
    norm: Literal["own"] = "own"  # type: ignore[assignment]
    frozen_layers: Annotated[int, Field(ge=0, le=5)] = 0
    feedforward: Count = 2048
    groups: Count = 13  # of queries, each matched on its own; evaluation has the first one
    cross_heads: Count = 16
    points: Count = 2
    projector_blocks: Count = 3
    projector_expansion: Positive = 0.5

    @model_validator(mode="after")
    def _check_heads(self) -> RFDETRConfig:
        if self.channels % self.cross_heads:
            raise ValueError(f"channels {self.channels} is not a multiple of cross_heads {self.cross_heads}")
        return self
