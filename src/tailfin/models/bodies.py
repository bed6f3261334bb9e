"""The body of a recipe's backbone, a ResNet, timm's or DINOv3's, and what it starts from."""

from __future__ import annotations

from torch import Tensor

from tailfin.errors import UserError
from tailfin.models import dinov3_body
from tailfin.models.backbones import Body, imagenet_state, load_body, resnet_body, small_body
from tailfin.models.timm_body import body_state, packaged_state, pretrained_state, timm_body
from tailfin.schema.backbones import DINOV3_NAMES, HUB_NAMES, TIMM
from tailfin.schema.detectors import DeformableDETRConfig, DetectorSection
from tailfin.schema.recipe import Recipe


def build_body(recipe: Recipe, config: DetectorSection, state: dict[str, Tensor] | None, source: str) -> Body:
    """The backbone's body with the weights of `state`, those of a classification network under the names of its
    library; none: random. `source` is where they come from, for messages."""
    if isinstance(config, DeformableDETRConfig) and config.widths:
        body = small_body(config.widths, config.blocks, norm=config.norm)
    elif recipe.backbone.startswith(TIMM):
        body = timm_body(recipe.backbone, norm=config.norm)
        state = None if state is None else body_state(recipe.backbone, state, source)
    elif recipe.backbone in DINOV3_NAMES:
        body = dinov3_body.dinov3_body(recipe.backbone)
        state = None if state is None else dinov3_body.body_state(state)
    elif recipe.backbone in HUB_NAMES:
        from tailfin.models.detr_bodies import hub_body  # transformers takes seconds to import

        body = hub_body(recipe.backbone, norm=config.norm)
    else:
        body = resnet_body(recipe.backbone, norm=config.norm)
    if state is not None:
        load_body(body, state, source)
    body.freeze(config.frozen_layers)
    return body


def named_state(recipe: Recipe, weights: str) -> dict[str, Tensor]:
    """Weights of the backbone by a name of `weights`: "imagenet" or "packaged"."""
    if weights == "packaged":
        return packaged_state(recipe.backbone)
    if recipe.backbone.startswith(TIMM):
        return pretrained_state(recipe.backbone)
    if recipe.backbone in DINOV3_NAMES:
        return dinov3_body.load_published(recipe.backbone)
    if recipe.detector.norm == "gn":
        raise UserError('weights: imagenet has batch norm and does not fit detector.norm "gn"')
    return imagenet_state(recipe.backbone)
