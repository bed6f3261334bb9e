"""Cascade R-CNN: the vectors stage by stage on injected predictions; what each stage has of its own; masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.losses.fcbl import FCBL
from tailfin.models import build_detector
from tailfin.models.cascade_rcnn import CascadeRCNN
from tailfin.models.detector import Limits
from tailfin.stats import ClassStats

CASES = ("a_agnostic_ce", "b_class_specific_ce", "c_agnostic_seesaw", "d_sampled_16", "e_no_gt")
CLASSES = 5
SIZES = ((96, 128), (128, 96))
DETECTOR = {
    "name": "cascade_rcnn",
    "norm": "bn",
    "frozen_layers": 0,
    "fpn_channels": 16,
    "fpn_layers": [2, 3],
    "fpn_pool": False,
    "anchor_sizes": [12, 32],
    "rpn_batch": 32,
    "rpn_pre_nms": [100, 60],
    "rpn_post_nms": [60, 40],
    "roi_size": 3,
    "roi_batch": 32,
    "head_channels": 32,
    "mask_channels": 8,
    "mask_layers": 1,
}


def detector(*, loss="softmax", classes: int = CLASSES, features=None, **options) -> CascadeRCNN:
    values = {
        "weights": "none",
        "backbone": "resnet18",
        "detector": {**DETECTOR, **options},
        "loss": loss,
        "features": features,
        "evaluation": {"max_dets": 20, "score_threshold": 0.02},
    }
    counts = np.arange(1, classes + 1)
    torch.manual_seed(0)
    return build_detector(
        check_recipe(values, "test"), ClassStats(image_count=counts, instance_count=2 * counts, num_images=20)
    )[0]


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((3, *size), generator=generator) for size in SIZES]


def targets(counts: tuple[int, ...] = (3, 2)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for count, (height, width) in zip(counts, SIZES, strict=True):
        corner = (50 * torch.rand((count, 2), generator=generator)).round()
        boxes = torch.cat([corner, corner + (10 + 30 * torch.rand((count, 2), generator=generator)).round()], 1)
        masks = torch.zeros((count, height, width), dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
            mask[top:bottom, left : (left + right) // 2] = 1  # the left half
        labels = torch.randint(CLASSES, (count,), generator=generator)
        found.append({"boxes": boxes, "labels": labels, "masks": masks})
    return found


# ---- vectors ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(golden_dir) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "cascade.npz"))


def of_case(file, case: str) -> tuple[CascadeRCNN, list[dict[str, Tensor]], list[tuple[int, int]]]:
    """A detector with the case's settings, its objects and the sizes of its pictures."""
    model = detector(
        loss="seesaw" if str(file[f"{case}/hp/cls_loss"]) == "seesaw" else "softmax",
        classes=int(file[f"{case}/num_classes"]),
        box_regression="class_agnostic" if file[f"{case}/class_agnostic_boxes"] else "class_specific",
        roi_batch=int(file[f"{case}/hp/num_samples"]),
    )
    images = range(int(file[f"{case}/num_images"]))
    wanted = [
        {
            "boxes": torch.from_numpy(file[f"{case}/img{image}/gt_boxes"]).double(),
            "labels": torch.from_numpy(file[f"{case}/img{image}/gt_labels"]),
        }
        for image in images
    ]
    return model.train(), wanted, [tuple(file[f"{case}/img{image}/shape"].tolist()) for image in images]


