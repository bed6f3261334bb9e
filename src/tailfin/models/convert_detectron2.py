"""Checkpoints of detectron2's model zoo: Faster, Mask and Cascade R-CNN with FPN, RetinaNet; ResNets.

    zoo = convert(state, backbone="resnet50", style="caffe", source="model_final.pkl")

Its conventions: pictures are BGR in 0..255 with ImageNet's mean and deviation 1 (folded into the first convolution) and
blocks have their stride in the first 1x1 convolution (`style` "caffe", the zoo's ResNets), or as torchvision's
("pytorch"); anchors are not rounded; RoIAlign is shifted by half a cell and samples as many points as there are cells;
the background is the last class; RetinaNet's anchors of a cell have the size outside, the ratio inside; a cascade takes
the mean of its stages' probabilities, divides deltas by weights of 10, 20, 30 and has one mask head, which here every
stage gets a copy of.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tailfin.errors import UserError
from tailfin.models.released import STYLES, Zoo, body_changes, class_changes, renamed, rgb_conv, with_statistics

BODY = "backbone.body."
LEFT_OUT = r"num_batches_tracked$|cell_anchors|^pixel_(mean|std)$"  # made anew, or read here
CLASSIFIERS = ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.0.cls_score.weight")
RULES = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", rf"{BODY}bn1."),
    (r"backbone\.bottom_up\.stem\.conv1\.", rf"{BODY}conv1."),
    (r"backbone\.bottom_up\.res2\.(\d+)\.", r"res.layer1.\1."),
    (r"backbone\.bottom_up\.res3\.(\d+)\.", r"res.layer2.\1."),
    (r"backbone\.bottom_up\.res4\.(\d+)\.", r"res.layer3.\1."),
    (r"backbone\.bottom_up\.res5\.(\d+)\.", r"res.layer4.\1."),
    (r"backbone\.top_block\.(p6|p7)\.", r"backbone.fpn.extra_blocks.\1."),
    (r"backbone\.fpn_(lateral|output)(\d)\.", r"fpn.\1.\2."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"roi_heads\.box_head\.fc1\.", "roi_heads.head.fc6."),
    (r"roi_heads\.box_head\.fc2\.", "roi_heads.head.fc7."),
    (r"roi_heads\.box_head\.(\d)\.fc1\.", r"roi_heads.stages.\1.head.fc6."),
    (r"roi_heads\.box_head\.(\d)\.fc2\.", r"roi_heads.stages.\1.head.fc7."),
    (r"roi_heads\.box_predictor\.(\d)\.(cls_score|bbox_pred)\.", r"roi_heads.stages.\1.predictor.\2."),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.", r"roi_heads.predictor.\1."),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", r"mask.convs.\1."),
    (r"roi_heads\.mask_head\.deconv\.", "mask.head.upsample."),
    (r"roi_heads\.mask_head\.predictor\.", "mask.predictor.conv."),
    (r"head\.cls_subnet\.", "head.class_tower."),
    (r"head\.bbox_subnet\.", "head.box_tower."),
    (r"head\.cls_score\.", "head.classifier."),
    (r"head\.bbox_pred\.", "head.box."),
)
IN_BLOCK = (  # of the parts of a residual block
    (r"res\.(.*)\.conv(\d)\.norm\.", rf"{BODY}\1.bn\2."),
    (r"res\.(.*)\.shortcut\.norm\.", rf"{BODY}\1.downsample.1."),
    (r"res\.(.*)\.shortcut\.", rf"{BODY}\1.downsample.0."),
    (r"res\.(.*\.conv\d)\.", rf"{BODY}\1."),
    (r"(?!res\.)(.*)", r"\1"),
)
RATIOS = 3  # of RetinaNet's anchors


def is_detectron2(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of one of detectron2's detectors."""
    return any(key.startswith("backbone.bottom_up.") for key in state)


