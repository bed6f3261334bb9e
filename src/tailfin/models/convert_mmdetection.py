"""Checkpoints of mmdetection's model zoo (2.x and 3.x): Faster, Mask and Cascade R-CNN, RetinaNet, ATSS; ResNets.

    zoo = convert(state, backbone="resnet50", config=text, source="mask_rcnn_r50.pth")

Its conventions: anchors are not rounded; RoIAlign is shifted by half a cell and samples as many points as there are
cells; classes come first, the background last; a cascade takes the mean of its stages' logits; there is no ReLU before
P7, whose P6 comes from C5 (RetinaNet) or P5 (ATSS). Pictures are RGB with ImageNet's mean and deviation, or, with
ResNets of "caffe" style, BGR with deviation 1, which is folded into the first convolution. What a state cannot say
(style, normalised predictors, the loss) is read from the config that a checkpoint carries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tailfin.errors import UserError
from tailfin.models.released import Zoo, body_changes, class_changes, renamed, rgb_conv

BODY = "backbone.body."
LEFT_OUT = r"num_batches_tracked$|^data_preprocessor\.|bbox_head\.(\d\.)?loss_cls\.|^ema_"
RULES = (
    (r"backbone\.(conv1|bn1|layer[1-4])\.", rf"{BODY}\1."),
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d)\.conv\.", r"fpn.\1."),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", "roi_heads.predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", "roi_heads.predictor.bbox_pred."),
    (r"roi_head\.bbox_head\.(\d)\.shared_fcs\.0\.", r"roi_heads.stages.\1.head.fc6."),
    (r"roi_head\.bbox_head\.(\d)\.shared_fcs\.1\.", r"roi_heads.stages.\1.head.fc7."),
    (r"roi_head\.bbox_head\.(\d)\.fc_cls\.", r"roi_heads.stages.\1.predictor.cls_score."),
    (r"roi_head\.bbox_head\.(\d)\.fc_reg\.", r"roi_heads.stages.\1.predictor.bbox_pred."),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"mask.head.convs.\1."),
    (r"roi_head\.mask_head\.upsample\.", "mask.head.upsample."),
    (r"roi_head\.mask_head\.conv_logits\.", "mask.predictor.conv."),
    (r"roi_head\.mask_head\.(\d)\.convs\.(\d)\.conv\.", r"masks.\1.head.convs.\2."),
    (r"roi_head\.mask_head\.(\d)\.upsample\.", r"masks.\1.head.upsample."),
    (r"roi_head\.mask_head\.(\d)\.conv_logits\.", r"masks.\1.predictor.conv."),
    (r"bbox_head\.(cls|reg)_convs\.(\d)\.(conv|gn)\.", r"tower.\1.\2.\3."),
    (r"bbox_head\.(?:retina|atss)_cls\.", "head.classifier."),
    (r"bbox_head\.(?:retina|atss)_reg\.", "head.box."),
    (r"bbox_head\.atss_centerness\.", "head.quality."),
    (r"bbox_head\.scales\.(\d)\.scale", r"scale.\1"),
)
# by which the deltas of a cascade's stages are divided
STDS = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]


def is_mmdetection(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of one of mmdetection's detectors."""
    return any(key.startswith("neck.lateral_convs.") for key in state)