@pytest.mark.parametrize("case", CASES)
def test_training_of_vectors(file, case):
    """Rows, losses with their gradients and refined boxes of every stage, each from the boxes of the one before."""
    model, wanted, sizes = of_case(file, case)
    proposals = [torch.from_numpy(file[f"{case}/img{image}/proposals"]).double() for image in range(len(wanted))]
    for stage, (heads, weight) in enumerate(zip(model.roi_heads.heads(), model.roi_heads.weights, strict=True)):
        prefix = f"{case}/train/stage{stage}"
        draws = []
        for image, (own, target) in enumerate(zip(proposals, wanted, strict=True)):
            torch.testing.assert_close(
                own, torch.from_numpy(file[f"{prefix}/img{image}/boxes_in"]), rtol=1e-6, atol=1e-4
            )
            drawn = np.concatenate([file[f"{prefix}/img{image}/{kind}_indices"] for kind in ("pos", "neg")])
            drawn = torch.from_numpy(drawn) - len(target["boxes"])  # theirs stand before the proposals, ours behind
            draws.append(torch.where(drawn < 0, drawn + len(target["boxes"]) + len(own), drawn))
        rows = heads.sample(proposals, wanted, draws)
        assert torch.equal(rows.labels, torch.from_numpy(file[f"{prefix}/labels"]))
        if file[f"{case}/hp/num_samples"] > 100:  # there are fewer rows: the sampler takes the same
            every = heads.sample(proposals, wanted)
            assert [len(own) for own in every.boxes] == [len(own) for own in rows.boxes]
        added = [file[f"{prefix}/img{image}/pos_is_gt"].sum() for image in range(len(wanted))]
        assert rows.added.sum() == sum(added)
        logits, deltas = (
            torch.from_numpy(file[f"{prefix}/{name}"]).double().requires_grad_()
            for name in ("cls_logits", "box_deltas")
        )
        losses = {name: weight * value for name, value in heads.losses_of(logits, deltas, rows).items()}
        for name, theirs in (("loss_classifier", "loss_cls"), ("loss_box_reg", "loss_bbox")):
            torch.testing.assert_close(
                losses[name].detach(), torch.tensor(file[f"{prefix}/{theirs}"].item()).double(), rtol=2e-5, atol=1e-6
            )
        found = torch.autograd.grad(sum(losses.values()), (logits, deltas))
        for gradient, name in zip(found, ("grad_cls", "grad_box"), strict=True):
            torch.testing.assert_close(
                gradient.float(), torch.from_numpy(file[f"{prefix}/{name}"]), rtol=1e-4, atol=1e-7
            )
        if stage < 2:
            moved = model.roi_heads.next_proposals(stage, rows.boxes, logits, deltas, sizes, rows)
            proposals = [own[valid] for own, valid in zip(moved.boxes, moved.valid, strict=True)]
            for image, own in enumerate(proposals):
                expected = torch.from_numpy(file[f"{prefix}/img{image}/refined_boxes"])
                torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_of_vectors(file, case, monkeypatch):
    """Predictions injected into each stage: the boxes it gets, the mean logits, the detections."""
    model, wanted, sizes = of_case(file, case)
    model.eval()
    counts = file[f"{case}/test/num_proposals"].tolist()
    if len(wanted) != len(counts):
        sizes = sizes[: len(counts)]

    def injected(stage: int):
        def predict(features, proposals, image_sizes):
            prefix = f"{case}/test/stage{stage}"
            rois = torch.from_numpy(file[f"{prefix}/rois"])
            torch.testing.assert_close(torch.cat(proposals), rois[:, 1:], rtol=1e-6, atol=1e-4)
            return tuple(torch.from_numpy(file[f"{prefix}/{name}"]).double() for name in ("cls_logits", "box_deltas"))

        return predict

    for stage, heads in enumerate(model.roi_heads.heads()):
        monkeypatch.setattr(heads, "predict", injected(stage))
    first = torch.from_numpy(file[f"{case}/test/stage0/rois"])[:, 1:].split(counts)
    boxes, logits, deltas = model.second_stage({}, list(first), sizes)
    torch.testing.assert_close(logits, torch.from_numpy(file[f"{case}/test/mean_logits"]), rtol=1e-6, atol=1e-6)
    scores = model.loss.scores(logits)
    expected = torch.from_numpy(file[f"{case}/test/mmdet_scores"])[:, : scores.shape[1]]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)
    limits = Limits(float(file[f"{case}/hp/score_thr"]), int(file[f"{case}/hp/max_per_img"]), 0.5)
    for image, own in enumerate(model.roi_heads.detect(scores, deltas, boxes, sizes, limits)):
        for name, value in own.items():
            theirs = torch.from_numpy(file[f"{case}/test/img{image}/det_{name}"])
            torch.testing.assert_close(value.to(theirs.dtype), theirs, rtol=1e-5, atol=1e-3)


