"""Masks as training targets: polygons and RLEs of any kind follow their object through every transform, and an object
without a mask that can be used is told of and counts for its box."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from tailfin.data import masks as mask_module
from tailfin.data.dataset import TrainingDataset, open_source, training_loader
from tailfin.errors import UserError
from tailfin.samplers import BatchPlan
from tailfin.schema.data import Data, DataFiles
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

SIDE = 96
BLOBS = ((10, 14, 36, 40), (50, 20, 84, 44), (22, 58, 62, 90))  # left, top, right, bottom of the three objects
COLORS = ((230, 30, 30), (30, 230, 30), (30, 30, 230))


def ell(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """An L in its box: the upper right quarter is missing."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[top:bottom, left:right] = 1
    mask[top : (top + bottom) // 2, (left + right) // 2 : right] = 0
    return mask


def segmentation(kind: str, box: tuple[int, int, int, int]) -> Any:
    left, top, right, bottom = box
    middle, centre = (top + bottom) // 2, (left + right) // 2
    if kind == "polygon":
        return [[left, top, centre, top, centre, middle, right, middle, right, bottom, left, bottom]]
    rle = coco_mask.encode(np.asfortranarray(ell(*box)))
    if kind == "compressed":
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    runs = np.flatnonzero(np.diff(ell(*box).ravel(order="F"), prepend=0)).tolist()
    return {"size": rle["size"], "counts": np.diff([0, *runs, SIDE * SIDE]).tolist()}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    """A source of six pictures with three coloured objects each, of one kind of segmentation each; `change` edits."""

    def build(change: Callable[[dict[str, Any]], None] = lambda document: None, crowd: bool = False):
        (tmp_path / "set").mkdir(exist_ok=True)
        picture = np.full((SIDE, SIDE, 3), 128, np.uint8)
        for box, color in zip(BLOBS, COLORS, strict=True):
            picture[ell(*box).astype(bool)] = color
        document: dict[str, Any] = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(6)],
            "categories": [{"id": n + 1, "name": name} for n, name in enumerate(("red", "green", "blue"))],
            "annotations": [],
        }
        for image in range(6):
            Image.fromarray(picture).save(tmp_path / "set" / f"{image}.png")
            for label, (box, kind) in enumerate(zip(BLOBS, ("polygon", "compressed", "list"), strict=True)):
                left, top, right, bottom = box
                document["annotations"].append(
                    {
                        "id": 3 * image + label + 1,
                        "image_id": image,
                        "category_id": label + 1,
                        "bbox": [left, top, right - left, bottom - top],
                        "segmentation": segmentation(kind, box),
                        "iscrowd": int(crowd and label == 2),
                    }
                )
        change(document)
        path = tmp_path / "set.json"
        path.write_text(json.dumps(document))
        return open_source(DataFiles(annotations=str(path)), "", "train")

    return build


