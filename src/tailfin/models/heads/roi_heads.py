"""The box head of two-stage detectors, taking any `ClassificationLoss`.

    proposals -> sampled rows -> RoIAlign -> shared layers -> (class logits, box deltas) -> losses | detections

Labels are tailfin's: foreground 0..C-1, background C. The classifier's width, its loss, its scores and its first bias
come from the loss; nothing here knows which method it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder

from tailfin.losses.base import ClassificationLoss
from tailfin.models.assigners import BACKGROUND, max_iou_batch, pad_targets, paired_iou
from tailfin.models.box_deltas import encode_deltas
from tailfin.models.detections import select_detections
from tailfin.models.detector import Limits, Targets, known_classes
from tailfin.models.features.base import ExtraRows, FeatureModule, Rows, Seen
from tailfin.models.heads.shared_layers import product
from tailfin.models.precision import in_float32
from tailfin.models.roi_align import Places, PyramidRoIAlign
from tailfin.models.row_sampling import Proposals, chosen_rows, padded, sample_rows


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
        deltas = in_float32(partial(product, self.bbox_pred), features)
        if labels is not None and getattr(self.cls_score, "takes_labels", False):
            return in_float32(self.cls_score, features, labels), deltas
        classify = partial(product, self.cls_score) if type(self.cls_score) is nn.Linear else self.cls_score
        return in_float32(classify, features), deltas


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
        pool: PyramidRoIAlign,
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
        self.fg_iou, self.batch, self.fg_fraction = fg_iou, batch, fg_fraction
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
        """Detections (evaluation) and losses (training) of boxes per image; the other one is empty."""
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
            shared = self.head(self.pool(features, rows.boxes, image_sizes, rows.places))
        logits, deltas = (value.float() for value in self.predictor(shared, rows.labels))
        more, further = None, {}
        if self.extra_rows is not None:
            seen = Seen(
                rows,
                shared,
                targets,
                image_sizes,
                lambda boxes, places=None: self.pool(features, boxes, image_sizes, places),
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
        facts = self.facts(deltas, boxes, labels, matched, rows, memory=more is not None and more.memory)
        if rows.known is not None:  # extra rows are of no picture
            facts["known"] = F.pad(rows.known, (0, 0, 0, len(labels) - len(rows.known)), value=True)
        return {"loss_classifier": self.loss(logits, labels, every_row=True, **facts), "loss_box_reg": box}

    def facts(
        self, deltas: Tensor, boxes: Tensor, labels: Tensor, matched: Tensor, rows: Rows, *, memory: bool = False
    ) -> dict[str, Any]:
        """What the loss asks to know about its rows, [N] each: the sampled `rows`, then extra ones up to `labels`.

        Only the first rows may have boxes and matched ones; `memory` says whether the extra rows come from a memory.
        """
        wanted: dict[str, Any] = {}
        extra = len(labels) - len(rows.labels)
        if "gt_index" in self.loss.row_facts:
            wanted["gt_index"] = F.pad(rows.gt_index, (0, extra), value=-1)
        if "picture" in self.loss.row_facts:
            wanted["picture"] = F.pad(rows.places.picture, (0, extra), value=len(rows.boxes))
        if "pictures" in self.loss.row_facts:
            wanted["pictures"] = len(rows.boxes) + (extra > 0)
        if "memory" in self.loss.row_facts:
            wanted["memory"] = torch.arange(len(labels), device=labels.device) >= len(labels) - extra * memory
        if "quality" in self.loss.row_facts:
            quality = self.quality(deltas, boxes, labels[: len(boxes)], matched)
            wanted["quality"] = F.pad(quality, (0, len(labels) - len(boxes)), value=1.0)
        return wanted

    @torch.no_grad()
    def quality(self, deltas: Tensor, boxes: Tensor, labels: Tensor, matched: Tensor) -> Tensor:
        """[N] IoU of each foreground row's predicted box (that of its class) with its object; 0 on background rows."""
        found = self.box_coder.decode_single(self._own_deltas(deltas, labels), boxes).view(-1, 4)
        return torch.where(labels < self.loss.num_classes, paired_iou(found, matched), 0.0)

    @torch.no_grad()
    def sample(
        self, proposals: Proposals | list[Tensor], targets: Targets, draws: Sequence[Tensor] | None = None
    ) -> Rows:
        """Ground truth joined to the proposals (behind them), matched by IoU and sampled.

        The host is told the numbers of rows per picture and level, which is one read back for the batch.

        `draws` takes the place of the sampling: int64 indices per image into proposals (a list of them) and objects.
        """
        counts = [len(target["boxes"]) for target in targets]
        if isinstance(proposals, list):
            lengths, proposals = [len(own) for own in proposals], padded(proposals)
        given = proposals.boxes
        batch, places = given.shape[:2]
        truth, classes, real = pad_targets(targets, given.device, given.dtype)
        boxes, there = torch.cat([given, truth], dim=1), torch.cat([proposals.valid, real], dim=1)
        assigned = max_iou_batch(boxes, truth, real, self.fg_iou, self.fg_iou, low_quality=False, counts=counts)
        if draws is None:
            positive, negative = (assigned >= 0) & there, (assigned == BACKGROUND) & there
            index, drawn = sample_rows(positive, negative, self.batch, self.fg_fraction)
        else:
            moved = [
                torch.where(own < length, own, own - length + places)
                for own, length in zip(draws, lengths, strict=True)
            ]
            most = max(len(own) for own in moved)
            index = torch.stack([F.pad(own, (0, most - len(own)), value=-1) for own in moved])
            index, drawn = index.clamp(min=0), index >= 0
        own_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        picture = torch.arange(batch, device=given.device)[:, None].expand_as(index)
        levels = len(self.pool.featmap_names)
        chosen = chosen_rows(drawn, picture, batch, self.pool.levels(own_boxes), levels)
        picture = picture.flatten()[chosen.rows]
        index = index.flatten()[chosen.rows]
        owner = assigned[picture, index]
        positive = owner >= 0
        object_of = owner.clamp(min=0)
        before = [sum(counts[:number]) for number in range(batch)]
        first = torch.tensor(before).to(given.device, non_blocking=True)
        return Rows(
            list(own_boxes.flatten(0, 1)[chosen.rows].split(chosen.per_picture)),
            torch.where(positive, classes[picture, object_of], self.loss.num_classes),
            truth[picture, object_of],
            torch.where(positive, owner + first[picture], -1),
            index >= places,
            Places(picture, chosen.per_level),
            known_classes(targets, chosen.per_picture).get("known"),
        )

    def box_regression_loss(self, deltas: Tensor, proposals: list[Tensor], labels: Tensor, matched: Tensor) -> Tensor:
        """L1 or smooth L1 on the deltas of the foreground rows (those of the row's class), divided by all rows."""
        foreground = ((labels >= 0) & (labels < self.loss.num_classes))[:, None]
        boxes = torch.cat(proposals)
        found = self._own_deltas(deltas, labels)
        wanted = torch.where(foreground, encode_deltas(boxes, matched, self.box_stds), 0.0)
        if self.box_loss == "smooth_l1":
            distance = F.smooth_l1_loss(found, wanted, beta=self.box_loss_beta, reduction="none")
        else:
            distance = F.l1_loss(found, wanted, reduction="none")
        total = torch.where(foreground, distance, 0.0).sum()
        return self.box_loss_weight * total / max(len(labels), 1)

    def _own_deltas(self, deltas: Tensor, labels: Tensor) -> Tensor:
        """[N, 4] deltas of the rows' own classes; of any class on background rows."""
        deltas = deltas.view(len(deltas), -1, 4)
        if deltas.shape[1] == 1:
            return deltas[:, 0]
        own = labels.clamp(0, deltas.shape[1] - 1)
        return deltas.gather(1, own[:, None, None].expand(-1, 1, 4))[:, 0]

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
