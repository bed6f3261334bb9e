"""The box head of a recipe: `detector.classifier`, a name with options, to modules.

    linear         a linear layer
    cosine         models/heads/cosine.py    NormedLinear: normed features and weights
    weight_cosine  models/heads/cosine.py    WeightNormCosine: the same with a learnt length per class (RIO)
    tde            models/heads/tde.py       De-confound-TDE
    forest         models/heads/forest.py    Forest R-CNN: parent classes vote
    pcb            models/heads/pcb.py  PCB's head in three passes, around a linear or cosine layer
    disalign       models/heads/disalign.py  DisAlign: a trained classifier, aligned          second stage
    simcal         models/heads/simcal.py    SimCal: a second head for the tail               second stage

The last two are `CALIBRATORS`: `base` is the classifier that they were trained as, and `calibrate` puts them around it.
Options are the keywords of the bricks. Some have a loss of their own, a form of softmax cross-entropy, which takes the
place of the recipe's `softmax`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from tailfin.calibration import norcal_foreground
from tailfin.errors import UserError, nearest
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.softmax import Softmax
from tailfin.models.heads.cosine import NormedLinear, WeightNormCosine
from tailfin.models.heads.disalign import DisAlign, GeneralizedReweight
from tailfin.models.heads.forest import ForestPredictor, GrownForest, SharedLayer
from tailfin.models.heads.roi_heads import BoxPredictor, RoIHeads
from tailfin.models.heads.tde import TDEHead
from tailfin.schema.detectors import CALIBRATORS, Classifier, FasterRCNN
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

if TYPE_CHECKING:
    from tailfin.models.faster_rcnn import FasterRCNN as Detector

BASES = {"pcb": ("linear", "cosine"), "simcal": ("linear", "cosine"), "disalign": ("linear", "cosine", "weight_cosine")}
SINGLE: dict[str, Callable[..., nn.Module]] = {"cosine": NormedLinear, "weight_cosine": WeightNormCosine}


def box_heads(
    config: FasterRCNN,
    loss: ClassificationLoss,
    stats: ClassStats,
    pool: MultiScaleRoIAlign,
    channels: int,
    **options: Any,
) -> RoIHeads:
    """The box head of `config`, without what a second stage puts around it; `options` are those of `RoIHeads`.

    A classifier and a loss that do not go together are a `UserError`.
    """
    from tailfin.models.heads.pcb import IterativeRoIHeads  # imports the box head

    name, given = config.classifier.name, config.classifier.options
    base = base_of(config.classifier)
    width, agnostic = config.head_channels, config.box_regression == "class_agnostic"
    try:
        if name == "forest":
            _needs_softmax(name, loss)
            forest = GrownForest(stats, **given)
            head = SharedLayer(channels, config.roi_size, width)
            return RoIHeads(pool, head, ForestPredictor(width, forest, agnostic), forest, **options)
        shared = TwoMLPHead(channels * config.roi_size**2, width)
        predictor = BoxPredictor(width, loss, agnostic, _layer(base, width, loss))
        if name == "pcb":
            options = {**options, **_without_base(given)}
            size = config.roi_size
            return IterativeRoIHeads(pool, shared, predictor, loss, channels=channels, roi_size=size, **options)
    except ValueError as error:
        raise UserError(f"detector.classifier {name}: {error}") from None
    return RoIHeads(pool, shared, predictor, loss, **options)


def calibrate(model: Detector, classifier: Classifier, stats: ClassStats) -> None:
    """Put a calibrator around the trained classifier of `model`, in place; any other classifier is left alone.

    What was trained is frozen, the calibrator's own weights train.
    """
    from tailfin.models.heads.simcal import with_calibrated_head  # imports the box head

    name, heads, options = classifier.name, model.roi_heads, _without_base(classifier.options)
    if name not in CALIBRATORS:
        return
    _needs_softmax(name, heads.loss)
    try:
        if name == "disalign":
            width = heads.predictor.bbox_pred.in_features
            heads.loss = GeneralizedReweight(stats, **options)
            heads.predictor.cls_score = DisAlign(heads.predictor.cls_score, width, stats.num_classes)
        else:
            _refuse_extra_rows(heads.extra_rows, name)
            model.roi_heads = with_calibrated_head(heads, stats, **options)
    except ValueError as error:
        raise UserError(f"detector.classifier {name}: {error}") from None


def base_of(classifier: Classifier) -> Classifier:
    """The classifier inside one that has a `base`; any other is its own."""
    if classifier.name not in BASES:
        return classifier
    return Classifier.model_validate(_named(classifier.options.get("base", "linear")))


def uncalibrated(recipe: Recipe) -> Recipe:
    """The recipe of the detector that a calibrator is put around; any other recipe as it is."""
    detector = recipe.detector
    if not isinstance(detector, FasterRCNN) or detector.classifier.name not in CALIBRATORS:
        return recipe
    plain = detector.model_copy(update={"classifier": base_of(detector.classifier)})
    return recipe.model_copy(update={"detector": plain})


def check_start(recipe: Recipe) -> None:
    """Refuse a calibrator in a training that starts from nothing that it could calibrate."""
    detector = recipe.detector
    if isinstance(detector, FasterRCNN) and detector.classifier.name in CALIBRATORS:
        name = detector.classifier.name
        raise UserError(
            f"detector.classifier {name} calibrates a trained classifier: set method=decoupled and "
            f"second.classifier={name}"
        )


def check_extra_rows(model: Detector, classifier: Classifier) -> None:
    """Refuse a feature module beside a box head that has no place for its rows."""
    if not model.roi_heads.takes_extra_rows:
        _refuse_extra_rows(model.roi_heads.extra_rows, classifier.name)


class NorCal(nn.Module):
    """`norcal_foreground` with the training counts of a model: scores [N, C] to calibrated ones, both float.

    Raises `UserError` for a loss whose scores are not probabilities that leave the background's.
    """

    counts: Tensor

    def __init__(self, stats: ClassStats, loss: ClassificationLoss, gamma: float) -> None:
        super().__init__()
        probe = 10 * torch.linspace(1, 99, 16 * loss.num_logits).square().sin().view(16, -1)
        if bool((loss.scores(probe).sum(dim=1) > 1 + 1e-4).any()):
            raise UserError(
                "evaluation.norcal needs the scores of a softmax over classes and background: those of the loss "
                f"{type(loss).__name__} add up to more than 1"
            )
        self.gamma = gamma
        self.register_buffer("counts", torch.as_tensor(stats.image_count, dtype=torch.float64), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        return norcal_foreground(scores, self.counts, self.gamma)


# ---- options ---------------------------------------------------------------------------------------------------------


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an unknown classifier or option, or a wrong value: the schema of `detector.classifier`."""
    known = {kind: _keywords(kind) for kind in NAMES}
    if name not in known:
        raise ValueError(f'there is no classifier "{name}"{nearest(name, known)}')
    for option in options:
        if option not in known[name]:
            choices = nearest(option, known[name]) if known[name] else " (it has no options)"
            raise ValueError(f'the classifier {name} has no option "{option}"{choices}')
    given = _without_base(options)
    counts = np.full(2000, 20)
    probe = ClassStats(image_count=counts, instance_count=counts, num_images=30)
    try:
        if name in BASES:
            base = _named(options.get("base", "linear"))
            if not isinstance(base, Mapping) or base.get("name") not in BASES[name]:
                raise ValueError(f'base must be one of {", ".join(BASES[name])} (given: "{options["base"]}")')
            check_options(base["name"], {key: value for key, value in base.items() if key != "name"})
        if name in SINGLE:
            SINGLE[name](2, 2, **given)
        elif name == "tde":
            heads = given.get("num_heads", 2)
            TDEHead(heads if isinstance(heads, int) and heads > 0 else 1, 2, **given)
        elif name == "disalign":
            GeneralizedReweight(probe, **given)
        elif name == "simcal" and not given.get("instance_threshold", 0) >= 0:
            raise ValueError(f"instance_threshold must not be negative (given: {given['instance_threshold']})")
        elif name == "forest":
            GrownForest(probe, **given)
        elif name == "pcb" and not all(weight >= 0 for weight in given.get("step_weights", (1.0,))):
            raise ValueError(f"step_weights must not be negative (given: {given['step_weights']})")
    except TypeError as error:
        raise ValueError(str(error)) from None


