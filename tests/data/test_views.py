"""Views: a box means the same pixels in both, the rule of what is valid, and samples as a function of their key."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tailfin.data.dataset import TrainingDataset, open_source, training_loader
from tailfin.data.proposals import open_proposals
from tailfin.data.views import (
    Geometry,
    PretrainingDataset,
    area_of,
    classes_of,
    common_window,
    paired_geometries,
    two_views,
)
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.data import Data
from tailfin.schema.pretraining import Proposals, Views
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

quick = settings(max_examples=80, deadline=None)
PLAIN = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": (0.0, 0.0), "solarise_p": (0.0, 0.0)}


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, int], np.ndarray]:
    """A picture's (height, width) and boxes in it."""
    height, width = draw(st.integers(40, 200)), draw(st.integers(40, 200))
    seed, count = draw(st.integers(0, 10_000)), draw(st.integers(0, 12))
    rng = np.random.default_rng(seed)
    sides = rng.uniform(4, 40, (count, 2))
    corner = rng.random((count, 2)) * (np.array([width, height]) - sides)
    return (height, width), np.concatenate([corner, corner + sides], axis=1).astype(np.float32)


modes = st.sampled_from(["short", "square"])
seeds = st.integers(0, 10_000)


@given(scene=scenes(), seed=seeds, mode=modes, area=st.sampled_from([0.1, 0.5, 1.0]))
@quick
def test_a_box_of_one_view_is_the_paired_box_of_the_other(scene, seed, mode, area):
    size, boxes = scene
    config = Views(resize=mode, crop_area=(area, 1.0), **PLAIN)
    rng = np.random.default_rng(seed)
    (first, second), rows = paired_geometries(size, boxes, config, rng, (64, 96), 160)
    one, two = first.to_view(boxes[rows]), second.to_view(boxes[rows])
    through = second.to_view(first.to_picture(one))
    assert np.abs(through - two).max(initial=0) < 0.01
    assert np.abs(first.to_picture(one) - boxes[rows]).max(initial=0) < 0.01
    # what a sample holds is clipped: the visible part maps into the other view's box within a pixel
    seen = second.clip(second.to_view(first.to_picture(first.clip(one))))
    inside = second.clip(two)
    assert (seen[:, :2] >= inside[:, :2] - 1).all() and (seen[:, 2:] <= inside[:, 2:] + 1).all()


@given(scene=scenes(), seed=seeds, mode=modes)
@quick
def test_what_is_valid(scene, seed, mode):
    size, boxes = scene
    config = Views(resize=mode, crop_area=(0.2, 1.0), min_kept=0.5, min_side=6.0, redraws=0, **PLAIN)
    geometries, rows = paired_geometries(size, boxes, config, np.random.default_rng(seed), (64,), 100)
    for number, box in enumerate(boxes.astype(np.float64)):
        kept, sides = [], []
        for view in geometries:
            window = np.array([view.left, view.top, view.left + view.width, view.top + view.height])
            low, high = np.maximum(box[:2], window[:2]), np.minimum(box[2:], window[2:])
            visible = np.maximum(high - low, 0)
            kept.append(visible.prod() / (box[2:] - box[:2]).prod())
            sides += (visible * (view.out_width / view.width, view.out_height / view.height)).tolist()
        if min(kept) > 0.502 and min(sides) > 6.01:
            assert number in rows
        if min(kept) < 0.498 or min(sides) < 5.99:
            assert number not in rows


