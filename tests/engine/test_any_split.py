"""What is drawn for a batch does not depend on how the batch is split over processes and accumulation steps.

Every draw of the project, with default counts, on 16 pictures: one process with all, one that accumulates 8 x 2 or
16 x 1, two gloo processes with 8 each, and two that accumulate. What they draw in sum is the same, and where a paper's
run of 8 processes with 2 pictures is known, it is what that run draws. `docs/training.md` has the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tailfin import losses
from tailfin.config import load_recipe
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.models import build_detector
from tailfin.models.features import FEATURES
from tailfin.models.features.base import Rows, Seen
from tailfin.models.features.box_generator import shifted_boxes
from tailfin.models.features.meta_reweighting import LearntWeights, MetaReweighter
from tailfin.models.heads.simcal import episode_labels
from tailfin.models.roi_align import Places
from tailfin.models.rpn import RPNOutputs
from tailfin.pretraining.contrast import ContrastHeads
from tailfin.run import batch_plan
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.pretraining import Contrast
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

CLASSES, WIDTH, ROWS, PICTURES = 120, 4, 12, 16
STATS = ClassStats(
    image_count=[1 + 3 * c for c in range(CLASSES)], instance_count=[2 + 4 * c for c in range(CLASSES)], num_images=900
)
DETECTOR = FasterRCNNConfig(head_channels=WIDTH)
Call = Callable[[Sequence[int]], Tensor]  # what is drawn in a call with these pictures, counts that can be added


def target(picture: int) -> dict[str, Tensor]:
    """Three objects: two of a class that a far picture has too, one of a class that the next one has."""
    corner = torch.arange(3)[:, None] * 10.0
    labels = torch.tensor([picture % 8, picture % 8, 8 + picture // 2])
    return {"boxes": torch.cat([corner, corner, corner + 20, corner + 20], 1), "labels": labels}


def rows_of(pictures: Sequence[int]) -> Rows:
    """Twelve sampled rows of each picture, three of them foreground."""
    labels = [torch.cat([target(p)["labels"], torch.full((ROWS - 3,), CLASSES)]) for p in pictures]
    boxes = [torch.rand(ROWS, 4) for _ in pictures]
    none = torch.zeros(ROWS * len(pictures), dtype=torch.int64)
    places = Places(torch.arange(len(pictures)).repeat_interleave(ROWS), [len(none)])
    return Rows(boxes, torch.cat(labels), torch.cat(boxes), none, none.bool(), places)


def seen(pictures: Sequence[int], classifier: nn.Module) -> Seen:
    rows = rows_of(pictures)
    pool = lambda boxes, places=None: torch.cat(boxes)  # noqa: E731 - boxes serve as features of four channels
    shared, sizes = torch.rand(len(rows.labels), WIDTH), [(64, 64)] * len(pictures)
    return Seen(rows, shared, [target(p) for p in pictures], sizes, pool, nn.Identity(), classifier)


def feature(name: str, loss_name: str, **state: Any) -> tuple[Any, Any]:
    """A feature module with a recipe's defaults, in training, and its loss."""
    kind = next(kind for kind in _sections() if kind.model_fields["name"].default == name)
    loss = losses.build(loss_name, STATS)
    module = FEATURES[name].build(kind(**state), DETECTOR, STATS, loss).train()
    module.at_epoch(0.0)
    return module, loss


def _sections() -> list[Any]:
    from tailfin.schema import features

    return [features.Hallucination, features.FeatureMemory, features.FASA, features.RIO]


# ---- the draws -------------------------------------------------------------------------------------------------------


def hallucination(**options: Any) -> Call:
    module, _ = feature("hallucination", "fcbl", **options)
    module.hallucination.statistics.used.fill_(True)  # a class without statistics would give none
    return lambda pictures: torch.tensor([len(module.rows(seen(pictures, nn.Identity())).labels)])


def feature_memory(**options: Any) -> Call:
    module, _ = feature("feature_memory", "ebl", **options)
    module.memory.written.fill_(80)
    return lambda pictures: torch.tensor([len(module.rows(seen(pictures, nn.Identity())).labels)])


def fasa(**options: Any) -> Call:
    """Made-up rows, and their loss as the engine means it: rows of any number of draws weigh the same."""
    module, _ = feature("fasa", "softmax", start_epoch=0, **options)
    classifier = nn.Linear(WIDTH, CLASSES + 1)
    nn.init.constant_(classifier.weight, 0.0)
    with torch.no_grad():
        classifier.bias.copy_(torch.arange(CLASSES + 1) / 50)
    module.fasa.prob.fill_(1.0)
    module.fasa.statistics.used.fill_(True)
    drawn = []
    module.fasa.statistics.draw = lambda labels, noise: drawn.append(len(labels)) or torch.zeros(len(labels), WIDTH)

    def call(pictures: Sequence[int]) -> Tensor:
        made = seen(pictures, classifier)
        loss = module.losses(made, torch.zeros(len(made.rows.labels), CLASSES + 1))["loss_augmented"]
        return torch.tensor([drawn[-1], len(pictures) * loss.item()])

    return call


