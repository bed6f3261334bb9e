"""Weights of torchvision's detectors in tailfin's names.

    state = torch.load("retinanet_resnet50_fpn_coco.pth", weights_only=True)
    is_torchvision_retinanet(state)                                       # True
    ours = convert_retinanet(state, names, num_logits)                    # names of the C classes, in their order

A state dict carries no class names. Its classifier has one row of logits per label, and labels count from 1, so the
first row is of no class. Rows are taken by name from the 91 of COCO, else in their order where their number is C or
C + 1; anything else is refused. The detector must have torchvision's settings to give its results, see
`tailfin.models.retinanet`; the published COCO_V1 weights were trained with frozen norms whose epsilon is 0, which is
1e-5 here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from tailfin.errors import UserError, nearest

CLASSIFIER = "head.classification_head.cls_logits."
BOX = "head.regression_head.bbox_reg."
TOWER = re.compile(r"^head\.(classification|regression)_head\.conv\.(\d+)\.(?:(\d)\.)?(weight|bias)$")
PYRAMID = re.compile(r"^backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)$")  # of older versions


def is_torchvision_retinanet(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a torchvision RetinaNet."""
    return f"{CLASSIFIER}weight" in state and f"{BOX}weight" in state


def convert_retinanet(
    state: Mapping[str, Tensor], names: Sequence[str], num_logits: int, source: str = "weights"
) -> dict[str, Tensor]:
    """A torchvision RetinaNet's state dict by tailfin's names, its classifier cut to the classes `names`.

    Raises:
        UserError: classes that cannot be told from the number of rows, or a loss with more logits than classes.
    """
    anchors = len(state[f"{BOX}weight"]) // 4
    rows = _rows(len(state[f"{CLASSIFIER}weight"]) // anchors, names, num_logits, source)
    layers = (
        3 if "head.classification_head.conv.0.1.weight" in state else 2
    )  # convolution, norm where there is one, ReLU
    converted = {}
    for key, value in state.items():
        if key.startswith(CLASSIFIER):
            own = value.unflatten(0, (anchors, -1))[:, rows].flatten(0, 1).clone()
            converted["head.classifier." + key.removeprefix(CLASSIFIER)] = own
        elif key.startswith(BOX):
            converted["head.box." + key.removeprefix(BOX)] = value
        elif found := TOWER.match(key):
            tower = "class_tower" if found[1] == "classification" else "box_tower"
            converted[f"head.{tower}.{layers * int(found[2]) + int(found[3] or 0)}.{found[4]}"] = value
        elif found := PYRAMID.match(key):
            converted[f"backbone.fpn.{found[1]}_blocks.{found[2]}.0.{found[3]}"] = value
        else:
            converted[key] = value
    return converted


def _rows(count: int, names: Sequence[str], num_logits: int, source: str) -> list[int]:
    """The classifier's row of every class."""
    if num_logits != len(names):
        raise UserError(
            f"{source}: a torchvision RetinaNet has one logit per class, this loss has {num_logits} for {len(names)} "
            "classes: use a loss of C sigmoids, as focal"
        )
    coco = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if count == len(coco):
        places = {name.lower(): row for row, name in enumerate(coco)}
        known = [name for name in coco if name not in ("__background__", "N/A")]
        for name in names:
            if name.lower() not in places:
                raise UserError(f'{source}: class "{name}" is none of COCO\'s{nearest(name, known)}')
        return [places[name.lower()] for name in names]
    if count in (len(names), len(names) + 1):
        return list(range(count - len(names), count))
    raise UserError(f"{source}: its classifier has {count} classes, the training file {len(names)}")