def convert(
    state: Mapping[str, Tensor],
    backbone: str,
    style: str = "",
    config: str = "",
    version: str = "",
    source: str = "checkpoint",
) -> Zoo:
    """The weights by tailfin's names.

    Args:
        state: float tensors by mmdetection's names.
        backbone: the recipe's.
        style: of `released.STYLES`; by default what `config` says, or "pytorch".
        config: the text of the config that the checkpoint carries; empty: unknown.
        version: of mmdetection, where the checkpoint says it.

    Raises:
        UserError: a weight of a part that tailfin does not have, a checkpoint of mmdetection 0.x or 1.x.
    """
    if version[:2] in ("0.", "1.") or any(re.match(r"bbox_head\.(\d\.)?fc_cls\.", key) for key in state):
        raise UserError(
            f"{source}: it is of mmdetection {version or '1.x'}, whose boxes and classes are counted in another way: "
            "upgrade it with that project's own tool first"
        )
    style = style or ("caffe" if re.search(r"style\s*=\s*['\"]caffe", config) else "pytorch")
    found = renamed(state, RULES, LEFT_OUT, source)
    first = f"{BODY}conv1.weight"
    if first not in found:
        raise UserError(f"{source}: it has no ResNet with a stem of one convolution")
    if style == "caffe":
        found[first] = rgb_conv(found[first])
    found = _pyramid(found)
    changes: dict[str, Any] = {**body_changes(backbone, style)}
    if "head.classifier.weight" in found:
        return _dense(found, changes)
    return _two_stage(found, changes, config, source)


# ---- details ---------------------------------------------------------------------------------------------------------


def _pyramid(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output convolutions that have no lateral one are P6 and P7."""
    count = len({key for key in state if key.startswith("backbone.fpn.inner_blocks.") and key.endswith("weight")})
    found = {}
    for key, value in state.items():
        if key.startswith("fpn."):
            _, number, word = key.split(".")
            level = int(number) - count
            place = f"layer_blocks.{number}.0" if level < 0 else f"extra_blocks.p{6 + level}"
            key = f"backbone.fpn.{place}.{word}"
        found[key] = value
    return found


def _dense(state: Mapping[str, Tensor], changes: dict[str, Any]) -> Zoo:
    norm = any(key.startswith("tower.") and ".gn." in key for key in state)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("tower."):
            _, kind, number, layer, word = key.split(".")
            place = (3 if norm else 2) * int(number) + (layer == "gn")
            key = f"head.{'class' if kind == 'cls' else 'box'}_tower.{place}.{word}"
        if not key.startswith("scale."):
            found[key] = value
    atss = "head.quality.weight" in found
    anchors = len(found["head.box.bias"]) // 4
    changes |= {
        "detector.fpn_convs": "pyramid" if atss else "body",
        "detector.fpn_convs_relu": False,
        "detector.head_norm": "gn" if norm else "none",
    }
    if atss:
        scales = sorted((key for key in state if key.startswith("scale.")), key=lambda key: int(key.split(".")[1]))
        found["head.scales"] = torch.stack([state[key].reshape(()) for key in scales])
    else:
        changes |= {"detector.anchor_style": "exact", "detector.low_quality": "take"}
    return Zoo(found, "atss" if atss else "retinanet", len(found["head.classifier.bias"]) // anchors, changes)


def _two_stage(state: dict[str, Tensor], changes: dict[str, Any], config: str, source: str) -> Zoo:
    cascade = any(key.startswith("roi_heads.stages.") for key in state)
    prefix, branch = ("roi_heads.stages.0.", "masks.0.") if cascade else ("roi_heads.", "mask.")
    classifier, box = (state.get(f"{prefix}predictor.{name}.bias") for name in ("cls_score", "bbox_pred"))
    if classifier is None or box is None:
        raise UserError(f"{source}: it has neither a box head nor the head of RetinaNet or ATSS")
    masks = state.get(f"{branch}predictor.conv.bias")
    name = "cascade_rcnn" if cascade else "faster_rcnn" if masks is None else "mask_rcnn"
    changes |= {"detector.anchor_style": "exact", "detector.roi_aligned": True, "detector.roi_sampling": 0}
    changes |= class_changes(name, len(box), None if masks is None else len(masks))
    if cascade:
        changes |= {"detector.stage_mean": "logits", "detector.stage_stds": STDS}
    if config:
        changes["detector.classifier"] = "cosine" if "NormedLinear" in config else "linear"
        if masks is not None:
            changes["detector.mask_predictor"] = "normed" if "NormedConv2d" in config else "linear"
        if "SeesawLoss" in config:
            changes["loss"] = "seesaw"
    return Zoo(state, name, len(classifier), changes)