def test_too_few_valid_boxes_are_drawn_again_and_at_last_not_cropped():
    boxes = np.array([[0, 0, 12, 12], [88, 88, 100, 100]], dtype=np.float32)  # in opposite corners
    options = {"crop_area": (0.3, 0.4), "crop_ratio": (1.0, 1.0), "min_side": 4.0, **PLAIN}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        geometries, rows = paired_geometries((100, 100), boxes, Views(**options), rng, (64,), 100)
        assert rows.tolist() == [0, 1]  # no crop of 40 % holds both
        assert all((view.width, view.height) == (100, 100) for view in geometries)
    central = np.array([[0, 0, 12, 12], [45, 45, 57, 57]], dtype=np.float32)
    one = [
        paired_geometries((100, 100), central, Views(**options, min_valid=1), np.random.default_rng(s), (64,), 100)[1]
        for s in range(20)
    ]
    assert all(len(rows) >= 1 for rows in one) and any(len(rows) == 1 for rows in one)
    none = [
        paired_geometries((100, 100), boxes, Views(**options, min_valid=0), np.random.default_rng(s), (64,), 100)[1]
        for s in range(20)
    ]
    assert any(len(rows) == 0 for rows in none)
    lonely = paired_geometries((100, 100), boxes[:0], Views(**options), np.random.default_rng(0), (64,), 100)
    assert len(lonely[1]) == 0 and lonely[0][0].width < 100  # no box to wait for


def test_identical_geometry_gives_equal_boxes_and_pictures():
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    boxes = np.array([[4, 6, 30, 40], [20, 10, 70, 60]], dtype=np.float32)
    config = Views(crop_area=(1.0, 1.0), flip=0.0, **PLAIN)
    first, second = two_views(image, boxes, config, np.random.default_rng(0), sizes=(64,), bound=80)
    assert torch.equal(first.image, image) and torch.equal(second.image, image)
    assert np.array_equal(first.boxes, boxes) and np.array_equal(second.boxes, boxes)


@given(scene=scenes(), width=st.integers(20, 90))
@quick
def test_mirrored_twice_is_the_same(scene, width):
    _, boxes = scene
    mirror = Geometry(0, 0, width, 50, width, 50, flip=True)
    assert np.allclose(mirror.to_view(mirror.to_view(boxes)), boxes, atol=1e-4)
    image = torch.randint(0, 256, (3, 50, width), dtype=torch.uint8)
    assert torch.equal(mirror.pixels(mirror.pixels(image)), image)


@given(seed=seeds, mode=modes, small=st.booleans())
@quick
def test_pixels_follow_the_boxes(seed, mode, small):
    """A bright rectangle is found again where its box says, in both views and whether they shrink or enlarge."""
    image = torch.full((3, 90, 120), 20, dtype=torch.uint8)
    box = np.array([[40, 30, 80, 66]], dtype=np.float32)
    image[:, 30:66, 40:80] = 220
    config = Views(resize=mode, crop_area=(0.4, 1.0), min_kept=1.0, min_valid=1, **PLAIN)
    sizes = (48,) if small else (140,)
    for view in two_views(image, box, config, np.random.default_rng(seed), sizes=sizes, bound=240):
        bright = view.image[0] > 120
        rows, columns = torch.where(bright.any(1))[0], torch.where(bright.any(0))[0]
        found = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        assert np.abs(np.subtract(found, view.boxes[0])).max() <= 1.5
        mask = view.geometry.mask_pixels((image[:1] > 120).to(torch.uint8))[0]
        assert (mask.bool() != bright).float().mean() < 0.07  # half a pixel along the edges


def test_jittered_proposals_stay_near_and_inside():
    image = torch.zeros((3, 100, 100), dtype=torch.uint8)
    boxes = np.array([[20, 20, 60, 60]], dtype=np.float32)
    config = Views(crop_area=(1.0, 1.0), flip=0.0, box_jitter=0.1, min_valid=1, **PLAIN)
    moved = 0
    for seed in range(200):
        for view in two_views(image, boxes, config, np.random.default_rng(seed), sizes=(100,), bound=100):
            assert np.abs(view.boxes - boxes).max() <= 40 * 0.15 + 1e-3
            moved += int(not np.array_equal(view.boxes, boxes))
    assert 140 < moved < 260  # half of 400


@pytest.fixture
def dataset(tiny_set):
    def make(
        third: bool = False,
        masks: bool = False,
        weak: bool = False,
        overlap: bool = False,
        data: dict | None = None,
        **views,
    ) -> PretrainingDataset:
        config = Data.model_validate(
            {
                "train": {"annotations": str(tiny_set[0])},
                "sizes": (64, 80),
                "max_size": 120,
                "workers": 0,
                **(data or {}),
            }
        )
        source = open_source(config.train, "", "train")
        proposals = open_proposals(Proposals(source="gt_jitter"), source)
        options = {"third": third, "weak": weak, "masks": masks, "overlap": overlap}
        return PretrainingDataset(source, config, 5, Views(**views), proposals, **options)

    return make


