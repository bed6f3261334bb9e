"""Constants are kept, but for those that an export makes, which hold no numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tailfin.models.constants import constant

VALUES = [3.0, 5.0, 7.25]  # of no other test


class Times(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * constant(VALUES, x.device)


def test_an_export_leaves_the_model_as_it_is():
    model, x = Times(), torch.ones(2, 3)
    program = torch.export.export(model, (x,), strict=False)
    assert model(x).tolist() == program.module()(x).tolist() == [VALUES, VALUES]
    assert constant(VALUES, x.device) is constant(tuple(VALUES), x.device)