def rio(**options: Any) -> Call:
    """Recalled rows by class. The bank stays as it is, whatever the calls before stored."""
    module, _ = feature("rio", "softmax", max_images=60, **options)
    module.bank.written.fill_(60)
    module.bank.push = lambda *rows: None
    return lambda pictures: torch.bincount(module.rows(seen(pictures, nn.Identity())).labels, minlength=CLASSES)


def fedloss(**options: Any) -> Call:
    """Rows that have a class in their loss, for each class of the batch; and the same of the others together. Those of
    the batch have no training images, so that none is drawn by chance."""
    counts = [0] * 16 + [5] * (CLASSES - 16)
    loss = losses.build("fedloss", ClassStats(image_count=counts, instance_count=counts, num_images=900), **options)

    def call(pictures: Sequence[int]) -> Tensor:
        rows = rows_of(pictures)
        logits = torch.zeros((len(rows.labels), CLASSES), requires_grad=True)
        (slope,) = torch.autograd.grad(loss(logits, rows.labels, picture=rows.places.picture), logits)
        kept = (slope != 0).sum(0)
        return torch.cat([kept[:16], kept[16:].sum()[None]])

    return call


def bags(**options: Any) -> Call:
    """The loss of each bin, as the engine means it, on logits of 0: the bins of the rare classes above all."""
    counts = [5, 50] * 8 + [5000] * (CLASSES - 16)
    loss = losses.build("bags", ClassStats(image_count=counts, instance_count=counts, num_images=9000), **options)

    def call(pictures: Sequence[int]) -> Tensor:
        rows = rows_of(pictures)
        loss(torch.zeros((len(rows.labels), loss.num_logits)), rows.labels, picture=rows.places.picture)
        return len(pictures) * torch.stack(list(loss.parts.values()))

    return call


def simcal() -> Call:
    """Rows of the episodes: foreground, and as many background ones."""

    def call(pictures: Sequence[int]) -> Tensor:
        rows = rows_of(pictures)
        labels = episode_labels(rows.labels, rows.places.picture, torch.tensor(pictures) % 8, CLASSES)
        return torch.stack([(labels == CLASSES).sum(), ((labels >= 0) & (labels < CLASSES)).sum()])

    return call


def meta_reweighting() -> Call:
    """Steps of the class weights, counted once; the engine knows how many calls there are to an optimiser batch."""
    loss = MetaReweighter(STATS)
    module = LearntWeights(loss, 0.1)
    module.at_epoch(0.0)

    def call(pictures: Sequence[int]) -> Tensor:
        module.accumulation = PICTURES // len(pictures) // _ranks()
        given = seen(pictures, nn.Linear(WIDTH, CLASSES))
        given.targets[0].update(balanced_features=torch.rand(5, WIDTH), balanced_labels=torch.arange(5))
        before = loss.step.clone()
        module.rows(given)
        return ((loss.step - before) / _ranks())[None]

    return call


def box_generator() -> Call:
    def call(pictures: Sequence[int]) -> Tensor:
        return torch.tensor([len(shifted_boxes([target(p) for p in pictures], [(64, 64)] * len(pictures))[1])])

    return call


def nms_resampling() -> Call:
    """Proposals that the resampling RPN keeps, of scores that belong to the picture."""
    recipe = load_recipe("fod/faster_rcnn_r18_softmax", ["detector.rpn_nms_resampling=discrete"])
    model: Any = build_detector(recipe, STATS, start=False)[0]
    rpn = model.rpn.train()

    generator = torch.Generator().manual_seed(0)
    anchors = target(0)["boxes"][torch.arange(100) % 3] + 4 * torch.rand(100, 4, generator=generator)

    def call(pictures: Sequence[int]) -> Tensor:
        scores = torch.stack([torch.randn(100, generator=torch.Generator().manual_seed(p)) for p in pictures])
        raw = RPNOutputs(scores, torch.zeros(len(pictures), 100, 4), anchors, [100])
        return rpn.propose(raw, [(64, 64)] * len(pictures), [target(p) for p in pictures]).valid.sum()[None]

    return call


def queue(term: str) -> Call:
    """Keys that enter the queue of a contrastive term, counted once."""
    head = ContrastHeads({term: (Contrast(queue=4096, hidden=8, dim=8), WIDTH)})[term]
    each = {"image": 1, "box": 8}[term]

    def call(pictures: Sequence[int]) -> Tensor:
        before = int(head.queue.place)
        head.remember([torch.rand(each * len(pictures), head.config.dim)])
        return torch.tensor([(int(head.queue.place) - before) / _ranks()])

    return call


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


