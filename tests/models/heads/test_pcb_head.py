"""PCB's iterative head: what each pass sees, how the losses are weighted, what the test outputs are."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from tailfin.losses.pcb import PCB
from tailfin.losses.softmax import Softmax
from tailfin.models.heads.pcb import IterativeRoIHeads, Refinement
from tailfin.models.heads.roi_heads import BoxPredictor
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[9, 4, 1], instance_count=[9, 4, 1], num_images=12)


def build(loss=None, **options):
    torch.manual_seed(0)
    loss = loss or PCB(STATS)
    pool = PyramidRoIAlign(["0"], [8], 3, 2)
    parts = (pool, TwoMLPHead(4 * 9, 16), BoxPredictor(16, loss, False), loss)
    return IterativeRoIHeads(*parts, channels=4, roi_size=3, batch=30, **options)


def inputs():
    torch.manual_seed(1)
    boxes = torch.tensor([[10.0, 10.0, 40.0, 40.0], [60.0, 60.0, 100.0, 90.0], [5.0, 60.0, 50.0, 100.0]])
    proposals = torch.cat([boxes.repeat(4, 1) + torch.randn((12, 4)), torch.tensor([[80.0, 5.0, 120.0, 40.0]] * 8)])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 1, 2])}]
    return {"0": torch.randn((1, 4, 16, 16))}, [proposals], [(128, 128)], targets


def test_refinement_is_a_factor_per_cell_and_an_offset_per_channel():
    refinement = Refinement(num_logits=4, num_deltas=12, channels=5, size=3, hidden=8)
    features, logits, deltas = torch.randn((6, 5, 3, 3)), torch.randn((6, 4)), torch.randn((6, 12))
    found = refinement(features, logits, deltas)
    factor = refinement.spatial(deltas).reshape(6, 3, 3)
    offset = refinement.channel(logits)
    torch.testing.assert_close(found, torch.einsum("ncyx,nyx->ncyx", features, factor) + offset[:, :, None, None])


def test_losses_are_weighted_over_the_passes():
    loss = PCB(STATS, start_epoch=0)
    loss.fg_confusion_matrix.copy_(torch.full((3, 3), 0.1) + 0.7 * torch.eye(3))
    loss.num_inst_cnt += 1
    heads = build(loss)
    features, proposals, sizes, targets = inputs()
    heads.train()
    loss.eval()  # frozen statistics, so that the passes can be repeated
    torch.manual_seed(2)
    detections, found = heads(features, proposals, sizes, targets)
    assert detections == []
    torch.manual_seed(2)
    rows = heads.sample(proposals, targets)
    passes = heads.passes(features, rows.boxes, sizes)
    values = [loss(logits, rows.labels, iter_id=step) for step, (logits, _) in enumerate(passes)]
    assert found["loss_classifier"].item() == pytest.approx(
        (0.2 * values[0] + 0.2 * values[1] + 0.6 * values[2]).item(), rel=1e-5
    )
    expected = heads.box_regression_loss(passes[2][1], rows.boxes, rows.labels, rows.matched)
    assert found["loss_box_reg"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.equal(passes[0][0], passes[1][0])
    (found["loss_classifier"] + found["loss_box_reg"]).backward()
    for name, value in heads.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


def test_each_pass_sees_the_last_ones_output():
    heads = build()
    features, proposals, sizes, _ = inputs()
    with torch.no_grad():
        passes = heads.passes(features, proposals, sizes)
        pooled = heads.pool(features, proposals, sizes)
        for logits, deltas in passes:
            torch.testing.assert_close(heads.predictor(heads.head(pooled)), (logits, deltas))
            pooled = heads.refinement(pooled, logits, deltas)


def test_detections_are_those_of_the_last_pass():
    heads = build().eval()
    features, proposals, sizes, _ = inputs()
    with torch.no_grad():
        found, empty = heads(features, proposals, sizes)
        logits, deltas = heads.passes(features, proposals, sizes)[-1]
        expected = heads.detect(heads.loss.scores(logits), deltas, proposals, sizes, heads.limits)
    assert empty == {}
    assert len(found[0]["boxes"]) > 0
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value)


def test_a_loss_without_passes_of_its_own_and_other_weights():
    heads = build(Softmax(STATS), step_weights=(0.5, 0.5)).train()
    _, found = heads(*inputs())
    assert torch.isfinite(found["loss_classifier"])
    assert len(heads.passes(*inputs()[:3])) == 2


def test_mistakes():
    with pytest.raises(ValueError, match="step_weights has 2 entries, the loss expects 3"):
        build(step_weights=(0.5, 0.5))
    heads = build().train()
    with pytest.raises(ValueError, match="training needs targets"):
        heads(*inputs()[:3])
    heads.extra_rows = lambda *_: None
    with pytest.raises(ValueError, match="no extra rows"):
        heads(*inputs())
