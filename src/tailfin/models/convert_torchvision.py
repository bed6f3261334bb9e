"""Weights of torchvision's detectors in the names, and the order of classes, of tailfin's.

    state = torchvision.models.detection.maskrcnn_resnet50_fpn(weights="DEFAULT").state_dict()
    model.load_state_dict(convert_mask_rcnn(state, classes=kept), strict=False)    # what is missing is the loss's

torchvision has the background as class 0 and columns for ids that COCO does not use; tailfin has the foreground classes
0..C-1 and the background last, and no box deltas or masks of the background. A function per detector; each takes every
weight of the state or says which it does not know. RetinaNet has no background column, and is recognised in `weights:`
(`is_torchvision_retinanet`); `tailfin.models.retinanet` says with which settings it gives torchvision's results. The
published COCO_V1 weights were trained with frozen norms that add nothing to the variance; `weights: coco`
(`tailfin.models.coco_weights`) allows for it, a file of weights may be of either kind and is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from tailfin.errors import UserError
from tailfin.models.released import Released, Zoo

SHARED = ("backbone.", "rpn.")  # the same names in both
BOX_HEAD = {"roi_heads.box_head.fc6.": "roi_heads.head.fc6.", "roi_heads.box_head.fc7.": "roi_heads.head.fc7."}
CLASSIFIER = "roi_heads.box_predictor.cls_score."
BOXES = "roi_heads.box_predictor.bbox_pred."
MASK_CONV = re.compile(r"roi_heads\.mask_head\.(?:mask_fcn(?P<old>\d+)|(?P<new>\d+)\.0)\.")  # counted from 1, or from 0
UPSAMPLE = "roi_heads.mask_predictor.conv5_mask."
MASKS = "roi_heads.mask_predictor.mask_fcn_logits."
DENSE_CLASSIFIER = "head.classification_head.cls_logits."
DENSE_BOX = "head.regression_head.bbox_reg."
TOWER = re.compile(r"^head\.(classification|regression)_head\.conv\.(\d+)\.(?:(\d)\.)?(weight|bias)$")
RPN_CONV = "rpn.head.conv."  # its weights stand right here in older versions
PYRAMID = re.compile(r"^backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)$")  # of older versions


def convert_faster_rcnn(state: Mapping[str, Tensor], classes: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The state of torchvision's `FasterRCNN` (FPN, two shared layers, softmax) in tailfin's names.

    Args:
        state: torchvision's, as saved.
        classes: torchvision's labels (1..) of the classes 0..C-1; by default all of them in order.

    Raises:
        UserError: a weight that is not one of this detector's; a label that it does not have.
    """
    return _converted(state, classes, {})


