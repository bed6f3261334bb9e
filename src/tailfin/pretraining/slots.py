"""Contrast of slots: SlotCon (Wen et al., "Self-Supervised Visual Representation Learning with Semantic Grouping",
NeurIPS'22).

Cells of the deepest layer are projected and grouped by K learnt prototypes; the momentum network is the teacher.

    dots[k, i]   cos(prototype k, cell i)
    grouping     -sum_k softmax((dots_teacher - centre) / t_t) log softmax(dots_student / t_s), where both views show
                 the same place: the views' overlap is pooled from either, and mirrored back
    slot k       mean of the cells, weighted by softmax over k of dots / t_t
    contrast     InfoNCE of a slot's prediction and the same slot of the other view against all slots in sight
    loss         w grouping + (1 - w) 2 t contrast, both ways

The centre, a running mean of the teacher's dots, keeps the prototypes from collapsing into one. A slot is in sight of a
view where it is some cell's nearest prototype; what only one view sees is not contrasted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailfin.collectives import gather_over_ranks, sum_over_ranks, this_rank
from tailfin.pretraining.contrast import JoinedBatchNorm
from tailfin.pretraining.reconstruction import real_cells
from tailfin.pretraining.term import Iteration, Term
from tailfin.schema.pretraining import Slots

SOFT = 1e-6  # added to every cell's share of a slot


class Grouped(NamedTuple):
    """What one network makes of a view."""

    slots: Tensor  # [B, K, D]
    dots: Tensor  # [B, K, h, w]
    seen: Tensor  # bool [B, K]


class SlotContrast(Term):
    """`loss_group` and `loss_slot`; targets have `overlap`, the views' common window in pixels of either, and
    `flipped` (see `PretrainingDataset`)."""

    averages = ("backbone",)
    centre: Tensor

    def __init__(self, weight: float, config: Slots, channels: int) -> None:
        super().__init__()
        self.weight, self.config = weight, config
        self.projector = mlp(channels, config.hidden, config.dim)
        self.prototypes = Prototypes(config.prototypes, config.dim)
        self.predictor = mlp(config.dim, config.hidden, config.dim)
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def followed(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        own = {"slot_projector": self.projector, "slot_prototypes": self.prototypes}
        return {**super().followed(parts), **own}

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        config = self.config
        student = {number: self.grouped(seen, number) for number in sorted({one for one, _ in seen.pairs})}
        with torch.no_grad():
            teacher = {number: self.grouped(seen, number, keys=True) for number in sorted({b for _, b in seen.pairs})}
        groups, contrasts = [], []
        for one, other in seen.pairs:
            own, wanted = (
                aligned(grouped.dots, seen, view) for grouped, view in ((student[one], one), (teacher[other], other))
            )
            common = torch.stack([(t["overlap"][0, 2:] > t["overlap"][0, :2]).all() for t in seen.targets])
            groups.append(
                grouping(own, wanted, self.centre, common, config.student_temperature, config.teacher_temperature)
            )
            contrasts.append(self._contrast(student[one], teacher[other]))
        if self.training:
            self._move_centre([grouped.dots for grouped in teacher.values()])
        if seen.diagnosed is not None:  # prototypes in sight of a picture, of all: near 0 is a collapse
            seen.diagnosed["slots_seen"] = student[0].seen.float().mean()
        share = config.group_weight
        return {
            "loss_group": self.weight * share * torch.stack(groups).sum(),
            "loss_slot": self.weight * (1 - share) * torch.stack(contrasts).sum(),
        }

    def grouped(self, seen: Iteration, number: int, *, keys: bool = False) -> Grouped:
        """Slots of a view, by the trained or by the momentum network."""
        feature = (seen.keys(number) if keys else seen.features(number)).deepest
        projector = seen.average["slot_projector"] if keys else self.projector
        prototypes = seen.average["slot_prototypes"] if keys else self.prototypes
        batch, _, height, width = feature.shape
        cells = projector(feature.permute(0, 2, 3, 1).flatten(0, 2)).float()
        maps = cells.view(batch, height, width, -1).permute(0, 3, 1, 2)
        with torch.autocast(maps.device.type, enabled=False):
            real = real_cells(seen.view(number), feature)
            return group(maps, prototypes(), real, self.config.teacher_temperature)

    def _contrast(self, student: Grouped, teacher: Grouped) -> Tensor:
        rows = torch.nonzero((student.seen & teacher.seen).flatten()).flatten()
        predicted = F.normalize(self.predictor(student.slots.flatten(0, 1)[rows]).float(), dim=1)
        keys = F.normalize(teacher.slots.flatten(0, 1), dim=1)
        return slot_contrast(predicted, rows, keys, teacher.seen.flatten(), self.config.temperature)

    def _move_centre(self, dots: list[Tensor]) -> None:
        """Towards the mean of the teacher's dots over the cells of all processes."""
        rows = torch.cat([own.permute(0, 2, 3, 1).flatten(0, 2) for own in dots])
        total, count = sum_over_ranks(rows.sum(0), rows.new_tensor([float(len(rows))]))
        self.centre.lerp_(total / count, 1 - self.config.centre_momentum)


