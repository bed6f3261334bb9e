"""Feature modules of a box head: what joins the sampled rows of `RoIHeads`, by the recipe's key.

    hallucination     BACL: rows made up from class statistics            models/features/hallucination.py
    feature_memory    LOCE: stored rows of classes that score low         models/features/feature_memory.py
    fasa              FASA: a loss on made-up features, adapted by epoch  models/features/fasa.py
    rio               RIO: stored rows of the rare classes in the batch   models/features/rio.py
    meta_reweighting  BALMS: class weights learnt on a balanced stream    models/features/meta_reweighting.py

A detector has at most one. It is there while training; detections come from the box head alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.ebl import EBL
from tailfin.losses.fcbl import FCBL
from tailfin.models.features.box_generator import COPIES, perturbed_boxes
from tailfin.models.features.fasa import FASA
from tailfin.models.features.feature_memory import FeatureMemory
from tailfin.models.features.hallucination import FeatureHallucination
from tailfin.models.features.meta_reweighting import MetaReweighter
from tailfin.models.features.rio import FeatureBank
from tailfin.models.heads.roi_heads import ExtraRows, FeatureModule, Seen, Targets
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats


def build_feature_module(recipe: Recipe, stats: ClassStats, loss: ClassificationLoss) -> FeatureModule | None:
    """The recipe's feature module, or none; the schema has seen to it that there is at most one."""
    detector = recipe.detector
    assert isinstance(detector, FasterRCNNConfig)
    classes, channels = stats.num_classes, detector.head_channels
    if recipe.hallucination is not None:
        options = recipe.hallucination.model_dump()
        independent = options.pop("independent_boxes")
        made_up = FeatureHallucination(classes, channels, **options)
        return HallucinatedRows(made_up, loss, independent_boxes=independent)
    if recipe.feature_memory is not None:
        options = recipe.feature_memory.model_dump(exclude={"prefill"})
        pooled = options.pop("stores") == "pooled"
        shape = (detector.fpn_channels, detector.roi_size, detector.roi_size) if pooled else (channels,)
        memory = FeatureMemory(classes, shape, **{**options, "dtype": getattr(torch, options["dtype"])})
        return RememberedRows(memory, loss, pooled=pooled)
    if recipe.fasa is not None:
        options = recipe.fasa.model_dump()
        start = options.pop("start_epoch")
        return AugmentedFeatures(FASA(stats.instance_count, channels, **options), start)
    if recipe.rio is not None:
        images = torch.from_numpy(stats.image_count)
        rare = torch.where((images > 0) & (images <= recipe.rio.max_images))[0]
        return RecalledRows(FeatureBank(rare, channels, size=recipe.rio.size, cache=recipe.rio.cache))
    if recipe.meta_reweighting is not None:
        return LearntWeights(loss, recipe.meta_reweighting.inner_lr)
    return None


