"""Deformable attention's sampling in one kernel, on CUDA devices where the package `kernels` is installed.

The kernel is the one of `kernels-community/deformable-detr`, Deformable DETR's own; `kernels` downloads it once, into
the cache of Hugging Face's hub. Where that fails the caller samples without it. Not run on a GPU so far.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tailfin.collectives import this_rank
from tailfin.models.constants import constant

REPOSITORY, VERSION = "kernels-community/deformable-detr", 1
STEP = 64  # pictures of one launch at most; it divides the batch


def kernel(device: torch.device) -> Any | None:
    """The module with `ms_deform_attn_forward` and `ms_deform_attn_backward`, or none for this device."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return _loaded()


@functools.lru_cache(1)
def _loaded() -> Any | None:
    """Looked for once; why there is none is said once, by the first process."""
    try:
        from kernels import get_kernel
    except ImportError:
        return None
    try:
        return get_kernel(REPOSITORY, version=VERSION)
    except Exception as error:  # no network, no build for this torch or device: any of it only costs time
        if this_rank()[0] == 0:
            reason = str(error).partition("\n")[0]
            print(f"deformable attention without its fused kernel ({REPOSITORY}): {reason}", file=sys.stderr)
        return None


class FusedSampling(torch.autograd.Function):
    """`deformable_attention.sample` by a kernel: [B, Q, H * D]; for backward its inputs alone are kept."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, places: Tensor, weights: Tensor, shapes: list[tuple[int, int]], kernel: Any
    ) -> Tensor:
        value, places, weights = value.contiguous(), places.contiguous(), weights.contiguous()
        cells = [height * width for height, width in shapes]
        ctx.sides = constant(shapes, value.device, torch.int64)
        ctx.starts = constant([sum(cells[:level]) for level in range(len(cells))], value.device, torch.int64)
        ctx.kernel, ctx.step = kernel, math.gcd(len(value), STEP)
        ctx.save_for_backward(value, places, weights)
        result: Tensor = kernel.ms_deform_attn_forward(value, ctx.sides, ctx.starts, places, weights, ctx.step)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        value, places, weights = ctx.saved_tensors
        to_value, to_places, to_weights = ctx.kernel.ms_deform_attn_backward(
            value, ctx.sides, ctx.starts, places, weights, upstream.contiguous(), ctx.step
        )
        return to_value, to_places, to_weights, None, None