class Prototypes(nn.Module):
    """K learnt directions [K, D]; `prototypes()` are the unit rows."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim))

    def forward(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=1)


def mlp(channels: int, hidden: int, dim: int) -> nn.Sequential:
    """Three linear layers of rows [N, channels], with batch norm over all processes and GELU between them."""
    made = nn.Sequential(
        *(nn.Linear(channels, hidden), JoinedBatchNorm(hidden), nn.GELU()),
        *(nn.Linear(hidden, hidden), JoinedBatchNorm(hidden), nn.GELU()),
        nn.Linear(hidden, dim),
    )
    for layer in made:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return made


def group(maps: Tensor, prototypes: Tensor, real: Tensor, temperature: float) -> Grouped:
    """Slots of projected maps [B, D, h, w] by unit prototypes [K, D]; `real` bool [B, 1, h, w] leaves padding out."""
    dots = torch.einsum("kd,bdhw->bkhw", prototypes, F.normalize(maps, dim=1))
    share = ((dots / temperature).softmax(1) + SOFT) * real
    slots = torch.einsum("bdhw,bkhw->bkd", maps, share / share.sum((2, 3), keepdim=True))
    with torch.no_grad():
        nearest = torch.zeros_like(dots).scatter_(1, dots.argmax(1, keepdim=True), 1.0) * real
    return Grouped(slots, dots, nearest.sum((2, 3)) > 0)


def aligned(dots: Tensor, seen: Iteration, number: int) -> Tensor:
    """Dots [B, K, h, w] of view 0 or 1 where it shows what the other one does, unmirrored."""
    boxes = [target["overlap"][number][None].to(dots) for target in seen.targets]
    size = (dots.shape[-2], dots.shape[-1])
    scale = size[1] / seen.view(number).batch.tensors.shape[-1]
    pooled = roi_align(dots, boxes, size, spatial_scale=scale, aligned=True)
    flipped = torch.stack([target["flipped"][number] for target in seen.targets])
    return torch.where(flipped.view(-1, 1, 1, 1), pooled.flip(-1), pooled)


def grouping(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    common: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross-entropy of the student's shares against the teacher's over the prototypes of aligned dots [B, K, h, w]:
    the mean over cells of the pictures, of all processes, whose views have something in `common`, bool [B]."""
    wanted = ((teacher - centre.view(1, -1, 1, 1)) / teacher_temperature).softmax(1)
    each = -(wanted * (student / student_temperature).log_softmax(1)).sum(1).mean((1, 2))
    (count,) = sum_over_ranks(common.sum().to(each.dtype))
    return (each * common).sum() * this_rank()[1] / count.clamp(min=1)


def slot_contrast(predicted: Tensor, rows: Tensor, keys: Tensor, seen: Tensor, temperature: float) -> Tensor:
    """InfoNCE of unit predictions [N, D] and the keys [M, D] of the same slots, whose places are `rows` int64 [N],
    against the keys of all processes that are `seen`, bool [M], times twice the temperature; the mean over rows."""
    rank, ranks = this_rank()
    every, sight = gather_over_ranks(keys, seen)
    logits = (predicted @ every.T / temperature).masked_fill(~sight, -1e9)
    total = F.cross_entropy(logits, rows + rank * len(keys), reduction="sum")
    (count,) = sum_over_ranks(predicted.new_tensor([float(len(rows))]))
    return total * (2 * temperature * ranks) / count.clamp(min=1).squeeze(0)
