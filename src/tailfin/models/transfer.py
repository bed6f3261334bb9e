"""Knowledge transfer of step-wise learning (Dong et al., ICCV'23, 3.3): a student that trains beside its teacher.

    total = detection losses of the student + lambda_fm * eq. 2 + lambda_cls * eq. 3        (models/distillation.py)

What the two compare on is the detector's own (`Detector.compared`): Deformable DETR's input projections and object
queries, Faster R-CNN's pyramid and sampled proposals. The teacher is no submodule: it is neither trained nor stored,
and the shell's state is the student's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.models.detector import Compared, Detector
from tailfin.models.distillation import class_distillation, feature_distillation, level_masks, logit_distance
from tailfin.models.images import pictures_of
from tailfin.schema.stepwise import Distillation

TINY = 1e-12  # below every score that matters


class Transfer(nn.Module):
    """`transfer(images, targets)` gives the student's losses and the distillation terms, each with its weight.

    Args:
        student: the detector that trains.
        teacher: one of the same kind; frozen here.
        old: bool [C], the classes that the teacher is an expert of; masks are of their boxes.
        config: the recipe's section.
    """

    old: Tensor
    over: Tensor

    def __init__(self, student: Detector, teacher: Detector, old: Tensor, config: Distillation) -> None:
        super().__init__()
        if why := student.untaught():
            raise UserError(f"stepwise: {why}")
        self.student = student
        self.config = config
        self.register_buffer("old", old.clone(), persistent=False)
        over = old if config.over == "head" else torch.ones_like(old)
        self.register_buffer("over", torch.where(over)[0], persistent=False)
        teacher.requires_grad_(False)
        teacher.train(not config.teacher_eval)
        self._teacher = (teacher,)

    @property
    def teacher(self) -> Detector:
        return self._teacher[0]

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        student, config, loss = self.student, self.config, self.student.loss
        assert loss is not None  # a detector without classes has no steps
        if next(self.teacher.parameters()).device != images[0].device:
            self.teacher.to(images[0].device)
        seen = student.compared(self.teacher, images, targets, shared=config.shared_queries)
        losses = dict(seen.losses)
        if config.feature and seen.maps:
            value = feature_distillation(seen.maps, seen.taught_maps, self._masks(targets, seen))
            losses["loss_feature_distillation"] = config.feature * value
        if config.classes:
            first = 0 if config.layers == "all" else len(seen.logits) - 1
            own, wanted = (class_logits(loss, value[first:]) for value in (seen.logits, seen.taught_logits))
            if config.distance == "l2":
                value = logit_distance(own, wanted, self.over)
            else:
                value = class_distillation(own, wanted, self.over, config.temperature)
            losses["loss_class_distillation"] = config.classes * value
        return losses

    def _masks(self, targets: Sequence[dict[str, Tensor]], seen: Compared) -> list[Tensor]:
        """Boxes of old classes on every level's grid."""
        counts = [len(target["labels"]) for target in targets]
        size = seen.sizes[pictures_of(counts, seen.sizes.device)]
        boxes = (torch.cat([target["boxes"] for target in targets]).float() / size).split(counts)
        old = self.old[torch.cat([target["labels"] for target in targets])]
        rounding = self.config.mask_rounding
        return level_masks(boxes, [level.shape[-2:] for level in seen.maps], seen.valid, rounding, old)


def class_logits(loss: ClassificationLoss, logits: Tensor) -> Tensor:
    """The logits of the foreground classes, [..., C].

    Losses have them first, with columns for background, foreground or both behind; one with another layout (groups of
    classes with a softmax each) gives the logarithms of its scores.
    """
    if logits.shape[-1] <= loss.num_classes + 2:
        return logits[..., : loss.num_classes]
    return loss.scores(logits.flatten(0, -2)).clamp(min=TINY).log().unflatten(0, logits.shape[:-1])
