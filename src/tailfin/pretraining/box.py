"""Contrast of boxes: 2DRCL's local contrast (LCL, 3.1.2), SoCo, and AlignDet's assigned boxes.

h = shared vector of a proposal: pyramid -> RoIAlign -> shared layers of the box head; a one-stage detector has none and
           gets two for the time of the pre-training (2DRCL, table A.2)
LCL        InfoNCE of a proposal's embedding and its key in the other view against a queue of boxes     (eq. 2)
SoCo       2 - 2 cos, on every pyramid level
AlignDet   foreground rows that the RoI head assigns to a proposal, against the rows of the other proposals
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tailfin.collectives import sum_over_ranks, this_rank
from tailfin.models.roi_align import Places, PyramidRoIAlign
from tailfin.models.row_sampling import chosen_rows
from tailfin.pretraining.contrast import ContrastHead, box_nt_xent
from tailfin.pretraining.detection import as_objects
from tailfin.pretraining.term import Contrastive, Iteration


class LocalContrast(Contrastive):
    """`loss_lcl` of proposals paired over the views.

    Args:
        weight, head: of the term.
        pool: the detector's RoI pooling, or one for its pyramid.
        levels: "assigned", a box from the pyramid level of its size, or "all", one row per level.
        alone: whether no other term trains the pyramid.
        trunk: shared layers of this term's own, for a detector without a box head; dropped afterwards.
    """

    reaches: tuple[str, ...] = ("backbone", "fpn", "head")
    averages: tuple[str, ...] = ("backbone", "fpn", "head")
    loss_name = "loss_lcl"
    prefix = "box_"

    def __init__(
        self,
        weight: float,
        head: ContrastHead,
        pool: PyramidRoIAlign,
        *,
        levels: str = "assigned",
        alone: bool = False,
        trunk: nn.Module | None = None,
    ) -> None:
        super().__init__(weight, head)
        self.pool, self.alone, self.trunk = pool, alone, trunk
        if trunk is not None:
            self.reaches = self.averages = ("backbone", "fpn")
        each = [] if levels == "assigned" else list(zip(pool.featmap_names, pool.scales, strict=True))
        self.level_pools = nn.ModuleList(pool.like([name], [round(1 / scale)]) for name, scale in each)

    def followed(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        own = {} if self.trunk is None else {"trunk": self.trunk}
        return {**super().followed(parts), **own}

    def vectors(self, seen: Iteration, number: int, *, keys: bool = False) -> Tensor:
        """The shared vector of every proposal, images one after another; for `levels: all` once per level."""
        view = seen.view(number)
        levels = (seen.keys(number) if keys else seen.features(number)).pyramid
        if keys:
            shared = seen.average["head" if self.trunk is None else "trunk"]
        else:
            shared = seen.box_head.head if self.trunk is None else self.trunk
        pools = self.level_pools or [self.pool]
        return shared(torch.cat([pool(levels, view.boxes, view.batch.image_sizes) for pool in pools]))

    def labels(self, seen: Iteration) -> Tensor:
        """The class of the object that each proposal lies on."""
        return torch.cat([target["proposal_labels"] for target in seen.targets] * max(len(self.level_pools), 1))

    def rows(self, queries: Tensor) -> float:
        """What this process divides its sum over boxes by, so that the mean of the processes is that over all boxes."""
        (total,) = sum_over_ranks(torch.tensor([float(len(queries))], device=queries.device))
        return float(total) / this_rank()[1]

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        losses = super().forward(seen)
        if self.alone:  # a level without a box would leave its weights without gradients
            levels = seen.features(0).pyramid.values()
            losses[self.loss_name] = losses[self.loss_name] + sum(level[:1, :1, :1, :1].sum() * 0 for level in levels)
        return losses


class AssignedBoxContrast(LocalContrast):
    """`loss_lcl` of AlignDet: rows that class-agnostic detection found in view 1 and the momentum network in view 2."""

    averages = ("backbone", "fpn", "head", "rpn")

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        if seen.assigned is None:
            raise ValueError("assigned boxes are the rows of class-agnostic detection, which must come before")
        shared, ids = seen.assigned
        keys, key_ids = self._found(seen)
        value = box_nt_xent(self.head.queries(shared), ids, keys, key_ids, self.head.config.temperature)
        return {self.loss_name: self.weight * value}

    @torch.no_grad()
    def _found(self, seen: Iteration) -> tuple[Tensor, Tensor]:
        """Keys [M, dim] of the momentum network's foreground rows in view 2, and the proposal of each."""
        view, features, heads = seen.view(1), seen.keys(1), seen.box_head
        rpn = seen.average["rpn"].eval()  # as many proposals as in evaluation
        _, proposals = rpn(view.batch, features.pyramid)
        rows = heads.sample(proposals, as_objects(view))
        every, count = torch.cat(rows.boxes), len(rows.boxes)
        levels = heads.pool.levels(every)
        chosen = chosen_rows(rows.gt_index >= 0, rows.places.picture, count, levels, len(heads.pool.featmap_names))
        places = Places(rows.places.picture[chosen.rows], chosen.per_level)
        boxes = list(every[chosen.rows].split(chosen.per_picture))
        vectors = seen.average["head"](heads.pool(features.pyramid, boxes, view.batch.image_sizes, places))
        return self.head.keys(vectors, seen.average[self.head.average]), rows.gt_index[chosen.rows]