@pytest.mark.parametrize("resize", ["multiscale", "detr", "square", "stretch", "jitter"])
def test_views_have_the_sizes_of_the_training_pictures(dataset, resize):
    own = dataset(data={"resize": resize})
    assert (own.sizes, own.bound) == (((64, 80), 120) if resize in ("multiscale", "detr") else ((64,), 64))


def test_overlap_is_the_same_window_in_both_views(dataset):
    """The pixels of both windows are the same picture's, mirrored where the views say so."""
    samples = dataset(overlap=True, crop_area=(0.3, 0.6), min_valid=0, **PLAIN)
    flipped = 0
    for row in samples.rows()[:8].tolist():
        image, target = samples[(0, row, 0)]
        windows = []
        for picture, box, flip in zip((image, target["view"]), target["overlap"], target["flipped"], strict=True):
            assert (box >= -1e-3).all() and (box[2:] - torch.tensor(picture.shape[:0:-1]) <= 1e-3).all()
            left, top, right, bottom = box.round().int().tolist()
            if right - left < 8 or bottom - top < 8:
                break
            window = F.interpolate(picture[None, :, top:bottom, left:right].float(), size=(12, 12), mode="area")
            windows.append(window.flip(-1) if flip else window)
            flipped += int(flip)
        if len(windows) == 2:
            assert (windows[0] - windows[1]).abs().mean() < 12, row
    assert flipped > 2


def test_the_second_crop_lies_in_the_first_as_far_as_asked():
    image, none = (100, 100), np.zeros((0, 4), dtype=np.float32)
    for wanted in (0.0, 0.3):
        config = Views(crop_area=(0.1, 0.2), min_valid=0, min_overlap=wanted, redraws=60)
        shares = []
        for seed in range(60):
            (first, second), _ = paired_geometries(image, none, config, np.random.default_rng(seed), (64,), 64)
            shares.append(area_of(common_window(first, second)) / (second.width * second.height))
        assert (min(shares) == 0) if not wanted else (min(shares) >= wanted)


@pytest.mark.parametrize("masks", [False, True])
def test_the_weak_view_is_the_sample_of_fine_tuning(dataset, masks):
    """Key by key the same picture and objects: no object of the picture is lost."""
    samples = dataset(weak=True, masks=masks)
    plain = TrainingDataset(samples.source, samples.config, samples.seed, masks=masks)
    for row in samples.rows()[:6].tolist():
        _, target = samples[(1, row, 2)]
        picture, wanted = plain[(1, row, 2)]
        assert torch.equal(target["weak"], picture) and "ignored" not in target
        for key in ("boxes", "labels", "masks", "mask_valid") if masks else ("boxes", "labels"):
            assert torch.equal(target[key], wanted[key]), key
        assert len(target["boxes"]) == np.diff(samples.clean.offsets)[row]


@pytest.mark.parametrize("weak", [False, True])
def test_classes_that_nobody_looked_for_are_those_of_fine_tuning(dataset, weak, monkeypatch):
    """Without them an unlabelled object is background for the pre-training's classifier, whatever `data` says."""
    samples = dataset(weak=weak, data={"unchecked_classes": "ignore"})
    index = samples.source.index
    monkeypatch.setattr(type(index), "known", lambda _, image: np.arange(len(index.categories)) != image % 3)
    plain = TrainingDataset(samples.source, samples.config, samples.seed)
    for row in samples.rows()[:4].tolist():
        known = samples[(0, row, 0)][1]["known"]
        assert torch.equal(known, plain[(0, row, 0)][1]["known"]) and not known.all()
    assert "known" not in dataset(weak=weak)[(0, row, 0)][1]


