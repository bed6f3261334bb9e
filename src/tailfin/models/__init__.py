"""Detectors: built from a recipe and the classes, loaded from a model file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from tailfin import losses
from tailfin.checkpoint import FORMAT, read_safetensors
from tailfin.class_rows import read_aliases
from tailfin.errors import UserError
from tailfin.files import existing_file, read_object
from tailfin.foreign import read_checkpoint
from tailfin.losses.base import ClassificationLoss
from tailfin.models.atss import build_atss
from tailfin.models.backbones import Backbone, pyramid_backbone
from tailfin.models.bodies import build_body, named_state
from tailfin.models.cascade_rcnn import CascadeRCNN, build_cascade_rcnn
from tailfin.models.coco_weights import coco_state, differing_settings, load_folder
from tailfin.models.convert_detectron2 import is_detectron2
from tailfin.models.convert_mmdetection import is_mmdetection
from tailfin.models.convert_torchvision import (
    is_torchvision_rcnn,
    is_torchvision_retinanet,
    released_rcnn,
    released_retinanet,
)
from tailfin.models.detector import Detector, Limits
from tailfin.models.detr_convert import (
    convert_hub,
    convert_released,
    convert_transformers,
    is_hub,
    is_released,
    is_transformers,
)
from tailfin.models.faster_rcnn import FasterRCNN, build_faster_rcnn
from tailfin.models.features import build_features, replaced_loss
from tailfin.models.heads import check_features_fit, refuse_untrained, wrap_trained
from tailfin.models.localizer import build_localizer
from tailfin.models.mask_rcnn import build_mask_rcnn
from tailfin.models.released import Released
from tailfin.models.rescoring import build_rescorer
from tailfin.models.retinanet import build_retinanet
from tailfin.schema.backbones import NAMED_WEIGHTS
from tailfin.schema.detectors import (
    ATSSConfig,
    FasterRCNNConfig,
    LocalizerConfig,
    RetinaNetConfig,
)
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats
from tailfin.weights import load_weights


def build_detector(recipe: Recipe, stats: ClassStats, *, start: bool = True) -> tuple[Detector, list[str]]:
    """The recipe's detector for the classes of `stats`, and lines that say what it starts from.

    `start` false leaves the weights random: what a model file will fill, without a download.
    """
    source = recipe.weights if start else "none"
    if start:
        refuse_untrained(getattr(recipe.detector, "classifier", None))
    body, whole = _starting_weights(recipe, source)
    loss = losses.build(recipe.loss.name, stats, **recipe.loss.options)
    loss = replaced_loss(recipe.features, stats, loss)
    released = None if whole is None else Released(whole)
    if body is not None and (convert := RELEASED.get(recipe.detector.name)):
        released = convert(body, stats, loss, source)
        body = None if released is not None else body
    model = BUILDERS[recipe.detector.name](recipe, stats, loss, body, source)
    own = model.loss  # a classifier may have put one of its own in the place of the recipe's
    if recipe.data.unchecked_classes == "ignore" and own is not None and not own.classes_first:
        name = recipe.loss.name
        if type(own) is not type(loss):
            name = f"that of detector.classifier {cast(FasterRCNNConfig, recipe.detector).classifier.name}"
        raise UserError(f"data.unchecked_classes: ignore needs a loss with a logit for each class, {name} has none")
    if recipe.calibration is not None:
        model.rescore = build_rescorer(recipe.calibration, stats, model.loss)
    if released is not None:
        aliases = read_aliases(recipe.classes.map) if recipe.classes.map else None
        said = load_weights(model, released.state, source, stats.names, old=released.names, aliases=aliases)
        notes = differing_settings(recipe.detector) if source == "coco" else []
        return model, [*said, *released.notes, *notes]
    return model, [f"backbone: {source}"] if body is not None else ["random start"]


def released_weights(recipe: Recipe, stats: ClassStats) -> Released | None:
    """The recipe's `weights` by tailfin's names, where they are a detector of another project; else None."""
    state, _ = _starting_weights(recipe, recipe.weights)
    convert = RELEASED.get(recipe.detector.name)
    if state is None or convert is None:
        return None
    return convert(state, stats, losses.build(recipe.loss.name, stats, **recipe.loss.options), recipe.weights)


def _two_stage(
    build: Callable[..., Any],
    recipe: Recipe,
    stats: ClassStats,
    loss: ClassificationLoss,
    body: dict[str, Tensor] | None,
    source: str,
) -> Any:
    """A detector that `build` assembles on a pyramid, without feature modules."""
    config = cast(FasterRCNNConfig, recipe.detector)
    backbone = _pyramid(recipe, config, body, source)
    return build(backbone, loss, config, _limits(recipe), stats, channels_last=recipe.schedule.channels_last)


def _one_box_head(
    build: Callable[..., FasterRCNN], recipe: Recipe, stats: ClassStats, loss: ClassificationLoss, *start: Any
) -> Detector:
    config = cast(FasterRCNNConfig, recipe.detector)
    model: FasterRCNN = _two_stage(build, recipe, stats, loss, *start)
    model.roi_heads.extra_rows = build_features(recipe.features, config, stats, loss)
    wrap_trained(model, config.classifier, stats)
    return model


def _cascade_rcnn(recipe: Recipe, stats: ClassStats, loss: ClassificationLoss, *start: Any) -> Detector:
    config = cast(FasterRCNNConfig, recipe.detector)
    model: CascadeRCNN = _two_stage(build_cascade_rcnn, recipe, stats, loss, *start)
    for heads in model.roi_heads.heads():  # each stage has a feature module of its own
        heads.extra_rows = build_features(recipe.features, config, stats, heads.loss)
        check_features_fit(heads.extra_rows, heads, config.classifier)
    return model


def _limits(recipe: Recipe) -> Limits:
    own = recipe.evaluation
    return Limits(own.score_threshold, own.max_dets, own.nms)


def _pyramid(
    recipe: Recipe, config: FasterRCNNConfig | LocalizerConfig, body_state: dict[str, Tensor] | None, source: str
) -> Backbone:
    body = build_body(recipe, config, body_state, source)
    init = "torchvision" if isinstance(config, LocalizerConfig) else config.init
    return pyramid_backbone(
        body, layers=config.fpn_layers, channels=config.fpn_channels, pool=config.fpn_pool, init=init
    )


def _dense(
    build: Callable[..., Detector],
    recipe: Recipe,
    stats: ClassStats,
    loss: ClassificationLoss,
    body: dict[str, Tensor] | None,
    source: str,
) -> Detector:
    """A one-stage detector that `build` assembles on a pyramid."""
    config = cast(RetinaNetConfig | ATSSConfig, recipe.detector)
    own = build_body(recipe, config, body, source)
    backbone = pyramid_backbone(
        own,
        layers=config.fpn_layers,
        channels=config.fpn_channels,
        convs=config.fpn_convs,
        relu=config.fpn_convs_relu,
        init=config.init,
    )
    return build(backbone, loss, config, _limits(recipe), channels_last=recipe.schedule.channels_last)


def _deformable_detr(
    recipe: Recipe, stats: ClassStats, loss: ClassificationLoss, body: dict[str, Tensor] | None, source: str
) -> Detector:
    from tailfin.models.deformable_detr import build_deformable_detr  # transformers takes seconds to import

    return build_deformable_detr(recipe, loss, body, source)


def _realtime_detr(
    recipe: Recipe, stats: ClassStats, loss: ClassificationLoss, body: dict[str, Tensor] | None, source: str
) -> Detector:
    from tailfin.models.realtime_detr import build_realtime_detr  # transformers takes seconds to import

    return build_realtime_detr(recipe, loss, body, source)


def _localizer(
    recipe: Recipe, stats: ClassStats, loss: ClassificationLoss, body: dict[str, Tensor] | None, source: str
) -> Detector:
    config = cast(LocalizerConfig, recipe.detector)
    backbone = _pyramid(recipe, config, body, source)
    return build_localizer(backbone, config, channels_last=recipe.schedule.channels_last)


Builder = Callable[[Recipe, ClassStats, ClassificationLoss, dict[str, Tensor] | None, str], Detector]
# by `detector.name`; the last arguments are the weights of the body, where there are any, and their source
BUILDERS: dict[str, Builder] = {
    "faster_rcnn": partial(_one_box_head, build_faster_rcnn),
    "mask_rcnn": partial(_one_box_head, build_mask_rcnn),
    "cascade_rcnn": _cascade_rcnn,
    "deformable_detr": _deformable_detr,
    "localizer": _localizer,
    "retinanet": partial(_dense, build_retinanet),
    "atss": partial(_dense, build_atss),
    "d_fine": _realtime_detr,
    "rt_detr_v2": _realtime_detr,
    "rf_detr": _realtime_detr,
}


def _released_retinanet(
    state: dict[str, Tensor], stats: ClassStats, loss: ClassificationLoss, source: str
) -> Released | None:
    return released_retinanet(state, stats.names, source) if is_torchvision_retinanet(state) else None


def _released_detr(
    state: dict[str, Tensor], stats: ClassStats, loss: ClassificationLoss, source: str
) -> Released | None:
    if is_transformers(state):
        return convert_transformers(state, stats.names, _labels_beside(source), source)
    return convert_released(state, stats.names, stats.category_ids.tolist(), source) if is_released(state) else None


def _released_hub(
    state: dict[str, Tensor], stats: ClassStats, loss: ClassificationLoss, source: str
) -> Released | None:
    """A folder of transformers' goes through its own loader, which knows files by former and by the authors' names."""
    if source not in NAMED_WEIGHTS and (path := _file_and_part(source)[0]).name == "model.safetensors":
        config = path.with_name("config.json")
        if config.is_file() and read_object(config).get("model_type") in HUB_TYPES:
            state = load_folder(path.parent)
    return convert_hub(state, stats.names, _labels_beside(source), source) if is_hub(state) else None


def _released_rcnn(
    masks: bool, state: dict[str, Tensor], stats: ClassStats, loss: ClassificationLoss, source: str
) -> Released | None:
    return released_rcnn(state, stats.names, source, masks=masks) if is_torchvision_rcnn(state) else None


HUB_TYPES = ("d_fine", "rt_detr_v2", "rf_detr")  # what transformers' configurations call them
# by `detector.name`: weights of a whole detector in another project's names to tailfin's; None for anything else
RELEASED: dict[str, Callable[[dict[str, Tensor], ClassStats, ClassificationLoss, str], Released | None]] = {
    "faster_rcnn": partial(_released_rcnn, False),
    "mask_rcnn": partial(_released_rcnn, True),
    "retinanet": _released_retinanet,
    "deformable_detr": _released_detr,
    "d_fine": _released_hub,
    "rt_detr_v2": _released_hub,
    "rf_detr": _released_hub,
}


def _starting_weights(recipe: Recipe, weights: str) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """(weights of the body, weights of a whole detector), at most one of them."""
    if weights == "none":
        return None, None
    if weights == "coco":
        return coco_state(recipe.detector), None
    if weights in NAMED_WEIGHTS:
        return named_state(recipe, weights), None
    path, part = _file_and_part(weights)
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        return (None, state) if metadata.get("format") == FORMAT else (state, None)
    checkpoint = read_checkpoint(path, part)
    for project, known in (("detectron2", is_detectron2), ("mmdetection", is_mmdetection)):
        if known(checkpoint.state):
            raise UserError(
                f"weights {path} are a detector of {project}: convert it first, `tailfin convert {path} --recipe "
                "RECIPE --classes FILE --out model.safetensors`, and start from that file"
            )
    return checkpoint.state, None


def _file_and_part(weights: str) -> tuple[Path, str]:
    """A file, and the part of a checkpoint with several models: `FILE#model_l0`."""
    plain, mark, part = weights.rpartition("#")
    if mark and not Path(weights).exists():
        return existing_file(plain, "weights"), part
    return existing_file(weights, "weights"), ""


def _labels_beside(source: str) -> list[str] | None:
    """Class names of a checkpoint of transformers, from the config.json beside its file; None without one."""
    if source == "coco":
        return None
    config = _file_and_part(source)[0].with_name("config.json")
    if not config.is_file():
        return None
    labels = read_object(config).get("id2label")
    try:
        return [str(labels[str(number)]) for number in range(len(labels))]  # type: ignore[index, arg-type]
    except (KeyError, TypeError):
        raise UserError(f"{config}: its id2label does not name the classes 0, 1, ...") from None
