"""SimCal (Wang et al., ECCV'20): after normal training, a second classification head for the tail on balanced episodes.

The detector is frozen. A copy of its box head (shared layers and classifier) is trained on episodes
(`tailfin.samplers.episodes`): classes drawn uniformly, then an image of each, then only that image's proposals of that
class, with as many background proposals. At test time the two heads are joined: classes with fewer than
`instance_threshold` training instances take the calibrated head's softmax, all others and the background the
original's; nothing is renormalised::

    detector.requires_grad_(False)
    detector.roi_heads = with_twin(detector.roi_heads, stats)               # the new head alone is trained
    for classes, rows in zip(*draw_episodes(image_of, labels, 1000, rng)):  # an epoch: 1000 episodes
        images, targets = load(rows)
        for target, label in zip(targets, classes):
            target["sampled_class"] = torch.tensor(label)
        detector(images, targets)["loss_classifier"]    # SGD, rate 0.01, from the 8th epoch 0.001, from the 11th 0.0001
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.collectives import several_ranks, sum_over_ranks
from tailfin.data.dataset import Source
from tailfin.losses.base import ClassificationLoss, at_least_float32
from tailfin.losses.softmax import Softmax
from tailfin.models.features.base import Rows, Targets
from tailfin.models.heads.roi_heads import BoxPredictor, RoIHeads
from tailfin.models.precision import in_float32
from tailfin.models.roi_align import Places
from tailfin.models.row_sampling import chosen_rows
from tailfin.samplers.episodes import EpisodeDataset, EpisodePlan
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

INSTANCE_THRESHOLD = 100  # LVIS; 400 for COCO-LT


def simcal_scores(original: Tensor, calibrated: Tensor, replaced: Tensor) -> Tensor:
    """[N, C + 1] logits of both heads (background last) to [N, C] scores; `replaced` bool [C]: take the calibrated."""
    before = at_least_float32(original).softmax(dim=1)[:, :-1]
    after = at_least_float32(calibrated).softmax(dim=1)[:, :-1]
    return torch.where(replaced, after, before)


class SimCal(ClassificationLoss):
    """Both heads as one loss: logits are the original's C + 1, then the calibrated head's C + 1, background last.

    loss = softmax cross-entropy of the calibrated head, mean over the rows; the original gets no gradient. An episode
    has as many rows as its objects, so processes differ: in training each divides by the mean number of all of them.
    """

    replaced: Tensor

    def __init__(self, stats: ClassStats, *, instance_threshold: float = INSTANCE_THRESHOLD) -> None:
        super().__init__(stats)
        if instance_threshold < 0:
            raise ValueError(f"instance_threshold must not be negative (given: {instance_threshold})")
        self.num_logits = 2 * (self.num_classes + 1)
        self.register_buffer("replaced", torch.as_tensor(stats.instance_count) < instance_threshold, persistent=False)

    def checked(self, logits: Tensor, labels: Tensor, known: Tensor | None) -> Tensor:
        """Of the calibrated head: the original is not trained."""
        if known is None:
            return logits
        original, calibrated = logits.chunk(2, dim=1)
        return torch.cat([original, super().checked(calibrated, labels, known)], dim=1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(logits[:, self.num_classes + 1 :], labels, reduction="sum")
        if not (self.training and several_ranks()):
            return total / max(len(labels), 1)
        rows, ranks = sum_over_ranks(total.new_tensor(float(len(labels))), total.new_ones(()))
        return total * ranks / rows.clamp(min=1)

    def scores(self, logits: Tensor) -> Tensor:
        original, calibrated = logits.chunk(2, dim=1)
        return simcal_scores(original, calibrated, self.replaced)


class DualPredictor(nn.Module):
    """Pooled features to (both heads' logits [N, 2 (C + 1)], the original's box deltas); the original is frozen.

    Args:
        head: the original shared layers, pooled features to [N, D].
        predictor: the original predictor, [N, D] to (logits, deltas), with its classifier as `cls_score`.
        fresh: start the calibrated head from random weights of the same shapes, not from the original's.
    """

    def __init__(self, head: nn.Module, predictor: BoxPredictor, *, fresh: bool = False) -> None:
        super().__init__()
        self.head = head.requires_grad_(False)
        self.predictor = predictor.requires_grad_(False)
        self.calibrated_head = copy.deepcopy(head).requires_grad_(True)
        classifier = copy.deepcopy(predictor.cls_score).requires_grad_(True)
        self.calibrated_classifier = classifier
        if fresh:
            for module in self.calibrated_head.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            nn.init.normal_(classifier.get_parameter("weight"), std=0.01)
            nn.init.zeros_(classifier.get_parameter("bias"))

    def forward(self, pooled: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            original, deltas = self.predictor(self.head(pooled))
        calibrated = in_float32(self.calibrated_classifier, self.calibrated_head(pooled))
        return torch.cat([original, calibrated.to(original.dtype)], dim=1), deltas


class TwinRoIHeads(RoIHeads):
    """`RoIHeads` with a second classifier, on rows of the class that `targets[i]["sampled_class"]` names in image i.

    Without it all classes of an image take part. Made by `with_twin`; in training it returns the classification loss
    alone.
    """

    takes_extra_rows = False

    def parts(self) -> dict[str, nn.Module]:
        """The classifier is the calibrated head with its own copy of the shared layers."""
        dual = self.predictor
        calibrated = nn.ModuleList([dual.calibrated_head, dual.calibrated_classifier])
        return {"classifier": calibrated, "box": dual.predictor.bbox_pred, "head": dual.head}

    def losses(
        self,
        features: dict[str, Tensor],
        rows: Rows,
        image_sizes: list[tuple[int, int]],
        targets: Targets,
        shared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The calibrated head's loss on the rows of the episode."""
        sampled = None
        if "sampled_class" in targets[0]:
            sampled = torch.stack([target["sampled_class"] for target in targets]).to(rows.labels.device)
        labels = episode_labels(rows.labels, rows.places.picture, sampled, self.loss.num_classes)
        boxes = torch.cat(rows.boxes)
        levels, count = self.pool.levels(boxes), len(self.pool.featmap_names)
        chosen = chosen_rows(labels >= 0, rows.places.picture, len(targets), levels, count)
        places = Places(rows.places.picture[chosen.rows], chosen.per_level)
        own = list(boxes[chosen.rows].split(chosen.per_picture))
        logits, _ = self.predictor(self.head(self.pool(features, own, image_sizes, places)))
        known = None if rows.known is None else rows.known[chosen.rows]
        return {"loss_classifier": self.loss(logits.float(), labels[chosen.rows], every_row=True, known=known)}


