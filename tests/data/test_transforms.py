"""Boxes and masks follow the pixels: a bright rectangle is drawn, transformed, and found again where its box says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.data import transforms
from tailfin.data.dataset import to_test_size
from tailfin.data.transforms import (
    MIN_SIDE,
    augment,
    crop,
    horizontal_flip,
    large_scale_jitter,
    resize,
    shortest_edge_size,
)
from tailfin.schema.data import Data

quick = settings(max_examples=60, deadline=None)
BRIGHT = 120  # between the background (20) and the rectangle (220)


def rectangle(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A dark picture with one bright rectangle, its box and its mask."""
    left, top, right, bottom = box
    image = torch.full((3, height, width), 20, dtype=torch.uint8)
    mask = torch.zeros((1, height, width), dtype=torch.uint8)
    image[:, top:bottom, left:right] = 220
    mask[:, top:bottom, left:right] = 1
    target = {"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([2]), "masks": mask}
    return image, target


def extent(bright: torch.Tensor) -> list[float]:
    """The box around the true values of a [H, W] mask."""
    rows, columns = torch.where(bright.any(1))[0], torch.where(bright.any(0))[0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def assert_found(image: torch.Tensor, target: dict[str, torch.Tensor], tolerance: float = 1.01) -> None:
    """The rectangle lies where the box says, in the picture and in the mask."""
    box = target["boxes"][0].tolist()
    assert np.abs(np.subtract(extent(image[0] > BRIGHT), box)).max() <= tolerance
    assert np.abs(np.subtract(extent(target["masks"][0] > 0), box)).max() <= tolerance
    assert image.dtype == torch.uint8 and target["boxes"].dtype == torch.float32
    assert target["masks"].shape[-2:] == image.shape[-2:]


sizes = st.tuples(st.integers(30, 120), st.integers(30, 120))


@st.composite
def pictures(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    height, width = draw(sizes)
    left, top = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    right, bottom = draw(st.integers(left + 10, width)), draw(st.integers(top + 10, height))
    return rectangle(height, width, (left, top, right, bottom))


@given(picture=pictures(), size=sizes)
@quick
def test_resize(picture, size):
    image, target = resize(*picture, size)
    assert tuple(image.shape[-2:]) == size
    assert_found(image, target)


@given(picture=pictures())
@quick
def test_flip(picture):
    image, target = horizontal_flip(*picture)
    assert_found(image, target, 0)
    back, again = horizontal_flip(image, target)
    assert torch.equal(back, picture[0]) and torch.equal(again["boxes"], picture[1]["boxes"])


@given(picture=pictures(), data=st.data())
@quick
def test_crop(picture, data):
    image, target = picture
    height, width = image.shape[-2:]
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows, columns = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    cut, rest = crop(image, target, top, left, rows, columns)
    assert cut.shape[-2:] == (rows, columns)
    assert len(rest["boxes"]) == len(rest["labels"]) == len(rest["masks"])
    if len(rest["boxes"]):
        assert_found(cut, rest, 0)
        assert ((rest["boxes"][:, 2:] - rest["boxes"][:, :2]) >= MIN_SIDE).all()
    else:
        assert not (cut > BRIGHT).any()


@given(picture=pictures(), seed=st.integers(0, 1000), size=st.integers(32, 96))
@quick
def test_large_scale_jitter(picture, seed, size):
    image, target = large_scale_jitter(*picture, size, (0.3, 2.0), np.random.default_rng(seed))
    assert max(image.shape[-2:]) <= size
    if len(target["boxes"]) and (target["boxes"][0, 2:] - target["boxes"][0, :2] > 3).all():
        assert_found(image, target)


@given(
    picture=pictures(),
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["multiscale", "square", "stretch", "jitter"]),
)
@quick
def test_augment(picture, seed, mode):
    config = Data(resize=mode, sizes=(48, 64, 80), max_size=100, jitter_scale=(0.8, 1.6), color_jitter=0.1)
    image, target = augment(*picture, config, np.random.default_rng(seed))
    if mode == "multiscale":
        assert min(image.shape[-2:]) in (48, 64, 80) or max(image.shape[-2:]) == 100
        assert max(image.shape[-2:]) <= 100
    elif mode == "stretch":
        assert image.shape[-2:] == (48, 48)
        assert to_test_size(picture[0], Data(resize="stretch", sizes=(48,))).shape[-2:] == (48, 48)
    else:
        assert max(image.shape[-2:]) <= 48
    if len(target["boxes"]) and (target["boxes"][0, 2:] - target["boxes"][0, :2] > 3).all():
        assert_found(image, target)


def test_the_same_generator_gives_the_same_sample():
    config = Data(resize="jitter", sizes=(64,), color_jitter=0.4)
    for seed in range(5):
        first, second = (
            augment(*rectangle(60, 90, (10, 10, 50, 40)), config, np.random.default_rng([seed, 3])) for _ in range(2)
        )
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    augment(*rectangle(60, 90, (10, 10, 50, 40)), config, np.random.default_rng(0))
    assert torch.equal(torch.random.get_rng_state(), state)  # no global generator is drawn from


def test_choices_are_made_at_the_stated_rates():
    config = Data(resize="multiscale", sizes=(40, 56), max_size=200, flip=0.25)
    shorts, flips = [], 0
    for seed in range(400):
        image, target = augment(*rectangle(40, 60, (0, 0, 10, 10)), config, np.random.default_rng(seed))
        shorts.append(min(image.shape[-2:]))
        flips += int(target["boxes"][0, 0] > 0)
    assert set(shorts) == {40, 56} and 160 < shorts.count(40) < 240
    assert 70 < flips < 130
    for flip, expected in ((0.0, False), (1.0, True)):
        fixed = Data(resize="square", sizes=(48,), flip=flip)
        moved = augment(*rectangle(40, 60, (0, 0, 10, 10)), fixed, np.random.default_rng(1))[1]["boxes"][0, 0] > 0
        assert bool(moved) is expected


def test_color_jitter_keeps_the_boxes_and_changes_the_pixels():
    image, target = rectangle(48, 48, (5, 5, 30, 30))
    config = Data(resize="square", sizes=(48,), flip=0.0, color_jitter=0.5)
    changed, same = augment(image, target, config, np.random.default_rng(3))
    assert not torch.equal(changed, image)
    assert torch.equal(same["boxes"], target["boxes"])


@given(size=sizes, short=st.integers(16, 200), bound=st.integers(16, 300))
@quick
def test_shortest_edge(size, short, bound):
    height, width = shortest_edge_size(size, short, bound)
    assert max(height, width) <= bound and min(height, width) <= short
    assert min(height, width) == short or max(height, width) == bound
    scale = height / size[0]
    assert abs(width - scale * size[1]) <= 0.5 * size[1] / size[0] + 0.5 + 1e-9  # the aspect, up to rounding


def test_a_worked_size():
    assert shortest_edge_size((480, 640), 800, 1333) == (800, 1067)
    assert shortest_edge_size((400, 1000), 800, 1333) == (533, 1333)
    assert shortest_edge_size((1, 4000), 800, 1333) == (1, 1333)


@pytest.mark.parametrize("boxes", [0, 3])
def test_pictures_without_boxes_pass(boxes):
    target = {"boxes": torch.zeros((boxes, 4)), "labels": torch.zeros(boxes, dtype=torch.int64)}
    target["boxes"][:, 2:] = 5
    for mode in ("multiscale", "square", "jitter"):
        config = Data(resize=mode, sizes=(32,), max_size=64, jitter_scale=(1.0, 1.0), flip=1.0)
        image, after = augment(torch.zeros((3, 40, 50), dtype=torch.uint8), target, config, np.random.default_rng(0))
        assert after["boxes"].shape == (boxes, 4) and after["labels"].shape == (boxes,)


def test_colours_before_or_after_resizing(monkeypatch):
    """`photometric_on` says which picture's pixels change; everything else is the same."""
    seen = []
    monkeypatch.setattr(transforms, "photometric", lambda image, rng: seen.append(image.shape) or image)
    image, target = rectangle(60, 80, (10, 10, 40, 40))
    for where in ("file", "resized"):
        config = Data(resize="square", sizes=(40,), photometric=True, photometric_on=where)
        augment(image, target, config, np.random.default_rng(0))
    assert seen == [(3, 60, 80), (3, 30, 40)]
    augment(image, target, Data(resize="square", sizes=(40,), photometric_on="file"), np.random.default_rng(0))
    assert len(seen) == 2
