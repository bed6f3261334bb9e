"""Small constants on a device, uploaded once: an upload in every step makes the device wait for the host."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KEPT = 256  # constants; sizes of feature maps are among them, of which training at several sizes has some dozens


def constant(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of plain numbers, or of rows of them, to be read and never changed."""
    given = tuple(tuple(row) if isinstance(row, list | tuple) else row for row in values)
    if torch.compiler.is_exporting():  # a tensor without numbers, of use to that graph alone
        return torch.tensor(given, device=device, dtype=dtype)
    return _constant(given, device, dtype)


@functools.lru_cache(KEPT)
def _constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what evaluation has made serves training too
        return torch.tensor(values, device=device, dtype=dtype)
