"""Weights of torchvision's detectors in the names, and the order of classes, of tailfin's.

    state = torchvision.models.detection.maskrcnn_resnet50_fpn(weights="DEFAULT").state_dict()
    model.load_state_dict(convert_mask_rcnn(state, classes=kept), strict=False)    # what is missing is the loss's

torchvision has the background as class 0 and columns for ids that COCO does not use; tailfin has the foreground classes
0..C-1 and the background last, and no box deltas or masks of the background. A function per detector; each takes every
weight of the state or says which it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tailfin.errors import UserError

SHARED = ("backbone.", "rpn.")  # the same names in both
BOX_HEAD = {"roi_heads.box_head.fc6.": "roi_heads.head.fc6.", "roi_heads.box_head.fc7.": "roi_heads.head.fc7."}
CLASSIFIER = "roi_heads.box_predictor.cls_score."
BOXES = "roi_heads.box_predictor.bbox_pred."
MASK_CONV = re.compile(r"roi_heads\.mask_head\.(?:mask_fcn(?P<old>\d+)|(?P<new>\d+)\.0)\.")  # counted from 1, or from 0
UPSAMPLE = "roi_heads.mask_predictor.conv5_mask."
MASKS = "roi_heads.mask_predictor.mask_fcn_logits."


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
        if name.startswith(SHARED):
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