PUBLISHED: dict[str, list[float] | None] = {  # what 8 processes with 2 pictures draw for a batch
    "hallucination": [8 * 8 * 12],
    "feature_memory": [8 * 8 * 4],
    "fasa": None,
    "rio": None,
    "fedloss": None,
    "bags": None,
    "simcal": [32, 32],
    "meta_reweighting": [1],
    "box_generator": [16 * 3 * 16],
    "nms_resampling": None,
    "queue_image": [16],
    "queue_box": [128],
}
CASES: dict[str, Callable[[], Call]] = {
    "hallucination": hallucination,
    "feature_memory": feature_memory,
    "fasa": fasa,
    "rio": rio,
    "fedloss": fedloss,
    "bags": bags,
    "simcal": simcal,
    "meta_reweighting": meta_reweighting,
    "box_generator": box_generator,
    "nms_resampling": nms_resampling,
    "queue_image": lambda: queue("image"),
    "queue_box": lambda: queue("box"),
}


def drawn(make: Callable[[], Call], processes: int, accumulation: int, rank: int = 0) -> np.ndarray[Any, Any]:
    """The sum of what a process draws for its share of the batch, cut as `BatchPlan.keys` cuts it."""
    torch.manual_seed(rank)
    call = make()
    pieces = np.arange(PICTURES).reshape(processes * accumulation, -1)
    own = pieces[rank * accumulation : (rank + 1) * accumulation]
    return torch.stack([call(piece.tolist()).double() for piece in own]).sum(0).numpy()


@pytest.mark.parametrize("name", CASES)
def test_a_batch_draws_the_same_however_it_is_split(name, run_on_ranks):
    make = CASES[name]
    whole = drawn(make, 1, 1)
    assert whole.any()
    if PUBLISHED[name] is not None:
        assert whole.tolist() == PUBLISHED[name]
    for accumulation in (8,) if name == "bags" else (8, 16):  # its means are over two pictures
        np.testing.assert_allclose(
            drawn(make, 1, accumulation), whole, rtol=1e-5, err_msg=f"accumulation {accumulation}"
        )
    for accumulation in (1, 4):
        both = run_on_ranks(lambda rank, steps=accumulation: drawn(make, 2, steps, rank))
        np.testing.assert_allclose(sum(both), whole, rtol=1e-5, err_msg=f"two processes, accumulation {accumulation}")


@pytest.mark.parametrize("make", [hallucination, feature_memory, fasa, rio, fedloss])
def test_as_released_a_process_draws_for_itself(make):
    """`per: process`: as many as 8 processes with 2 pictures only where there are 8."""
    whole, split = drawn(lambda: make(per="process"), 1, 1), drawn(lambda: make(per="process"), 1, 8)
    assert not np.allclose(whole, split)
    if make in (hallucination, feature_memory, fasa):  # of the others each picture has its own here, none shares
        np.testing.assert_allclose(split, drawn(make, 1, 1), rtol=1e-5)


@pytest.mark.parametrize("each", [1, 3, 8])
def test_what_does_not_divide_is_shared_out(each):
    """16 x 1 pictures: of an odd number for two, some calls draw one more; every iteration begins anew."""
    module, _ = feature("hallucination", "fcbl", sampled_num_classes=each)
    for _ in range(3):
        module.at_epoch(0.0)
        shares = [module.share(each, 1) for _ in range(PICTURES)]
        assert sum(shares) == PICTURES * each / 2
        assert max(shares) - min(shares) <= 1
        assert shares == shares[:2] * 8
    assert [module.share(each, 1, "process") for _ in range(3)] == [each] * 3


def test_pictures_copies_and_partners_are_the_same(tiny_set, tiny_recipe):
    """Augmentation, copy-paste and BALMS's partners are functions of (epoch, picture, repeat): a batch has the same
    keys, in the same order."""
    recipe = load_recipe(tiny_recipe, {"data.train.annotations": str(tiny_set[0])})
    recipe = recipe.model_copy(update={"sampler": Sampler(name="rfs", threshold=0.5)})
    source = open_source(recipe.data.train, "", "train")
    plan = batch_plan(recipe, TrainingDataset(source, recipe.data, recipe.seed), ClassStats.from_index(source.index))
    whole = list(plan.keys(0, slice(0, 1), 1))
    for parts in (2, 4):
        pieces = [list(plan.keys(0, slice(part, part + 1), parts)) for part in range(parts)]
        assert [[key for piece in own for key in piece] for own in zip(*pieces, strict=True)] == whole
