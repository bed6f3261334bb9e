"""Rows drawn for a batch at once: how many, which, and what the host is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou_loss

from tailfin.losses.base import counts_of
from tailfin.models.assigners import giou_loss
from tailfin.models.row_sampling import chosen_rows, padded, sample_rows


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 40),
    count=st.integers(1, 50),
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    odds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_numbers_of_rows(seed, rows, count, share, odds):
    """torchvision's: positives up to the share, negatives for the rest, each at most as many as there are."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(3, rows, generator=generator)
    positive = kind < odds[0] * 0.5
    negative = (kind > 0.5) & (kind < 0.5 + odds[1])
    index, drawn = sample_rows(positive, negative, count, share, torch.rand(3, rows, generator=generator))
    assert index.shape == drawn.shape == (3, min(count, rows))
    for own, valid, good, bad in zip(index, drawn, positive, negative, strict=True):
        chosen = own[valid]
        assert torch.equal(chosen, chosen.unique())  # ascending, each once
        assert not valid[len(chosen) :].any()  # those that are drawn stand first
        wanted = min(int(count * share), int(good.sum()))
        assert good[chosen].sum() == wanted
        assert bad[chosen].sum() == min(count - wanted, int(bad.sum()))
        assert (good | bad)[chosen].all()


def test_every_row_is_as_likely():
    torch.manual_seed(0)
    positive = torch.tensor([[True] * 4 + [False] * 6]).expand(4000, -1)
    index, drawn = sample_rows(positive, ~positive, 5, 0.4)
    found = torch.zeros(10).index_add_(0, index[drawn], torch.ones(int(drawn.sum()))) / 4000
    assert torch.allclose(found[:4], torch.tensor(2 / 4), atol=0.04)
    assert torch.allclose(found[4:], torch.tensor(3 / 6), atol=0.04)


def test_the_draw_is_that_of_the_generator():
    mask = torch.rand(2, 50) < 0.5
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(sample_rows(mask, ~mask, 10, 0.5)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_chosen_rows():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    pictures, levels = torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.tensor([[2, 0, 0], [0, 1, 2]])
    chosen = chosen_rows(mask, pictures, 2, levels, 3)
    assert chosen.rows.tolist() == [0, 2, 5]
    assert (chosen.per_picture, chosen.per_level) == ([2, 1], [1, 0, 2])
    none = chosen_rows(mask & False, pictures, 2, levels, 3)
    assert len(none.rows) == 0 and (none.per_picture, none.per_level) == ([0, 0], [0, 0, 0])


def test_padded_boxes_come_apart_again():
    boxes = [torch.rand(3, 4), torch.rand(0, 4), torch.rand(1, 4).double().float()]
    joined = padded(boxes)
    assert joined.boxes.shape == (3, 3, 4) and joined.valid.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    for own, wanted in zip(joined.split()[0], boxes, strict=True):
        assert torch.equal(own, wanted)
    assert padded(boxes[1:2]).boxes.shape == (1, 1, 4)


def test_counts_of():
    index = torch.tensor([0, 2, 2, 4])
    found = counts_of(index, 5, torch.float64)
    assert torch.equal(found, torch.bincount(index, minlength=5).double())
    assert counts_of(index[:0], 3, torch.int64).tolist() == [0, 0, 0]


def test_giou_loss_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    boxes, others = (50 * torch.rand(40, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    boxes = torch.cat([boxes, boxes + 1 + 30 * torch.rand(40, 2, generator=generator)], 1).requires_grad_()
    others = torch.cat([others, others + 1 + 30 * torch.rand(40, 2, generator=generator)], 1)
    found, wanted = giou_loss(boxes, others), generalized_box_iou_loss(boxes, others)
    assert wanted.min() < 1 < wanted.max()  # some overlap, some lie apart
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    mine, theirs = (torch.autograd.grad(value.sum(), boxes)[0] for value in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    assert giou_loss(boxes[:1].detach(), boxes[:1].detach()).item() == pytest.approx(0, abs=1e-6)
