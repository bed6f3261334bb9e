"""The box head of two-stage detectors, taking any `ClassificationLoss`.

    proposals -> sampled rows -> RoIAlign -> shared layers -> (class logits, box deltas) -> losses | detections

Labels are tailfin's: foreground 0..C-1, background C. The classifier's width, its loss, its scores and its first bias
come from the loss; nothing here knows which method it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.ops import MultiScaleRoIAlign, box_area, box_iou

from tailfin.losses.base import ClassificationLoss
from tailfin.models.detections import select_detections
from tailfin.models.detector import Limits, Targets, known_classes
from tailfin.models.features.base import ExtraRows, FeatureModule, Rows, Seen
from tailfin.models.precision import in_float32


class BoxPredictor(nn.Module):
    """Linear layers on shared features: [N, D] -> class logits [N, num_logits], box deltas [N, 4] or [N, 4 C].

    Both compute in float32, whatever autocast says.

    `classifier` takes the place of the linear layer for the logits; its `start(loss)`, where it has one, sets its first
    weights and refuses a loss that it does not go with.
    """

    cls_score: Any

    def __init__(
        self, channels: int, loss: ClassificationLoss, class_agnostic: bool, classifier: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, loss.num_logits) if classifier is None else classifier
        self.bbox_pred = nn.Linear(channels, 4 if class_agnostic else 4 * loss.num_classes)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.bbox_pred.bias)
        if classifier is None:
            nn.init.normal_(self.cls_score.weight, std=0.01)
            with torch.no_grad():
                self.cls_score.bias.copy_(loss.prior_bias())
        elif hasattr(classifier, "start"):
            self.cls_score.start(loss)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`labels` [N] are those of training rows; a classifier that follows them says so (`takes_labels`)."""
        if labels is not None and getattr(self.cls_score, "takes_labels", False):
            return in_float32(self.cls_score, features, labels), in_float32(self.bbox_pred, features)
        return in_float32(self.cls_score, features), in_float32(self.bbox_pred, features)


class Trained(NamedTuple):
    """What a training step makes of its sampled rows."""

    losses: dict[str, Tensor]
    logits: Tensor  # [N, num_logits] and
    deltas: Tensor  # [N, 4] or [N, 4 C] of the sampled rows, float32


