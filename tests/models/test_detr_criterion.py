"""Matching and losses of Deformable DETR against plain loops, and over processes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from tailfin import losses
from tailfin.models.detr_criterion import (
    Outputs,
    SetCriterion,
    assign,
    box_losses,
    giou,
    matching_cost,
    pad_objects,
    places_of,
)
from tailfin.schema.detectors import DeformableDETRConfig
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
SIZES = torch.tensor([[64.0, 48.0, 64.0, 48.0], [40.0, 64.0, 40.0, 64.0]])


def criterion(loss: str = "focal", **options) -> SetCriterion:
    return SetCriterion(losses.build(loss, STATS), DeformableDETRConfig(name="deformable_detr", **options)).train()


def boxes_of(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Boxes (centre, size) inside the picture."""
    side = 0.1 + 0.4 * torch.rand((*shape, 2), generator=generator)
    return torch.cat([side / 2 + (1 - side) * torch.rand((*shape, 2), generator=generator), side], dim=-1)


def batch(counts=(3, 2), layers=2, queries=6, width=3, seed=0, encoder=True):
    """Random outputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    pictures = len(counts)
    sizes = SIZES[:1].repeat(pictures, 1) if pictures > 2 else SIZES[:pictures]
    targets = [
        {
            "boxes": box_convert(boxes_of(generator, count), "cxcywh", "xyxy") * size,
            "labels": torch.randint(0, 3, (count,), generator=generator),
        }
        for count, size in zip(counts, sizes, strict=True)
    ]
    outputs = Outputs(
        torch.randn((layers, pictures, queries, width), generator=generator),
        boxes_of(generator, layers, pictures, queries),
        torch.zeros(layers, pictures, queries, 4),
        [],
        [],
        sizes,
        torch.randn((pictures, 9, 1), generator=generator) if encoder else None,
        boxes_of(generator, pictures, 9) if encoder else None,
    )
    return outputs, targets


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_giou_is_torchvisions(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = boxes_of(generator, 5), boxes_of(generator, 4)
    expected = generalized_box_iou(box_convert(first, "cxcywh", "xyxy"), box_convert(second, "cxcywh", "xyxy"))
    torch.testing.assert_close(giou(first[:, None], second[None]), expected, atol=1e-6, rtol=1e-5)


def test_giou_of_boxes_without_area_has_a_finite_gradient():
    box = torch.tensor([[0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    value = giou(box, torch.tensor([[0.5, 0.5, 0.0, 0.0]])).sum()
    assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, box)[0]).all()


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_assignment_is_the_cheapest(seed, queries, objects):
    cost = torch.rand((1, 1, queries, max(objects, 1)), generator=torch.Generator().manual_seed(seed))
    pairs = assign([cost], [objects])[0]
    assert len(pairs.query) == min(queries, objects)
    assert len(set(pairs.query.tolist())) == len(set(pairs.object.tolist())) == len(pairs.query)
    found = cost[0, 0, pairs.query, pairs.object].sum().item()
    size = min(queries, objects)
    best = min(
        sum(cost[0, 0, q, o].item() for q, o in zip(rows, columns, strict=True))
        for rows in itertools.permutations(range(queries), size)
        for columns in itertools.combinations(range(objects), size)
    )
    assert found == pytest.approx(best, abs=1e-5)


def test_the_cost_is_that_of_the_formula():
    own, (outputs, targets) = criterion(), batch()
    objects = pad_objects(targets, outputs.sizes)
    cost = matching_cost(own.scores(outputs.logits), outputs.boxes, objects, own.costs)
    for layer, picture, query in itertools.product(range(2), range(2), range(6)):
        for number, label in enumerate(targets[picture]["labels"].tolist()):
            p = outputs.logits[layer, picture, query, label].sigmoid()
            box, wanted = outputs.boxes[layer, picture, query], objects.boxes[picture, number]
            overlap = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (box, wanted)))[0, 0]
            focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            expected = 2 * focal + 5 * (box - wanted).abs().sum() - 2 * overlap
            assert cost[layer, picture, query, number].item() == pytest.approx(expected.item(), abs=1e-5)


def test_losses_are_those_of_the_formula():
    own, (outputs, targets) = criterion(), batch()
    found = own(outputs, targets)
    assert set(found) == {"loss_classifier", "loss_box_l1", "loss_giou", "loss_auxiliary", "loss_encoder"}
    expected = dict.fromkeys(found, 0.0)
    layers = [(outputs.logits[0], outputs.boxes[0]), (outputs.logits[1], outputs.boxes[1])]
    layers.append((outputs.encoder_logits, outputs.encoder_boxes))
    for layer, (logits, boxes) in enumerate(layers):
        encoder = layer == 2
        wanted = [{**t, "labels": t["labels"] * 0} if encoder else t for t in targets]
        matcher = criterion()
        objects = pad_objects(wanted, outputs.sizes)
        cost = matching_cost(logits[None].sigmoid(), boxes[None], objects, matcher.costs)
        pairs = assign([cost], objects.counts)[0]
        target = torch.zeros_like(logits)
        for picture, query, number in zip(*(part.tolist() for part in pairs[1:]), strict=True):
            target[picture, query, objects.labels[picture, number]] = 1
        p = logits.sigmoid()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        alpha = 0.25 * target + 0.75 * (1 - target)
        classes = 3 * (alpha * (p * (1 - target) + (1 - p) * target) ** 2 * entropy).sum() / 5
        sums = box_losses(boxes[pairs.picture, pairs.query], objects, pairs, 1)
        l1, one_minus = 5 * sums[0] / 5, 2 * sums[1] / 5
        if layer == 1:
            expected.update(loss_classifier=classes, loss_box_l1=l1, loss_giou=one_minus)
        else:
            expected["loss_encoder" if encoder else "loss_auxiliary"] = classes + l1.sum() + one_minus.sum()
    for name, value in found.items():
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-5), name


def test_the_order_of_the_objects_does_not_matter():
    own, (outputs, targets) = criterion(), batch((5, 4))
    turned = [{key: value.flip(0) for key, value in target.items()} for target in targets]
    first, second = own(outputs, targets), own(outputs, turned)
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name)


def test_no_objects_and_more_objects_than_queries():
    for counts in ((0, 0), (0, 9), (9, 8)):
        outputs, targets = batch(counts)
        leaves = [
            t.requires_grad_() for t in (outputs.logits, outputs.boxes, outputs.encoder_logits, outputs.encoder_boxes)
        ]
        found = criterion()(outputs, targets)
        total = torch.stack(list(found.values())).sum()
        assert torch.isfinite(total)
        assert all(gradient is not None for gradient in torch.autograd.grad(total, leaves))
        if counts == (0, 0):
            assert found["loss_box_l1"] == found["loss_giou"] == 0


def test_match_pairs_every_object():
    own, (outputs, targets) = criterion(), batch((3, 0))
    objects = pad_objects(targets, outputs.sizes)
    pairs = own.match(outputs.logits[-1:], outputs.boxes[-1:], objects)
    assert pairs.picture.tolist() == [0, 0, 0] and sorted(places_of(objects, pairs).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("name", [n for n in losses.names() if losses.LOSSES[n].alone])
def test_every_loss_works(name):
    loss = losses.build(name, STATS)
    outputs, targets = batch(width=loss.num_logits)
    outputs.logits.requires_grad_()
    own = SetCriterion(loss, DeformableDETRConfig(name="deformable_detr")).train()
    found = own(outputs, targets)
    assert all(torch.isfinite(value) for value in found.values())
    (gradient,) = torch.autograd.grad(found["loss_classifier"] + found["loss_auxiliary"], outputs.logits)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()  # every layer's
    assert loss.training


@pytest.mark.parametrize("name", [n for n in losses.names() if losses.LOSSES[n].additive])
@pytest.mark.parametrize("known", [False, True])
def test_layers_in_one_call_are_those_one_by_one(name, known, monkeypatch):
    """What losses say of themselves (`additive`) holds: sums and gradients, also of unchecked classes."""
    outputs, targets = batch((4, 1), layers=4)
    loss = losses.build(name, STATS)
    if known:
        targets = [{**target, "known": torch.arange(loss.num_classes) % 2 == 0} for target in targets]
    found = []
    for additive in (True, False):
        monkeypatch.setattr(type(loss), "additive", additive)
        logits = outputs.logits.clone().requires_grad_()
        value = criterion(name)(outputs._replace(logits=logits), targets)["loss_auxiliary"]
        found.append((value, *torch.autograd.grad(value, logits)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_move_once_by_the_last_layer():
    outputs, targets = batch((3, 2), layers=3)
    alone, several = criterion("efl"), criterion("efl")
    alone(outputs._replace(logits=outputs.logits[-1:], boxes=outputs.boxes[-1:]), targets)
    several(outputs, targets)
    assert (several.loss.pos_grad > 0).any()
    assert torch.equal(alone.loss.pos_grad, several.loss.pos_grad)


def test_two_processes_are_one(run_on_ranks):
    """Averaged gradients and the statistics are those of one process on the joined batch."""
    outputs, targets = batch((4, 1, 0, 2), seed=3)

    def part(rank: int, n: int = 2):
        rows = slice(rank * 2, rank * 2 + 2) if n == 2 else slice(None)
        logits = outputs.logits[:, rows].clone().requires_grad_()
        cut = outputs._replace(
            logits=logits,
            boxes=outputs.boxes[:, rows],
            sizes=outputs.sizes[rows],
            encoder_logits=outputs.encoder_logits[rows],
            encoder_boxes=outputs.encoder_boxes[rows],
        )
        own = criterion("efl")
        found = own(cut, targets[rows])
        total = torch.stack(list(found.values())).sum()
        gradient = torch.autograd.grad(total, logits)[0] / n
        return (total / n).item(), gradient.tolist(), own.loss.pos_neg.tolist()

    first, second = run_on_ranks(part)
    total, gradient, statistics = part(0, 1)
    assert first[0] + second[0] == pytest.approx(total, rel=1e-5)
    joined = torch.cat([torch.tensor(first[1]), torch.tensor(second[1])], dim=1)
    torch.testing.assert_close(joined, torch.tensor(gradient), atol=1e-6, rtol=1e-4)
    assert first[2] == second[2] == pytest.approx(statistics, rel=1e-5)


def test_encoder_head_with_classes():
    """The proposals' loss is focal loss over all logits, whose last one is the target of a matched proposal."""
    outputs, targets = batch((3, 2), seed=5)
    wide = torch.randn((2, 9, 4), generator=torch.Generator().manual_seed(7))
    own = criterion(encoder_head="classes", class_weight=1, box_weight=0, giou_weight=0)
    found = own(outputs._replace(encoder_logits=wide), targets)["loss_encoder"]
    objects = pad_objects(targets, outputs.sizes)
    labels = torch.full_like(objects.labels, 3)
    one_class = objects._replace(labels=labels)
    cost = matching_cost(wide[None].sigmoid(), outputs.encoder_boxes[None], one_class, own.costs)
    pairs = assign([cost], objects.counts)[0]
    wanted = torch.zeros(2, 9, 4)
    wanted[pairs.picture, pairs.query, 3] = 1
    expected = sigmoid_focal_loss(wide, wanted, alpha=0.25, gamma=2.0, reduction="sum") / 5
    torch.testing.assert_close(found, expected)


