"""Detectors converted from detectron2's and mmdetection's formats give the outputs of plain forward passes written by
those projects' conventions (`zoo_reference.py`), to 1e-5 of the largest value."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zoo_reference import (
    DETECTRON2,
    HIDDEN,
    MMDETECTION,
    WIDTH,
    Maker,
    Names,
    State,
    anchors,
    body,
    clipped,
    conv,
    decoded,
    linear,
    normalised,
    pooled,
    pyramid,
)

import tailfin
from tailfin.convert import convert
from tailfin.errors import UserError
from tailfin.models.box_deltas import decode_deltas
from tailfin.models.images import batch_images

CLASSES = ["cup", "dog", "ape", "cat", "bee"]  # the checkpoint's order
WANTED = ["bee", "cup", "cat"]  # of the model, by ascending id
ROWS = [CLASSES.index(name) for name in WANTED]
RATIOS = [0.5, 1.0, 2.0]
SIZE = (96, 128)
TWO_STAGE = f"""
weights: imagenet
detector:
  fpn_channels: {WIDTH}
  head_channels: {HIDDEN}
  rpn_pre_nms: [50, 50]
  rpn_post_nms: [40, 40]
"""
DENSE = f"weights: imagenet\nloss: focal\ndetector: {{fpn_channels: {WIDTH}, head_convs: 2}}\n"


@pytest.fixture
def picture() -> Tensor:
    return torch.randint(0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


@pytest.fixture
def files(tmp_path):
    """Annotation file of the wanted classes and text file of the checkpoint's."""
    categories = [{"id": 3 * place + 1, "name": name} for place, name in enumerate(WANTED)]
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}]
    annotation = {"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}
    document = {"images": images, "categories": categories, "annotations": [annotation]}
    (tmp_path / "val.json").write_text(json.dumps(document))
    (tmp_path / "theirs.txt").write_text("\n".join(CLASSES))
    return tmp_path


def converted(folder, state: State, recipe: str, name: str, depth: str, suffix: str = ".pth", meta=None, **options):
    """The model of a checkpoint in its format, and the lines that were said."""
    path = folder / f"theirs{suffix}"
    if suffix == ".pkl":
        path.write_bytes(
            pickle.dumps({"model": {key: value.numpy() for key, value in state.items()}, "__author__": "x"})
        )
    else:
        torch.save({"meta": meta or {}, "state_dict" if meta is not None else "model": state}, path)
    (folder / "recipe.yaml").write_text(recipe)
    overrides = [f"detector.name={name}", f"backbone={depth}"]
    if meta is None:
        options.setdefault("source_classes", folder / "theirs.txt")
    lines = convert(
        path, folder / "recipe.yaml", folder / "val.json", folder / "m.safetensors", overrides=overrides, **options
    )
    return tailfin.load(folder / "m.safetensors", device="cpu").model.eval(), lines


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    scale = float(wanted.abs().max())
    assert scale > 0 and float((found - wanted).abs().max()) <= 1e-5 * max(scale, 1)


def by_cell(maps: Tensor, width: int) -> Tensor:
    """[1, A * width, h, w] to [h * w * A, width]."""
    return maps.view(-1, width, *maps.shape[2:]).permute(2, 3, 0, 1).reshape(-1, width)


# ---- two stages ------------------------------------------------------------------------------------------------------


def two_stage(names: Names, depth: str, stages: int, masks: bool, extra: int = 1, **body_options) -> State:
    """A checkpoint; the background is the last row of the classifier, boxes of a single stage are class-specific."""
    make = Maker()
    make.body(names, depth, **body_options)
    make.pyramid(names, depth, first=2)
    d2, count = names is DETECTRON2, len(CLASSES)
    rpn = ("proposal_generator.rpn_head.{}" if d2 else "rpn_head.{}").format
    for theirs, rows, side in zip(
        ("conv", "objectness_logits", "anchor_deltas") if d2 else ("rpn_conv", "rpn_cls", "rpn_reg"),
        (WIDTH, 3, 12), (3, 1, 1), strict=True,
    ):  # fmt: skip
        make.layer(rpn(theirs), rows, WIDTH, side, side, std=None if side == 3 else 0.01)
    for stage in range(stages):
        at = f".{stage}" if stages > 1 else ""
        fc1, fc2 = (
            f"roi_heads.box_head{at}.fc{n}" if d2 else f"roi_head.bbox_head{at}.shared_fcs.{n - 1}" for n in (1, 2)
        )
        cls, box = (
            (f"roi_heads.box_predictor{at}.cls_score", f"roi_heads.box_predictor{at}.bbox_pred")
            if d2
            else (f"roi_head.bbox_head{at}.fc_cls", f"roi_head.bbox_head{at}.fc_reg")
        )
        make.layer(fc1, HIDDEN, WIDTH * 49)
        make.layer(fc2, HIDDEN, HIDDEN)
        make.layer(cls, count + extra, HIDDEN)
        make.layer(box, 4 if stages > 1 else 4 * count, HIDDEN, std=0.05)
    for stage in range(stages if masks and not d2 else masks):
        at = f".{stage}" if stages > 1 else ""
        for number in range(4):
            name = f"roi_heads.mask_head.mask_fcn{number + 1}" if d2 else f"roi_head.mask_head{at}.convs.{number}.conv"
            make.layer(name, 256, WIDTH if not number else 256, 3, 3)
        up, last = (
            ("roi_heads.mask_head.deconv", "roi_heads.mask_head.predictor")
            if d2
            else (f"roi_head.mask_head{at}.upsample", f"roi_head.mask_head{at}.conv_logits")
        )
        make.layer(up, 256, 256, 2, 2, std=0.05)
        make.layer(last, count, 256, 1, 1)
    return make.state


def check_first_stage(model, state: State, names: Names, depth: str, picture: Tensor, bgr: bool, stride: bool):
    """Pyramid, anchors, objectness and boxes of the RPN; returns the reference's levels."""
    batch = model.batch([picture])
    layers = body(state, names, depth, normalised([picture], bgr), stride)
    levels = pyramid(state, names, layers, 2)
    levels.append(F.max_pool2d(levels[-1], 1, 2))
    found = model.backbone(batch.tensors)
    for own, wanted in zip(found.values(), levels, strict=True):
        close(own, wanted)
    raw = model.rpn.outputs(batch, found)
    d2 = names is DETECTRON2
    parts = ("conv", "objectness_logits", "anchor_deltas") if d2 else ("rpn_conv", "rpn_cls", "rpn_reg")
    prefix = "proposal_generator.rpn_head." if d2 else "rpn_head."
    hidden = [conv(state, prefix + parts[0], level).relu() for level in levels]
    close(raw.objectness.reshape(-1, 1), torch.cat([by_cell(conv(state, prefix + parts[1], own), 1) for own in hidden]))
    deltas = torch.cat([by_cell(conv(state, prefix + parts[2], own), 4) for own in hidden])
    close(raw.deltas.reshape(-1, 4), deltas)
    grids = [
        anchors(level.shape[-2:], 4 * 2**number, [8.0 * 4 * 2**number], RATIOS, size_outside=d2)
        for number, level in enumerate(levels)
    ]
    own = raw.anchors
    close(own, torch.cat(grids))
    close(decode_deltas(own, raw.deltas.reshape(-1, 4)), decoded(torch.cat(grids), deltas)[:, 0])
    return levels, found


def head(state: State, names: Names, levels: list[Tensor], boxes: Tensor, at: str = "") -> tuple[Tensor, Tensor]:
    d2 = names is DETECTRON2
    shared = pooled(levels, boxes, 7).flatten(1)
    for n in (1, 2):
        name = f"roi_heads.box_head{at}.fc{n}" if d2 else f"roi_head.bbox_head{at}.shared_fcs.{n - 1}"
        shared = linear(state, name, shared).relu()
    prefix = f"roi_heads.box_predictor{at}." if d2 else f"roi_head.bbox_head{at}."
    last = ("cls_score", "bbox_pred") if d2 else ("fc_cls", "fc_reg")
    return linear(state, prefix + last[0], shared), linear(state, prefix + last[1], shared)


def mask(state: State, names: Names, levels: list[Tensor], boxes: Tensor, at: str = "") -> Tensor:
    d2 = names is DETECTRON2
    x = pooled(levels, boxes, 14)
    for number in range(4):
        name = f"roi_heads.mask_head.mask_fcn{number + 1}" if d2 else f"roi_head.mask_head{at}.convs.{number}.conv"
        x = conv(state, name, x).relu()
    up = "roi_heads.mask_head.deconv" if d2 else f"roi_head.mask_head{at}.upsample"
    x = F.conv_transpose2d(x, state[f"{up}.weight"], state[f"{up}.bias"], stride=2).relu()
    return conv(state, "roi_heads.mask_head.predictor" if d2 else f"roi_head.mask_head{at}.conv_logits", x)


def some_boxes() -> Tensor:
    """Boxes of all sizes, thin and tiny ones among them."""
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand((30, 2), generator=generator) * torch.tensor([100.0, 70.0])
    sides = torch.rand((30, 2), generator=generator) ** 3 * torch.tensor([90.0, 70.0]) + 0.3
    return clipped(torch.cat([corner, corner + sides], 1), SIZE)


CASES = [  # format, body, style, masks, file
    (DETECTRON2, "resnet50", "caffe", True, ".pkl"),
    (DETECTRON2, "resnet50", "pytorch", False, ".pth"),
    (DETECTRON2, "resnet18", "caffe", False, ".pkl"),
    (MMDETECTION, "resnet50", "caffe", False, ".pth"),
    (MMDETECTION, "resnet18", "pytorch", True, ".pth"),
]


@pytest.mark.parametrize(("names", "depth", "style", "masks", "suffix"), CASES)
def test_faster_and_mask_rcnn(files, picture, names, depth, style, masks, suffix):
    bgr = style == "caffe"
    state = two_stage(names, depth, 1, masks, bgr=bgr, statistics=not (bgr and names is DETECTRON2))
    meta = None
    if names is MMDETECTION:
        meta = {"CLASSES": tuple(CLASSES), "config": f"backbone=dict(style='{style}')", "mmdet_version": "2.25.0"}
    if names is DETECTRON2 and style == "pytorch":
        state["pixel_std"] = torch.tensor([57.375, 57.12, 58.395])[:, None, None]
    name = "mask_rcnn" if masks else "faster_rcnn"
    model, lines = converted(files, state, TWO_STAGE, name, depth, suffix, meta)
    assert "3 kept, 0 new, 2 of the file left out" in " ".join(lines) and "detector.roi_aligned: True" in " ".join(
        lines
    )
    with torch.no_grad():
        levels, found = check_first_stage(model, state, names, depth, picture, bgr, bgr)
        boxes = some_boxes()
        logits, deltas = head(state, names, levels, boxes)
        own_logits, own_deltas = model.roi_heads.predict(found, [boxes], [SIZE])
        close(own_logits, logits[:, [*ROWS, len(CLASSES)]])
        close(own_deltas, deltas.view(30, -1, 4)[:, ROWS].flatten(1))
        moved = decoded(boxes, deltas, (10.0, 5.0))[:, ROWS]
        close(model.roi_heads.box_coder.decode(own_deltas, [boxes]), moved)
        if masks:
            labels = torch.arange(30) % len(WANTED)
            wanted = mask(state, names, levels, boxes)[torch.arange(30), torch.tensor(ROWS)[labels]]
            close(model.mask.logits(found, [boxes], labels, [SIZE]), wanted)


@pytest.mark.parametrize(("names", "masks"), [(DETECTRON2, True), (MMDETECTION, True), (MMDETECTION, False)])
def test_cascade_rcnn(files, picture, names, masks):
    """Three stages: refined boxes, mean probabilities (detectron2) or the mean's (mmdetection), masks' mean."""
    state = two_stage(names, "resnet18", 3, masks)
    meta = {"dataset_meta": {"classes": CLASSES}, "cfg": "style='pytorch'"} if names is MMDETECTION else None
    model, _ = converted(files, state, TWO_STAGE, "cascade_rcnn", "resnet18", meta=meta, style="pytorch")
    d2 = names is DETECTRON2
    weights = [(10.0, 5.0), (20.0, 10.0), (30.0, 15.0)] if d2 else [(10.0, 5.0), (20.0, 10.0), (1 / 0.033, 1 / 0.067)]
    with torch.no_grad():
        levels, found = check_first_stage(model, state, names, "resnet18", picture, False, False)
        boxes = start = some_boxes()
        every = []
        for stage, own in enumerate(weights):
            logits, deltas = head(state, names, levels, boxes, f".{stage}")
            every.append(logits[:, [*ROWS, len(CLASSES)]])
            boxes = clipped(decoded(boxes, deltas, own)[:, 0], SIZE)
        stacked = torch.stack(every)
        wanted = stacked.softmax(2).mean(0) if d2 else stacked.mean(0).softmax(1)
        last, mean, deltas = model.second_stage(found, [start], [SIZE])
        close(model.loss.scores(mean), wanted[:, :-1])
        moved = model.roi_heads.heads()[-1].box_coder.decode(deltas, last)[:, 0]
        close(clipped(moved, SIZE), boxes)
        if masks:
            labels = torch.arange(30) % len(WANTED)
            at = torch.tensor(ROWS)[labels]
            parts = [mask(state, names, levels, boxes, f".{stage}").sigmoid() for stage in range(3)]
            wanted = torch.stack(parts).mean(0)[torch.arange(30), at]
            probabilities = [own.probabilities(found, [boxes], labels, [SIZE]) for own in model.branches()]
            close(torch.stack(probabilities).mean(0), wanted)


def test_the_outputs_of_a_whole_model(files, picture):
    """Detections of detectron2's steps from end to end: proposals, suppression, the best scores."""
    from torchvision.ops import batched_nms

    state = two_stage(DETECTRON2, "resnet18", 1, masks=False)
    model, _ = converted(files, state, TWO_STAGE, "faster_rcnn", "resnet18", style="pytorch")
    with torch.no_grad():
        levels, _ = check_first_stage(model, state, DETECTRON2, "resnet18", picture, False, False)
        prefix = "proposal_generator.rpn_head."
        boxes, scores, level_of = [], [], []
        for number, level in enumerate(levels):
            hidden = conv(state, f"{prefix}conv", level).relu()
            logits = by_cell(conv(state, f"{prefix}objectness_logits", hidden), 1)[:, 0]
            grid = anchors(level.shape[-2:], 4 * 2**number, [32.0 * 2**number], RATIOS, size_outside=True)
            moved = clipped(decoded(grid, by_cell(conv(state, f"{prefix}anchor_deltas", hidden), 4))[:, 0], SIZE)
            best = logits.topk(min(50, len(logits))).indices
            boxes.append(moved[best])
            scores.append(logits[best])
            level_of.append(torch.full((len(best),), number))
        every, score = torch.cat(boxes), torch.cat(scores)
        solid = (every[:, 2:] > every[:, :2]).all(1)
        every, score, level_of = every[solid], score[solid], torch.cat(level_of)[solid]
        proposals = every[batched_nms(every, score, level_of, 0.7)[:40]]
        logits, deltas = head(state, DETECTRON2, levels, proposals)
        probabilities = logits[:, [*ROWS, len(CLASSES)]].softmax(1)[:, :-1]
        moved = clipped(decoded(proposals, deltas, (10.0, 5.0)), SIZE)[:, ROWS]
        row, label = torch.where(probabilities > 0.05)
        keep = batched_nms(moved[row, label], probabilities[row, label], label, 0.5)[:100]
        found = model([picture], limits=model.limits._replace(score_threshold=0.05, max_dets=100))[0]
    assert len(keep) > 20 and len(found["labels"]) == len(keep)
    scores = probabilities[row, label][keep]
    # classes apart: scores that differ by less than rounding may change places
    theirs, ours = (label[keep].double() - scores).argsort(), (found["labels"].double() - found["scores"]).argsort()
    assert torch.equal(found["labels"][ours], label[keep][theirs])
    close(found["scores"][ours], scores[theirs])
    close(found["boxes"][ours], moved[row, label][keep][theirs])


# ---- one stage -------------------------------------------------------------------------------------------------------


def dense(names: Names, atss: bool = False) -> State:
    make, count, per_cell = Maker(), len(CLASSES), 1 if atss else 9
    d2 = names is DETECTRON2
    make.body(names, "resnet18")
    extra = (
        ("backbone.top_block.p6", "backbone.top_block.p7") if d2 else ("neck.fpn_convs.3.conv", "neck.fpn_convs.4.conv")
    )
    make.pyramid(names, "resnet18", 3, extra, "pyramid" if atss else "body")
    for theirs, ours in (("cls", "cls"), ("reg", "bbox")):
        for number in range(2):
            if d2:
                make.layer(f"head.{ours}_subnet.{2 * number}", WIDTH, WIDTH, 3, 3)
            else:
                make.layer(f"bbox_head.{theirs}_convs.{number}.conv", WIDTH, WIDTH, 3, 3, bias=not atss)
                if atss:
                    make.norm(f"bbox_head.{theirs}_convs.{number}.gn", WIDTH, statistics=False)
    kind = "atss" if atss else "retina"
    make.layer("head.cls_score" if d2 else f"bbox_head.{kind}_cls", per_cell * count, WIDTH, 3, 3)
    make.layer("head.bbox_pred" if d2 else f"bbox_head.{kind}_reg", per_cell * 4, WIDTH, 3, 3, std=0.02)
    if atss:
        make.layer("bbox_head.atss_centerness", 1, WIDTH, 3, 3)
        for level in range(5):
            make.state[f"bbox_head.scales.{level}.scale"] = torch.tensor(0.5 + 0.2 * level)
    return make.state


@pytest.mark.parametrize(("names", "atss"), [(DETECTRON2, False), (MMDETECTION, False), (MMDETECTION, True)])
def test_retinanet_and_atss(files, picture, names, atss):
    """Logits, quality and boxes of every anchor; the order of the anchors in a cell is each project's own."""
    d2, count = names is DETECTRON2, len(CLASSES)
    picture = picture.repeat(1, 2, 2)  # P7 needs more than one cell for a group norm
    state = dense(names, atss)
    meta = None if d2 else {"CLASSES": CLASSES, "mmdet_version": "2.28.2"}
    name = "atss" if atss else "retinanet"
    model, lines = converted(files, state, DENSE, name, "resnet18", meta=meta, style="pytorch")
    assert ("detector.fpn_convs_relu: False" in " ".join(lines)) == (not d2)
    with torch.no_grad():
        layers = body(state, names, "resnet18", normalised([picture], False), False)
        levels = pyramid(state, names, layers, 3)
        p6, p7 = (
            ("backbone.top_block.p6", "backbone.top_block.p7")
            if d2
            else ("neck.fpn_convs.3.conv", "neck.fpn_convs.4.conv")
        )
        levels.append(conv(state, p6, levels[-1] if atss else layers[-1], 2))
        levels.append(conv(state, p7, levels[-1].relu() if d2 else levels[-1], 2))
        outputs = model.outputs([picture])
        for number, level in enumerate(levels):
            close(list(outputs.features.values())[number], level)
            towers = []
            for theirs, ours in (("cls", "cls"), ("reg", "bbox")):
                x = level
                for layer in range(2):
                    x = conv(
                        state, f"head.{ours}_subnet.{2 * layer}" if d2 else f"bbox_head.{theirs}_convs.{layer}.conv", x
                    )
                    if atss:
                        gn = f"bbox_head.{theirs}_convs.{layer}.gn"
                        x = F.group_norm(x, 32, state[f"{gn}.weight"], state[f"{gn}.bias"])
                    x = x.relu()
                towers.append(x)
            kind = "atss" if atss else "retina"
            logits = by_cell(conv(state, "head.cls_score" if d2 else f"bbox_head.{kind}_cls", towers[0]), count)
            deltas = by_cell(conv(state, "head.bbox_pred" if d2 else f"bbox_head.{kind}_reg", towers[1]), 4)
            stride = 8 * 2**number
            sizes = [8.0 * stride] if atss else [4 * stride * 2 ** (k / 3) for k in range(3)]
            grid = anchors(level.shape[-2:], stride, sizes, [1.0] if atss else RATIOS, size_outside=d2)
            if atss:
                deltas = deltas * (0.5 + 0.2 * number)
                close(
                    by_cell(outputs.quality[number], 1), by_cell(conv(state, "bbox_head.atss_centerness", towers[1]), 1)
                )
            boxes = decoded(grid, deltas, (10.0, 5.0) if atss else (1.0, 1.0))[:, 0]
            own = by_cell(outputs.logits[number], len(WANTED))
            own_boxes = decoded(
                outputs.anchors[number], by_cell(outputs.deltas[number], 4), (10.0, 5.0) if atss else (1.0, 1.0)
            )
            per_cell = len(sizes) * (1 if atss else 3)
            order = torch.arange(len(grid)).view(-1, per_cell)
            if d2:  # size outside there, ratio outside here
                order = order.view(-1, 3, 3).transpose(1, 2).reshape(-1, per_cell)
            close(own, logits[order.flatten()][:, ROWS])
            close(own_boxes[:, 0], boxes[order.flatten()])


# ---- what is refused -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_refused(files):
    state = two_stage(DETECTRON2, "resnet18", 1, masks=False)
    with pytest.raises(UserError, match="theirs.pth is a faster_rcnn, the recipe's detector is mask_rcnn"):
        converted(files, state, TWO_STAGE, "mask_rcnn", "resnet18")
    (files / "theirs.txt").write_text("\n".join(["cup", "dog", "ape", "cat", "bees"]))
    with pytest.raises(UserError, match='it has no class "bee".*bees'):
        converted(files, state, TWO_STAGE, "faster_rcnn", "resnet18")
    (files / "map.yaml").write_text("bee: bees")
    _, lines = converted(files, state, TWO_STAGE, "faster_rcnn", "resnet18", aliases=files / "map.yaml")
    assert "3 kept" in " ".join(lines)
    with pytest.raises(UserError, match="exists already"):
        converted(files, state, TWO_STAGE, "faster_rcnn", "resnet18", aliases=files / "map.yaml")
    again = {"overwrite": True, "aliases": files / "map.yaml"}
    with pytest.raises(UserError, match="no class names, its classifier has 6 rows, --classes 3 names"):
        converted(files, state, TWO_STAGE, "faster_rcnn", "resnet18", source_classes=None, **again)
    with pytest.raises(UserError, match="belong to no detector .*deformable"):
        converted(
            files,
            {**state, "roi_heads.deformable.weight": torch.ones(1)},
            TWO_STAGE,
            "faster_rcnn",
            "resnet18",
            **again,
        )
    with pytest.raises(UserError, match="does not fit"):
        converted(files, state, TWO_STAGE + "loss: seesaw\n", "faster_rcnn", "resnet18", **again)
    older = {
        key.replace("roi_head.bbox_head", "bbox_head"): value
        for key, value in two_stage(MMDETECTION, "resnet18", 1, False).items()
    }
    with pytest.raises(UserError, match="mmdetection 1.x"):
        converted(files, older, TWO_STAGE, "faster_rcnn", "resnet18", meta={"CLASSES": CLASSES}, overwrite=True)


@pytest.mark.parametrize("value", [Evil(), np.array([Evil()], dtype=object)])
def test_a_pickle_that_wants_code_is_refused(files, value):
    (files / "theirs.pkl").write_bytes(pickle.dumps({"model": {"backbone.bottom_up.x": value}}))
    with pytest.raises(UserError, match="theirs.pkl: the pickle wants builtins.eval"):
        convert(files / "theirs.pkl", "fod/faster_rcnn_r18_softmax", files / "val.json", files / "m.safetensors")


def test_pictures_are_normalised_alike(picture):
    """A caffe network's input is the mean's difference, RGB to BGR; at the padded border both have zeros."""
    batch = batch_images([picture[:, :90]])
    theirs = normalised([picture[:, :90]], bgr=True)
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    close((batch.tensors[0] * std).flip(0), theirs[0])