NAMES = ("linear", "cosine", "weight_cosine", "tde", "forest", "pcb", "disalign", "simcal")


def _keywords(name: str) -> list[str]:
    """Option names of a classifier: the keyword-only arguments of its brick."""
    from tailfin.models.heads.simcal import with_calibrated_head

    if name == "pcb":
        return ["base", "step_weights"]
    bricks: dict[str, Callable[..., Any]] = {
        **{kind: brick.__init__ for kind, brick in SINGLE.items()},
        "tde": TDEHead.__init__,
        "forest": GrownForest.__init__,
        "disalign": GeneralizedReweight.__init__,
        "simcal": with_calibrated_head,
    }
    if name not in bricks:
        return []
    own = [p.name for p in inspect.signature(bricks[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return ["base", *own] if name in BASES else own


def _named(base: Any) -> Any:
    return {"name": base} if isinstance(base, str) else base


def _without_base(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "base"}


# ---- what goes together ----------------------------------------------------------------------------------------------


def _layer(classifier: Classifier, width: int, loss: ClassificationLoss) -> nn.Module | None:
    """The module from shared features to logits; none for the plain linear layer."""
    name, options = classifier.name, classifier.options
    if name == "linear":
        return None
    if name == "cosine":
        return NormedLinear(width, loss.num_logits, **options)
    if bool(loss.prior_bias().any()):
        raise ValueError(f"it has no bias, which {type(loss).__name__} starts with: take linear or cosine, or softmax")
    if name == "weight_cosine":
        return WeightNormCosine(width, loss.num_logits, **options)
    probe = torch.linspace(1, 9, 4 * loss.num_logits).square().sin().view(4, -1)
    scores = loss.scores(probe)
    softmax = probe.softmax(dim=1)[:, :-1]
    if scores.shape != softmax.shape or not torch.allclose(scores, softmax, atol=1e-6):
        raise ValueError(f"its logits are made for a plain softmax, which the scores of {type(loss).__name__} are not")
    return TDEHead(width, loss.num_classes, **options)


def _needs_softmax(name: str, loss: ClassificationLoss) -> None:
    if not isinstance(loss, Softmax):
        raise UserError(
            f"detector.classifier {name} has a form of softmax cross-entropy of its own, in the place of loss=softmax; "
            f"{type(loss).__name__} cannot stand beside it"
        )


def _refuse_extra_rows(module: nn.Module | None, name: str) -> None:
    if module is not None:
        raise UserError(
            f"detector.classifier {name} reads pooled features: the rows of a feature module "
            f"({type(module).__name__}) cannot join it"
        )