def test_every_object_of_the_first_view_is_learnt_or_ignored(dataset):
    samples = dataset(crop_area=(0.2, 0.5), keep_rarest=False)
    cut = 0
    for row in samples.rows().tolist():
        image, target = samples[(0, row, 0)]
        count = np.diff(samples.clean.offsets)[row]
        assert len(target["boxes"]) + len(target["ignored"]) <= count
        limit = torch.tensor([image.shape[-1], image.shape[-2]])
        assert (target["ignored"] >= 0).all() and (target["ignored"][:, 2:] <= limit).all()
        assert (target["ignored"][:, 2:] > target["ignored"][:, :2]).all()
        cut += len(target["ignored"])
    assert cut > 5


def test_the_rarest_object_survives_the_first_crop():
    boxes = np.array([[0, 0, 90, 90], [0, 0, 99, 99]], dtype=np.float32)
    rare = np.array([[2, 2, 14, 14]], dtype=np.float32)  # in a corner: most crops lose it
    options = {"crop_area": (0.3, 0.5), "min_valid": 0, "redraws": 30}
    for seed in range(40):
        (first, _), _ = paired_geometries((100, 100), boxes, Views(**options), rng(seed), (64,), 100, rare)
        assert first.valid(rare, 0.5, 0).all()
    lost = [
        not paired_geometries((100, 100), boxes, Views(**options), rng(seed), (64,), 100)[0][0]
        .valid(rare, 0.5, 0)
        .all()
        for seed in range(40)
    ]
    assert np.mean(lost) > 0.3
    tiny = np.array([[2, 2, 3, 3]], dtype=np.float32)  # too small to be learnt from, and no reason to crop nothing
    crops = [
        paired_geometries((100, 100), boxes, Views(**options), rng(seed), (64,), 100, tiny)[0][0] for seed in range(20)
    ]
    assert any((crop.width, crop.height) != (100, 100) for crop in crops)


def test_boxes_are_drawn_after_the_crops():
    """Of a hundred candidates that the crops leave many of, as many as asked are drawn, all valid in both views."""
    image = torch.zeros((3, 100, 100), dtype=torch.uint8)
    corner = rng(0).uniform(0, 70, (100, 2))
    boxes = np.concatenate([corner, corner + 25], axis=1).astype(np.float32)
    config = Views(crop_area=(0.4, 0.6))
    taken = set()
    for seed in range(20):
        first, second = two_views(image, boxes, config, rng(seed), sizes=(64,), bound=64, most=8)
        assert len(first.rows) == len(second.rows) == 8 == len(set(first.rows.tolist()))
        assert first.geometry.valid(boxes[first.rows], 0.5, 8).all()
        assert second.geometry.valid(boxes[first.rows], 0.5, 8).all()
        taken |= set(first.rows.tolist())
    assert len(taken) > 60


