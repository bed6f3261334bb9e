"""The generator's sizes, the mask inside its box, and both reconstruction losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.pretraining.reconstruction import (
    Generator,
    appearance_loss,
    mask_pictures,
    mask_rectangles,
    semantic_loss,
    unexplained,
    valid_pixels,
)


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    stride=st.sampled_from([16, 32]),
    bridge=st.sampled_from(["first_stride4", "bilinear"]),
)
def test_the_generator_gives_the_size_of_the_input(height, width, stride, bridge):
    generator = Generator(6, stride=stride, bridge=bridge, widths=(5, 4, 3))
    assert generator(torch.randn(1, 6, height, width)).shape == (1, 3, stride * height, stride * width)


def test_the_generator_is_the_papers():
    generator = Generator(2048)
    kernels = [layer for layer in generator.layers if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in kernels] == [
        *((2048, 512), (512, 256), (256, 64), (64, 3))
    ]
    assert {layer.kernel_size for layer in kernels} == {(4, 4)}
    assert sum(parameter.numel() for parameter in generator.parameters()) / 1e6 == pytest.approx(19.14, abs=0.01)
    half = Generator(6, bridge="half_target", widths=(5, 4, 3))
    assert half.scale == 0.5 and half(torch.randn(1, 6, 2, 3)).shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="16 and 32"):
        Generator(6, stride=8)


@pytest.mark.parametrize("bridge", ["bilinear", "first_stride4"])
def test_the_appearance_loss_falls_on_a_repeated_batch(bridge):
    torch.manual_seed(0)
    generator = Generator(8, widths=(16, 16, 8), bridge=bridge)
    features = torch.randn(2, 8, 1, 1)
    pictures = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8), size=32, mode="bilinear")  # no noise of pixels
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    values = []
    for _ in range(40):
        loss = appearance_loss(pictures, generator(features), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


def test_the_share_of_variance_that_is_left():
    """A copy leaves none, each channel's mean all of it, whatever stands in the padding."""
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 32, 32) * torch.tensor([0.5, 1.0, 2.0])[:, None, None] + 3
    valid = valid_pixels([(20, 32), (32, 10)], 32, 32, pictures.device)
    for inside in (None, valid):
        shown = pictures if inside is None else pictures * inside
        cells = torch.ones(2, 1, 32, 32, dtype=torch.bool) if inside is None else inside
        channels = shown.movedim(1, 0)[:, cells[:, 0]]  # [3, pixels]
        flat = channels.mean(dim=1)[:, None, None] * cells
        assert unexplained(shown, shown, inside).item() == 0
        assert unexplained(shown, flat, inside).item() == pytest.approx(1, rel=1e-4)
        assert unexplained(shown, (shown + flat) / 2, inside).item() == pytest.approx(0.25, rel=1e-4)
    assert unexplained(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), None).isfinite()  # pictures of one colour


def test_appearance_counts_real_pixels_alone():
    pictures, sizes = torch.zeros(2, 3, 32, 32), [(20, 32), (32, 10)]
    valid = valid_pixels(sizes, 32, 32, pictures.device)
    assert valid is not None and int(valid.sum()) == 20 * 32 + 32 * 10
    made = torch.full((2, 3, 32, 32), 2.0) * valid
    assert appearance_loss(pictures, made, valid).item() == pytest.approx(4)
    assert valid_pixels([(32, 32)] * 2, 32, 32, pictures.device) is None


BOX = st.tuples(st.floats(0, 40), st.floats(0, 40), st.floats(4, 23), st.floats(4, 23)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(st.lists(BOX, max_size=4), min_size=1, max_size=3),
    which=st.sampled_from(["one", "all"]),
    fraction=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 9),
)
def test_a_mask_is_a_quarter_of_its_box_and_inside_it(boxes, which, fraction, seed):
    tensors = [torch.tensor(own).reshape(-1, 4) for own in boxes]
    rectangles = mask_rectangles(tensors, fraction, which=which, generator=torch.Generator().manual_seed(seed))
    pictures = torch.full((len(boxes), 3, 64, 64), 7.0)
    masked = mask_pictures(pictures, rectangles)
    for own, found, picture in zip(tensors, rectangles, masked, strict=True):
        sides = found[:, 2:] - found[:, :2]
        kept = found[(sides > 0).all(1)]
        if fraction == 0 or len(own) == 0:
            assert len(kept) == 0
        elif fraction == 0.25:
            assert len(kept) == (1 if which == "one" else len(own))
        inside = torch.zeros(64, 64, dtype=torch.bool)
        for left, top, right, bottom in kept.tolist():
            inside[top:bottom, left:right] = True
            holders = own[(own[:, 0] <= left) & (own[:, 1] <= top) & (own[:, 2] >= right) & (own[:, 3] >= bottom)]
            assert len(holders), "the rectangle leaves every box"
            shares = [
                abs((right - left) - math.sqrt(fraction) * float(box[2] - box[0])) <= (0.5001 if fraction < 1 else 2)
                and abs((bottom - top) - math.sqrt(fraction) * float(box[3] - box[1]))
                <= (0.5001 if fraction < 1 else 2)
                for box in holders
            ]
            assert any(shares)
        assert (picture[:, inside] == 0).all()
        assert (picture[:, ~inside] == 7).all(), "nothing outside changes"