class HallucinatedRows(FeatureModule):
    """BACL's feature hallucination (III-E).

    Every iteration: collect the features of 16 shifted boxes around each object, move the class statistics, and draw
    made-up features of classes that the loss's long-term indicator finds weak.
    """

    def __init__(
        self, hallucination: FeatureHallucination, loss: ClassificationLoss, *, independent_boxes: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(loss, FCBL):
            raise UserError("hallucination draws classes by the indicator of fcbl: set loss=fcbl")
        self.hallucination = hallucination
        self.independent_boxes = independent_boxes
        self._loss = (loss,)  # in a tuple: the box head owns it, its state is not stored twice

    @torch.no_grad()
    def rows(self, seen: Seen) -> ExtraRows:
        boxes, labels, _ = shifted_boxes(seen.targets, seen.image_sizes, independent=self.independent_boxes)
        self.hallucination.update(seen.head(seen.pool(boxes)).float(), labels)
        return ExtraRows(*self.hallucination.sample(self._loss[0].indicator_diagonal()))


class RememberedRows(FeatureModule):
    """LOCE's memory-augmented feature sampling.

    Every iteration: store the features of 16 shifted boxes around each object, draw classes against the loss's mean
    score, and train classifier and boxes with stored rows of them. `pooled`: features are stored before the shared
    layers, which the drawn ones then pass anew.
    """

    def __init__(self, memory: FeatureMemory, loss: ClassificationLoss, *, pooled: bool = False) -> None:
        super().__init__()
        if not isinstance(loss, EBL):
            raise UserError("feature_memory draws classes by the mean score of ebl: set loss=ebl")
        self.memory = memory
        self.pooled = pooled
        self._loss = (loss,)

    def rows(self, seen: Seen) -> ExtraRows:
        self.remember(seen.pool, seen.head, seen.targets, seen.image_sizes)
        drawn = self.memory.sample(self._loss[0].mean_score[:-1])
        features = drawn.features.to(seen.shared.dtype)
        return ExtraRows(
            seen.head(features) if self.pooled else features, drawn.labels, drawn.boxes, drawn.gt_boxes, memory=True
        )

    @torch.no_grad()
    def remember(
        self,
        pool: Callable[[list[Tensor]], Tensor],
        head: nn.Module,
        targets: Targets,
        image_sizes: list[tuple[int, int]],
    ) -> None:
        """Store the features of the shifted boxes around the objects of `targets`."""
        boxes, labels, objects = shifted_boxes(targets, image_sizes)
        features = pool(boxes)
        self.memory.push(features if self.pooled else head(features), labels, torch.cat(boxes), objects)


class AugmentedFeatures(FeatureModule):
    """FASA: the statistics of the sampled foreground rows give made-up features, whose loss is a term of its own.

    The probabilities adapt at the end of each epoch, to the losses of the epoch's own rows (the released code measures
    them on the validation set). From epoch `start` on there are made-up features.
    """

    epoch: Tensor

    def __init__(self, fasa: FASA, start: int = 1) -> None:
        super().__init__()
        self.fasa = fasa
        self.start = start
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))  # the one that runs

    def at_epoch(self, epoch: float) -> None:
        """Close the epoch before where a new one begins."""
        if math.floor(epoch) > int(self.epoch):
            self.fasa.adapt()
            self.epoch.fill_(math.floor(epoch))

    def losses(self, seen: Seen, logits: Tensor) -> dict[str, Tensor]:
        labels = seen.rows.labels
        self.fasa.update(seen.shared.detach().float(), labels)
        self.fasa.observe(F.cross_entropy(logits.detach(), labels, reduction="none"), labels)
        if int(self.epoch) < self.start:
            return {}
        features, labels = self.fasa.sample()
        logits = seen.classifier(features.to(seen.shared.dtype)).float()
        return {"loss_augmented": self.fasa.augmentation_loss(logits, labels)}


class RecalledRows(FeatureModule):
    """RIO: the newest stored rows of the rare classes in the batch join it, then the batch's own are stored."""

    def __init__(self, bank: FeatureBank) -> None:
        super().__init__()
        self.bank = bank

    def rows(self, seen: Seen) -> ExtraRows:
        rows = seen.rows
        stored = self.bank.recall(rows.labels)
        self.bank.push(seen.shared.detach(), rows.labels, torch.cat(rows.boxes), rows.matched)
        return ExtraRows(stored.features.to(seen.shared.dtype), stored.labels, stored.boxes, stored.gt_boxes)


class LearntWeights(FeatureModule):
    """BALMS's meta reweighter: before the loss, one step of its class weights.

    The first target carries the balanced rows, `balanced_features` [M, D] and `balanced_labels` [M]: see
    `tailfin.methods.feature_stage`, which also sets `rate`, from a point in epochs to the stage's learning rate there.
    Without balanced rows the weights stay.
    """

    rate: Callable[[float], float]

    def __init__(self, loss: ClassificationLoss, inner_lr: float | None = None) -> None:
        super().__init__()
        assert isinstance(loss, MetaReweighter)
        self.inner_lr = inner_lr
        self.epoch = 0.0
        self._loss = (loss,)

    def at_epoch(self, epoch: float) -> None:
        self.epoch = epoch

    def rows(self, seen: Seen) -> None:
        if "balanced_features" in (target := seen.targets[0]):
            rate = self.inner_lr if self.inner_lr is not None else self.rate(self.epoch)
            balanced = target["balanced_features"], target["balanced_labels"]
            self._loss[0].learn(seen.classifier, seen.shared, seen.rows.labels, *balanced, inner_lr=rate)


def shifted_boxes(
    targets: Targets, image_sizes: list[tuple[int, int]], **options: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """16 shifted copies of every object: boxes per image [16 m, 4], labels [N] and the objects' own boxes [N, 4]."""
    boxes = [
        perturbed_boxes(target["boxes"], size, **options) for target, size in zip(targets, image_sizes, strict=True)
    ]
    labels = torch.cat([target["labels"] for target in targets]).repeat_interleave(COPIES)
    return boxes, labels, torch.cat([target["boxes"] for target in targets]).repeat_interleave(COPIES, dim=0)
