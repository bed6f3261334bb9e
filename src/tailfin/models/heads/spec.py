"""What a box head is made of, for the functions of the table `tailfin.models.heads.HEADS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from tailfin.losses.base import ClassificationLoss
from tailfin.models.backbones import start_xavier
from tailfin.models.heads.roi_heads import BoxPredictor, RoIHeads
from tailfin.models.heads.shared_layers import SharedLayers
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.stats import ClassStats


class HeadSpec(NamedTuple):
    """The parts that a recipe fixes, and how the usual ones are made."""

    config: FasterRCNNConfig
    loss: ClassificationLoss
    stats: ClassStats
    pool: PyramidRoIAlign
    channels: int  # of the pooled features
    layer: Callable[[], nn.Module | None]  # shared features to logits; none: a linear layer
    keywords: dict[str, Any]  # the classifier's own options
    options: dict[str, Any]  # those of `RoIHeads`

    @property
    def width(self) -> int:
        """Length of a shared feature."""
        return self.config.head_channels

    @property
    def class_agnostic(self) -> bool:
        return self.config.box_regression == "class_agnostic"

    def shared(self) -> nn.Module:
        """The usual two layers from pooled to shared features."""
        layers = SharedLayers(self.channels * self.config.roi_size**2, self.width)
        if self.config.init == "xavier":
            start_xavier(layers)
        return layers

    def predictor(self) -> BoxPredictor:
        """The usual two layers from shared features to logits and deltas."""
        return BoxPredictor(self.width, self.loss, self.class_agnostic, self.layer())


def plain_box_head(spec: HeadSpec) -> RoIHeads:
    """Two shared layers, then one for the logits and one for the deltas."""
    return RoIHeads(spec.pool, spec.shared(), spec.predictor(), spec.loss, **spec.options)
