"""Float32 for what must not be rounded: class logits and box deltas under autocast.

A half-precision linear layer gives logits in steps of 0.06 to 0.125 at |z| = 20: hundreds of equal scores among
proposals x classes, in whatever type they are kept afterwards. So classifiers and box layers compute in float32, also
where the layers before them do not::

    logits = in_float32(classifier, features)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def in_float32(module: Callable[..., Any], features: Tensor, *more: Any) -> Any:
    """`module(features, *more)` without autocast, on `features` in float32 (float64 stays)."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    with torch.autocast(features.device.type, enabled=False):
        return module(features, *more)
