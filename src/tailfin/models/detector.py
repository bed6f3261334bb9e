"""What a detector is: the one contract that training, inference, methods and tools ask.

    outputs = detector.outputs(images, targets)          tensors of a batch; targets where training draws depend on them
    losses = detector.losses(outputs, targets)           named losses, each with its weight
    found = detector.detections(outputs, limits)         per picture boxes, scores, labels

`forward` is these three: losses in training, detections in evaluation. The rest of this file says which parts a
detector has, what may train, and what methods want to know of it. A detector of one's own is a subclass that writes the
three steps and `parts`; `examples/own_detector.py` is one to start from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

from tailfin.errors import UserError, nearest
from tailfin.losses.base import ClassificationLoss
from tailfin.models.images import MEAN, STD, batch_images

if TYPE_CHECKING:
    from tailfin.models.features.base import FeatureModule

Targets = Sequence[dict[str, Tensor]]
Detections = list[dict[str, Tensor]]


class Limits(NamedTuple):
    """Which detections are reported; a value that goes with the call, so that two callers cannot disturb each other."""

    score_threshold: float = 0.0  # detections score above it
    max_dets: int = -1  # best ones per picture over all classes; -1: no limit
    nms: float = 0.5  # IoU of the suppression within a class, where the detector has one

    def replaced(self, score_threshold: float | None = None, max_dets: int | None = None) -> Limits:
        """These limits with those given in their place."""
        given: dict[str, Any] = {"score_threshold": score_threshold, "max_dets": max_dets}
        return self._replace(**{name: value for name, value in given.items() if value is not None})


def known_classes(targets: Targets, rows: Sequence[int]) -> dict[str, Tensor]:
    """`known`, bool [N, C]: the classes that were looked for in each row's picture, as `ClassificationLoss` takes them.

    Nothing where the targets do not say. `rows` are counts per picture, one after another.
    """
    if not targets or "known" not in targets[0]:
        return {}
    own = [target["known"].expand(count, -1) for target, count in zip(targets, rows, strict=True)]
    return {"known": torch.cat(own)}


class Compared(NamedTuple):
    """What knowledge transfer compares between a student and its teacher on the same pictures."""

    losses: dict[str, Tensor]  # the student's own
    maps: list[Tensor]  # feature maps of the student per level [B, d, h, w]; empty where none of them trains
    taught_maps: list[Tensor]  # the teacher's
    valid: list[Tensor]  # bool [B, h, w] per level: cells that a picture reaches into
    sizes: Tensor  # [B, 4] width, height, width, height of the pictures in pixels
    logits: Tensor  # [L, ..., K] of the student, of the same rows as the teacher's
    taught_logits: Tensor


class Detector(nn.Module, ABC):
    """Base of all detectors, as functions of pictures.

    Training: `model(images, targets)` returns named losses; targets are dicts of boxes float32 [M, 4] (xyxy, pixels of
    the picture given) and labels int64 [M]. Evaluation: `model(images)` returns one dict of boxes [D, 4], scores [D]
    and labels [D] per picture, best first. Pictures are [3, H, W], uint8 or float in 0..1, already resized.

    Args:
        backbone: from pictures to feature maps.
        limits: of `model(images)`; a call may give its own.
        divisor: height and width of a batch are multiples of it.
        mean, std: of the pictures that the backbone expects, RGB in 0..1.
    """

    kinds: tuple[str, ...] = ("bbox",)  # what detections carry; "segm" beside it where they have masks
    num_proposals: int | None = None  # boxes per picture that a second stage looks at in evaluation

    def __init__(
        self,
        backbone: nn.Module,
        limits: Limits = Limits(),
        *,
        divisor: int = 32,
        channels_last: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.limits = limits
        self.divisor, self.channels_last = divisor, channels_last
        self.mean, self.std = tuple(mean), tuple(std)
        self.rescore: nn.Module | None = None  # scores [..., C] to those that are reported (calibration)

    # ---- the three steps -------------------------------------------------------------------------------------------

    @abstractmethod
    def outputs(self, images: Sequence[Tensor], targets: Targets | None = None) -> Any:
        """What losses and detections are made of, a named tuple of the detector's own."""

    @abstractmethod
    def losses(self, outputs: Any, targets: Targets) -> dict[str, Tensor]:
        """Named losses with their weights."""

    @abstractmethod
    def detections(self, outputs: Any, limits: Limits) -> Detections:
        """Per picture: boxes [D, 4] (xyxy, pixels of the picture given), scores [D] descending, labels int64 [D]."""

    def forward(
        self, images: Sequence[Tensor], targets: Targets | None = None, limits: Limits | None = None
    ) -> dict[str, Tensor] | Detections:
        if not self.training:
            return self.detections(self.outputs(images), limits or self.limits)
        if targets is None:
            raise ValueError("training needs targets")
        return self.losses(self.outputs(images, targets), targets)

    def batch(self, images: Sequence[Tensor]) -> ImageList:
        """Pictures to one padded batch, normalised as the backbone expects."""
        return batch_images(
            images, divisor=self.divisor, channels_last=self.channels_last, mean=self.mean, std=self.std
        )

    # ---- parts -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Parts that a stage may train, by the names that a recipe uses; "classifier" is among them."""

    def class_specific(self) -> tuple[str, ...]:
        """Names of the parts that know the classes; the head class expert of step-wise learning trains them."""
        return ("classifier",)

    def freeze_but(self, names: Sequence[str]) -> None:
        """Nothing but the named parts goes on training, and what is frozen in them stays so: no gradients are computed
        or kept for the rest, and its norms keep their statistics. An unknown name is a `UserError`.
        """
        parts = self.parts()
        for name in names:
            if name not in parts:
                raise UserError(f'trains: there is no part "{name}"{nearest(name, parts)}')
        kept = {id(parameter) for name in names for parameter in parts[name].parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
        self.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        """Training or evaluation mode; a batch norm whose weights are frozen keeps its statistics in both."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self

    @property
    def loss(self) -> ClassificationLoss | None:
        """The classification loss; none for a detector that knows no classes."""
        return None

    @property
    def features(self) -> FeatureModule | None:
        """The feature module that takes part in the training, where there is one."""
        return None

    def method_state(self) -> list[nn.Module]:
        """Modules whose state is a method's own, which each stage starts anew: losses and feature modules."""
        return [module for module in (self.loss, self.features) if module is not None]

    # ---- what methods and tools ask --------------------------------------------------------------------------------

    def annotation_scores(self, images: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """How sure the detector is of annotations: scores [P, C], and the place int64 [P] of each over the batch.

        An annotation that nothing is matched with is left out. Exemplars of step-wise learning are chosen by it.
        """
        raise UserError(f"{type(self).__name__} cannot say how sure it is of an annotation")

    def boxes_only(self, outputs: Any, limits: Limits) -> Detections:
        """`detections` without their masks, for a caller that does not want them."""
        return self.detections(outputs, limits)

    def proposals(self, images: Sequence[Tensor], top: int, nms_iou: float) -> Detections:
        """Boxes [n, 4] of any class and scores [n] per picture, best first, n at most `top`, after NMS at `nms_iou`.

        By default the detections whatever their class.
        """
        results = []
        for own in self.detections(self.outputs(images), self.limits._replace(score_threshold=0.0, max_dets=-1)):
            boxes, scores = own["boxes"].float(), own["scores"].float()
            keep = nms(boxes, scores, nms_iou)[:top]
            results.append({"boxes": boxes[keep], "scores": scores[keep]})
        return results

    def compared(self, teacher: Detector, images: Sequence[Tensor], targets: Targets, *, shared: bool) -> Compared:
        """The student's losses, and what eq. 2 and 3 of step-wise learning compare with a `teacher` of the same kind.

        shared: the student's classifier sees the teacher's queries (or features); else its own.
        """
        raise UserError(f"{type(self).__name__} cannot be taught by another detector")

    def maps_of(self, teacher: Detector, batch: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """The teacher's feature maps of a batch whose maps by this detector are `maps`: the very same where its own
        backbone is frozen, since that of the teacher is no other then."""
        if any(parameter.requires_grad for parameter in self.backbone.parameters()):
            return list(teacher.backbone(batch.tensors).values())
        return maps

    def untaught(self) -> str:
        """Why this detector cannot be a student in knowledge transfer; empty where it can."""
        own = type(self).compared is not Detector.compared
        return "" if own else f"{type(self).__name__} has no knowledge transfer"

    def rehearsed(self, images: Sequence[Tensor]) -> Any:
        """`outputs` with the amount of work that those of a trained detector make, for measuring cost before training:
        as many proposals as there may be, and logits that are spread. By default the outputs as they are.
        """
        return self.outputs(images)

    def candidates(self, outputs: Any, limits: Limits) -> int | None:
        """How many scores of a batch lie above the threshold, which NMS has to sort out; none without NMS."""
        return None


def reported(model: nn.Module, scores: Tensor) -> Tensor:
    """Scores after the detector's calibration, where it has one."""
    return scores if model.rescore is None else model.rescore(scores)  # type: ignore[operator]


def valid_cells(shape: Sequence[int], padded: Sequence[int], sizes: Tensor) -> Tensor:
    """Cells of a level that a picture reaches into, bool [B, h, w]; `padded` (H, W) is the batch's, sizes [B, 4] the
    pictures' width, height, width, height."""
    height, width = shape
    across = (sizes[:, 0] * width / padded[1]).ceil()
    down = (sizes[:, 1] * height / padded[0]).ceil()
    columns = torch.arange(width, device=sizes.device)[None] < across[:, None]
    rows = torch.arange(height, device=sizes.device)[None] < down[:, None]
    return rows[:, :, None] & columns[:, None]