def convert(state: Mapping[str, Tensor], backbone: str, style: str = "", source: str = "checkpoint") -> Zoo:
    """The weights by tailfin's names.

    Args:
        state: float tensors by detectron2's names.
        backbone: the recipe's.
        style: of `STYLES`; by default what the stored deviation says, or the zoo's, "caffe".

    Raises:
        UserError: a weight of a part that tailfin does not have.
    """
    style = style or _style(state)
    found = renamed(renamed(state, RULES, LEFT_OUT, source), IN_BLOCK, r"^$", source)
    norms = {key.removesuffix("weight") for key in found if key.startswith(BODY) and _of_norm(key)}
    found = with_statistics(found, sorted(norms))
    first = f"{BODY}conv1.weight"
    if first not in found:
        raise UserError(f"{source}: it has no ResNet with a stem of one convolution")
    if style == "caffe":
        found[first] = rgb_conv(found[first])
    found = _pyramid(found)
    changes = {**body_changes(backbone, style), "detector.anchor_style": "exact"}
    if "head.classifier.weight" in found:
        anchors = len(found["head.box.bias"]) // 4
        rows = len(found["head.classifier.bias"]) // anchors
        for key in [key for key in found if key.startswith(("head.classifier.", "head.box."))]:
            found[key] = found[key].unflatten(0, (anchors // RATIOS, RATIOS, -1)).transpose(0, 1).flatten(0, 2)
        changes |= {"detector.fpn_convs": "body", "detector.fpn_convs_relu": True, "detector.low_quality": "keep_owner"}
        return Zoo(found, "retinanet", rows, changes)
    return _two_stage(found, changes, source)


# ---- details ---------------------------------------------------------------------------------------------------------


def _style(state: Mapping[str, Tensor]) -> str:
    """By the deviation that a .pth file has; a .pkl of the zoo has none."""
    std = state.get("pixel_std")
    return STYLES[0] if std is None or bool((std.flatten() == 1).all()) else STYLES[1]


def _of_norm(key: str) -> bool:
    *_, module, word = key.split(".")
    before = key.split(".")[-3]
    return word == "weight" and (module.startswith("bn") or (module == "1" and before == "downsample"))


def _pyramid(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Levels are counted by the body's layer there (res2 = 2), by their place in the pyramid here."""
    first = min((int(key.split(".")[2]) for key in state if key.startswith("fpn.lateral.")), default=2)
    found = {}
    for key, value in state.items():
        if key.startswith("fpn."):
            _, kind, level, word = key.split(".")
            blocks = "inner" if kind == "lateral" else "layer"
            key = f"backbone.fpn.{blocks}_blocks.{int(level) - first}.0.{word}"
        found[key] = value
    return found


def _two_stage(state: dict[str, Tensor], changes: dict[str, object], source: str) -> Zoo:
    stages = len({key.split(".")[2] for key in state if key.startswith("roi_heads.stages.")})
    prefix = "roi_heads.stages.0." if stages else "roi_heads."
    classifier, box = (state.get(f"{prefix}predictor.{name}.bias") for name in ("cls_score", "bbox_pred"))
    if classifier is None or box is None:
        raise UserError(f"{source}: it has neither a box head nor RetinaNet's head")
    masks = state.get("mask.predictor.conv.bias")
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("mask.convs."):
            _, _, number, word = key.split(".")
            key = f"mask.head.convs.{int(number) - 1}.{word}"
        if key.startswith("mask.") and stages:
            found |= {f"masks.{stage}{key.removeprefix('mask')}": value.clone() for stage in range(stages)}
        else:
            found[key] = value
    name = "cascade_rcnn" if stages else "faster_rcnn" if masks is None else "mask_rcnn"
    changes |= {"detector.roi_aligned": True, "detector.roi_sampling": 0}
    changes |= class_changes(name, len(box), None if masks is None else len(masks))
    if stages:
        changes["detector.stage_mean"] = "scores"
        weights = [(10.0 * (stage + 1), 5.0 * (stage + 1)) for stage in range(stages)]
        changes["detector.stage_stds"] = [[1 / centre, 1 / centre, 1 / side, 1 / side] for centre, side in weights]
    return Zoo(found, name, len(classifier), changes)