def test_one_object_for_every_process(run_on_ranks):
    """One object on two processes: divided by one half of an object, or as released by one."""
    outputs, targets = batch((1, 0), encoder=False)

    def total(rank: int, normalizer: str) -> float:
        cut = outputs._replace(
            logits=outputs.logits[:, rank : rank + 1],
            boxes=outputs.boxes[:, rank : rank + 1],
            sizes=outputs.sizes[rank : rank + 1],
        )
        return float(torch.stack(list(criterion(normalizer=normalizer)(cut, targets[rank : rank + 1]).values())).sum())

    found = run_on_ranks(lambda rank: [total(rank, normalizer) for normalizer in ("batch", "process")])
    shared, released = zip(*found, strict=True)
    assert shared == pytest.approx(tuple(2 * value for value in released), rel=1e-5)
    one = criterion(normalizer="process")(outputs, targets)
    both = criterion()(outputs, targets)
    assert all(torch.equal(one[name], both[name]) for name in one)  # one process with an object: the same


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_has_diverged_has_losses_that_are_not_finite(value):
    """No error of the assignment: what is wrong is said by the training loop."""
    outputs, targets = batch((3, 2))
    found = criterion()(outputs._replace(logits=torch.full_like(outputs.logits, value)), targets)
    assert not torch.isfinite(torch.stack(list(found.values())).sum())
    found = criterion()(outputs._replace(boxes=torch.full_like(outputs.boxes, value)), targets)
    assert not torch.isfinite(torch.stack(list(found.values())).sum())