def with_twin(
    roi_heads: RoIHeads,
    stats: ClassStats,
    *,
    instance_threshold: float = INSTANCE_THRESHOLD,
    fresh: bool = False,
) -> TwinRoIHeads:
    """Box heads that share the trained, now frozen parts of `roi_heads` (a softmax detector's) and add the twin.

    Only the twin asks for gradients; the loss is `SimCal`, and detections use both heads.
    """
    predictor = roi_heads.predictor
    if not isinstance(predictor, BoxPredictor) or not isinstance(roi_heads.loss, Softmax):
        raise ValueError("SimCal calibrates a plain box predictor that was trained with the loss softmax")
    return TwinRoIHeads(
        roi_heads.pool,
        nn.Identity(),
        DualPredictor(roi_heads.head, predictor, fresh=fresh),
        SimCal(stats, instance_threshold=instance_threshold),
        fg_iou=roi_heads.fg_iou,
        batch=roi_heads.batch,
        fg_fraction=roi_heads.fg_fraction,
        limits=roi_heads.limits,
    )


def episodes(source: Source, recipe: Recipe, stats: ClassStats) -> dict[str, Any]:
    """Data set and order of the stage that trains the twin: episodes, with the sampler class_aware; else the usual."""
    if recipe.sampler.name != "class_aware":
        return {}
    dataset = EpisodeDataset(source, recipe.data, recipe.seed)
    schedule = recipe.schedule
    plan = EpisodePlan(
        source.index,
        dataset.rows(),
        stats,
        recipe.sampler,
        schedule.batch,
        schedule.epochs,
        recipe.seed,
        recipe.data.group_by_aspect,
    )
    return {"dataset": dataset, "plan": plan}


def episode_labels(
    labels: Tensor,
    image_of: Tensor,
    sampled_class: Tensor | None,
    num_classes: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Labels [N] with all rows that an episode leaves out set to -1.

    What stays: foreground rows of their image's sampled class, and as many background rows (all if there are fewer),
    drawn from the whole batch. image_of int64 [N]: the row's image; sampled_class int64 [images], none: every class.
    """
    if sampled_class is None:
        chosen = (labels >= 0) & (labels < num_classes)
    else:
        chosen = labels == sampled_class[image_of]
    background = labels == num_classes
    device = labels.device if generator is None else generator.device
    keys = torch.rand(labels.shape, generator=generator, device=device).to(labels.device)
    place = torch.where(background, keys, -1.0).argsort(descending=True).argsort()  # of a row in the draw
    chosen = chosen | (background & (place < chosen.sum()))
    return torch.where(chosen, labels, -1)
