"""Deformable attention by a fused kernel, a made-up one in its place: what it is given, gradients, none to be had."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tailfin.models import deformable_attention, fused_attention
from tailfin.models.deformable_attention import sample

SHAPES = [(5, 4), (3, 2)]
CUDA = torch.device("cuda")


def read(value: Tensor, sides: Tensor, starts: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sums of eq. 2 of Deformable DETR, corner by corner, from the layouts that the kernel has."""
    batch, queries, heads = places.shape[:3]
    result = value.new_zeros(batch, queries, heads, value.shape[3])
    picture, head = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None]
    for level, (height, width) in enumerate(sides.tolist()):
        x, y = places[:, :, :, level, :, 0] * width - 0.5, places[:, :, :, level, :, 1] * height - 0.5
        for column in (x.floor(), x.floor() + 1):
            for row in (y.floor(), y.floor() + 1):
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                cell = int(starts[level]) + (row * width + column).long().where(inside, torch.zeros(()).long())
                share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside * weights[:, :, :, level]
                result = result + (value[picture, cell, head] * share[..., None]).sum(3)
    return result.flatten(2)


class Kernel:
    """As strict as the real one about what it is given."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def ms_deform_attn_forward(self, *given: Any) -> Tensor:
        self.check(*given)
        with torch.no_grad():
            return read(*given[:5])

    def ms_deform_attn_backward(self, *given: Any) -> list[Tensor]:
        *inputs, upstream, step = given
        self.check(*inputs, step)
        assert upstream.is_contiguous()
        value, sides, starts, places, weights = inputs
        leaves = [own.detach().requires_grad_() for own in (value, places, weights)]
        with torch.enable_grad():
            found = read(leaves[0], sides, starts, *leaves[1:])
        return list(torch.autograd.grad(found, leaves, upstream))

    def check(self, value: Tensor, sides: Tensor, starts: Tensor, places: Tensor, weights: Tensor, step: int) -> None:
        assert all(own.is_contiguous() for own in (value, sides, starts, places, weights))
        assert sides.dtype == starts.dtype == torch.int64
        assert sides.tolist() == [list(shape) for shape in SHAPES] and starts.tolist() == [0, 20]
        assert value.dtype == places.dtype == weights.dtype
        assert len(value) % min(len(value), step) == 0
        self.steps.append(step)


@pytest.mark.parametrize(("batch", "step"), [(2, 2), (3, 1)])
def test_the_kernel_is_given_what_it_takes(monkeypatch, batch, step):
    """Values and gradients are those without it, whatever the strides of what comes in."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn((batch, 4, 26, 3), generator=generator).transpose(1, 2).requires_grad_()
    places = (torch.rand((batch, 6, 4, 2, 2, 2), generator=generator) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand((batch, 6, 4, 2, 2), generator=generator).requires_grad_()
    upstream = torch.randn((batch, 12, 6), generator=generator).transpose(1, 2)
    results = []
    for own in (Kernel(), None):
        monkeypatch.setattr(deformable_attention, "kernel", lambda _, own=own: own)
        found = sample(value, SHAPES, places, weights)
        results.append((found, *torch.autograd.grad(found, (value, places, weights), upstream)))
        assert own is None or own.steps == [step, step]
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def test_looked_for_once_on_cuda_alone(monkeypatch, capsys):
    asked, made = [], Kernel()
    monkeypatch.setitem(
        sys.modules,
        "kernels",
        SimpleNamespace(get_kernel=lambda name, version: asked.append((name, version)) or made),
    )
    fused_attention._loaded.cache_clear()
    try:
        assert fused_attention.kernel(torch.device("cpu")) is None and not asked
        assert fused_attention.kernel(CUDA) is made and fused_attention.kernel(CUDA) is made
    finally:
        fused_attention._loaded.cache_clear()
    assert asked == [("kernels-community/deformable-detr", 1)]
    assert capsys.readouterr().err == ""


def test_none_to_be_had_is_said_once(monkeypatch, capsys):
    def get_kernel(name: str, version: int) -> None:
        raise OSError("no route to the hub\nand more lines")

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    fused_attention._loaded.cache_clear()
    try:
        assert fused_attention.kernel(CUDA) is None and fused_attention.kernel(CUDA) is None
        said = capsys.readouterr().err.splitlines()
        fused_attention._loaded.cache_clear()
        monkeypatch.setitem(sys.modules, "kernels", None)  # not installed
        assert fused_attention.kernel(CUDA) is None
    finally:
        fused_attention._loaded.cache_clear()
    assert len(said) == 1 and "kernels-community/deformable-detr" in said[0] and said[0].endswith("no route to the hub")
    assert capsys.readouterr().err == ""