def test_the_class_of_a_box():
    truth = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], dtype=np.float32)
    boxes = np.array([[0, 0, 10, 9], [20, 20, 40, 29], [50, 50, 60, 60]], dtype=np.float32)
    assert classes_of(boxes, truth, np.array([7, 3])).tolist() == [7, -1, -1]
    assert classes_of(boxes, truth[:0], np.array([], dtype=np.int64)).tolist() == [-1, -1, -1]
    assert classes_of(boxes[:0], truth, np.array([7, 3])).tolist() == []


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_sample_is_a_function_of_its_key(dataset):
    samples = dataset(third=True)
    row = int(samples.rows()[3])
    image, target = samples[(1, row, 0)]
    again, same = pickle.loads(pickle.dumps(samples))[(1, row, 0)]
    assert torch.equal(image, again) and all(torch.equal(target[key], same[key]) for key in target)
    for other in ((2, row, 0), (1, row, 1)):
        assert not torch.equal(samples[other][1]["proposals"], target["proposals"])
    state = torch.random.get_rng_state()
    _ = samples[(0, row, 0)]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_sample_holds_pairs(dataset):
    samples = dataset(third=True)
    for row in samples.rows()[:8]:
        image, target = samples[(0, int(row), 0)]
        assert image.dtype == target["view"].dtype == target["third"].dtype == torch.uint8
        assert target["proposals"].shape == target["view_proposals"].shape == target["third_proposals"].shape
        assert len(target["proposals"]) <= 8 and target["proposals"].dtype == torch.float32
        assert len(target["boxes"]) == len(target["labels"]) and target["labels"].dtype == torch.int64
        assert int(target["image_id"]) == row
        for picture, boxes in (
            (image, target["boxes"]),
            (image, target["proposals"]),
            (target["view"], target["view_proposals"]),
            (target["third"], target["third_proposals"]),
        ):
            limit = torch.tensor([picture.shape[-1], picture.shape[-2]])
            assert (boxes >= 0).all() and (boxes[:, 2:] <= limit).all()
        assert (torch.tensor(target["view"].shape[-2:]) // 2).tolist() == list(target["third"].shape[-2:])
        across = target["third"].shape[-1] / target["view"].shape[-1]
        down = target["third"].shape[-2] / target["view"].shape[-2]
        half = target["view_proposals"] * torch.tensor([across, down] * 2)
        assert (half - target["third_proposals"]).abs().max() < 0.01


def test_annotated_objects_follow_the_first_view(dataset):
    samples = dataset(crop_area=(1.0, 1.0), flip=0.0, min_side=0.0, data={"sizes": (60,)}, **PLAIN)
    row = int(samples.rows()[1])
    image, target = samples[(0, row, 0)]
    own = slice(int(samples.clean.offsets[row]), int(samples.clean.offsets[row + 1]))
    assert np.allclose(target["boxes"], samples.clean.boxes[own], atol=1e-3)
    assert target["labels"].tolist() == samples.source.index.labels[samples.clean.rows[own]].tolist()
    assert torch.equal(image, samples.source.read(row, 10**6))


def test_view_sizes_come_from_the_section_or_the_data(dataset):
    shorts = {min(dataset()[(epoch, 0, 0)][1]["view"].shape[-2:]) for epoch in range(12)}
    assert shorts == {64, 80}
    square = dataset(resize="square", sizes=(48,), crop_area=(0.2, 1.0), min_valid=0)
    assert tuple(square[(0, 0, 0)][0].shape[-2:]) == (48, 48)
    bounded = dataset(data={"resize": "square", "sizes": (40,)})
    assert max(max(bounded[(0, int(row), 0)][0].shape[-2:]) for row in bounded.rows()[:6]) == 40


def test_the_loader_feeds_pairs_and_passes_mistakes_on(dataset, tiny_set):
    samples = dataset(data={"workers": 1})
    index = samples.source.index
    plan = BatchPlan(index, samples.rows(), ClassStats.from_index(index), Sampler(), 4, 1, 0)
    images, targets = next(training_loader(samples, plan, start=0, rank=0, processes=1, accumulation=1))
    assert len(images) == len(targets) == 4 and all("view_proposals" in target for target in targets)
    straight = samples[(0, int(targets[2]["image_id"]), 0)]
    assert torch.equal(straight[0], images[2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_area": (0.9, 0.5)}, "crop_area must be (smaller, larger)"),
        ({"crop_area": (0.0, 0.5)}, "crop_area must be larger than 0"),
        ({"blur_sigma": (2.0, 0.1)}, "blur_sigma must be (smaller, larger)"),
        ({"jitter": (0.4, 0.4, 0.4, 0.7)}, "less than or equal to 0.5"),
    ],
)
def test_mistakes_in_the_section(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Views(**values)


def test_on_photos(data_dir):
    config = Data.model_validate({"train": {"annotations": str(data_dir / "fod31-lt" / "train.json")}, "sizes": (128,)})
    source = open_source(config.train, "", "train")
    views = Views(min_side=4.0)  # pictures are small here
    samples = PretrainingDataset(source, config, 0, views, open_proposals(Proposals(source="gt_jitter"), source))
    counts = [len(samples[(0, int(row), 0)][1]["proposals"]) for row in samples.rows()[:: len(samples.rows()) // 40]]
    assert np.mean(counts) > 5 and np.mean(np.array(counts) >= 2) > 0.9