@pytest.mark.parametrize(
    "config",
    [
        Data(resize="square", sizes=(96,)),
        Data(resize="square", sizes=(141,), flip=1.0),
        Data(sizes=(57,), max_size=90, flip=1.0, photometric=True),
        Data(resize="jitter", sizes=(110,), jitter_scale=(0.5, 2.0)),
        Data(resize="detr", sizes=(120,), crop_resize=(100, 160), crop=(70, 130)),
        Data(resize="jitter", sizes=(110,), jitter_scale=(0.6, 1.6), copy_paste=True, color_jitter=0.2),
    ],
    ids=["as it is", "square", "photometric", "jitter", "detr", "copy-paste"],
)
def test_masks_lie_on_the_pixels_of_their_object(make, config) -> None:
    dataset = TrainingDataset(make(), config.model_copy(update={"workers": 0}), 0).with_masks()
    seen = 0
    for key in [(epoch, row, 0) for epoch in range(3) for row in range(6)]:
        image, target = dataset.sample(*key)
        masks, boxes, labels = target["masks"], target["boxes"], target["labels"]
        assert masks.dtype == torch.uint8 and masks.is_contiguous() and int(masks.max()) <= 1
        assert masks.shape == (len(boxes), *image.shape[1:]) and target["mask_valid"].tolist() == [True] * len(boxes)
        strong = image.int().argmax(dim=0)
        coloured = (image.int().amax(dim=0) - image.int().amin(dim=0)) > 120
        for mask, box, label in zip(masks.bool(), boxes, labels, strict=True):
            if config.photometric:  # colours are not to be trusted, the box is
                inside = torch.zeros_like(mask)
                left, top, right, bottom = (round(float(side)) for side in box)
                inside[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
                assert not (mask & ~inside).any() and 0.6 < mask.sum() / ((right - left) * (bottom - top)) < 0.9
            elif mask.sum() > 400:
                assert (coloured & (strong == label))[mask].float().mean() > 0.85  # but for the blurred border
            seen += 1
        if not config.photometric:
            assert (coloured & ~masks.bool().any(dim=0)).float().mean() < 0.04
    assert seen > 20


def test_nothing_is_decoded_where_nobody_asks(make, monkeypatch) -> None:
    monkeypatch.setattr(mask_module.Segmentations, "masks", lambda *_: pytest.fail("a mask was decoded"))
    source = make()
    dataset = TrainingDataset(source, Data(resize="square", sizes=(64,)), 0)
    assert set(dataset.sample(0, 0, 0)[1]) == {"boxes", "labels", "image_id"}
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        dataset.with_masks().sample(0, 0, 0)
    assert not dataset.masks


def test_crowds_do_not_train(make) -> None:
    target = TrainingDataset(make(crowd=True), Data(resize="square", sizes=(96,)), 0).with_masks().sample(0, 0, 0)[1]
    assert target["labels"].tolist() == [0, 1] and target["masks"].shape == (2, 96, 96)


def spoil(document: dict[str, Any]) -> None:
    first, second, third, fourth, *_ = document["annotations"]
    del first["segmentation"]
    second["segmentation"] = {"size": [SIDE, SIDE], "counts": "oooooo"}
    third["segmentation"] = [[30, 60, 31, 61]]  # no area
    fourth["segmentation"] = [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]  # no pixel


def test_objects_without_a_usable_mask_count_for_their_box(make) -> None:
    dataset = TrainingDataset(make(spoil), Data(resize="square", sizes=(96,), flip=0.0), 0).with_masks()
    note = dataset.missing_masks()
    assert note.startswith("masks: 3 of 18 objects have none, first annotation 1, and count for their box alone; ")
    assert "2 of them cannot be read: annotation 2: segmentation: the RLE's counts do not add up" in note
    target = dataset.sample(0, 0, 0)[1]
    assert target["mask_valid"].tolist() == [False] * 3 and target["boxes"].tolist() == [list(box) for box in BLOBS]
    for mask, (left, top, right, bottom) in zip(target["masks"], BLOBS, strict=True):
        assert mask[top:bottom, left:right].all() and mask.sum() == (right - left) * (bottom - top)
    assert dataset.sample(0, 1, 0)[1]["mask_valid"].tolist() == [False, True, True]
    assert TrainingDataset(make(), Data(), 0).with_masks().missing_masks() == ""


def test_the_parsed_file_still_refuses_what_cannot_be_read(make) -> None:
    index = make(spoil).index
    with pytest.raises(UserError, match=r"set\.json: annotation 2: segmentation: the RLE's counts do not add up"):
        index.segmentations()
    kept = pickle.loads(pickle.dumps(index.readable_segmentations))
    assert kept.problem == index.readable_segmentations.problem != ""
    assert kept.kinds[:4].tolist() == [0, 3, 3, 1] and kept.drawable()[:5].tolist() == [False, False, False, True, True]


def test_copy_paste_keeps_objects_without_a_mask(make) -> None:
    config = Data(resize="square", sizes=(96,), flip=0.0, copy_paste=True)
    dataset = TrainingDataset(make(spoil), config, 0).with_masks()
    targets = [dataset.sample(epoch, 0, 0)[1] for epoch in range(12)]
    assert {len(target["boxes"]) for target in targets} >= {3, 4}
    for target in targets:
        rows = ~target["mask_valid"]
        assert len(target["mask_valid"]) == len(target["masks"]) == len(target["labels"])
        boxes, masks = target["boxes"][rows], target["masks"][rows]
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        assert (masks.flatten(1).sum(dim=1) <= area).all() and (masks.flatten(1).sum(dim=1) > 0).all()


def test_a_mask_that_a_crop_leaves_outside_is_not_learnt(make) -> None:
    config = Data(resize="jitter", sizes=(48,), jitter_scale=(2.0, 2.0), flip=0.0)
    dataset = TrainingDataset(make(), config, 0).with_masks()
    found = [dataset.sample(epoch, row, 0)[1] for epoch in range(30) for row in range(6)]
    seen = torch.cat([target["masks"].flatten(1).any(dim=1).bool() for target in found])
    valid = torch.cat([target["mask_valid"] for target in found])
    assert torch.equal(seen, valid) and valid.any() and not valid.all()


def test_a_file_without_masks_is_refused(make) -> None:
    def strip(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            del annotation["segmentation"]

    with pytest.raises(UserError, match=r"set\.json: no object has a mask \(segmentation\)"):
        TrainingDataset(make(strip), Data(), 0).with_masks()


def test_workers_give_the_same_masks(make) -> None:
    source = make()

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        config = Data(resize="jitter", sizes=(64,), workers=workers)
        dataset = TrainingDataset(source, config, 0).with_masks()
        plan = BatchPlan(source.index, dataset.rows(), ClassStats.from_index(source.index), Sampler(), 2, 1.0, 0)
        loader = training_loader(dataset, plan, start=0, rank=0, processes=1, accumulation=1)
        found = [target for _, (_, targets) in zip(range(3), loader, strict=False) for target in targets]
        loader.close()
        return found

    for own, other in zip(batches(0), batches(1), strict=True):
        assert all(torch.equal(own[key], other[key]) for key in ("masks", "mask_valid", "boxes"))
