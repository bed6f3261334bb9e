"""Photometric changes: a function of the generator alone, 8 bits in and out, each at its rate and strength."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from tailfin.data.photometric import photometric

quick = settings(max_examples=40, deadline=None)
NONE = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "solarise_p": 0.0}


def photo(height: int = 40, width: int = 52, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some noise: what a photo is to these kernels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows * 5, columns * 4, 255 - rows - columns]) + rng.integers(-20, 20, (3, height, width))
    return torch.from_numpy(np.clip(picture, 0, 255).astype(np.uint8))


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 10_000),
    p=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 4),
)
@quick
def test_any_picture_stays_a_picture(size, seed, p):
    image = photo(*size)
    before = image.clone()
    options = dict(zip(("jitter_p", "gray_p", "blur_p", "solarise_p"), p, strict=True))
    first, second = (photometric(image, np.random.default_rng(seed), **options) for _ in range(2))
    assert first.dtype == torch.uint8 and first.shape == image.shape
    assert torch.equal(first, second)  # the generator decides alone
    assert torch.equal(image, before)


def test_nothing_drawn_is_the_picture_itself():
    image = photo()
    assert photometric(image, np.random.default_rng(0), **NONE) is image
    still = photometric(image, np.random.default_rng(0), **{**NONE, "jitter_p": 1.0}, jitter=(0, 0, 0, 0))
    assert torch.equal(still, image)


def test_the_number_of_draws_does_not_depend_on_what_is_drawn():
    states = []
    for p in (0.0, 1.0):
        rng = np.random.default_rng(3)
        photometric(photo(), rng, jitter_p=p, gray_p=p, blur_p=p, solarise_p=p)
        states.append(rng.bit_generator.state["state"])
    assert states[0] == states[1]


def test_each_change_is_torchvisions():
    image = photo()
    rng = np.random.default_rng(0)
    gray = photometric(image, rng, **{**NONE, "gray_p": 1.0})
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[1], gray[2])
    assert (gray.int() - F.rgb_to_grayscale(image, 3).int()).abs().max() <= 1
    assert torch.equal(photometric(image, rng, **{**NONE, "solarise_p": 1.0}), F.solarize(image, 128))
    kernels = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for number, kernel in enumerate(kernels):
        strength = [0.0] * 4
        strength[number] = 0.4
        changed = photometric(image, np.random.default_rng(7), **{**NONE, "jitter_p": 1.0}, jitter=tuple(strength))
        rng = np.random.default_rng(7)
        rng.random(4), rng.permutation(4)
        factor = rng.uniform(
            [1 - strength[0], 1 - strength[1], 1 - strength[2], 0], [1 + s for s in strength[:3]] + [0]
        )
        expected = kernel(image, float(factor[number]))
        assert not torch.equal(changed, image)
        assert (changed.int() - expected.int()).abs().max() <= 2


def test_hue_turns_colours_and_keeps_brightness_order():
    red = torch.zeros((3, 8, 8), dtype=torch.uint8)
    red[0] = 200
    changed = photometric(red, np.random.default_rng(1), **{**NONE, "jitter_p": 1.0}, jitter=(0, 0, 0, 0.5))
    assert not torch.equal(changed, red)
    assert abs(int(changed.max()) - 200) <= 2 and int(changed.min()) <= 2


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_gaussian(sigma):
    image = torch.zeros((3, 31, 31), dtype=torch.uint8)
    image[:, :, 15:] = 255
    edge = photometric(image, np.random.default_rng(0), **{**NONE, "blur_p": 1.0}, blur_sigma=(sigma, sigma))
    expected = F.gaussian_blur(image.float(), [23, 23], [sigma, sigma])
    assert (edge.float() - expected)[:, 5:-5, 5:-5].abs().max() < 8


def test_changes_come_at_the_stated_rates():
    gray = blurred = 0
    flat = torch.zeros((3, 6, 6), dtype=torch.uint8)
    flat[0], flat[0, :, 3:] = 60, 120
    for seed in range(600):
        rng = np.random.default_rng(seed)
        gray += int(photometric(flat, rng, **{**NONE, "gray_p": 0.2})[1].max() > 0)
        blurred += int(len(photometric(flat, rng, **{**NONE, "blur_p": 0.5}, blur_sigma=(2, 2))[0].unique()) > 2)
    assert 90 < gray < 150 and 260 < blurred < 340
