"""LOCE's feature memory: rings, drawing against the mean score, state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.models.features.feature_memory import FeatureMemory, ring_slots
from tailfin.models.features.hallucination import inverse_cdf


def rows(values, labels):
    """Features [n, 1, 1, 1] with the given values, boxes (value, 0, 0, 0) and ground truth (0, value, 0, 0)."""
    values = torch.tensor(values, dtype=torch.float32)
    boxes = torch.zeros(len(values), 4)
    boxes[:, 0] = values
    return values.view(-1, 1, 1, 1), torch.tensor(labels, dtype=torch.int64), boxes, boxes.roll(1, dims=1)


@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
def test_classes_are_drawn_as_in_the_reference_vectors(golden_dir: Path, case: str):
    data = np.load(golden_dir / "loce.npz")
    mean_score = torch.from_numpy(data[f"{case}/step2/state_after/mean_score"])[:-1]
    uniform = torch.from_numpy(data[f"{case}/mfs/uniform_sorted"])
    selected = data[f"{case}/mfs/selected_classes"]
    weights = 1 / (mean_score + 1e-7)
    np.testing.assert_allclose(weights / weights.sum(), data[f"{case}/mfs/sample_probability"], rtol=1e-6)
    np.testing.assert_array_equal(inverse_cdf(weights, uniform), selected)

    memory = FeatureMemory(len(mean_score), (1, 1, 1), size=3)
    memory.push(*rows(range(len(mean_score)), range(len(mean_score))))
    drawn = memory.sample(mean_score, draws=(uniform, torch.rand(8, 4)))
    np.testing.assert_array_equal(drawn.labels, selected.repeat(4))
    np.testing.assert_array_equal(drawn.features.flatten(), selected.repeat(4))
    np.testing.assert_array_equal(drawn.boxes[:, 0], selected.repeat(4))
    np.testing.assert_array_equal(drawn.gt_boxes[:, 1], selected.repeat(4))


def test_ring_keeps_the_newest():
    memory = FeatureMemory(3, (1, 1, 1), size=3)
    memory.push(*rows([1, 2, 10], [0, 0, 2]))
    memory.push(*rows([3, 4, 99, 98, 5], [0, 0, 3, -1, 0]))  # 99 and 98 are of no class
    assert sorted(memory.features[0].flatten().tolist()) == [3, 4, 5]
    assert sorted(memory.boxes[0, :, 0].tolist()) == [3, 4, 5]
    assert sorted(memory.gt_boxes[0, :, 1].tolist()) == [3, 4, 5]
    assert memory.features[2].flatten().tolist() == [10, 0, 0]
    assert memory.written.tolist() == [5, 0, 1]


@settings(deadline=None, max_examples=40)
@given(
    batches=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5),
    size=st.integers(1, 5),
)
def test_rings_are_lists_cut_to_their_newest(batches, size):
    written = torch.zeros(4, dtype=torch.int64)
    stored, expected, number = torch.full((4, size), -1), [[] for _ in range(4)], 0
    for batch in batches:
        index = torch.tensor(batch, dtype=torch.int64)
        value = torch.arange(number, number + len(batch))
        kept, slot = ring_slots(index, written, size)
        stored[index[kept], slot] = value[kept]
        written += torch.bincount(index, minlength=4)
        for ring, item in zip(batch, value.tolist(), strict=True):
            expected[ring].append(item)
        number += len(batch)
    for ring in range(4):
        assert sorted(x for x in stored[ring].tolist() if x >= 0) == expected[ring][-size:]


def test_stored_rows_are_all_reached_and_empty_places_never():
    memory = FeatureMemory(2, (1, 1, 1), size=5, sampled_num_classes=2, sampled_num_features=300)
    memory.push(*rows([1, 2, 3], [1, 1, 1]))
    drawn = memory.sample(torch.tensor([0.5, 0.5]), generator=torch.Generator().manual_seed(0))
    assert set(drawn.labels.tolist()) <= {1}
    drawn = memory.sample(torch.tensor([1e9, 0.5]), generator=torch.Generator().manual_seed(0))
    assert drawn.labels.tolist() == [1] * 600
    assert set(drawn.features.flatten().tolist()) == {1, 2, 3}
    edges = memory.sample(torch.tensor([1e9, 0.5]), draws=(torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [1.0]])))
    assert edges.features.flatten().tolist() == [1, 3]


def test_empty_memory_gives_no_rows():
    drawn = FeatureMemory(4, (2, 3, 3)).sample(torch.full((4,), 0.01))
    assert drawn.features.shape == (0, 2, 3, 3)
    assert drawn.labels.shape == (0,)
    assert drawn.boxes.shape == drawn.gt_boxes.shape == (0, 4)
    memory = FeatureMemory(4, (1, 1, 1))
    memory.push(*rows([], []))
    assert not memory.written.any()


def test_state_is_saved_and_changes_in_train_mode_only():
    memory, other = (FeatureMemory(3, (1, 1, 1), size=2) for _ in range(2))
    memory.push(*rows([1, 2, 3, 4], [0, 1, 1, 1]))
    other.load_state_dict(memory.state_dict())
    memory.eval()
    memory.push(*rows([7, 8], [0, 2]))
    score = torch.tensor([0.1, 0.2, 0.3])
    draws = torch.rand(8), torch.rand(8, 4)
    for one, another in zip(memory.sample(score, draws=draws), other.sample(score, draws=draws), strict=True):
        assert torch.equal(one, another)
    assert not memory.sample(score).features.requires_grad


def test_dtype_and_place_of_the_features():
    memory = FeatureMemory(2, (1, 1, 1), dtype=torch.float16, keep_on_cpu=True).to("meta")
    assert memory.features.device.type == "cpu"
    assert memory.boxes.device.type == "meta"
    assert "features" in memory.state_dict()
    assert FeatureMemory(2, (1, 1, 1)).to("meta").features.device.type == "meta"
    half = FeatureMemory(2, (1, 1, 1), dtype=torch.float16)
    half.push(*rows([1.5], [0]))
    assert half.sample(torch.tensor([0.1, 0.1])).features.dtype == torch.float16


def test_mistakes():
    with pytest.raises(ValueError, match="size"):
        FeatureMemory(2, (1, 1, 1), size=0)
