"""Feature bank of RIO (Chang et al., ICML'21): earlier RoI features of the rare classes join the batch.

Each target class has a first-in first-out bank of its newest features, detached, with their boxes. When a target class
shows up in a batch, its newest stored rows are appended to those of the box head, for classification and box regression
alike, and only then is the bank updated with the batch's own. Meant for use with repeat factor sampling::

    stored = bank.recall(labels)                   # of the classes in `labels`
    bank.push(features, labels, boxes, gt_boxes)   # rows of no target class are left out
    rows, row_labels = bank(features, labels)      # both in one, for a classifier alone

All state is in buffers, so a checkpoint has it, and the same on every process: each stores the rows of all, in the
order of the processes, which is what one process stores of the joined batch. What a picture recalls follows its own
classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tailfin.collectives import gather_over_ranks
from tailfin.losses.base import ClassificationLoss, counts_of
from tailfin.models.features.base import ExtraRows, FeatureModule, Seen
from tailfin.models.features.feature_memory import StoredRows, ring_slots
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.features import RIO
from tailfin.stats import ClassStats


class FeatureBank(nn.Module):
    """Stored features of the target classes.

    Args:
        target_classes: labels of the classes to help, for instance those of the rare group.
        channels: D, length of a feature.
        size: rows kept per class.
        cache: how many of them, at most, join a batch per class that is in it (the released code has 20, a base
            configuration of it 5).
    """

    stage_memory = True  # of the stage that trains with it: no part of a model file
    target_classes: Tensor
    features: Tensor
    boxes: Tensor
    gt_boxes: Tensor
    written: Tensor

    def __init__(
        self, target_classes: Sequence[int] | Tensor, channels: int = 1024, *, size: int = 60, cache: int = 20
    ) -> None:
        super().__init__()
        if size < 1 or cache < 0:
            raise ValueError(f"size must be at least 1 and cache not negative (given: {size} and {cache})")
        self.size = size
        self.cache = min(cache, size)
        targets = torch.as_tensor(target_classes, dtype=torch.int64).unique()  # sorted
        self.register_buffer("target_classes", targets, persistent=False)
        self.register_buffer("features", torch.zeros(len(targets), size, channels))
        self.register_buffer("boxes", torch.zeros(len(targets), size, 4))
        self.register_buffer("gt_boxes", torch.zeros(len(targets), size, 4))
        self.register_buffer("written", torch.zeros(len(targets), dtype=torch.int64))  # rows ever stored

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N + R, D] and labels [N + R]: the rows given, then stored ones, class by class, newest first.

        Boxes are not kept; in evaluation mode both come back as they are.
        """
        if not self.training:
            return features, labels
        stored = self.recall(labels)
        none = features.new_zeros(len(labels), 4)
        self.push(features, labels, none, none)
        return torch.cat([features, stored.features.to(features.dtype)]), torch.cat([labels, stored.labels])

    @torch.no_grad()
    def recall(self, labels: Tensor, pictures: Tensor | None = None, batch: int = 1) -> StoredRows:
        """The newest rows, at most `cache`, of each target class in `labels` [N]: class by class, newest first.

        With `pictures` int64 [N], the picture of each row among `batch` ones: of each target class in each picture,
        picture by picture.
        """
        width = len(self.written) + 1
        ring = self._ring(labels) if pictures is None else self._ring(labels) + pictures * width
        present = counts_of(ring, batch * width, torch.int64).view(batch, width)[:, :-1, None] > 0
        age = torch.arange(self.cache, device=labels.device)
        held = present & (age < self.written[:, None].clamp(max=self.size))
        _, ring, back = torch.where(held)
        place = (ring, (self.written[ring] - 1 - back) % self.size)
        return StoredRows(self.features[place], self.target_classes[ring], self.boxes[place], self.gt_boxes[place])

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor) -> None:
        """Store the target classes' rows of all processes; only in train mode.

        features [N, D], labels int64 [N], boxes and gt_boxes [N, 4]. Call it on every process, also without rows.
        """
        if not self.training:
            return
        ring = self._ring(labels)
        row = torch.where(ring < len(self.written))[0]
        target = ring[row]
        features, target, boxes, gt_boxes = gather_over_ranks(
            features[row].to(self.features.dtype), target, boxes[row].to(self.boxes), gt_boxes[row].to(self.boxes)
        )
        kept, slot = ring_slots(target, self.written, self.size)
        self.features[target[kept], slot] = features[kept]
        self.boxes[target[kept], slot] = boxes[kept]
        self.gt_boxes[target[kept], slot] = gt_boxes[kept]
        self.written += counts_of(target, len(self.written), torch.int64)

    def _ring(self, labels: Tensor) -> Tensor:
        """The place of each row's class in `target_classes` [T]; T where it is none of them."""
        rings = len(self.target_classes)
        if not rings:
            return torch.zeros_like(labels)
        place = torch.searchsorted(self.target_classes, labels).clamp(max=rings - 1)
        return torch.where(self.target_classes[place] == labels, place, rings)


class RecalledRows(FeatureModule):
    """RIO: the newest stored rows of the rare classes in the batch join it, then the batch's own are stored.

    Each picture recalls for its own classes, so that a batch recalls as much however it is split; with `per` "process",
    as released, the pictures of a process do so together.
    """

    def __init__(self, bank: FeatureBank, *, per: str = "batch") -> None:
        super().__init__()
        self.bank = bank
        self.per = per

    def rows(self, seen: Seen) -> ExtraRows:
        rows = seen.rows
        each = (rows.places.picture, len(seen.targets)) if self.per == "batch" else ()
        stored = self.bank.recall(rows.labels, *each)
        self.bank.push(seen.shared.detach(), rows.labels, torch.cat(rows.boxes), rows.matched)
        return ExtraRows(stored.features.to(seen.shared.dtype), stored.labels, stored.boxes, stored.gt_boxes)


def build(config: RIO, detector: FasterRCNNConfig, stats: ClassStats, loss: ClassificationLoss) -> FeatureModule:
    """The module of a recipe."""
    images = torch.from_numpy(stats.image_count)
    rare = torch.where((images > 0) & (images <= config.max_images))[0]
    bank = FeatureBank(rare, detector.head_channels, size=config.size, cache=config.cache)
    return RecalledRows(bank, per=config.per)
