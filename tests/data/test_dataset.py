"""Training samples by key, evaluation pictures at test size, and the loaders in front of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tailfin.data.dataset import (
    EvaluationDataset,
    TrainingDataset,
    evaluation_loader,
    open_source,
    to_test_size,
    training_loader,
    unchecked_note,
)
from tailfin.errors import UserError
from tailfin.samplers import BatchPlan
from tailfin.schema.data import Data, DataFiles
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

CONFIG = Data(resize="square", sizes=(64,), workers=0)


@pytest.fixture(scope="module")
def source(tiny_set):
    return open_source(DataFiles(annotations=str(tiny_set[0])), "", "train")


def make_plan(source, dataset, batch=4, epochs=1.0):
    stats = ClassStats.from_index(source.index)
    return BatchPlan(source.index, dataset.rows(), stats, Sampler(name="rfs", threshold=0.5), batch, epochs, 0)


def same(first, second) -> bool:
    return torch.equal(first[0], second[0]) and all(torch.equal(first[1][key], second[1][key]) for key in first[1])


def test_a_sample_is_a_function_of_its_key(source):
    first, second = TrainingDataset(source, CONFIG, seed=5), TrainingDataset(source, CONFIG, seed=5)
    keys = [(epoch, row, copy) for epoch in (0, 1) for row in (0, 3) for copy in (0, 1)]
    expected = [first[key] for key in keys]
    assert all(same(second[key], sample) for key, sample in zip(keys[::-1], expected[::-1], strict=True))


def test_epochs_repeats_and_seeds_differ(source):
    config = Data(resize="jitter", sizes=(64,), workers=0)
    dataset = TrainingDataset(source, config, seed=0)
    base = dataset[(0, 2, 0)]
    others = [dataset[(1, 2, 0)], dataset[(0, 2, 1)], TrainingDataset(source, config, seed=1)[(0, 2, 0)]]
    assert not any(same(base, other) for other in others)
    assert not any(same(first, second) for i, first in enumerate(others) for second in others[:i])


def test_targets(source, tiny_set):
    """Boxes are xyxy in pixels of the picture given, labels 0..C-1 by ascending category id."""
    document = json.loads(tiny_set[0].read_text())
    config = Data(resize="square", sizes=(80,), flip=0.0, workers=0)  # 80 x 60 and 60 x 80: the size of the files
    dataset = TrainingDataset(source, config, seed=0)
    for row in range(6):
        image, target = dataset[(0, row, 0)]
        own = [a for a in document["annotations"] if a["image_id"] == document["images"][row]["id"]]
        x, y, w, h = np.array([a["bbox"] for a in own], np.float32).T
        assert torch.equal(target["boxes"], torch.from_numpy(np.stack([x, y, x + w, y + h], 1)))
        assert target["labels"].tolist() == [{3: 0, 5: 1, 9: 2}[a["category_id"]] for a in own]
        assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
        assert int(target["image_id"]) == row
        picture = np.asarray(Image.open(tiny_set[0].with_suffix("") / f"{row}.png"))
        assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0).numpy(), picture)


def test_which_images_train(source):
    annotated = TrainingDataset(source, CONFIG, 0).rows()
    everything = TrainingDataset(source, Data(resize="square", sizes=(64,), keep_empty=True), 0)
    assert len(annotated) == 25 and everything.rows().tolist() == list(range(26))
    image, target = everything[(0, 25, 0)]  # the last image has no annotation
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_hidden_objects_are_no_background(source):
    """With `keep_empty` an image whose annotations a step hides stays out; one without any annotation is shown."""
    config = Data(resize="square", sizes=(64,), keep_empty=True, workers=0)
    kept = source.index.labels == 2
    rows = TrainingDataset(source, config, 0, kept=kept).rows()
    assert rows.tolist() == sorted({*source.index.image_of[kept].tolist(), 25})


def test_the_next_picture_in_the_place_of_an_empty_crop(source, monkeypatch):
    config = Data(resize="square", sizes=(64,), empty_crop="next", workers=0, group_by_aspect=False, keep_empty=True)
    dataset, plain = TrainingDataset(source, config, 0), TrainingDataset(source, CONFIG, 0)
    augmented = TrainingDataset._augmented

    def crop_away(own, row, rng):
        image, target = augmented(own, row, rng)
        return image, {key: value[:0] for key, value in target.items()} if row in (3, 4) else target

    monkeypatch.setattr(TrainingDataset, "_augmented", crop_away)
    assert same(dataset[(1, 3, 2)], plain[(1, 5, 2)]) and same(dataset[(1, 6, 2)], plain[(1, 6, 2)])
    assert int(dataset[(1, 25, 0)][1]["image_id"]) == 25  # it has no object to lose
    assert not len(plain[(1, 3, 2)][1]["labels"])


@pytest.fixture
def awkward(tmp_path) -> Path:
    """One image with a crowd, a box without area, one over the border and one outside."""
    (tmp_path / "set").mkdir()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "set" / "a.png")
    boxes = [[5, 5, 20, 20], [0, 0, 50, 40], [10, 10, 0, 5], [40, 30, 30, 30], [60, 60, 10, 10]]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 50, "height": 40}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 7, "bbox": box, "iscrowd": int(i == 1)}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "thing"}],
    }
    (tmp_path / "set.json").write_text(json.dumps(document))
    return tmp_path / "set.json"


def test_crowds_and_boxes_without_area_do_not_train(awkward):
    config = Data(resize="square", sizes=(50,), flip=0.0, workers=0)
    dataset = TrainingDataset(open_source(DataFiles(annotations=str(awkward)), "", "train"), config, 0)
    boxes = dataset[(0, 0, 0)][1]["boxes"]
    assert boxes.tolist() == [[5, 5, 25, 25], [40, 30, 50, 40]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_follows_the_plan(source, workers):
    config = Data(resize="square", sizes=(64,), workers=workers)
    dataset = TrainingDataset(source, config, 0)
    plan = make_plan(source, dataset)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    batches = list(training_loader(dataset, plan, start=2, rank=0, processes=1, accumulation=1))
    assert torch.equal(torch.random.get_rng_state(), state)  # a resumed run would otherwise draw other numbers
    keys = list(plan.keys(2, slice(0, 1), 1))
    assert len(batches) == len(keys) == plan.iterations - 2
    for (images, targets), own in zip(batches, keys, strict=True):
        assert [int(target["image_id"]) for target in targets] == [row for _, row, _ in own]
        assert all(same((image, target), dataset[key]) for image, target, key in zip(images, targets, own, strict=True))


def test_ranks_and_accumulation_share_one_batch(source):
    dataset = TrainingDataset(source, CONFIG, 0)
    plan = make_plan(source, dataset)

    def rows(rank, processes, accumulation):
        loader = training_loader(dataset, plan, start=0, rank=rank, processes=processes, accumulation=accumulation)
        return [[int(target["image_id"]) for target in targets] for _, targets in loader]

    whole = rows(0, 1, 1)
    ranks = [rows(0, 2, 1), rows(1, 2, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole
    halves = rows(0, 1, 2)
    assert [halves[i] + halves[i + 1] for i in range(0, len(halves), 2)] == whole
    both = [rows(0, 2, 2), rows(1, 2, 2)]
    joined = [both[0][i] + both[0][i + 1] + both[1][i] + both[1][i + 1] for i in range(0, len(both[0]), 2)]
    assert joined == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_a_users_mistake(source, tmp_path, workers):
    from tailfin.data.dataset import Source

    config = Data(resize="square", sizes=(64,), workers=workers)
    broken = Source(source.index, tmp_path)
    dataset = TrainingDataset(broken, config, 0)
    with pytest.raises(UserError, match=r"image .*\.png does not exist"):
        next(training_loader(dataset, make_plan(source, dataset), start=0, rank=0, processes=1, accumulation=1))
    with pytest.raises(UserError, match=r"image .*\.png does not exist"):
        next(evaluation_loader(broken, config, batch=2, rank=0, processes=1))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_shows_each_image_once(source, processes):
    rows = []
    for rank in range(processes):
        for images, own in evaluation_loader(source, CONFIG, batch=4, rank=rank, processes=processes):
            assert len(images) == len(own) <= 4
            rows += own
    assert sorted(rows) == list(range(26))


def test_evaluation_pictures_have_test_size(source):
    config = Data(resize="square", sizes=(48,), test_size=96, test_max_size=120)
    image, row = EvaluationDataset(source, config)[1]
    assert row == 1 and image.dtype == torch.uint8
    width, height = int(source.index.widths[1]), int(source.index.heights[1])
    scale = min(96 / min(width, height), 120 / max(width, height))
    assert image.shape[-2:] == (round(height * scale), round(width * scale))


@pytest.mark.parametrize(
    "config, size, expected",
    [
        (Data(), (480, 640), (800, 1067)),  # the largest training size, bounded by max_size
        (Data(sizes=(640, 672)), (400, 1000), (533, 1333)),
        (Data(resize="square", sizes=(64,)), (60, 80), (48, 64)),  # fits into the square
        (Data(resize="jitter", sizes=(64,)), (60, 80), (48, 64)),
        (Data(resize="stretch", sizes=(64, 96)), (60, 80), (64, 64)),  # training uses the first size alone
        (Data(resize="jitter", sizes=(64, 96)), (60, 80), (48, 64)),
        (Data(resize="detr", sizes=(48, 64), max_size=200), (60, 80), (64, 85)),
        (Data(resize="square", sizes=(64,), test_size=100, test_max_size=200), (60, 80), (100, 133)),
    ],
)
def test_test_size_follows_the_recipe(config, size, expected):
    assert to_test_size(torch.zeros((3, *size), dtype=torch.uint8), config).shape == (3, *expected)


def test_open_source_needs_a_file(tiny_set, tmp_path):
    with pytest.raises(UserError, match="no val annotations: give --val FILE or data.val.annotations"):
        open_source(DataFiles(), "", "val")
    relative = open_source(DataFiles(annotations="train.json", images="train"), str(tiny_set[0].parent), "train")
    assert relative.images == tiny_set[0].with_suffix("")
    with pytest.raises(UserError, match="image folder .* does not exist"):
        open_source(DataFiles(annotations=str(tiny_set[0]), images="nothing"), str(tmp_path), "train")


def test_classes_that_nobody_looked_for(tmp_path):
    """Known are: every class of a picture without lists; else those present and those listed as absent, in full."""
    (tmp_path / "set").mkdir()
    lists = [{}, {"neg_category_ids": [5]}, {"neg_category_ids": [5], "not_exhaustive_category_ids": [7]}]
    for number in range(3):
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "set" / f"{number}.png")
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 50, "height": 40, **own} for i, own in enumerate(lists)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "bbox": [5, 5, 20, 20], "iscrowd": 0} for i in range(3)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in (3, 5, 7)],
    }
    (tmp_path / "set.json").write_text(json.dumps(document))
    source = open_source(DataFiles(annotations=str(tmp_path / "set.json")), "", "train")
    ignoring = CONFIG.model_copy(update={"unchecked_classes": "ignore"})
    dataset = TrainingDataset(source, ignoring, 0)
    known = [dataset[(0, row, 0)][1]["known"].tolist() for row in range(3)]
    assert known == [[True, True, True], [False, True, True], [False, True, False]]
    assert source.index.known_share() == np.mean(known)
    assert "known" not in TrainingDataset(source, CONFIG, 0)[(0, 0, 0)][1]
    assert unchecked_note(source, ignoring) == "33% of pictures times classes were not looked for"
    assert unchecked_note(source, CONFIG) == ""


def test_ignoring_without_lists_is_said(source):
    assert "every class counts as looked for" in unchecked_note(
        source, CONFIG.model_copy(update={"unchecked_classes": "ignore"})
    )
