"""Weights into a model: what is loaded, dropped and new is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tailfin.errors import UserError
from tailfin.weights import load_fitting, load_weights, load_whole, state_of


def model() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4)})


def test_what_fits_is_loaded_and_the_rest_is_told():
    own = model()
    before = own["head"].bias.detach().clone()
    weights = {"body.weight": torch.ones(3, 2), "head.weight": torch.ones(5, 3), "tail.weight": torch.ones(1)}
    loaded = load_fitting(own, weights)
    assert (loaded.names, loaded.reshaped, loaded.unknown) == ({"body.weight"}, ("head.weight",), ("tail.weight",))
    assert loaded.new == ("body.bias", "head.bias")
    assert bool((own["body"].weight == 1).all()) and torch.equal(own["head"].bias, before)
    lines = load_weights(own, weights, "FILE")
    assert lines[0] == "FILE: 1 of 4 weights loaded"
    assert "  another shape: 1 (head.weight)" in lines and "  start anew: 2 (body.bias, head.bias)" in lines


def test_names_that_are_not_wanted_stay():
    own = model()
    loaded = load_fitting(
        own,
        {key: torch.zeros_like(value) for key, value in own.state_dict().items()},
        lambda name: name.startswith("body."),
    )
    assert loaded.names == {"body.weight", "body.bias"} == state_of(own, own["body"], None)
    assert loaded.dropped == loaded.missing == ("head.bias", "head.weight")
    assert float(own["head"].weight.detach().abs().sum()) > 0


def test_everything_or_a_mistake():
    own = model()
    whole = {key: torch.zeros_like(value) for key, value in own.state_dict().items()}
    load_whole(own, whole, "FILE")
    assert float(own["head"].weight.detach().abs().sum()) == 0
    del whole["body.bias"]
    with pytest.raises(UserError, match=r"FILE: its weights do not fit its recipe: not in the file: 1 \(body.bias\)"):
        load_whole(own, whole, "FILE")
    with pytest.raises(UserError, match="none of its 1 weights fits"):
        load_weights(own, {"other": torch.ones(1)}, "FILE")