def test_noise_fills_the_same_place():
    torch.manual_seed(0)
    rectangles = torch.tensor([[[4, 6, 12, 20]]])
    masked = mask_pictures(torch.full((1, 3, 32, 32), 7.0), rectangles, fill="noise")
    changed = (masked != 7).all(1)[0]
    assert changed[6:20, 4:12].all() and int(changed.sum()) == 14 * 8
    assert masked[0, :, 6:20, 4:12].std().item() == pytest.approx(1, abs=0.2)


def test_semantic_loss_is_the_sum_over_layers_of_means():
    torch.manual_seed(0)
    shapes = [(2, 3, 4, 4), (2, 5, 2, 2)]
    wanted = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = sum(((one - two) ** 2).mean() for one, two in zip(wanted, found, strict=True))
    torch.testing.assert_close(semantic_loss(wanted, found), expected)
    assert torch.autograd.gradcheck(lambda *args: semantic_loss(args[:2], args[2:]), (*wanted, *found))
    semantic_loss(wanted, found, stop_gradient=True).backward()
    assert all(value.grad is None for value in wanted) and all(value.grad is not None for value in found)
    half = [value.detach().bfloat16() for value in wanted]
    assert semantic_loss(half, half).item() == 0 and semantic_loss(half, half).dtype == torch.float32


def test_the_unit_of_the_semantic_loss_is_the_features_own_energy():
    """It does not change with the features' size; its gradient is that of the raw form over the energy."""
    torch.manual_seed(0)
    wanted, found = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3, requires_grad=True)
    value = semantic_loss([wanted], [found], unit="energy")
    raw = semantic_loss([wanted], [found])
    torch.testing.assert_close(value, raw / wanted.square().mean())
    torch.testing.assert_close(semantic_loss([30 * wanted], [30 * found], unit="energy"), value)
    torch.testing.assert_close(semantic_loss([wanted], [torch.zeros_like(wanted)], unit="energy"), torch.tensor(1.0))
    (own,) = torch.autograd.grad(value, found, retain_graph=True)
    (plain,) = torch.autograd.grad(raw, found)
    torch.testing.assert_close(own, plain / wanted.square().mean())
    free = wanted.clone().requires_grad_()  # the energy is no way to make the loss small
    (to_wanted,) = torch.autograd.grad(semantic_loss([free], [found.detach()], unit="energy"), free)
    torch.testing.assert_close(to_wanted, 2 * (wanted - found.detach()) / wanted.numel() / wanted.square().mean())
    zero = torch.zeros_like(wanted)
    assert semantic_loss([zero], [zero], unit="energy").item() == 0


@pytest.mark.parametrize("unit", ["raw", "energy"])
def test_the_semantic_loss_counts_real_cells_alone(unit):
    torch.manual_seed(0)
    wanted, found = torch.randn(2, 4, 3, 6, dtype=torch.float64), torch.randn(2, 4, 3, 6, dtype=torch.float64)
    valid = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    valid[1, :, :, 2:] = False
    cells = valid.expand_as(wanted)
    energy = wanted[cells].square().mean() if unit == "energy" else 1
    value = semantic_loss([wanted], [found], unit=unit, valid=[valid])
    torch.testing.assert_close(value, (wanted[cells] - found[cells]).square().mean() / energy)
    other = found.clone()
    other[~cells] = 1e3  # whatever padding holds
    torch.testing.assert_close(semantic_loss([wanted], [other], unit=unit, valid=[valid]), value)
    other.requires_grad_()
    (gradient,) = torch.autograd.grad(semantic_loss([wanted], [other], unit=unit, valid=[valid]), other)
    assert (gradient[~cells] == 0).all() and (gradient[cells] != 0).all()
