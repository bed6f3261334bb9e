"""Mosaic and mixup: every pixel and every box is where it belongs, samples are functions of their key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.data.copy_paste import PADDING
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.data.mixing import mixup, mosaic
from tailfin.data.synth import make_synthetic
from tailfin.schema.data import Data, DataFiles

quick = settings(max_examples=40, deadline=None)


def plain(grey: int, height: int, width: int, box: tuple[int, int, int, int]) -> tuple[torch.Tensor, dict]:
    """A grey picture with one object, which is brighter by 100 and has its mask."""
    image = torch.full((3, height, width), grey, dtype=torch.uint8)
    left, top, right, bottom = box
    image[:, top:bottom, left:right] += 100
    mask = torch.zeros((1, height, width), dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    target = {"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([grey]), "masks": mask}
    return image, {**target, "image_id": torch.tensor(grey)}


FOUR = [
    plain(10, 60, 80, (10, 10, 50, 40)),
    plain(30, 40, 40, (5, 5, 35, 35)),
    plain(50, 90, 60, (20, 30, 40, 80)),
    plain(70, 60, 80, (0, 0, 80, 60)),
]


@given(seed=st.integers(0, 10_000))
@quick
def test_a_mosaic_shows_what_its_boxes_say(seed):
    image, target = mosaic(FOUR, np.random.default_rng(seed), (0.5, 1.0))
    assert image.shape == (3, 60, 80) and image.dtype == torch.uint8 and target["image_id"] == 10
    shown = {int(value) for value in image[0].unique()}
    assert shown & {10, 30, 50, 70, 110, 130, 150, 170}
    limit = torch.tensor([80.0, 60, 80, 60])
    assert len(set(target["labels"].tolist())) == len(target["labels"])
    for box, grey, mask in zip(target["boxes"], target["labels"].tolist(), target["masks"], strict=True):
        assert (box >= 0).all() and (box <= limit).all() and (box[2:] > box[:2]).all()
        left, top, right, bottom = box.round().int().tolist()
        inner = image[0, top + 2 : bottom - 2, left + 2 : right - 2]
        assert not inner.numel() or (inner == grey + 100).all()  # nothing but the object, away from resized edges
        assert mask[top + 1 : bottom - 1, left + 1 : right - 1].all() and not mask[: max(top - 1, 0)].any()
        assert mask.sum() <= (bottom - top + 1) * (right - left + 1)
    again, same = mosaic(FOUR, np.random.default_rng(seed), (0.5, 1.0))
    assert torch.equal(image, again) and all(torch.equal(target[key], same[key]) for key in target)


def test_a_mosaic_drops_what_is_nearly_gone_and_pads_with_the_mean():
    kept, pads = 0, 0
    for seed in range(60):
        image, target = mosaic(FOUR, np.random.default_rng(seed), (0.3, 0.3))  # whole pictures, and space beside them
        kept += len(target["labels"])
        pads += int(image[:, 0, 0].tolist() == list(PADDING))
        if seed < 20:
            _, large = mosaic(FOUR, np.random.default_rng(seed), (4.0, 4.0))
            areas = (large["boxes"][:, 2:] - large["boxes"][:, :2]).prod(1)
            whole = {10: 1200.0, 30: 900, 50: 1000, 70: 4800}
            assert all(
                area >= 0.24 * 16 * whole[grey]
                for area, grey in zip(areas.tolist(), large["labels"].tolist(), strict=True)
            )
    assert kept > 200 and pads > 20


def test_mixup_adds_pixels_and_keeps_all_objects():
    one, other = FOUR[0], FOUR[2]
    rng = np.random.default_rng(1)
    weight = np.random.default_rng(1).beta(8.0, 8.0)
    image, target = mixup(one, other, rng)
    assert image.shape == (3, 90, 80)
    assert int(image[0, 0, 0]) == round(weight * 10 + (1 - weight) * 50)
    assert int(image[0, 35, 30]) == round(weight * 110 + (1 - weight) * 150)
    assert int(image[0, 5, 75]) == round(weight * 10 + (1 - weight) * PADDING[0])
    assert target["boxes"].tolist() == [[10, 10, 50, 40], [20, 30, 40, 80]] and target["labels"].tolist() == [10, 50]
    assert target["masks"].shape == (2, 90, 80) and target["masks"].sum(dim=(1, 2)).tolist() == [1200, 1000]
    assert one[0].shape == (3, 60, 80)  # the inputs are as they were


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixing") / "set"
    make_synthetic(folder, images_train=24, images_val=2, classes=3, imbalance=4.0, size=64, objects=2.0)
    return open_source(DataFiles(annotations=str(folder / "train.json")), "", "train")


@pytest.mark.parametrize("masks", [False, True])
def test_samples_are_functions_of_their_key(source, masks):
    """In any order, with all of it together; other keys give other pictures."""
    config = Data(resize="square", sizes=(64,), mosaic=0.7, mixup=0.5, copy_paste=True, paste_power=0.5)
    first, second = (TrainingDataset(source, config, 7, masks=masks) for _ in range(2))
    keys = [(epoch, row, copy) for epoch in (0, 1) for row in range(4) for copy in (0, 1)]
    found = {key: first.sample(*key) for key in keys}
    for key in reversed(keys):
        image, target = second.sample(*key)
        assert torch.equal(image, found[key][0]) and target.keys() == found[key][1].keys()
        assert all(torch.equal(value, found[key][1][name]) for name, value in target.items())
        assert int(target["image_id"]) == key[1] and ("masks" in target) == masks
        assert len({len(value) for value in target.values() if value.ndim}) == 1
    assert len({image.numpy().tobytes() for image, _ in found.values()}) == len(keys)


def test_off_they_leave_samples_as_they_were(source):
    """Not a single draw more: a run without them is the run that it was; `mixed_epochs` ends them."""
    plain_set = TrainingDataset(source, Data(resize="jitter", sizes=(64,)), 3)
    later = TrainingDataset(source, Data(resize="jitter", sizes=(64,), mosaic=1.0, mixup=1.0, mixed_epochs=2), 3)
    for row in range(4):
        assert not torch.equal(plain_set.sample(1, row, 0)[0], later.sample(1, row, 0)[0])
        image, target = plain_set.sample(2, row, 0)
        other, same = later.sample(2, row, 0)
        assert torch.equal(image, other) and torch.equal(target["boxes"], same["boxes"])


def test_classes_that_one_of_the_pictures_was_not_searched_for(source, monkeypatch):
    """`known` of a mosaic: those that were looked for in all four."""
    config = Data(resize="square", sizes=(64,), mosaic=1.0, unchecked_classes="ignore")
    own = TrainingDataset(source, config, 0)
    read = []
    monkeypatch.setattr(type(source.index), "known", lambda self, row: read.append(row) or np.arange(3) != row % 3)
    known = own.sample(0, 0, 0)[1]["known"]
    assert len(read) == 4 and known.tolist() == [all(row % 3 != label for row in read) for label in range(3)]
