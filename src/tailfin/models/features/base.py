"""What a box head and a feature module say to each other, and what a stage tells a feature module about itself.

What is drawn is drawn for the pictures, not for the process that happens to have them: `FeatureModule.share`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn

from tailfin.collectives import this_rank
from tailfin.data.dataset import Source, TrainingDataset
from tailfin.losses.base import PICTURES
from tailfin.models.roi_align import Places
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

Targets = Sequence[dict[str, Tensor]]


class Rows(NamedTuple):
    """Sampled proposals of a batch, images one after another."""

    boxes: list[Tensor]  # per image [n, 4]
    labels: Tensor  # int64 [N], background C
    matched: Tensor  # [N, 4] the ground-truth box of each row; of no meaning on background rows
    gt_index: Tensor  # int64 [N] the object of each row, counted over the batch; -1 on background rows
    added: Tensor  # bool [N] rows that are an object's own box, joined to the proposals
    places: Places  # for pooling: the picture of each row, and how many rows each level has
    known: Tensor | None = None  # bool [N, C] classes that were looked for in the row's picture; none: all


class ExtraRows(NamedTuple):
    """Rows that a feature module adds to the sampled ones: made up, or stored in earlier iterations.

    Without boxes they take part in the classification loss alone, with them in the box loss too.
    """

    features: Tensor  # [E, D] shared features
    labels: Tensor  # int64 [E]
    boxes: Tensor | None = None  # [E, 4] the box of each feature, and that of its object
    gt_boxes: Tensor | None = None
    memory: bool = False  # whether a loss counts them as rows of a memory


class Seen(NamedTuple):
    """What a feature module sees of a training iteration."""

    rows: Rows
    shared: Tensor  # [N, D] features of the sampled rows
    targets: Targets
    image_sizes: list[tuple[int, int]]  # (height, width) without padding
    pool: Callable[..., Tensor]  # boxes per image [M, 4] (and places) to pooled features [N, channels, size, size]
    head: nn.Module  # pooled to shared features
    classifier: nn.Module  # shared features to logits


class StageFacts(NamedTuple):
    """The stage that a feature module is to take part in."""

    recipe: Recipe  # the stage's own
    source: Source  # training annotations and pictures
    stats: ClassStats
    accelerator: Accelerator
    plan: Callable[[TrainingDataset], BatchPlan]  # the recipe's order of a data set
    seed: Callable[[int], None]  # torch's generators, for an iteration of this process
    say: Callable[[str], None]  # a line on the main process
    later: bool  # an earlier stage gave the weights, and this one has not begun


class FeatureModule(nn.Module):
    """Takes part in the training of a box head beside its sampled rows; each method has what it needs of this.

    State is in buffers and the same on every process. `at_epoch` tells it the time before every iteration.
    """

    calls = 0  # of `share` in the iteration

    def at_epoch(self, epoch: float) -> None:
        """An iteration begins, at this point of the stage in epochs."""
        self.calls = 0

    def share(self, each: int, pictures: int, per: str = "batch") -> int:
        """How many draws this call makes for its `pictures`; once per call of `rows` or `losses`.

        per "batch": `each` for every two pictures (`PICTURES`), so that a batch has as many however it is split over
        processes and accumulation steps; what does not divide is shared out by the pictures' places in the batch.
        "process": `each`, whatever the number of pictures. All processes have as many pictures.
        """
        rank, ranks = this_rank()
        before = (self.calls * ranks + rank) * pictures
        self.calls += 1
        if per == "process":
            return each
        return (before + pictures) * each // PICTURES - before * each // PICTURES

    def rows(self, seen: Seen) -> ExtraRows | None:
        """Rows that join the sampled ones; called once per iteration, before the losses."""
        return None

    def losses(self, seen: Seen, logits: Tensor) -> dict[str, Tensor]:
        """Further losses by name; `logits` [N, num_logits] are those of the sampled rows."""
        return {}

    def check(self, model: Any) -> None:
        """Refuse, as a `UserError`, a stage of the detector `model` that the module does not go with; called before
        anything trains.
        """

    def around(self, model: Any, stage: StageFacts) -> dict[str, Any]:
        """What the stage of the detector `model` needs beside the usual: `dataset`, `plan`, `step`.

        Called once before the stage, on every process; the place for what must be there when it begins.
        """
        return {}
