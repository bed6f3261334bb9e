"""RIO's feature bank: what joins the batch, in which order the bank moves, state."""

from __future__ import annotations

import pytest
import torch

from tailfin.models.features.rio import FeatureBank


def rows(*pairs):
    """Features [n, 1] and labels [n] from (value, label) pairs."""
    return torch.tensor([[float(value)] for value, _ in pairs]), torch.tensor([label for _, label in pairs])


def test_newest_rows_of_present_classes_join_before_the_update():
    bank = FeatureBank([7, 2], 1, size=3, cache=2)
    features, labels = rows((1, 2), (2, 5), (3, 2), (4, 2), (5, 2))
    joined, joined_labels = bank(features, labels)
    assert torch.equal(joined, features)  # the bank was empty
    assert torch.equal(joined_labels, labels)

    features, labels = rows((6, 7), (7, 2), (8, 0), (9, -1))
    joined, joined_labels = bank(features, labels)
    # class 2 had 3, 4, 5: its two newest; class 7 had none
    assert joined.flatten().tolist() == [6, 7, 8, 9, 5, 4]
    assert joined_labels.tolist() == [7, 2, 0, -1, 2, 2]

    joined, joined_labels = bank(*rows((10, 2), (11, 7)))
    assert joined.flatten().tolist() == [10, 11, 7, 5, 6]
    assert joined_labels.tolist() == [2, 7, 2, 2, 7]
    # a class that is not there brings nothing
    assert bank(*rows((12, 0)))[0].flatten().tolist() == [12]


def test_rows_are_detached_and_the_batch_is_not():
    bank = FeatureBank([0], 1, cache=5)
    features, labels = rows((1, 0), (2, 0))
    bank(features.requires_grad_(), labels)
    assert not bank.features.requires_grad
    again = torch.tensor([[3.0]], requires_grad=True)
    joined, _ = bank(again, torch.tensor([0]))
    joined.square().sum().backward()
    assert joined.flatten().tolist() == [3, 2, 1]
    assert again.grad.tolist() == [[6.0]]
    assert features.grad is None


def test_evaluation_mode_changes_nothing_and_state_is_saved():
    bank, other = FeatureBank([0, 1], 1), FeatureBank([0, 1], 1)
    bank(*rows((1, 0), (2, 1)))
    other.load_state_dict(bank.state_dict())
    bank.eval()
    features, labels = rows((3, 0))
    joined, _ = bank(features, labels)
    assert torch.equal(joined, features)
    assert torch.equal(other(features, labels)[0], bank.train()(features, labels)[0])
    assert torch.equal(bank.features, other.features)


def test_defaults_empty_batches_and_no_targets():
    bank = FeatureBank(torch.tensor([3]), 2)
    assert bank.features.shape == (1, 60, 2)
    for n in (50, 50):
        joined, _ = bank(torch.randn(n, 2), torch.full((n,), 3))
    assert len(joined) == 70
    assert bank.written.tolist() == [100]
    empty, labels = bank(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert len(empty) == len(labels) == 0
    features = torch.randn(4, 2)
    assert torch.equal(FeatureBank([], 2)(features, torch.arange(4))[0], features)


def test_half_precision_rows_join_in_their_dtype():
    bank = FeatureBank([0], 1)
    for _ in range(2):
        joined, _ = bank(torch.ones((1, 1), dtype=torch.bfloat16), torch.tensor([0]))
    assert joined.dtype == torch.bfloat16
    assert len(joined) == 2


def test_mistakes():
    with pytest.raises(ValueError, match="size must be at least 1"):
        FeatureBank([0], 1, size=0)
