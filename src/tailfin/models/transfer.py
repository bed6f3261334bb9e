"""Knowledge transfer of step-wise learning (Dong et al., ICCV'23, 3.3): a student that trains beside its teacher.

    total = detection losses of the student + lambda_fm * eq. 2 + lambda_cls * eq. 3        (models/distillation.py)

Deformable DETR: eq. 2 on the outputs of `input_proj`, eq. 3 on the teacher's object queries. Faster R-CNN: eq. 3 on the
student's sampled proposals with the teacher's features, eq. 2 on the pyramid where it trains. The teacher is no
submodule: it is neither trained nor stored, and the shell's state is the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.models.distillation import box_masks, class_distillation, feature_distillation
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.images import batch_images
from tailfin.schema.stepwise import Distillation

Losses = dict[str, Tensor]
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

    def __init__(self, student: Any, teacher: nn.Module, old: Tensor, config: Distillation) -> None:
        super().__init__()
        if isinstance(student, FasterRCNN) and not student.roi_heads.takes_extra_rows:
            raise UserError("stepwise: distillation needs a box head of one pass and one classifier, not pcb or simcal")
        self.student = student
        self.config = config
        self.register_buffer("old", old.clone(), persistent=False)
        over = old if config.over == "head" else torch.ones_like(old)
        self.register_buffer("over", torch.where(over)[0], persistent=False)
        teacher.requires_grad_(False)
        teacher.train(not config.teacher_eval)
        self._replay: _Replay | None = None
        if not isinstance(student, FasterRCNN) and not any(p.requires_grad for p in student.backbone.parameters()):
            # the same frozen backbone on the same pictures: the teacher takes what the student has computed
            self._replay = teacher.backbone = _Replay()
        self._teacher = (teacher,)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Losses:
        self.teacher.to(images[0].device)
        steps: Callable[..., Losses] = self._proposals if isinstance(self.student, FasterRCNN) else self._queries
        return steps(images, targets)

    # ---- Deformable DETR -------------------------------------------------------------------------------------------

    def _queries(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Losses:
        student: Any = self.student
        hook = student.backbone.register_forward_hook(self._replay.keep) if self._replay is not None else None
        outputs = student.outputs(images)
        if hook is not None:
            hook.remove()
        losses: Losses = student.losses(outputs, targets)
        with torch.no_grad():
            taught = self.teacher.outputs(images)  # type: ignore[operator]
        if self.config.feature:
            masks = self._masks(targets, outputs.sizes, outputs.features, outputs.masks)
            value = feature_distillation(outputs.features, taught.features, masks)
            losses["loss_feature_distillation"] = self.config.feature * value
        if self.config.classes:
            logits = student.classify(taught.hidden) if self.config.shared_queries else outputs.logits
            first = 0 if self.config.layers == "all" else len(logits) - 1
            loss = student.criterion.loss
            own, wanted = (class_logits(loss, value[first:]) for value in (logits, taught.logits))
            value = class_distillation(own, wanted, self.over, self.config.temperature)
            losses["loss_class_distillation"] = self.config.classes * value
        return losses

    # ---- Faster R-CNN ----------------------------------------------------------------------------------------------

    def _proposals(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Losses:
        student: Any = self.student
        teacher: Any = self.teacher
        heads = student.roi_heads
        seen: list[Tensor] = []  # of the box head: the first call is that of the sampled proposals
        pooled: list[Any] = []
        hooks = [
            heads.pool.register_forward_hook(lambda _, arguments, __: pooled.append(arguments)),
            heads.head.register_forward_hook(lambda _, __, shared: seen.append(shared)),
        ]
        try:
            losses: Losses = student(images, targets)
        finally:
            for hook in hooks:
                hook.remove()
        features, boxes, sizes = pooled[0]
        shared = seen[0]
        pyramid = any(p.requires_grad for p in student.backbone.parameters())
        trunk = pyramid or any(p.requires_grad for p in heads.head.parameters())
        taught = features
        with torch.no_grad():
            if pyramid:
                taught = teacher.backbone(batch_images(images, channels_last=teacher.channels_last).tensors)
            # where nothing below the classifier trains, both have the same features
            rows = teacher.roi_heads.head(teacher.roi_heads.pool(taught, boxes, sizes)) if trunk else shared.detach()
            wanted = teacher.roi_heads.predictor.cls_score(rows)
        if self.config.feature and pyramid:
            height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
            padded = tuple(-(-side // 32) * 32 for side in (height, width))
            scale = torch.tensor([[size[1], size[0]] * 2 for size in sizes], device=rows.device).float()
            levels = list(features.values())
            valid = [_valid(level.shape[-2:], padded, scale) for level in levels]
            masks = self._masks(targets, scale, levels, valid)
            value = feature_distillation(levels, list(taught.values()), masks)
            losses["loss_feature_distillation"] = self.config.feature * value
        if self.config.classes:
            own = heads.predictor.cls_score(rows if self.config.shared_queries else shared)
            own, wanted = (class_logits(heads.loss, value)[None] for value in (own, wanted))
            value = class_distillation(own, wanted, self.over, self.config.temperature)
            losses["loss_class_distillation"] = self.config.classes * value
        return losses

    def _masks(
        self,
        targets: Sequence[dict[str, Tensor]],
        sizes: Tensor,
        levels: Sequence[Tensor],
        valid: Sequence[Tensor],
    ) -> list[Tensor]:
        """Boxes of old classes on every level's grid; sizes [B, 4] are width, height, width, height in pixels."""
        boxes = [
            target["boxes"][self.old[target["labels"]]].float() / size
            for target, size in zip(targets, sizes, strict=True)
        ]
        rounding = self.config.mask_rounding
        return [box_masks(boxes, level.shape[-2:], own, rounding) for level, own in zip(levels, valid, strict=True)]


def class_logits(loss: ClassificationLoss, logits: Tensor) -> Tensor:
    """The logits of the foreground classes, [..., C].

    Losses have them first, with columns for background, foreground or both behind; one with another layout (groups of
    classes with a softmax each) gives the logarithms of its scores.
    """
    if logits.shape[-1] <= loss.num_classes + 2:
        return logits[..., : loss.num_classes]
    return loss.scores(logits.flatten(0, -2)).clamp(min=TINY).log().unflatten(0, logits.shape[:-1])


class _Replay(nn.Module):
    """Stands for a backbone: returns what another one has just computed."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: Any = None

    def keep(self, _: nn.Module, __: Any, maps: Any) -> None:
        self.maps = maps

    def forward(self, _: Tensor) -> Any:
        return self.maps


def _valid(shape: Sequence[int], padded: Sequence[int], sizes: Tensor) -> Tensor:
    """Cells that a picture reaches into, bool [B, h, w]."""
    height, width = shape
    across = (sizes[:, 0] * width / padded[1]).ceil()
    down = (sizes[:, 1] * height / padded[0]).ceil()
    columns = torch.arange(width, device=sizes.device)[None] < across[:, None]
    rows = torch.arange(height, device=sizes.device)[None] < down[:, None]
    return rows[:, :, None] & columns[:, None]