# ---- the detector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [False, True])
def test_losses_and_gradients_of_every_stage(masks):
    model = detector(masks=masks).train()
    losses = model(pictures(), targets())
    kinds = ("loss_classifier", "loss_box_reg", *(["loss_mask"] if masks else []))
    numbered = {f"{kind}_{stage}" for kind in kinds for stage in (1, 2, 3)}
    assert losses.keys() == numbered | {"loss_rpn_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    for name, part in model.parts().items():
        assert all(value.grad is not None for value in part.parameters()), name
    for name, value in (*model.roi_heads.named_parameters(), *model.masks.named_parameters()):
        assert bool(value.grad.abs().sum() > 0), name
    assert model.kinds == (("bbox", "segm") if masks else ("bbox",))


def test_stage_weights_multiply_all_losses_of_a_stage():
    def values(weights):
        model = detector(masks=True, stage_weights=weights).train()
        torch.manual_seed(1)
        return model(pictures(), targets())

    plain, weighted = values([1.0, 1.0, 1.0]), values([1.0, 0.5, 0.25])
    for kind in ("loss_classifier", "loss_box_reg", "loss_mask"):
        for stage, weight in enumerate((1.0, 0.5, 0.25), start=1):
            torch.testing.assert_close(weighted[f"{kind}_{stage}"], weight * plain[f"{kind}_{stage}"])


def test_each_stage_has_statistics_and_made_up_rows_of_its_own():
    model = detector(loss={"name": "fcbl", "alpha": 0.85}, features={"name": "hallucination"}).train()
    heads = model.roi_heads.heads()
    assert len({id(own.loss) for own in heads} | {id(own.extra_rows) for own in heads}) == 6
    losses_of = [own.loss for own in heads]
    assert all(isinstance(loss, FCBL) for loss in losses_of)
    sum(model(pictures(), targets()).values()).backward()
    states = [torch.cat([value.double().flatten() for value in loss.buffers()]) for loss in losses_of]
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])
    owned = {id(module) for module in model.method_state()}
    assert owned == {id(own.loss) for own in heads} | {id(own.extra_rows) for own in heads}


@pytest.mark.parametrize(
    "loss",
    ["softmax", "objectness", {"name": "fcbl", "alpha": 0.85}, "seesaw", "ecm"],
    ids=lambda loss: loss if isinstance(loss, str) else loss["name"],
)
@pytest.mark.parametrize("regression", ["class_agnostic", "class_specific"])
def test_losses_of_the_box_heads(loss, regression):
    model = detector(loss=loss, box_regression=regression, masks=True).train()
    losses = model(pictures(), targets())
    assert torch.isfinite(sum(losses.values()))
    model.eval()
    with torch.no_grad():
        found = model(pictures(), limits=Limits(0.0, 7, 0.5))
    assert [own["masks"].shape for own in found] == [(7, 28, 28)] * 2


def test_masks_are_the_mean_of_the_stages():
    model = detector(masks=True).eval()
    with torch.no_grad():
        outputs = model.outputs(pictures())
        found = model.detections(outputs, Limits(0.0, 7, 0.5))
        boxes, labels = [own["boxes"] for own in found], torch.cat([own["labels"] for own in found])
        every = [
            branch.probabilities(outputs.features, boxes, labels, outputs.image_sizes) for branch in model.branches()
        ]
    torch.testing.assert_close(torch.cat([own["masks"] for own in found]), sum(every) / 3)
    assert not torch.equal(every[0], every[1])


@pytest.mark.parametrize("features", ["fasa", "rio"])
def test_feature_modules(features):
    model = detector(features={"name": features}).train()
    for _ in range(2):
        losses = model(pictures(), targets())
    assert torch.isfinite(sum(losses.values()))


def test_pcb_in_every_stage():
    losses = detector(classifier="pcb", loss="pcb").train()(pictures(), targets())
    assert torch.isfinite(sum(losses.values()))


def test_pictures_without_objects():
    losses = detector(masks=True).train()(pictures(), targets((0, 0)))
    sum(losses.values()).backward()
    assert all(losses[f"loss_mask_{stage}"] == 0 for stage in (1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"detector": {"stage_ious": [0.5, 0.6]}}, "one entry per stage"),
        ({"detector": {"roi_fg_iou": 0.6}}, "stage_ious"),
        ({"features": {"name": "feature_memory"}, "loss": "ebl"}, "needs one box head"),
        ({"method": "decoupled", "second": {"classifier": "simcal"}}, "needs one box head"),
    ],
)
def test_mistakes(changes, text):
    values = {"weights": "none", **changes, "detector": {**DETECTOR, **changes.get("detector", {})}}
    with pytest.raises(UserError, match=text):
        check_recipe(values, "test")
