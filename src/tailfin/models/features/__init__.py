"""Feature modules of a box head: what joins the sampled rows of `RoIHeads`, by the name in the recipe's `features`.

    hallucination     BACL: rows made up from class statistics            models/features/hallucination.py
    feature_memory    LOCE: stored rows of classes that score low         models/features/feature_memory.py
    fasa              FASA: a loss on made-up features, adapted by epoch  models/features/fasa.py
    rio               RIO: stored rows of the rare classes in the batch   models/features/rio.py
    meta_reweighting  BALMS: class weights learnt on a balanced stream    models/features/meta_reweighting.py

A detector has at most one. It is there while training; detections come from the box head alone. `base.py` has what
they are made of, `FEATURES` here is the one table of them, and `schema/features.py` has their options.

To add one: a `FeatureModule` and its `build` in a file of its own, a section in `schema/features.py`, a line in
`FEATURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tailfin.losses.base import ClassificationLoss
from tailfin.models.features import fasa, feature_memory, hallucination, meta_reweighting, rio
from tailfin.models.features.base import FeatureModule
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.features import Features
from tailfin.stats import ClassStats


class Feature(NamedTuple):
    """How a feature module becomes part of a detector."""

    build: Callable[[Any, FasterRCNNConfig, ClassStats, ClassificationLoss], FeatureModule]
    loss: Callable[[Any, ClassStats], ClassificationLoss] | None = None  # in the place of the recipe's


FEATURES: dict[str, Feature] = {
    "hallucination": Feature(hallucination.build),
    "feature_memory": Feature(feature_memory.build),
    "fasa": Feature(fasa.build),
    "rio": Feature(rio.build),
    "meta_reweighting": Feature(meta_reweighting.build, loss=meta_reweighting.build_loss),
}


def build_features(
    config: Features | None, detector: FasterRCNNConfig, stats: ClassStats, loss: ClassificationLoss
) -> FeatureModule | None:
    """The feature module of `config` for the box head of `detector`, or none."""
    return FEATURES[config.name].build(config, detector, stats, loss) if config is not None else None


def replaced_loss(config: Features | None, stats: ClassStats, loss: ClassificationLoss) -> ClassificationLoss:
    """The loss that a feature module puts in the place of the recipe's `loss`, or that one."""
    make = FEATURES[config.name].loss if config is not None else None
    return make(config, stats) if make is not None else loss
