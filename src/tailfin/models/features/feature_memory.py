"""Feature memory of LOCE (Feng et al., ICCV'21): stored RoI features of every class, drawn against its mean score.

Each class has a ring of its newest `size` features, filled with the boxes that `models/features/box_generator.py` makes
around the ground truth; a training step draws classes with probability 1 / (mean score + 1e-7) and takes some stored
features of each. Their rows train classification and box regression like sampled proposals, with weight 1::

    memory.push(features, labels, boxes, gt_boxes)
    drawn = memory.sample(loss.mean_score[:-1])
    value = loss(logits, labels, gt_index=gt_index, memory=from_memory)

The rings are buffers, so a resume point has them, and the same on every process: each stores the rows of all, in the
order of the processes, which is what one process stores of the joined batch. Pooled features [256, 7, 7] of LVIS need
4.8 GB in float32, 2.4 GB in half precision. Where the layers behind the pooling are frozen, their output [1024] can be
stored in its place: the rows that come out are the same, and the rings a twelfth of the size, 0.4 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tailfin.collectives import gather_over_ranks
from tailfin.data.dataset import TrainingDataset, training_loader
from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss, counts_of
from tailfin.losses.ebl import EBL
from tailfin.models.features.base import ExtraRows, FeatureModule, Seen, StageFacts, Targets
from tailfin.models.features.box_generator import COPIES, shifted_boxes
from tailfin.models.features.hallucination import inverse_cdf
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.features import FeatureMemory as FeatureMemoryConfig
from tailfin.stats import ClassStats


class StoredRows(NamedTuple):
    """Rows drawn from the memory: features [R, ...], labels int64 [R], boxes and gt_boxes [R, 4] (xyxy, pixels)."""

    features: Tensor
    labels: Tensor
    boxes: Tensor
    gt_boxes: Tensor


class FeatureMemory(nn.Module):
    """A ring of features per class.

    Args:
        num_classes: C foreground classes.
        feature_shape: of one RoI feature, for instance (256, 7, 7).
        size: features kept per class.
        sampled_num_classes: classes drawn per call; one can be drawn several times.
        sampled_num_features: stored features taken per drawn class, with replacement.
        dtype: of the stored features.
        keep_on_cpu: leave the features in main memory whatever device the model moves to.
    """

    stage_memory = True  # of the stage that trains with it: no part of a model file
    features: Tensor
    boxes: Tensor
    gt_boxes: Tensor
    written: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int] = (256, 7, 7),
        *,
        size: int = 80,
        sampled_num_classes: int = 8,
        sampled_num_features: int = 4,
        dtype: torch.dtype = torch.float32,
        keep_on_cpu: bool = False,
    ) -> None:
        super().__init__()
        if min(size, sampled_num_classes, sampled_num_features) < 1:
            raise ValueError("size, sampled_num_classes and sampled_num_features must be at least 1")
        self.size = size
        self.sampled_num_classes = sampled_num_classes
        self.sampled_num_features = sampled_num_features
        self.keep_on_cpu = keep_on_cpu
        self.register_buffer("features", torch.zeros((num_classes, size, *feature_shape), dtype=dtype))
        self.register_buffer("boxes", torch.zeros(num_classes, size, 4))
        self.register_buffer("gt_boxes", torch.zeros(num_classes, size, 4))
        self.register_buffer("written", torch.zeros(num_classes, dtype=torch.int64))  # rows ever pushed

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor) -> None:
        """Store the rows of all processes, the newest of a class in place of its oldest; only in train mode.

        features [n, ...], labels int64 [n] (rows of no foreground class are left out), boxes and gt_boxes [n, 4]. Call
        it on every process, also without rows.
        """
        if not self.training:
            return
        features, labels, boxes, gt_boxes = gather_over_ranks(
            features.to(self.features.dtype), labels, boxes.to(self.boxes.dtype), gt_boxes.to(self.boxes.dtype)
        )
        classes = len(self.written)
        labels = torch.where((labels >= 0) & (labels < classes), labels, classes)  # the last ring is not there
        row, slot = ring_slots(labels, self.written, self.size)
        label = labels[row]
        self.boxes[label, slot] = boxes[row].to(self.boxes)
        self.gt_boxes[label, slot] = gt_boxes[row].to(self.gt_boxes)
        at = (label.to(self.features.device), slot.to(self.features.device))
        self.features[at] = features[row].to(self.features)
        self.written += counts_of(labels, classes + 1, torch.int64)[:-1]

    @torch.no_grad()
    def sample(
        self,
        mean_score: Tensor,
        classes: int | None = None,
        *,
        generator: torch.Generator | None = None,
        draws: tuple[Tensor, Tensor] | None = None,
    ) -> StoredRows:
        """Stored rows of the classes drawn against `mean_score` [C] >= 0; classes without any give none. `classes`
        takes the place of `sampled_num_classes`.

        `draws` takes the place of random numbers: uniforms [sampled_num_classes] for the classes and
        [sampled_num_classes, sampled_num_features] for the rows of each.
        """
        device = self.written.device
        if draws is None:
            shape = (self.sampled_num_classes if classes is None else classes, self.sampled_num_features)
            uniform = torch.rand(shape[0], generator=generator, device=device).sort().values
            draws = uniform, torch.rand(shape, generator=generator, device=device)
        chosen = inverse_cdf(1 / (mean_score + 1e-7), draws[0]).to(device)
        held = self.written[chosen].clamp(max=self.size)
        # a float32 uniform times a count can round up to the count
        slot = torch.minimum((draws[1].to(device) * held[:, None]).long(), (held - 1).clamp(min=0)[:, None])
        filled = torch.where(held > 0)[0]
        slot = slot[filled].flatten()
        labels = chosen[filled, None].expand(-1, draws[1].shape[1]).flatten()
        at = (labels.to(self.features.device), slot.to(self.features.device))
        return StoredRows(self.features[at].to(device), labels, self.boxes[labels, slot], self.gt_boxes[labels, slot])

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureMemory:
        features = self._buffers.pop("features") if self.keep_on_cpu else None
        super()._apply(fn, recurse)
        if features is not None:
            self._buffers["features"] = features
        return self


class RememberedRows(FeatureModule):
    """LOCE's memory-augmented feature sampling.

    Every iteration: store the features of 16 shifted boxes around each object, draw classes against the loss's mean
    score, and train classifier and boxes with stored rows of them. `pooled`: features are stored before the shared
    layers, which the drawn ones then pass anew. `prefill`: before a second stage the memory is filled, class by class,
    with features of the frozen detector. `per` as for `FeatureModule.share`.
    """

    def __init__(
        self,
        memory: FeatureMemory,
        loss: ClassificationLoss,
        *,
        pooled: bool = False,
        prefill: bool = False,
        per: str = "batch",
    ) -> None:
        super().__init__()
        if not isinstance(loss, EBL):
            raise UserError("feature_memory draws classes by the mean score of ebl: set loss=ebl")
        self.memory = memory
        self.pooled = pooled
        self.prefill = prefill
        self.per = per
        self._loss = (loss,)

    def rows(self, seen: Seen) -> ExtraRows:
        self.remember(seen.pool, seen.head, seen.targets, seen.image_sizes)
        classes = self.share(self.memory.sampled_num_classes, len(seen.targets), self.per)
        drawn = self.memory.sample(self._loss[0].mean_score[:-1], classes)
        features = drawn.features.to(seen.shared.dtype)
        return ExtraRows(
            seen.head(features) if self.pooled else features, drawn.labels, drawn.boxes, drawn.gt_boxes, memory=True
        )

    def check(self, model: Any) -> None:
        """Refuse shared layers that train behind what is stored."""
        if not self.pooled and any(value.requires_grad for value in model.roi_heads.head.parameters()):
            raise UserError(
                "feature_memory.stores: the shared layers train in this stage, so what is stored behind them grows "
                "stale; set it to pooled"
            )

    def around(self, model: Any, stage: StageFacts) -> dict[str, Any]:
        """Fill the memory before a second stage."""
        if self.prefill and stage.later:
            self.fill(model, stage)
        return {}

    @torch.no_grad()
    def fill(self, model: Any, stage: StageFacts) -> None:
        """Store features of the detector as it is, until each class has had enough objects to fill its ring."""
        stage.say("filling the feature memory")
        accelerator = stage.accelerator
        model.to(accelerator.device).eval()
        self.memory.train()
        dataset = TrainingDataset(stage.source, stage.recipe.data, stage.recipe.seed)
        plan = stage.plan(dataset)
        draws = int((stage.stats.image_count > 0).sum()) * -(-self.memory.size // COPIES)
        sampler = plan.sampler.model_copy(update={"name": "class_aware"})
        plan = replace(plan, sampler=sampler, epochs=draws / len(plan.rows))
        batches = training_loader(
            dataset,
            plan,
            start=0,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            accumulation=1,
        )
        for iteration, (images, targets) in enumerate(batches):
            stage.seed(iteration)
            own = [{key: target[key].to(accelerator.device) for key in ("boxes", "labels")} for target in targets]
            with accelerator.autocast():
                self.see(model, [image.to(accelerator.device) for image in images], own)
        model.train()

    def see(self, model: Any, images: list[Tensor], targets: Targets) -> None:
        """Store what the detector `model` makes of pictures with objects."""
        pool, sizes = model.pooler(images)
        self.remember(pool, model.roi_heads.head, targets, sizes)

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


def build(
    config: FeatureMemoryConfig, detector: FasterRCNNConfig, stats: ClassStats, loss: ClassificationLoss
) -> FeatureModule:
    """The module of a recipe."""
    pooled = config.stores == "pooled"
    shape = (detector.fpn_channels, detector.roi_size, detector.roi_size) if pooled else (detector.head_channels,)
    options = config.model_dump(exclude={"name", "stores", "prefill", "per"})
    memory = FeatureMemory(stats.num_classes, shape, **{**options, "dtype": getattr(torch, config.dtype)})
    return RememberedRows(memory, loss, pooled=pooled, prefill=config.prefill, per=config.per)


def ring_slots(index: Tensor, written: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where rows go in rings of `size` places, in their order: (rows to store [k], place of each [k]).

    `index` int64 [n] names each row's ring, `written` [rings] counts the rows that each has ever got; rows of ring
    number [rings] are not stored. Of rows that would overwrite each other only the newest are stored. One read back.
    """
    count = counts_of(index, len(written) + 1, torch.int64)
    order = torch.argsort(index, stable=True)
    nth = torch.empty_like(index)  # of its ring, among the new rows
    nth[order] = torch.arange(len(index), device=index.device) - (count.cumsum(0) - count)[index[order]]
    kept = torch.where((nth >= count[index] - size) & (index < len(written)))[0]
    return kept, (written[index[kept]] + nth[kept]) % size
