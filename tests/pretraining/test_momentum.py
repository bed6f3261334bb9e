"""The momentum network follows, and takes no gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tailfin.pretraining.momentum import cosine_momentum, follow, momentum_copy


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    average = momentum_copy(module)
    module(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return average, module


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
def test_parameters_are_averaged_and_buffers_copied(momentum):
    average, module = pair()
    before = [parameter.clone() for parameter in average.parameters()]
    follow(average, module, momentum)
    for old, mine, theirs in zip(before, average.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine, momentum * old + (1 - momentum) * theirs)
        if momentum in (0, 1):
            assert torch.equal(mine, old if momentum else theirs)
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_copy_takes_no_gradients_and_shares_nothing():
    average, module = pair()
    average(torch.randn(8, 3)).sum()
    module(torch.randn(8, 3)).sum().backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in average.parameters())
    assert all(parameter.grad is not None for parameter in module.parameters())
    own = {parameter.data_ptr() for parameter in average.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in module.parameters())


@given(start=st.floats(0, 1), progress=st.floats(0, 1))
def test_cosine_momentum_rises_from_start_to_one(start, progress):
    assert cosine_momentum(start, 0) == pytest.approx(start)
    assert cosine_momentum(start, 1) == pytest.approx(1)
    assert start - 1e-9 <= cosine_momentum(start, progress) <= 1
    assert cosine_momentum(start, progress) <= cosine_momentum(start, min(1, progress + 0.1)) + 1e-12
