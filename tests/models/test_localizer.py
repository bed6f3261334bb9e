"""The class-agnostic detector: its targets, its losses, and that training finds objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from tailfin.config import check_recipe
from tailfin.data.dataset import TrainingDataset, open_source, to_test_size
from tailfin.models import build_detector
from tailfin.models.assigners import max_iou, paired_iou
from tailfin.models.localizer import Localizer, centerness, sample_near
from tailfin.propose import Found, average_recall
from tailfin.stats import ClassStats

RECIPE = {
    "weights": "none",
    "backbone": "resnet18",
    "detector": {
        "name": "localizer",
        "norm": "bn",
        "frozen_layers": 0,
        "fpn_channels": 16,
        "fpn_layers": [2, 3],
        "fpn_pool": False,
        "anchor_sizes": [16, 32],
        "rpn_batch": 64,
        "rpn_proposals": 60,
        "roi_size": 3,
        "roi_batch": 64,
        "head_channels": 32,
        "max_proposals": 40,
    },
    "data": {"resize": "square", "sizes": [64], "workers": 0},
}


def build(**detector) -> Localizer:
    torch.manual_seed(0)
    recipe = check_recipe({**RECIPE, "detector": RECIPE["detector"] | detector}, "test")
    stats = ClassStats(image_count=[3, 2, 1], instance_count=[3, 2, 1], num_images=6)
    return build_detector(recipe, stats)[0]


def pictures(count: int = 2) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(count)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 30, 28], [30, 34, 60, 60]]), "labels": torch.tensor([0, 2])}
        for _ in range(count)
    ]
    return images, targets


def test_centerness():
    box = torch.tensor([[10.0, 20, 30, 60]])
    points = torch.tensor([[20.0, 40], [15, 40], [15, 30], [10, 40], [5, 40], [20, 70]])
    expected = [1.0, (5 / 15) ** 0.5, ((5 / 15) * (10 / 30)) ** 0.5, 0, 0, 0]
    assert torch.allclose(centerness(points, box.expand(6, 4)), torch.tensor(expected), atol=1e-6)


def test_paired_iou():
    first = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 4, 4]])
    second = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [6, 6, 9, 9]])
    assert torch.allclose(paired_iou(first, second), torch.tensor([1, 50 / 150, 0]))


def test_sampled_rows_are_near_their_objects():
    torch.manual_seed(0)
    boxes = torch.rand(500, 2) * 40
    boxes = torch.cat([boxes, boxes + 5 + torch.rand(500, 2) * 25], dim=1)
    objects = torch.tensor([[5.0, 5, 30, 30], [20, 20, 60, 60]])
    assigned = torch.stack([max_iou(boxes, own, 0.3, 0.3, low_quality=False) for own in (objects, objects[:0])])
    some = torch.tensor([True, False])

    def sampled(**options):
        index, drawn = sample_near(assigned, some, 50, **options)
        rows = [own[valid] for own, valid in zip(index, drawn, strict=True)]
        return rows, [own[row] for own, row in zip(assigned, rows, strict=True)]

    (rows, none), (match, _) = sampled()
    assert 0 < len(rows) <= 50 and len(rows) == len(rows.unique()) and len(none) == 0
    assert (paired_iou(boxes[rows], objects[match]) >= 0.3).all()
    (rows, alone), (match, nothing) = sampled(background=0.4)
    assert (match >= 0).sum() == 30 and (match < 0).sum() == 20
    assert (box_iou(objects, boxes[rows[match < 0]]) < 0.3).all()
    assert len(alone) == 20 and (nothing < 0).all()


def test_losses_are_named_finite_and_reach_every_part():
    model = build().train()
    losses = model(*pictures())
    assert set(losses) == {"loss_centerness", "loss_rpn_box_reg", "loss_iou", "loss_box_reg"}
    torch.stack(list(losses.values())).sum().backward()
    for name in ("rpn", "box", "head", "fpn", "backbone"):
        grads = [parameter.grad for parameter in model.parts()[name].parameters() if parameter.requires_grad]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), name
    assert model.roi_heads.iou.weight.grad.abs().sum() > 0


def test_labels_are_never_read():
    images, targets = pictures()
    values = []
    for labels in (torch.tensor([0, 2]), torch.tensor([1, 1])):
        model = build().train()
        torch.manual_seed(3)
        values.append(model(images, [{**target, "labels": labels} for target in targets]))
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    model(images, [{"boxes": target["boxes"]} for target in targets])


@pytest.mark.parametrize("background", [0.0, 0.5])
def test_pictures_without_objects(background):
    model = build(background=background).train()
    images, _ = pictures()
    losses = model(images, [{"boxes": torch.zeros((0, 4))} for _ in images])
    total = torch.stack(list(losses.values())).sum()
    total.backward()  # the losses are attached to the graph also where they are 0
    assert losses["loss_box_reg"].item() == losses["loss_rpn_box_reg"].item() == 0
    assert (losses["loss_centerness"].item() > 0) == (losses["loss_iou"].item() > 0) == (background > 0)


def test_weights_of_the_losses():
    images, targets = pictures()
    options = {"centerness_weight": 3.0, "rpn_box_weight": 5.0, "iou_weight": 0.0, "box_weight": 2.0}
    values = []
    for own in ({}, options):
        model = build(**own).train()
        torch.manual_seed(3)
        values.append(model(images, targets))
    plain, weighted = values
    assert torch.isclose(weighted["loss_centerness"], 3 * plain["loss_centerness"])
    assert torch.isclose(weighted["loss_rpn_box_reg"], 0.5 * plain["loss_rpn_box_reg"])
    assert weighted["loss_iou"].item() == 0
    assert torch.isclose(weighted["loss_box_reg"], 2 * plain["loss_box_reg"])


def test_detections_are_scored_boxes_inside_the_picture():
    model = build().eval()
    with torch.inference_mode():
        found = model(pictures()[0])
    for own in found:
        assert 0 < len(own["boxes"]) <= 40 and (own["labels"] == 0).all()
        assert (own["boxes"] >= 0).all() and (own["boxes"] <= 64).all()
        assert (own["scores"].diff() <= 0).all() and ((own["scores"] > 0) & (own["scores"] <= 1)).all()
    with torch.inference_mode():
        few = model(pictures()[0], limits=model.limits.replaced(max_dets=3))
    assert all(len(own["boxes"]) == 3 for own in few)


def test_training_raises_recall(tiny_set):
    recipe = check_recipe({**RECIPE, "data": {**RECIPE["data"], "train": {"annotations": str(tiny_set[0])}}}, "test")
    source = open_source(recipe.data.train, "", "train")
    samples = TrainingDataset(source, recipe.data, 0)
    model = build(background=0.5)

    def recall() -> float:
        model.eval()
        owners, boxes, scores = [], [], []
        with torch.inference_mode():
            for row in samples.rows()[:12].tolist():
                picture = source.read(row, 10**6)
                small = to_test_size(picture, recipe.data)
                found = model([small])[0]
                owners.append(int(source.index.image_ids[row]))
                boxes.append(found["boxes"].numpy() * np.float32(picture.shape[-1] / small.shape[-1]))
                scores.append(found["scores"].numpy())
        offsets = np.concatenate([[0], np.cumsum([len(own) for own in boxes])])
        found = Found(np.array(owners), offsets, np.concatenate(boxes), np.concatenate(scores))
        return average_recall(found, source.index, [10])["R50@10"]

    before = recall()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for iteration in range(60):
        torch.manual_seed(iteration)
        rows = np.random.default_rng(iteration).choice(samples.rows(), 4)
        batch = [samples[(iteration, int(row), 0)] for row in rows]
        losses = model([image for image, _ in batch], [target for _, target in batch])
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
    assert recall() >= before + 0.2  # 0.5 above it and more: another rounding moves it by 0.1


def test_mistakes():
    with pytest.raises(Exception, match="anchor_sizes needs one size per level: 2 levels, 3 sizes"):
        build(anchor_sizes=[8, 16, 32])
    values = {**RECIPE, "data": {**RECIPE["data"], "val": {"annotations": "val.json"}}}
    with pytest.raises(Exception, match="knows no classes to be measured by"):
        check_recipe(values, "test")
