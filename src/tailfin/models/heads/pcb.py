"""PCB's iterative box head (He et al., CVPR'22): three passes through one shared head, each told the last one's output.

    x_0 = pooled features;  (z_k, d_k) = head(x_k);  x_{k+1} = x_k * spatial(d_k) + channel(z_k)

`channel` is an MLP from the class logits to one offset per channel, `spatial` one from the box deltas to one factor per
cell of the RoI; both are shared by the passes. Each pass has its classification loss (`iter_id` = k: the target gets
softer), weighted 0.2, 0.2, 0.6; the box loss is that of the last pass alone, and so are the outputs at test time::

    heads = IterativeRoIHeads(pool, head, predictor, losses.build("pcb", stats), roi_size=7, channels=256)

Any classification loss works; one with "iter_id" among its `row_facts` is told the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.losses.base import ClassificationLoss
from tailfin.models.features.base import Rows, Targets
from tailfin.models.heads.roi_heads import BoxPredictor, RoIHeads, Trained
from tailfin.models.heads.spec import HeadSpec
from tailfin.models.roi_align import Places, PyramidRoIAlign

STEP_WEIGHTS = (0.2, 0.2, 0.6)


class Refinement(nn.Module):
    """Features [N, channels, size, size], logits [N, L] and deltas [N, B] of a pass to the features of the next."""

    def __init__(self, num_logits: int, num_deltas: int, channels: int, size: int, hidden: int = 512) -> None:
        super().__init__()
        self.size = size
        self.channel = nn.Sequential(nn.Linear(num_logits, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.spatial = nn.Sequential(nn.Linear(num_deltas, hidden), nn.ReLU(), nn.Linear(hidden, size * size))

    def forward(self, features: Tensor, logits: Tensor, deltas: Tensor) -> Tensor:
        offset = self.channel(logits)[:, :, None, None]
        factor = self.spatial(deltas).view(-1, 1, self.size, self.size)
        return features * factor + offset


class IterativeRoIHeads(RoIHeads):
    """`RoIHeads` whose head runs `len(step_weights)` times.

    Args:
        pool, head, predictor, loss: as for `RoIHeads`.
        channels, roi_size: of the pooled features [N, channels, roi_size, roi_size].
        step_weights: weight of each pass's classification loss; with the loss "pcb" as many as its `n_iter`.
        options: those of `RoIHeads`.
    """

    takes_extra_rows = False

    def __init__(
        self,
        pool: PyramidRoIAlign,
        head: nn.Module,
        predictor: BoxPredictor,
        loss: ClassificationLoss,
        *,
        channels: int,
        roi_size: int,
        step_weights: Sequence[float] = STEP_WEIGHTS,
        **options: Any,
    ) -> None:
        super().__init__(pool, head, predictor, loss, **options)
        steps = getattr(loss, "n_iter", len(step_weights))
        if len(step_weights) != steps or steps < 1:
            raise ValueError(f"step_weights has {len(step_weights)} entries, the loss expects {steps} passes")
        self.step_weights = tuple(step_weights)
        self.refinement = Refinement(loss.num_logits, predictor.bbox_pred.out_features, channels, roi_size)

    def parts(self) -> dict[str, nn.Module]:
        """The refinement belongs to the shared layers."""
        return {**super().parts(), "head": nn.ModuleList([self.head, self.refinement])}

    def train_rows(
        self,
        features: dict[str, Tensor],
        rows: Rows,
        image_sizes: list[tuple[int, int]],
        targets: Targets,
        shared: Tensor | None = None,
    ) -> Trained:
        """Losses of all passes on the sampled rows; logits and deltas are the last pass's."""
        if self.extra_rows is not None:
            raise ValueError("the iterative head takes no extra rows: they have no pooled features to refine")
        passes = self.passes(features, rows.boxes, image_sizes, rows.places)
        deltas = passes[-1][1]
        facts: dict[str, Any] = self.facts(deltas, torch.cat(rows.boxes), rows.labels, rows.matched, rows)
        if rows.known is not None:
            facts["known"] = rows.known
        classifier = passes[0][0].new_zeros(())
        for step, (weight, (logits, _)) in enumerate(zip(self.step_weights, passes, strict=True)):
            if "iter_id" in self.loss.row_facts:
                facts["iter_id"] = step
            classifier = classifier + weight * self.loss(logits, rows.labels, every_row=True, **facts)
        box = self.box_regression_loss(deltas, rows.boxes, rows.labels, rows.matched)
        return Trained({"loss_classifier": classifier, "loss_box_reg": box}, passes[-1][0], deltas)

    def predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of the last pass."""
        return self.passes(features, proposals, image_sizes)[-1]

    def passes(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        places: Places | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """(logits, deltas) of every pass, float32."""
        pooled = self.pool(features, proposals, image_sizes, places)
        results: list[tuple[Tensor, Tensor]] = []
        for _ in self.step_weights:
            if results:
                pooled = self.refinement(pooled, *results[-1])
            logits, deltas = self.predictor(self.head(pooled))
            results.append((logits.float(), deltas.float()))
        return results


def box_head(spec: HeadSpec) -> RoIHeads:
    """The box head of a recipe."""
    shared, predictor = spec.shared(), spec.predictor()
    options = {**spec.options, **spec.keywords, "channels": spec.channels, "roi_size": spec.config.roi_size}
    return IterativeRoIHeads(spec.pool, shared, predictor, spec.loss, **options)
