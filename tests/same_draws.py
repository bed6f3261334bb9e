"""torchvision's detectors with the random draws of tailfin's, so that their losses can be compared.

with recorded() as draws:
    ours = model(pictures, targets)
draws.give(twin.rpn, 0), draws.give(twin.roi_heads, 1)       # in the order in which they were drawn
theirs = twin(pictures, targets)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tailfin.models import row_sampling, rpn
from tailfin.models.heads import roi_heads


class Draws:
    """Calls of `sample_rows`: bool [B, N] of each, the rows that it drew."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def sample_rows(self, positive: Tensor, negative: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        index, drawn = row_sampling.sample_rows(positive, negative, *options)
        mask = torch.zeros_like(positive, dtype=torch.int64).scatter_add_(1, index, drawn.long())
        assert mask.max() <= 1
        self.calls.append(mask.bool())
        return index, drawn

    def give(self, part: Any, call: int, objects: list[int] | None = None) -> None:
        """Let torchvision's RPN or RoI heads draw what call number `call` drew.

        objects: of each picture, where they stand behind the proposals, from which padding parts them here.
        """
        mask = self.calls[call]

        def sampler(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            positive, negative = [], []
            for number, own in enumerate(labels):
                drawn = mask[number]
                if objects is not None:
                    count, start = objects[number], mask.shape[1] - max(1, *objects)
                    drawn = torch.cat([drawn[: len(own) - count], drawn[start : start + count]])
                assert drawn.shape == own.shape and drawn.sum() == mask[number].sum()
                positive.append((drawn & (own >= 1)).to(torch.uint8))
                negative.append((drawn & (own == 0)).to(torch.uint8))
            return positive, negative

        part.fg_bg_sampler = sampler


@contextlib.contextmanager
def recorded() -> Iterator[Draws]:
    """What is drawn inside is kept."""
    draws = Draws()
    with pytest.MonkeyPatch.context() as patch:
        for module in (rpn, roi_heads):
            patch.setattr(module, "sample_rows", draws.sample_rows)
        yield draws


def first_rows() -> None:
    """From now on the first rows are drawn, in this process."""

    def sample_rows(positive: Tensor, negative: Tensor, count: int, share: float) -> tuple[Tensor, Tensor]:
        keys = 1 / (1 + torch.arange(positive.shape[1])).expand(positive.shape)
        return row_sampling.sample_rows(positive, negative, count, share, keys)

    rpn.sample_rows = roi_heads.sample_rows = sample_rows
