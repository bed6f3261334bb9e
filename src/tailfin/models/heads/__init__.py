"""The box head of a recipe: `detector.classifier`, a name with options, to modules.

    linear         a linear layer
    cosine         models/heads/cosine.py    NormedLinear: normed features and weights
    weight_cosine  models/heads/cosine.py    WeightNormCosine: the same with a learnt length per class (RIO)
    tde            models/heads/tde.py       De-confound-TDE
    forest         models/heads/forest.py    Forest R-CNN: parent classes vote
    pcb            models/heads/pcb.py       PCB's head in three passes, around a linear or cosine layer
    disalign       models/heads/disalign.py  DisAlign: a trained classifier, aligned          second stage
    simcal         models/heads/simcal.py    SimCal: a second head for the tail               second stage

`HEADS` is the one table of them; `schema/heads.py` has their options. The last two are put around a trained classifier
(`wrap_trained`), which their option `base` names. Some have a loss of their own, a form of softmax cross-entropy, which
takes the place of the recipe's `softmax`.

To add one: write the module in its own file, add its options to `schema.heads.CLASSIFIERS` and a line to `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from tailfin.data.dataset import Source
from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.softmax import Softmax
from tailfin.models.heads import disalign, forest, pcb, simcal
from tailfin.models.heads.cosine import NormedLinear, WeightNormCosine
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.models.heads.spec import HeadSpec, plain_box_head
from tailfin.models.heads.tde import TDEHead
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.heads import Classifier
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats


class Head(NamedTuple):
    """How a classifier becomes part of a box head."""

    layer: Callable[..., nn.Module | None] | None = None  # (width, loss, **options): shared features to logits
    box_head: Callable[[HeadSpec], RoIHeads] = plain_box_head
    wrap: Callable[..., RoIHeads] | None = None  # (trained box head, stats, **options): that of a second stage
    samples: Callable[[Source, Recipe, ClassStats], dict[str, Any]] | None = None  # data set and plan of that stage
    own_loss: bool = False  # a form of softmax cross-entropy of its own


HEADS: dict[str, Head] = {
    "linear": Head(layer=lambda width, loss: None),
    "cosine": Head(layer=lambda width, loss, **options: NormedLinear(width, loss.num_logits, **options)),
    "weight_cosine": Head(layer=lambda width, loss, **options: WeightNormCosine(width, loss.num_logits, **options)),
    "tde": Head(layer=lambda width, loss, **options: TDEHead(width, loss.num_classes, **options)),
    "forest": Head(box_head=forest.box_head, own_loss=True),
    "pcb": Head(box_head=pcb.box_head),
    "disalign": Head(wrap=disalign.align, own_loss=True),
    "simcal": Head(wrap=simcal.with_twin, samples=simcal.episodes, own_loss=True),
}


def box_heads(
    config: FasterRCNNConfig,
    loss: ClassificationLoss,
    stats: ClassStats,
    pool: PyramidRoIAlign,
    channels: int,
    **options: Any,
) -> RoIHeads:
    """The box head of `config`, without what a second stage puts around it; `options` are those of `RoIHeads`.

    A classifier and a loss that do not go together are a `UserError`.
    """
    classifier, inner = config.classifier, config.classifier.inner
    head, make = HEADS[classifier.name], HEADS[inner.name].layer

    def layer() -> nn.Module | None:
        return make(config.head_channels, loss, **inner.options) if make is not None else None

    if head.own_loss and head.wrap is None:
        _needs_softmax(classifier.name, loss)
    try:
        return head.box_head(HeadSpec(config, loss, stats, pool, channels, layer, classifier.keywords, options))
    except ValueError as error:
        raise UserError(f"detector.classifier {classifier.name}: {error}") from None


def wrap_trained(model: Any, classifier: Classifier, stats: ClassStats) -> None:
    """Put a classifier of a second stage around the trained one of `model`, in place; any other leaves it alone.

    What was trained is frozen, what is new trains. A feature module whose rows the box head has no place for is a
    `UserError`.
    """
    name, head, features = classifier.name, HEADS[classifier.name], model.roi_heads.extra_rows
    if head.wrap is not None:
        _needs_softmax(name, model.roi_heads.loss)
        try:
            model.roi_heads = head.wrap(model.roi_heads, stats, **classifier.keywords)
        except ValueError as error:
            raise UserError(f"detector.classifier {name}: {error}") from None
    check_features_fit(features, model.roi_heads, classifier)


def check_features_fit(features: nn.Module | None, heads: RoIHeads, classifier: Classifier) -> None:
    """Refuse a feature module whose rows the box head has no place for."""
    if features is not None and not heads.takes_extra_rows:
        raise UserError(
            f"detector.classifier {classifier.name} reads pooled features: the rows of a feature module "
            f"({type(features).__name__}) cannot join it"
        )


def stage_samples(classifier: Classifier, source: Source, recipe: Recipe, stats: ClassStats) -> dict[str, Any]:
    """`dataset` and `plan` of a stage that trains `classifier`, where they are not the usual ones."""
    samples = HEADS[classifier.name].samples
    return samples(source, recipe, stats) if samples is not None else {}


def refuse_untrained(classifier: Classifier | None) -> None:
    """Refuse a classifier of a second stage in a training that starts from nothing that it could be put around."""
    if classifier is not None and classifier.second_stage:
        raise UserError(
            f"detector.classifier {classifier.name} calibrates a trained classifier: set method=decoupled and "
            f"second.classifier={classifier.name}"
        )


def _needs_softmax(name: str, loss: ClassificationLoss) -> None:
    if not isinstance(loss, Softmax):
        raise UserError(
            f"detector.classifier {name} has a form of softmax cross-entropy of its own, in the place of loss=softmax; "
            f"{type(loss).__name__} cannot stand beside it"
        )
