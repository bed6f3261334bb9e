"""What is exported: a detector as a function of a padded batch, with calibration and thresholds inside.

    boxes, scores, labels(, masks) = graph(images, sizes)

images uint8 [B, 3, H, W], RGB, already at test size, padded right and below; sizes int64 [B, 2], height and width of
each picture in it. boxes float32 [B, D, 4] (xyxy, pixels of the picture given), scores [B, D] descending, labels int64
[B, D]; where a picture has fewer than D detections, scores are 0 and labels -1. masks [B, D, 28, 28] are probabilities
within the boxes. B, H and W may be any; D is fixed. The detectors' own modules compute; the loops over pictures, and
what depends on how many boxes there are, are written for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailfin.errors import UserError
from tailfin.export.suppression import FIRST, best, finish, rows_of, survivors
from tailfin.models.atss import ATSS
from tailfin.models.box_deltas import decode_deltas
from tailfin.models.cascade_rcnn import TINY, CascadeRCNN
from tailfin.models.dense import DenseDetector
from tailfin.models.dense_ops import flatten_map
from tailfin.models.detections import MIN_SIDE
from tailfin.models.detector import Detector, reported
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.heads.mask import MaskBranch
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.models.mask_rcnn import MaskRCNN
from tailfin.models.retinanet import RetinaNet
from tailfin.schema.data import Data

EXPORTED = "faster_rcnn, mask_rcnn, cascade_rcnn, retinanet, atss, deformable_detr, d_fine, rt_detr_v2"
QUERIES = ("DeformableDETR", "RealTimeDETR")  # by name: transformers takes seconds to import
Found = tuple[Tensor, ...]  # boxes, scores, labels(, masks)


class Settings(NamedTuple):
    """What the graph reports."""

    thresholds: Tensor  # float32 [C]; a detection counts from its class's on
    most: int  # D
    nms: float


class Graph(nn.Module):
    """`detector` as a function of images and sizes, see the head of this file."""

    thresholds: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector, settings: Settings) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.most, self.nms = settings.most, settings.nms
        self.run = runner(detector)
        self.register_buffer("thresholds", settings.thresholds.float(), persistent=False)
        self.register_buffer("mean", torch.tensor(detector.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(detector.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> Found:
        """The detections of a batch."""
        height, width = images.shape[2], images.shape[3]
        inside = (torch.arange(height, device=images.device)[None, :, None] < sizes[:, :1, None]) & (
            torch.arange(width, device=images.device)[None, None] < sizes[:, 1:, None]
        )
        batch = (images.float() / 255 - self.mean) / self.std
        batch = torch.where(inside[:, None], batch, torch.zeros_like(batch))
        divisor = self.detector.divisor
        if divisor > 1:
            batch = F.pad(batch, (0, -width % divisor, 0, -height % divisor))
        limit = sizes[:, [1, 0, 1, 0]].float()  # [B, 4] width, height, width, height
        return self.run(self, batch, limit)

    def kept(self, scores: Tensor) -> Tensor:
        """Scores [..., C] that reach their class's threshold, others 0."""
        return torch.where(scores >= self.thresholds, scores, torch.zeros_like(scores))


Runner = Callable[[Graph, Tensor, Tensor], Found]


def runner(detector: Detector) -> Runner:
    """How a detector is exported; one that has no way is a `UserError`."""
    if isinstance(detector, FasterRCNN):
        return two_stage
    if isinstance(detector, RetinaNet | ATSS):
        return dense
    if type(detector).__name__ in QUERIES and not getattr(detector, "grouped", False):
        return queries
    raise UserError(f"{type(detector).__name__} is not exported; {EXPORTED} are")


# ---- Faster, Mask and Cascade R-CNN ----------------------------------------------------------------------------------


def two_stage(graph: Graph, batch: Tensor, limit: Tensor) -> Found:
    """Faster and Cascade R-CNN, and the masks of what they find."""
    model = cast(FasterRCNN, graph.detector)
    features = model.backbone(batch)
    boxes, there = proposals(model, features, batch, limit)
    heads, branches = _parts(model)
    boxes, logits, deltas = box_heads(model, heads, features, boxes, limit)
    count, classes = boxes.shape[1], model.loss.num_classes
    scores = graph.kept(reported(model, model.loss.scores(logits))).view(-1, count, classes)
    scores = torch.where(there[..., None], scores, torch.zeros_like(scores))
    values, places = best(scores.flatten(1), min(FIRST, count * classes))
    rows, labels = places // classes, places % classes
    own = rows_of(deltas.view(-1, count * (classes if model.own_boxes else 1), 4), places if model.own_boxes else rows)
    found = heads[-1].box_coder.decode_single(own.flatten(0, 1), rows_of(boxes, rows).flatten(0, 1)).view_as(own)
    found, values = _clipped(found, values, limit, MIN_SIDE)
    result = finish(found, values, labels, classes, graph.nms, graph.most)
    if not branches:
        return result
    found, _, labels = result
    every = []
    for branch in branches:
        with _pooled_as_batch(branch):
            every.append(branch.logits(features, [found], labels.clamp(min=0).flatten(), []).sigmoid())
    masks = every[0] if len(every) == 1 else torch.stack(every).mean(dim=0)
    return (*result, masks.unflatten(0, (-1, graph.most)))