def convert_mask_rcnn(state: Mapping[str, Tensor], classes: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The state of torchvision's `MaskRCNN` in tailfin's names; as `convert_faster_rcnn`, with the mask branch."""
    masks = {}
    for name, value in state.items():
        if convolution := MASK_CONV.match(name):
            place = int(convolution["new"]) if convolution["new"] else int(convolution["old"]) - 1
            masks[name] = f"mask.head.convs.{place}.{name[convolution.end() :]}", value
        elif name.startswith(UPSAMPLE):
            masks[name] = f"mask.head.upsample.{name.removeprefix(UPSAMPLE)}", value
        elif name.startswith(MASKS):
            rows = _labels(classes, len(value))
            masks[name] = f"mask.predictor.conv.{name.removeprefix(MASKS)}", value[rows]
    return _converted(state, classes, masks)


def _converted(
    state: Mapping[str, Tensor], classes: Sequence[int] | None, known: Mapping[str, tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The state by tailfin's names; `known` has those of weights beside Faster R-CNN's."""
    found = dict(known.values())
    for name, value in state.items():
        if name in known:
            continue
        if older := PYRAMID.match(name):
            found[f"backbone.fpn.{older[1]}_blocks.{older[2]}.0.{older[3]}"] = value
        elif name.startswith(RPN_CONV) and name.count(".") == RPN_CONV.count("."):
            found[name.replace(RPN_CONV, f"{RPN_CONV}0.0.")] = value
        elif name.startswith(SHARED):
            found[name] = value
        elif name.startswith(CLASSIFIER):
            rows = torch.tensor([*_labels(classes, len(value)), 0])
            found[f"roi_heads.predictor.cls_score.{name.removeprefix(CLASSIFIER)}"] = value[rows]
        elif name.startswith(BOXES):
            kept = _labels(classes, len(value) // 4)
            boxes = value.unflatten(0, (-1, 4))[kept].flatten(0, 1)
            found[f"roi_heads.predictor.bbox_pred.{name.removeprefix(BOXES)}"] = boxes
        elif prefix := next((prefix for prefix in BOX_HEAD if name.startswith(prefix)), None):
            found[BOX_HEAD[prefix] + name.removeprefix(prefix)] = value
        else:
            raise UserError(f"the weight {name} belongs to no part of this detector: another model of torchvision's?")
    return found


def _labels(classes: Sequence[int] | None, count: int) -> list[int]:
    """torchvision's labels of the classes, of `count` with the background."""
    labels = list(range(1, count)) if classes is None else list(classes)
    wrong = [label for label in labels if not 1 <= label < count]
    if wrong:
        raise UserError(f"classes: the weights have the labels 1..{count - 1}, not {wrong[0]}")
    return labels


def is_torchvision_retinanet(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a torchvision RetinaNet."""
    return f"{DENSE_CLASSIFIER}weight" in state and f"{DENSE_BOX}weight" in state


def convert_retinanet(state: Mapping[str, Tensor], classes: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The state of torchvision's `RetinaNet` in tailfin's names.

    Args:
        state: torchvision's, as saved.
        classes: the classifier's rows of the classes 0..C-1; by default all of them in order. A label is its row there,
            so where labels count from 1 the first row is of no class.
    """
    anchors = len(state[f"{DENSE_BOX}weight"]) // 4
    layers = (
        3 if "head.classification_head.conv.0.1.weight" in state else 2
    )  # convolution, norm where there is one, ReLU
    converted = {}
    for key, value in state.items():
        if key.startswith(DENSE_CLASSIFIER):
            grouped = value.unflatten(0, (anchors, -1))
            own = grouped if classes is None else grouped[:, list(classes)]
            converted["head.classifier." + key.removeprefix(DENSE_CLASSIFIER)] = own.flatten(0, 1).clone()
        elif key.startswith(DENSE_BOX):
            converted["head.box." + key.removeprefix(DENSE_BOX)] = value
        elif found := TOWER.match(key):
            tower = "class_tower" if found[1] == "classification" else "box_tower"
            converted[f"head.{tower}.{layers * int(found[2]) + int(found[3] or 0)}.{found[4]}"] = value
        elif found := PYRAMID.match(key):
            converted[f"backbone.fpn.{found[1]}_blocks.{found[2]}.0.{found[3]}"] = value
        else:
            converted[key] = value
    return converted


def is_torchvision_rcnn(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a torchvision Faster or Mask R-CNN."""
    return f"{CLASSIFIER}weight" in state and any(key.startswith("backbone.body.") for key in state)


def released_retinanet(state: Mapping[str, Tensor], names: Sequence[str], source: str) -> Released:
    """A torchvision RetinaNet's weights with the classes that its rows are of, see `_classes`."""
    count = len(state[f"{DENSE_CLASSIFIER}weight"]) // (len(state[f"{DENSE_BOX}weight"]) // 4)
    rows, old, notes = _classes(count, names, source, background=False)
    return Released(convert_retinanet(state, rows), old, notes)


def released_rcnn(state: Mapping[str, Tensor], names: Sequence[str], source: str, *, masks: bool) -> Released:
    """A torchvision Faster or Mask R-CNN's weights with the classes that its rows are of; a mask branch that is not
    wanted is left out."""
    rows, old, notes = _classes(len(state[f"{CLASSIFIER}weight"]), names, source, background=True)
    if masks:
        return Released(convert_mask_rcnn(state, rows), old, notes)
    return Released(
        convert_faster_rcnn({key: value for key, value in state.items() if ".mask_" not in key}, rows), old, notes
    )


def _classes(
    count: int, names: Sequence[str], source: str, *, background: bool
) -> tuple[list[int], list[str], tuple[str, ...]]:
    """Rows of classes among `count`, the names of these classes, and what has to be said of them.

    A state carries no names. 91 rows are COCO's ids; else they are those of the data in its order, where their number
    fits: C, of which there is none of a background, or C + 1 with the row of label 0. Anything else is refused.
    """
    coco = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if count == len(coco):
        own = {name.lower(): name for name in names}  # the data may write them in capitals
        known = [(row, name) for row, name in enumerate(coco) if name not in ("__background__", "N/A")]
        return [row for row, _ in known], [own.get(name.lower(), name) for _, name in known], ()
    first = count - len(names)
    if first == 1 or (first == 0 and not background):
        said = f"  {source} has no class names: its {len(names)} classes are taken in the order of the data's"
        return list(range(first, count)), list(names), (said,)
    raise UserError(f"{source}: its classifier has {count} classes, the training file {len(names)}")


def zoo(state: Mapping[str, Tensor], backbone: str) -> Zoo:
    """A published detector of COCO, whose 80 classes have rows by id; of fewer rows all but the first."""
    dense = is_torchvision_retinanet(state)
    count = len(state[f"{DENSE_BOX}weight"]) // 4 if dense else 1
    rows = len(state[f"{DENSE_CLASSIFIER if dense else CLASSIFIER}weight"]) // count
    coco = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    labels = list(range(1, rows))
    if rows == len(coco):
        labels = [row for row, name in enumerate(coco) if name not in ("__background__", "N/A")]
    changes: dict[str, Any] = {"backbone": backbone, "detector.norm": "frozen_bn"}
    if dense:
        plain = {"fpn_convs": "pyramid", "fpn_convs_relu": True, "anchor_style": "torchvision"}
        changes |= {f"detector.{key}": value for key, value in {**plain, "low_quality": "keep_owner"}.items()}
        return Zoo(convert_retinanet(state, labels), "retinanet", len(labels), changes)
    masks = any(".mask_" in key for key in state)
    plain = {"anchor_style": "torchvision", "roi_aligned": False, "roi_sampling": 2, "box_regression": "class_specific"}
    changes |= {f"detector.{key}": value for key, value in plain.items()}
    if masks:
        changes["detector.masks_by_class"] = "class_specific"
        return Zoo(convert_mask_rcnn(state, labels), "mask_rcnn", len(labels) + 1, changes)
    return Zoo(convert_faster_rcnn(state, labels), "faster_rcnn", len(labels) + 1, changes)
