"""Every term by itself, without the shell: it is built, its loss is the formula's, and it says what it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_shell import dense_detector, detector, samples, section
from torch import Tensor
from torch.nn import functional as F

from tailfin.models import rpn
from tailfin.pretraining.box import AssignedBoxContrast, LocalContrast
from tailfin.pretraining.contrast import ContrastHeads
from tailfin.pretraining.dense import DenseContrast
from tailfin.pretraining.detection import ClassAgnosticDetection, ClassAwareDetection, as_objects, on_ignored, spared
from tailfin.pretraining.image import BatchContrast, HolisticContrast, pooled
from tailfin.pretraining.momentum import MomentumNetwork
from tailfin.pretraining.reconstruction import DualReconstruction
from tailfin.pretraining.shell import deepest
from tailfin.pretraining.term import Iteration, Term

SHARED = 16  # width of the small detector's box head


def seen(term: Term, model: Any, boxes: int = 3, pairs: Any = ((0, 1),)) -> Iteration:
    """A batch as `term` alone sees it, with a momentum network of what it asks for."""
    average = MomentumNetwork(term.followed(model.parts()))
    return Iteration(model, average, *samples(boxes=boxes), pyramid="fpn" in term.reaches, pairs=pairs)


def head(name: str, model: Any, **values: Any) -> Any:
    config = getattr(section(**values), name)
    channels = SHARED if name == "box" else deepest(model.backbone.body)[0]
    return ContrastHeads({name: (config, channels)})[name]


def info_nce_by_hand(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ negatives.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.int64))


def test_holistic_contrast():
    model = detector().train()
    term = HolisticContrast(0.1, head("image", model))
    batch = seen(term, model)
    assert set(batch.average.copies) == {"backbone", "image_projector"}
    stored = term.head.queue.rows.clone()
    queries, keys = term.queries(batch, 0), term.keys(batch, 1)
    assert not keys.requires_grad and queries.requires_grad
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(2))
    assert term.vectors(batch, 0).equal(pooled(batch.features(0), batch.view(0)))
    found = term(batch)
    assert found.keys() == {"loss_hcl"}
    torch.testing.assert_close(found["loss_hcl"], 0.1 * info_nce_by_hand(queries, keys, stored, 0.2))
    assert torch.equal(term.head.queue.rows[:2], keys) and torch.equal(term.head.queue.rows[2:], stored[2:])
    assert term.eval().shown(batch)["negative"].shape == (2, 20)


def test_both_ways_is_the_mean_of_both():
    model = detector(norm="gn").train()
    term = HolisticContrast(1.0, head("image", model, preset="byol", image={"norm": False}))
    both = term(seen(term, model, pairs=[(0, 1), (1, 0)]))["loss_hcl"]
    batch = seen(term, model, pairs=[(0, 1), (1, 0)])
    each = [2 - 2 * (term.queries(batch, a) * term.keys(batch, b)).sum(1).mean() for a, b in batch.pairs]
    torch.testing.assert_close(both, torch.stack(each).mean())


def test_batch_contrast_trains_both_views_and_follows_nothing():
    model = detector().train()
    term = BatchContrast(1.0, head("image", model, preset="simclr"))
    batch = seen(term, model)
    assert not batch.average and term.head.queue is None
    rows = F.normalize(torch.cat([term.queries(batch, number) for number in (0, 1)]), dim=1)
    similarity = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(similarity, torch.tensor([2, 3, 0, 1]))
    torch.testing.assert_close(term(batch)["loss_hcl"], expected)


def test_local_contrast():
    model = detector().train()
    term = LocalContrast(0.05, head("box", model), model.roi_heads.pool)
    batch = seen(term, model)
    assert set(batch.average.copies) == {"backbone", "fpn", "head", "box_projector"}
    stored = term.head.queue.rows.clone()
    queries, keys = term.queries(batch, 0), term.keys(batch, 1)
    assert queries.shape == keys.shape == (6, 8), "two pictures of three boxes"
    found = term(batch)
    torch.testing.assert_close(found["loss_lcl"], 0.05 * info_nce_by_hand(queries, keys, stored, 0.2))
    assert int(term.head.queue.place) == 6


def test_local_contrast_on_all_levels_and_without_boxes():
    model = detector().train()
    term = LocalContrast(1.0, head("box", model, preset="soco"), model.roi_heads.pool, levels="all", alone=True)
    assert term.queries(seen(term, model), 0).shape == (3 * 6, 8)
    loss = term(seen(term, model, boxes=0))["loss_lcl"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None for p in model.backbone.fpn.parameters())


def test_assigned_boxes_need_the_rows_of_detection():
    model = detector().train()
    term = AssignedBoxContrast(1.0, head("box", model, preset="aligndet"), model.roi_heads.pool)
    batch = seen(term, model)
    assert set(batch.average.copies) == {"backbone", "fpn", "head", "rpn", "box_projector"}
    with pytest.raises(ValueError, match="class-agnostic detection"):
        term(batch)
    detection = ClassAgnosticDetection(2.0, SHARED)
    losses = detection(batch)
    assert losses.keys() == {"loss_box_reg", "loss_rpn_objectness", "loss_rpn_box_reg"}
    shared, ids = batch.assigned
    assert len(shared) == len(ids) > 0 and int(ids.max()) < 6 and int(ids.min()) >= 0
    loss = term(batch)["loss_lcl"]
    loss.backward()
    assert loss.item() > 0 and all(p.grad is not None for p in term.head.projector.parameters())


def test_class_agnostic_losses_carry_their_weight():
    found = []
    for weight in (1.0, 3.0):
        model = detector().train()
        term = ClassAgnosticDetection(weight, SHARED)
        with torch.no_grad():
            term.box_layer.weight.fill_(0.01)
        torch.manual_seed(1)
        found.append(term(seen(term, model)))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], 3 * value)


def test_class_aware_losses_are_the_detectors():
    model = detector().train()
    term = ClassAwareDetection(1.0)
    torch.manual_seed(1)
    found = term(seen(term, model))
    torch.manual_seed(1)
    own = detector().train()
    torch.manual_seed(1)
    expected = own(*samples())
    assert {name: value.item() for name, value in found.items()} == {k: v.item() for k, v in expected.items()}


def test_dense_contrast():
    model = detector().train()
    term = DenseContrast(0.5, head("dense", model, preset="densecl"))
    batch = seen(term, model)
    stored = term.head.queue.rows.clone()
    found = term(batch)
    assert found.keys() == {"loss_dense"} and int(term.head.queue.place) == 2
    # pairs by hand, cell by cell
    cells, others = (F.adaptive_avg_pool2d(own.deepest, 7) for own in (batch.features(0), batch.keys(1)))
    queries, keys = [], []
    for mine, theirs in zip(cells.flatten(2), others.flatten(2), strict=True):
        like = F.normalize(mine, dim=0).T @ F.normalize(theirs, dim=0)
        queries.append(term.head.queries(mine.T))
        keys.append(term.head.keys(theirs.T, batch.average["dense_projector"])[like.argmax(1)])
    expected = info_nce_by_hand(torch.cat(queries), torch.cat(keys), stored, 0.2)
    torch.testing.assert_close(found["loss_dense"], 0.5 * expected)


def test_dual_reconstruction():
    model = detector().train()
    channels, stride = deepest(model.backbone.body)
    config = section().reconstruction
    term = DualReconstruction(0.1, 0.9, config, channels=channels, stride=stride).train()
    batch = seen(term, model)
    assert not batch.average, "no momentum network"
    found = term(batch)
    made = term.generator(batch.features(0).deepest)
    torch.testing.assert_close(found["loss_ar"], 0.1 * F.mse_loss(made, batch.view(0).batch.tensors))
    assert found["loss_sr"] > 0
    only = DualReconstruction(0.0, 0.9, config, channels=channels, stride=stride)
    assert only(seen(only, model)).keys() == {"loss_sr"}
    shown = term.shown(batch)
    assert shown["reconstruction"].shape == (2, 3, 64, 64) and shown["masks"].shape == (2, 4)


def test_proposals_as_objects_have_one_class():
    model = detector()
    term = ClassAwareDetection(1.0)
    objects = as_objects(seen(term, model).view(0))
    assert [len(own["boxes"]) for own in objects] == [3, 3] and all(not own["labels"].any() for own in objects)


def test_views_features_and_keys_are_computed_once():
    model = detector().train()
    term = LocalContrast(1.0, head("box", model), model.roi_heads.pool)
    batch = seen(term, model)
    calls: list[str] = []
    model.backbone.body["layer1"].register_forward_hook(lambda *_: calls.append("trained"))
    batch.average["backbone"]["layer1"].register_forward_hook(lambda *_: calls.append("momentum"))
    for _ in range(2):
        term.eval()(batch)
    assert calls == ["trained", "momentum"]


def test_detection_looks_at_the_weak_picture_where_there_is_one():
    model = detector().train()
    term = ClassAwareDetection(1.0)
    images, targets = samples()
    weak = [torch.flip(image, (-1,)) for image in images]
    for target, picture in zip(targets, weak, strict=True):
        target["weak"] = picture
    own = Iteration(model, MomentumNetwork({}), images, targets)
    assert own.detected == 3 and [len(boxes) for boxes in own.view(3).boxes] == [0, 0]
    torch.manual_seed(1)
    found = term(own)
    torch.manual_seed(1)
    wanted = model(weak, [{key: target[key] for key in ("boxes", "labels")} for target in targets])
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_what_lies_on_a_cut_object_is_no_background(monkeypatch):
    target = {"boxes": torch.tensor([[0.0, 0, 20, 20]]), "ignored": torch.tensor([[40.0, 0, 60, 20]])}
    boxes = torch.tensor([[41.0, 1, 59, 19], [0, 0, 20, 20], [25, 0, 65, 40], [20, 40, 30, 60], [0, 0, 60, 20]])
    assert on_ignored(boxes, target).tolist() == [True, False, False, False, False]
    over = {**target, "ignored": torch.tensor([[0.0, 0, 60, 20]])}  # an object on it stays one
    assert on_ignored(boxes, over).tolist() == [True, False, False, False, False]
    assert not on_ignored(boxes, {**target, "ignored": torch.zeros((0, 4))}).any()

    model = detector().train()
    images, targets = samples()
    targets[0]["ignored"], targets[1]["ignored"] = torch.tensor([[0.0, 0, 64, 64]]), torch.zeros((0, 4))
    batch = model.batch(images)
    outputs = model.from_features(model.backbone(batch.tensors), batch, targets)
    (left,) = spared(model, outputs, targets)
    on = left.rpn.left_out
    assert on[0].any() and not on[0].all() and not on[1].any()
    before, after = outputs.proposals.valid.sum(1), left.proposals.valid.sum(1)
    assert after[0] < before[0] and after[1] == before[1]
    given = []
    original = rpn.sample_rows
    monkeypatch.setattr(rpn, "sample_rows", lambda *draw: given.append(draw[1]) or original(*draw))
    losses = model.losses(left, targets)
    assert not (given[0] & on).any() and given[0][1].any()
    assert all(torch.isfinite(value) for value in losses.values())


def test_a_one_stage_detector_ignores_cut_objects():
    model = dense_detector("atss").train()
    images, targets = samples()
    targets[0]["ignored"], targets[1]["ignored"] = torch.tensor([[0.0, 0, 64, 64]]), torch.zeros((0, 4))
    batch = model.batch(images)
    outputs = model.from_features(model.backbone(batch.tensors), batch, targets)
    same, assigned = spared(model, outputs, targets)
    assert same is outputs and (assigned[0] == -2).any() and not (assigned[1] == -2).any()
    assert (assigned[0] >= 0).any()
    assert all(torch.isfinite(value) for value in model.losses(outputs, targets, assigned).values())