class RoIHeads(nn.Module):
    """Second stage of Faster R-CNN.

    Args:
        pool: features of the levels and boxes to [N, channels, size, size].
        head: pooled features to the shared vector [N, D].
        predictor: shared vector [N, D] (and, in training, labels [N] or none) to (class logits, box deltas).
        loss: the classification loss; it is a submodule, so its buffers travel with the checkpoint.
        box_loss_beta: of smooth_l1, below which it is quadratic.
        box_stds: by which box deltas are divided.
        limits: what `forward` reports in evaluation.
    """

    predictor: Any  # features and, in training, labels to logits and deltas; its `cls_score` is what extra rows pass
    takes_extra_rows = True  # whether shared vectors that come from elsewhere can be classified like its own

    def __init__(
        self,
        pool: MultiScaleRoIAlign,
        head: nn.Module,
        predictor: nn.Module,
        loss: ClassificationLoss,
        *,
        fg_iou: float = 0.5,
        batch: int = 512,
        fg_fraction: float = 0.25,
        box_loss: str = "l1",
        box_loss_beta: float = 1 / 9,
        box_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        box_loss_weight: float = 1.0,
        limits: Limits = Limits(1e-4, 300, 0.5),
    ) -> None:
        super().__init__()
        self.pool = pool
        self.head = head
        self.predictor = predictor
        self.loss = loss
        self.matcher = Matcher(fg_iou, fg_iou, allow_low_quality_matches=False)
        self.sampler = BalancedPositiveNegativeSampler(batch, fg_fraction)
        self.box_stds = tuple(box_stds)
        across, down, width, height = (1 / std for std in self.box_stds)
        self.box_coder = BoxCoder((across, down, width, height))
        self.box_loss = box_loss
        self.box_loss_beta = box_loss_beta
        self.box_loss_weight = box_loss_weight
        self.limits = limits
        self.extra_rows: FeatureModule | None = None

    def parts(self) -> dict[str, nn.Module]:
        """What a stage may train or freeze here, by the names of a recipe's `second.trains`."""
        return {"classifier": self.predictor.cls_score, "box": self.predictor.bbox_pred, "head": self.head}

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections (evaluation) and losses (training); the other one is empty."""
        if self.training:
            if targets is None:
                raise ValueError("training needs targets")
            rows = self.sample(proposals, targets)
            return [], self.losses(features, rows, image_sizes, targets)
        logits, deltas = self.predict(features, proposals, image_sizes)
        return self.detect(self.loss.scores(logits), deltas, proposals, image_sizes, self.limits), {}

    def predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of all proposals, images one after another, in float32."""
        logits, deltas = self.predictor(self.head(self.pool(features, proposals, image_sizes)))
        return logits.float(), deltas.float()

    # ---- training --------------------------------------------------------------------------------------------------

    def losses(
        self,
        features: dict[str, Tensor],
        rows: Rows,
        image_sizes: list[tuple[int, int]],
        targets: Targets,
        shared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of the sampled rows and of what the feature module adds; `shared` [N, D] are the rows' features,
        where the caller has them already."""
        return self.train_rows(features, rows, image_sizes, targets, shared).losses

    def train_rows(
        self,
        features: dict[str, Tensor],
        rows: Rows,
        image_sizes: list[tuple[int, int]],
        targets: Targets,
        shared: Tensor | None = None,
    ) -> Trained:
        """`losses`, with the logits and deltas that they are made of."""
        if shared is None:
            shared = self.head(self.pool(features, rows.boxes, image_sizes))
        logits, deltas = (value.float() for value in self.predictor(shared, rows.labels))
        more, further = None, {}
        if self.extra_rows is not None:
            seen = Seen(
                rows,
                shared,
                targets,
                image_sizes,
                lambda boxes: self.pool(features, boxes, image_sizes),
                self.head,
                self.predictor.cls_score,
            )
            more = self.extra_rows.rows(seen)
            further = self.extra_rows.losses(seen, logits)
        return Trained({**self.losses_of(logits, deltas, rows, more), **further}, logits, deltas)

    def losses_of(self, logits: Tensor, deltas: Tensor, rows: Rows, more: ExtraRows | None = None) -> dict[str, Tensor]:
        """`loss_classifier` and `loss_box_reg` of the sampled rows' logits and deltas and the rows that join them."""
        boxes, labels, matched = torch.cat(rows.boxes), rows.labels, rows.matched
        if more is not None:
            labels = torch.cat([labels, more.labels])
            if more.boxes is None or more.gt_boxes is None:
                more_logits = in_float32(self.predictor.cls_score, more.features)
            else:
                more_logits, more_deltas = (value.float() for value in self.predictor(more.features))
                deltas = torch.cat([deltas, more_deltas])
                boxes, matched = torch.cat([boxes, more.boxes]), torch.cat([matched, more.gt_boxes])
            logits = torch.cat([logits, more_logits])
        box = self.box_regression_loss(deltas, [boxes], labels[: len(boxes)], matched)
        facts = self.facts(deltas, boxes, labels, matched, rows.gt_index, memory=more is not None and more.memory)
        if rows.known is not None:  # extra rows are of no picture
            facts["known"] = F.pad(rows.known, (0, 0, 0, len(labels) - len(rows.known)), value=True)
        return {"loss_classifier": self.loss(logits, labels, **facts), "loss_box_reg": box}

    def facts(
        self, deltas: Tensor, boxes: Tensor, labels: Tensor, matched: Tensor, gt_index: Tensor, *, memory: bool = False
    ) -> dict[str, Tensor]:
        """What the loss asks to know about its rows, [N] each: those of `gt_index`, then extra ones up to `labels`.

        Only the first rows may have boxes and matched ones; `memory` says whether the extra rows come from a memory.
        """
        wanted: dict[str, Tensor] = {}
        extra = len(labels) - len(gt_index)
        if "gt_index" in self.loss.row_facts:
            wanted["gt_index"] = F.pad(gt_index, (0, extra), value=-1)
        if "memory" in self.loss.row_facts:
            wanted["memory"] = torch.arange(len(labels), device=labels.device) >= len(labels) - extra * memory
        if "quality" in self.loss.row_facts:
            quality = self.quality(deltas, boxes, labels[: len(boxes)], matched)
            wanted["quality"] = F.pad(quality, (0, len(labels) - len(boxes)), value=1.0)
        return wanted

    @torch.no_grad()
    def quality(self, deltas: Tensor, boxes: Tensor, labels: Tensor, matched: Tensor) -> Tensor:
        """[N] IoU of each foreground row's predicted box (that of its class) with its object; 0 on background rows."""
        rows = torch.where(labels < self.loss.num_classes)[0]
        found = self.box_coder.decode_single(self._own_deltas(deltas, rows, labels), boxes[rows])
        wanted = matched[rows]
        sides = torch.minimum(found[:, 2:], wanted[:, 2:]) - torch.maximum(found[:, :2], wanted[:, :2])
        overlap = sides.clamp(min=0).prod(dim=1)
        union = box_area(found) + box_area(wanted) - overlap
        return boxes.new_zeros(len(labels)).index_put_((rows,), overlap / union.clamp(min=1e-9))

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], targets: Targets, draws: Sequence[Tensor] | None = None) -> Rows:
        """Ground truth joined to the proposals (behind them), matched by IoU and sampled.

        `draws` takes the place of the sampling: int64 indices per image into proposals and objects.
        """
        background = self.loss.num_classes
        boxes = [torch.cat((own, target["boxes"].to(own))) for own, target in zip(proposals, targets, strict=True)]
        matches, labels = [], []
        for own, target in zip(boxes, targets, strict=True):
            if len(target["boxes"]) == 0:
                matches.append(own.new_full((len(own),), -1, dtype=torch.int64))
                labels.append(own.new_full((len(own),), background, dtype=torch.int64))
                continue
            match = self.matcher(box_iou(target["boxes"].to(own), own))
            matches.append(match)
            labels.append(torch.where(match >= 0, target["labels"][match.clamp(min=0)], background))
        # torchvision's sampler reads >= 1 as foreground and 0 as background
        if draws is None:
            fg_masks, bg_masks = self.sampler([(label < background).long() for label in labels])
            draws = [torch.where(fg | bg)[0] for fg, bg in zip(fg_masks, bg_masks, strict=True)]
        matched, objects, before = [], [], 0
        for row, match, target in zip(draws, matches, targets, strict=True):
            truth, match = target["boxes"].to(boxes[0]), match[row]
            matched.append(truth[match.clamp(min=0)] if len(truth) else truth.new_zeros((len(row), 4)))
            objects.append(torch.where(match >= 0, match + before, -1))
            before += len(truth)
        return Rows(
            [own[row] for own, row in zip(boxes, draws, strict=True)],
            torch.cat([label[row] for label, row in zip(labels, draws, strict=True)]),
            torch.cat(matched),
            torch.cat(objects),
            torch.cat([row >= len(own) for row, own in zip(draws, proposals, strict=True)]),
            known_classes(targets, [len(row) for row in draws]).get("known"),
        )

    def box_regression_loss(self, deltas: Tensor, proposals: list[Tensor], labels: Tensor, matched: Tensor) -> Tensor:
        """L1 or smooth L1 on the deltas of the foreground rows (those of the row's class), divided by all rows."""
        rows = torch.where(labels < self.loss.num_classes)[0]
        boxes = torch.cat(proposals)
        wanted = self.box_coder.encode_single(matched[rows], boxes[rows])
        found = self._own_deltas(deltas, rows, labels)
        if self.box_loss == "smooth_l1":
            total = F.smooth_l1_loss(found, wanted, beta=self.box_loss_beta, reduction="sum")
        else:
            total = F.l1_loss(found, wanted, reduction="sum")
        return self.box_loss_weight * total / max(len(labels), 1)

    def _own_deltas(self, deltas: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """[n, 4] deltas of the rows' own classes."""
        deltas = deltas.view(len(deltas), -1, 4)
        return deltas[rows, labels[rows] if deltas.shape[1] > 1 else 0]

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def detect(
        self,
        scores: Tensor,
        deltas: Tensor,
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        limits: Limits,
    ) -> list[dict[str, Tensor]]:
        """Scores [N, C] and deltas of all proposals to detections per image: boxes [D, 4] (xyxy, pixels of the image
        given), scores [D] descending, labels [D]."""
        counts = [len(own) for own in proposals]
        return [
            select_detections(own, own_scores, own_deltas.view(len(own), -1, 4), self.box_coder, size, limits)
            for own, own_scores, own_deltas, size in zip(
                proposals, scores.split(counts), deltas.split(counts), image_sizes, strict=True
            )
        ]