def _parts(model: FasterRCNN) -> tuple[list[RoIHeads], list[MaskBranch]]:
    """The box heads and mask branches, one of each but in a cascade."""
    if isinstance(model, CascadeRCNN):
        return model.roi_heads.heads(), model.branches()
    return [model.roi_heads], [model.mask] if isinstance(model, MaskRCNN) else []


def box_heads(
    model: FasterRCNN, heads: Sequence[RoIHeads], features: dict[str, Tensor], boxes: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The last stage's boxes [B, P, 4] and deltas, and the mean logits of all stages, as `CascadeRCNN.second_stage`."""
    softmax = isinstance(model, CascadeRCNN) and model.mean_of == "scores"
    every: list[Tensor] = []
    for stage, own in enumerate(heads):
        with _pooled_as_batch(own):
            logits, deltas = own.predict(features, [boxes], [])
        every.append(logits.softmax(dim=1) if softmax else logits)
        if stage + 1 < len(heads):
            moved = deltas
            if deltas.shape[1] != 4:  # those of the best class
                best_class = own.loss.scores(logits).argmax(dim=1)
                moved = rows_of(deltas.view(deltas.shape[0], -1, 4), best_class[:, None])[:, 0]
            refined = decode_deltas(boxes.flatten(0, 1), moved, own.box_stds, None).view_as(boxes)
            boxes = torch.minimum(refined.clamp(min=0), limit[:, None])
    if len(every) == 1:
        return boxes, logits, deltas
    mean = torch.stack(every).mean(dim=0)
    return boxes, mean.clamp(min=TINY).log() if softmax else mean, deltas


def proposals(model: FasterRCNN, features: dict[str, Tensor], batch: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, P, 4] of the first stage, and which of them there are, bool [B, P]."""
    rpn, levels = model.rpn, list(features.values())
    made = rpn.anchor_generator.levels
    objectness, deltas = rpn.head(levels)
    boxes, scores, groups = [], [], []
    before = int(rpn._pre_nms_top_n["testing"])
    for number, (level, logits, delta) in enumerate(zip(levels, objectness, deltas, strict=True)):
        stride = None if made.strides is None else made.strides[number]
        anchors = _anchors(made.get_buffer(f"level{number}"), level, batch, stride)
        # the sigmoid keeps the order, and 0 is left for places that there are not
        value, place = best(flatten_map(logits, 1)[..., 0].sigmoid(), before)
        own = rows_of(flatten_map(delta, 4), place)
        decoded = rpn.box_coder.decode_single(own.flatten(0, 1), anchors[place].flatten(0, 1)).view_as(own)
        boxes.append(decoded)
        scores.append(value)
        groups.append(torch.full_like(place, number))
    box, score = _clipped(torch.cat(boxes, 1), torch.cat(scores, 1), limit, rpn.min_size)
    stay = survivors(box, score, torch.cat(groups, 1), len(levels), rpn.nms_thresh)
    values, places = best(torch.where(stay, score, torch.zeros_like(score)), int(rpn._post_nms_top_n["testing"]))
    return rows_of(box, places), values > 0


def _anchors(cell: Tensor, level: Tensor, batch: Tensor, stride: int | None) -> Tensor:
    """[h w A, 4], `stride` pixels apart; none: as torchvision places them, by the padded picture's sides divided by the
    level's, rounded down."""
    height, width = level.shape[2], level.shape[3]
    y = torch.arange(height, device=level.device) * (batch.shape[2] // height if stride is None else stride)
    x = torch.arange(width, device=level.device) * (batch.shape[3] // width if stride is None else stride)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([columns, rows, columns, rows], dim=2).view(-1, 1, 4).float()
    return (shift + cell).view(-1, 4)


class CanvasPool(nn.Module):
    """RoIAlign of boxes [B, P, 4] from all levels at once: the levels lie one below the other on one map.

    The pyramid's levels differ in size, and picking boxes by level is a shape that depends on values. On one map, with
    a border that repeats each level's outer rows and columns, every box is where its level is.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Any, places: Any = None) -> Tensor:
        pool, every = self.pool, boxes[0]
        batch, count = every.shape[0], every.shape[1]
        levels = [features[name] for name in pool.featmap_names]
        flat = every.flatten(0, 1)
        scale = flat.new_tensor(pool.scales)
        full = levels[0].shape[3] + 2
        rows, starts, start = [], [], 0
        for level in levels:
            padded = F.pad(level, (1, 1, 1, 1), mode="replicate")
            rows.append(F.pad(padded, (0, full - padded.shape[3])))
            starts.append(torch.arange(start, start + 1, device=flat.device) + 1)
            start = start + padded.shape[2]
        which = pool.map_levels([flat]) if len(levels) > 1 else torch.zeros_like(flat[:, 0], dtype=torch.int64)
        offset = torch.cat(starts)[which].to(flat)
        one = torch.ones_like(offset)
        placed = flat * scale[which][:, None] + torch.stack([one, offset, one, offset], dim=1)
        picture = torch.arange(batch, device=flat.device)[:, None].expand(-1, count).reshape(-1, 1).to(flat)
        rois = torch.cat([picture, placed], dim=1)
        joined = torch.cat(rows, dim=2)
        return cast(Tensor, roi_align(joined, rois, pool.output_size, 1.0, pool.sampling_ratio, pool.aligned))


class _pooled_as_batch:
    """Within it `module.pool` takes boxes of the whole batch."""

    def __init__(self, module: Any) -> None:
        self.module, self.pool = module, module.pool

    def __enter__(self) -> None:
        self.module.pool = CanvasPool(self.pool)

    def __exit__(self, *problem: Any) -> None:
        self.module.pool = self.pool


# ---- RetinaNet and ATSS ----------------------------------------------------------------------------------------------


def dense(graph: Graph, batch: Tensor, limit: Tensor) -> Found:
    """One-stage detectors: the best pairs of anchor and class of every level, then NMS over all."""
    model = cast(DenseDetector, graph.detector)
    levels = list(model.backbone(batch).values())
    anchors = model.anchors([level.shape[2:] for level in levels], batch.shape[2:])
    outputs = model.head(levels)
    logit_maps, delta_maps, quality_maps = outputs
    classes, width = model.class_loss.num_classes, model.class_loss.num_logits
    boxes, scores, labels = [], [], []
    for number in range(len(levels)):
        rows = flatten_map(logit_maps[number], width)  # [B, n, width]
        found = reported(model, model.class_loss.scores(rows.flatten(0, 1))).view(rows.shape[0], -1, classes)
        factor = None
        if quality_maps:
            factor = flatten_map(quality_maps[number], 1).sigmoid()
        ranked = found * factor if factor is not None and model.rank == "product" else found
        value, place = best(ranked.flatten(1), model.pre_nms)
        row, label = place // classes, place % classes
        score = found.flatten(1).gather(1, place)
        if factor is not None:
            score = score * factor[..., 0].gather(1, row)
        delta = rows_of(flatten_map(delta_maps[number], 4), row)
        decoded = decode_deltas(anchors[number][row].flatten(0, 1), delta.flatten(0, 1), model.stds).view_as(delta)
        boxes.append(decoded)
        enough = (value > 0) & (score >= graph.thresholds[label])
        scores.append(torch.where(enough, score, torch.zeros_like(score)))
        labels.append(label)
    box, score = _clipped(torch.cat(boxes, 1), torch.cat(scores, 1), limit, 0.0)
    return finish(box, score, torch.cat(labels, 1), classes, graph.nms, graph.most)


# ---- detectors of queries --------------------------------------------------------------------------------------------


def fixed_size(detector: Detector, data: Data) -> tuple[int, int] | None:
    """The only height and width that a graph takes; none where it takes any."""
    if type(detector).__name__ != "RealTimeDETR":
        return None
    if data.resize != "stretch":
        raise UserError(
            f"this detector is exported for pictures of one size, data.resize: stretch; its recipe has {data.resize}"
        )
    return data.inference_size[0], data.inference_size[0]


def queries(graph: Graph, batch: Tensor, limit: Tensor) -> Found:
    """The best pairs of query and class, without NMS."""
    model: Any = graph.detector
    maps = list(model.backbone(batch).values())
    outputs = model.from_sizes(batch.shape[2:], limit, True, maps)
    scores = graph.kept(reported(model, model.criterion.scores(outputs.logits[-1])))
    classes = scores.shape[2]
    values, places = best(scores.flatten(1), graph.most)
    boxes = model.pixels(outputs)
    return finish(rows_of(boxes, places // classes), values, places % classes, classes, None, graph.most)


def _clipped(boxes: Tensor, scores: Tensor, limit: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Boxes [B, K, 4] within their pictures; the scores of those that are thinner than `least` pixels are 0."""
    boxes = torch.minimum(boxes.clamp(min=0), limit[:, None])
    sides = boxes[..., 2:] - boxes[..., :2]
    solid = (sides > 0).all(dim=2) if least == 0 else (sides >= least).all(dim=2)
    return boxes, torch.where(solid, scores, torch.zeros_like(scores))
