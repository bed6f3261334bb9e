"""Copy-paste that paints rare classes more often, and crops out of a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tailfin.data.copy_paste import box_paste, copy_paste
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.data.pasting import CropFolder, ObjectsByClass, class_weights
from tailfin.data.synth import make_synthetic
from tailfin.errors import UserError
from tailfin.schema.data import Data, DataFiles

COUNTS = (90, 9, 1)


def by_class(power: float) -> ObjectsByClass:
    labels = np.repeat(np.arange(3), COUNTS)
    return ObjectsByClass(labels, np.arange(100), 4, power)  # one class has no object


@pytest.mark.parametrize(("power", "wanted"), [(0.0, (1 / 3, 1 / 3, 1 / 3)), (1.0, (1 / 101, 10 / 101, 90 / 101))])
def test_classes_are_drawn_with_their_weights(power, wanted):
    objects = by_class(power)
    assert class_weights(np.array([*COUNTS, 0]), power).tolist() == objects.weights.tolist()
    np.testing.assert_allclose(objects.chances[:3], wanted, atol=1e-4)
    rng = np.random.default_rng(0)
    drawn = [objects.draw(rng) for _ in range(2000)]
    shares = np.bincount([label for label, _ in drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(shares[:3], wanted, atol=0.04)
    assert shares[3] == 0
    labels = np.repeat(np.arange(3), COUNTS)
    assert all(labels[picture] == label for label, picture in drawn)
    assert len({picture for label, picture in drawn if label == 1}) == 9


def test_a_partner_gives_its_rare_objects():
    objects = by_class(1.0)
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 1])
    chosen = np.zeros(4)
    for _ in range(3000):
        chosen[objects.selected(labels, 1, rng)] += 1
    np.testing.assert_allclose(chosen / 3000, [0.1, 1, 1, 1], atol=0.03)


@pytest.fixture
def folder(tmp_path):
    """A triangle with alpha of one class, a rectangle without of another."""
    alpha = np.tril(np.full((20, 20), 255, dtype=np.uint8))
    rgba = np.dstack([np.full((20, 20, 3), 200, dtype=np.uint8), alpha])
    framed = np.zeros((30, 40, 4), dtype=np.uint8)  # the box of a crop is that of what is seen of it
    framed[5:25, 10:30] = rgba
    for name, picture in (("b", framed), ("c", np.full((10, 16, 3), 90, dtype=np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "1.png")
    return tmp_path


def test_crops_lie_where_their_boxes_say(folder):
    crops = CropFolder(folder, ["a", "b", "c"], 10**6)
    background = torch.full((3, 50, 60), 10, dtype=torch.uint8)
    weights = np.array([1.0, 1.0, 1.0])
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, target = crops.sample(rng, background, weights, 1, (1.0, 1.0), ("masks", "mask_valid"))
        (label,), (box,) = target["labels"].tolist(), target["boxes"].int().tolist()
        left, top, right, bottom = box
        seen.add(label)
        assert (right - left, bottom - top) == ((20, 20) if label == 1 else (16, 10))
        assert left >= 0 and right <= 60 and top >= 0 and bottom <= 50
        mask = target["masks"][0].bool()
        assert target["mask_valid"].tolist() == [label == 1]
        assert mask.sum() == (210 if label == 1 else 160) and mask[top:bottom, left:right].sum() == mask.sum()
        assert (image[:, mask] == (200 if label == 1 else 90)).all() and (image[:, ~mask] == 10).all()
    assert seen == {1, 2}


def test_weights_sizes_and_overlaps(folder):
    crops = CropFolder(folder, ["a", "b", "c"], 10**6)
    background = torch.zeros((3, 24, 20), dtype=torch.uint8)
    labels, sizes = [], []
    for seed in range(200):
        image, target = crops.sample(np.random.default_rng(seed), background, np.array([1, 9.0, 1]), 3, (2.0, 3.0))
        labels += target["labels"].tolist()
        sizes.append((target["boxes"][:, 2:] - target["boxes"][:, :2]).amax(0))
        assert set(target) == {"boxes", "labels"} and 1 <= len(target["labels"]) <= 3
    assert 0.84 < labels.count(1) / len(labels) < 0.94
    assert (torch.stack(sizes).amax(0) <= torch.tensor([16.0, 20.0])).all()  # four fifths of the picture, rounded


def test_both_ways_of_pasting_follow_the_alpha(folder):
    crops = CropFolder(folder, ["a", "b", "c"], 10**6)
    image = torch.full((3, 50, 60), 10, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[0.0, 0, 2, 2]]), "labels": torch.tensor([0])}
    masks = torch.zeros((1, 50, 60), dtype=torch.uint8)
    masks[:, :2, :2] = 1
    only_b = np.array([0.0, 1.0, 0.0])
    for seed in range(5):
        source = crops.sample(np.random.default_rng(seed), image, only_b, 1, (1.0, 1.0))
        pasted, boxes = box_paste(image, target, *source, np.random.default_rng(0), selected=range(1))
        source = crops.sample(np.random.default_rng(seed), image, only_b, 1, (1.0, 1.0), ("masks",))
        other, cut = copy_paste(image, {**target, "masks": masks}, *source, np.random.default_rng(0), selected=range(1))
        assert torch.equal(pasted, other) and int((pasted[0] == 200).sum()) == 210
        assert boxes["labels"].tolist()[-1] == cut["labels"].tolist()[-1] == 1
        assert torch.equal(boxes["boxes"][-1], cut["boxes"][-1])


def test_mistakes(folder, tmp_path_factory):
    def told(*arguments):
        with pytest.raises(UserError) as caught:
            CropFolder(*arguments)
        return str(caught.value)

    assert 'is no class (did you mean "bb"?)' in told(folder, ["bb", "cc"], 10**6)
    assert "no pictures in folders" in told(tmp_path_factory.mktemp("empty"), ["b"], 10**6)
    assert "is no folder" in told(folder / "nothing", ["b"], 10**6)
    with pytest.raises(ValueError, match="set copy_paste=true"):
        Data(paste_power=0.5)


def test_rare_classes_are_pasted_more(tmp_path_factory, folder):
    """On a set with masks: what the samples hold, with and without the power; and with the folder."""
    made = tmp_path_factory.mktemp("paste") / "set"
    make_synthetic(made, images_train=60, images_val=2, classes=3, imbalance=12.0, size=64, objects=2.0)
    source = open_source(DataFiles(annotations=str(made / "train.json")), "", "train")

    def rare_share(**more):
        own = TrainingDataset(source, Data(resize="square", sizes=(64,), copy_paste=True, **more), 0)
        labels = np.concatenate([own.sample(0, int(row), 0)[1]["labels"].numpy() for row in own.rows()])
        counts = np.bincount(source.index.labels, minlength=3)
        return np.mean(labels == counts.argmin())

    assert rare_share(paste_power=1.0) > 3 * rare_share()
    names = source.index.names
    for given, name in zip(("b", "c"), names, strict=False):
        (folder / given).rename(folder / name)
    own = TrainingDataset(
        source, Data(resize="square", sizes=(64,), copy_paste=True, paste_crops=str(folder)), 0, masks=True
    )
    image, target = own.sample(0, int(own.rows()[0]), 0)
    assert image.shape == (3, 64, 64) and len(target["masks"]) == len(target["labels"]) == len(target["mask_valid"])
