"""Sixteen shifted copies of each ground-truth box."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tailfin.models.features.box_generator import COPIES, perturbed_boxes, sign_patterns


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_reference_vectors(golden_dir: Path, case: str):
    data = {key: value for key, value in np.load(golden_dir / "bacl_box_generator.npz").items() if key.startswith(case)}
    boxes = torch.from_numpy(data[f"{case}/gt_boxes"])
    size = int(data[f"{case}/img_h"]), int(data[f"{case}/img_w"])
    draws = torch.from_numpy(data[f"{case}/uniform_4x16"])
    np.testing.assert_array_equal(sign_patterns(boxes), data[f"{case}/sign_matrix_4x16"])
    copies = perturbed_boxes(boxes.double(), size, draws=draws)
    np.testing.assert_allclose(copies, data[f"{case}/proposals"], rtol=0, atol=1e-9)
    assert perturbed_boxes(boxes, size, draws=draws).dtype == torch.float32
    np.testing.assert_allclose(perturbed_boxes(boxes, size, draws=draws), copies, atol=2e-4)
    labels = torch.from_numpy(data[f"{case}/gt_labels"]).repeat_interleave(COPIES)
    np.testing.assert_array_equal(labels, data[f"{case}/proposal_labels"])


def test_signs_are_all_patterns():
    patterns = list(itertools.product([-1.0, 1.0], repeat=4))
    assert list(map(tuple, sign_patterns(torch.zeros(1)).t().tolist())) == patterns


def test_shared_draws_move_boxes_alike_and_independent_ones_do_not():
    boxes = torch.tensor([[100.0, 100, 160, 220], [300.0, 100, 360, 220]])
    shared = perturbed_boxes(boxes, (900, 900), generator=torch.Generator().manual_seed(1)).view(2, COPIES, 4)
    shift = torch.tensor([200.0, 0, 200, 0])
    torch.testing.assert_close(shared[1], shared[0] + shift)
    moved = (shared[0] - boxes[0]).abs()
    assert (moved <= torch.tensor([10.0, 20, 10, 20])).all()
    # copy 0 goes up and left, copy 15 down and right
    assert (shared[0, 0] <= boxes[0]).all()
    assert (shared[0, 15] >= boxes[0]).all()

    generator = torch.Generator().manual_seed(1)
    free = perturbed_boxes(boxes, (900, 900), independent=True, generator=generator).view(2, COPIES, 4)
    assert not torch.allclose(free[1], free[0] + shift)
    assert ((free - boxes[:, None]).abs() <= torch.tensor([10.0, 20, 10, 20])).all()
    assert (free < boxes[:, None]).any()
    assert (free > boxes[:, None]).any()


def test_independent_draws_by_hand():
    draws = torch.zeros((1, COPIES, 4))
    draws[0, 3] = torch.tensor([-1.0, 0.5, 1.0, -0.5])
    copies = perturbed_boxes(torch.tensor([[10.0, 20, 40, 80]]), (200, 100), independent=True, draws=draws)
    assert copies[3].tolist() == [5, 25, 45, 75]
    assert copies[4].tolist() == [10, 20, 40, 80]


def test_copies_stay_in_the_image():
    boxes = torch.tensor([[0.0, 0, 99, 49]])
    copies = perturbed_boxes(boxes, (50, 100), generator=torch.Generator().manual_seed(0))
    assert (copies >= 0).all()
    assert (copies[:, 0::2] <= 99).all()
    assert (copies[:, 1::2] <= 49).all()


@pytest.mark.parametrize("independent", [False, True])
def test_no_boxes_give_none(independent: bool):
    assert perturbed_boxes(torch.zeros((0, 4)), (50, 100), independent=independent).shape == (0, 4)


def test_seeds_and_mistakes():
    boxes = torch.tensor([[5.0, 5, 40, 40]])
    one, other = (perturbed_boxes(boxes, (50, 50), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"draws must be \[4, 16\]"):
        perturbed_boxes(boxes, (50, 50), draws=torch.zeros((16, 4)))
