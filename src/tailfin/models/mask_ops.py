"""Mask R-CNN's masks: what a mask head learns for a box, its loss, and its answer drawn into the picture.

Released code has several conventions for the first and the last step, which agree on 84 to 100 % of the pixels; `style`
names them. A convention that differs between training and the vectors or weights at hand costs accuracy without a word,
so choose one and stay with it::

    targets = mask_targets(bitmaps[matched], boxes, 28, "mmdet_bitmap")     # [P, 28, 28] of 0 and 1
    value = mask_loss(mask_head(features), targets, labels)
    masks = paste_masks(logits.sigmoid()[rows, labels], boxes, (height, width))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailfin.errors import nearest
from tailfin.losses.base import at_least_float32

TargetStyle = Literal["mmdet_bitmap", "mmdet_polygon", "d2_bitmap", "d2_polygon", "torchvision"]
PasteStyle = Literal["mmdet", "torchvision"]
POLYGON_SIDE = {"mmdet_polygon": 1.0, "d2_polygon": 0.1}  # pixels that a box's side counts at least
THRESHOLD = 0.5
CHUNK = 2**25  # pixels of masks that are worked on at a time


def mask_targets(
    polygons_or_bitmaps: Tensor | Sequence[Sequence[Any]],
    boxes: Tensor,
    size: int = 28,
    style: TargetStyle = "mmdet_bitmap",
    image_size: tuple[int, int] | None = None,
    matched: Tensor | None = None,
) -> Tensor:
    """What the mask head should answer for each box.

    mmdet_bitmap clips the boxes to the image, pools the mask with RoIAlign (half-pixel centres, as many samples as a
    bin has pixels) and cuts at 0.5; d2_bitmap is the same without clipping. mmdet_polygon and d2_polygon move and
    scale the polygon to the box and rasterise it there; the first clips the boxes and counts a side as at least 1
    pixel, the second does not clip and counts 0.1. torchvision pools without the half-pixel shift, with sides of at
    least 1 pixel, and does not cut: its targets are soft.

    Args:
        polygons_or_bitmaps: the mask of each box: bool [P, H, W], or for the polygon styles P lists of flat x, y arrays
            (a part with fewer than three points is empty).
        boxes: [P, 4] xyxy in pixels of the image, of any float dtype; they are not changed.
        size: side of a target.
        style: the convention.
        matched: int64 [P], the mask of each box among bitmaps [M, H, W]; none: one bitmap per box, in order.
        image_size: (H, W) that mmdet's styles clip to; by default the bitmaps'. mmdet_polygon needs it.

    Returns:
        [P, size, size] in the boxes' dtype; 0 and 1 but for torchvision.

    Raises:
        ValueError: an unknown style, shapes that do not match, a polygon that is no flat list of x, y pairs.
    """
    if style not in get_args(TargetStyle):
        raise ValueError(f'there is no style "{style}"{nearest(style, get_args(TargetStyle))}')
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"boxes must be floats [P, 4], these are {boxes.dtype} {list(boxes.shape)}")
    if size < 1:
        raise ValueError(f"size must be positive (given: {size})")
    if matched is None and len(polygons_or_bitmaps) != len(boxes):
        raise ValueError(f"{len(polygons_or_bitmaps)} masks are given for {len(boxes)} boxes: one per box is needed")
    if matched is not None and (matched.shape != (len(boxes),) or style in POLYGON_SIDE):
        raise ValueError(f"matched must be [{len(boxes)}], and goes with bitmaps alone")
    if style in POLYGON_SIDE:
        if isinstance(polygons_or_bitmaps, Tensor):
            raise ValueError(f"style {style} takes polygons: a list of flat x, y arrays per box, not a tensor")
        if style == "mmdet_polygon":
            if image_size is None:
                raise ValueError("style mmdet_polygon clips boxes to the image: give image_size=(height, width)")
            boxes = clip_boxes(boxes, image_size)
        drawn = _rasterised(polygons_or_bitmaps, boxes, size, POLYGON_SIDE[style])
        return torch.from_numpy(drawn).to(boxes)
    masks = polygons_or_bitmaps
    if not isinstance(masks, Tensor) or masks.ndim != 3:
        raise ValueError(f"style {style} takes bitmaps: a tensor [P, H, W]")
    if style == "mmdet_bitmap":
        boxes = clip_boxes(boxes, tuple(masks.shape[1:]) if image_size is None else image_size)
    index = torch.arange(len(boxes), device=boxes.device) if matched is None else matched
    pooled = _pooled(masks, index, boxes, size, aligned=style != "torchvision")
    return pooled if style == "torchvision" else (pooled >= THRESHOLD).to(boxes.dtype)


def batch_mask_targets(
    masks: Sequence[Tensor], boxes: Sequence[Tensor], matched: Sequence[Tensor], size: int, style: TargetStyle
) -> Tensor:
    """`mask_targets` of the boxes of several pictures, one after another; neighbours of one size in one computation.

    Args:
        masks: of each picture, uint8 or bool [M, H, W].
        boxes: of each picture, [P, 4].
        matched: of each picture, int64 [P], counted over the masks of all pictures.
    """
    found, start, before = [], 0, 0
    for end in range(1, len(masks) + 1):
        last = end == len(masks)
        pixels = sum(own.numel() for own in masks[start : end + 1])
        if not last and masks[end].shape[1:] == masks[start].shape[1:] and pixels <= CHUNK:
            continue
        together, own = torch.cat(list(masks[start:end])), torch.cat(list(matched[start:end]))
        found.append(mask_targets(together, torch.cat(list(boxes[start:end])), size, style, matched=own - before))
        start, before = end, before + len(together)
    return torch.cat(found)


def mask_loss(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over all pixels of the rows, on the channel of each row's class (Mask R-CNN, 3).

    Args:
        logits: [P, C, m, m]; with one channel (class-agnostic) the labels are not looked at.
        targets: [P, m, m] in 0..1.
        labels: int64 [P], the classes 0..C-1.

    Returns:
        A scalar, float32 at least; without rows 0, attached to the graph.
    """
    rows = logits.shape[0]
    if logits.ndim != 4 or targets.shape != (rows, *logits.shape[2:]):
        raise ValueError(f"logits {list(logits.shape)} must be [P, C, m, m], targets {list(targets.shape)} [P, m, m]")
    if logits.shape[1] != 1 and labels.shape != (rows,):
        raise ValueError(f"labels must be [{rows}], these are {list(labels.shape)}")
    logits = at_least_float32(logits)
    if rows == 0:
        return logits.sum()
    if logits.shape[1] == 1:
        chosen = logits[:, 0]
    else:
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
            raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1}: masks are learnt on objects alone")
        chosen = logits[torch.arange(rows, device=logits.device), labels]
    return F.binary_cross_entropy_with_logits(chosen, targets.to(chosen.dtype))


@torch.no_grad()
def paste_masks(probs: Tensor, boxes: Tensor, image_size: tuple[int, int], style: PasteStyle = "mmdet") -> Tensor:
    """Masks of boxes drawn into the picture.

    mmdet (and detectron2): a pixel's centre is looked up bilinearly in the mask, whose values fade to 0 over half a
    cell beyond the border, and cut at >= 0.5. torchvision: the mask gets a border of zeros, the box grows with it and
    is cut to whole pixels, the mask is resized to that and cut at > 0.5. They differ on 1 to 3 % of the pixels.

    Args:
        probs: [N, m, m] after the sigmoid.
        boxes: [N, 4] xyxy in pixels of `image_size`; those outside the image give empty masks.
        image_size: (H, W).

    Returns:
        bool [N, H, W].
    """
    if style not in get_args(PasteStyle):
        raise ValueError(f'there is no style "{style}"{nearest(style, get_args(PasteStyle))}')
    if probs.ndim != 3 or boxes.shape != (len(probs), 4):
        raise ValueError(
            f"probs must be [N, m, m] and boxes [N, 4], these are {list(probs.shape)}, {list(boxes.shape)}"
        )
    height, width = map(int, image_size)
    if height < 0 or width < 0:
        raise ValueError(f"image_size must be (height, width), this is {tuple(image_size)}")
    probs, boxes = at_least_float32(probs), at_least_float32(boxes)
    dtype = torch.promote_types(probs.dtype, boxes.dtype)
    probs = probs.to(dtype)
    if style == "torchvision":
        boxes = _grown(boxes, probs.shape[-1])
        probs = F.pad(probs, (1, 1, 1, 1))
    weights = _fading if style == "mmdet" else _resizing
    drawn = torch.zeros((len(probs), height, width), dtype=torch.bool, device=probs.device)
    step = max(1, CHUNK // max(1, height * width))
    with torch.autocast(probs.device.type, enabled=False):  # half precision would move outlines
        for start in range(0, len(probs), step):
            part = slice(start, start + step)
            down = weights(boxes[part, 1], boxes[part, 3], height, probs.shape[-2], dtype)
            across = weights(boxes[part, 0], boxes[part, 2], width, probs.shape[-1], dtype)
            values = down @ probs[part] @ across.transpose(1, 2)  # bilinear: two weights of each row are not 0
            drawn[part] = values >= THRESHOLD if style == "mmdet" else values > THRESHOLD
    return drawn


def clip_boxes(boxes: Tensor, image_size: tuple[int, ...]) -> Tensor:
    """[N, 4] xyxy boxes within [0, W] x [0, H], as a new tensor; `image_size` is (H, W)."""
    height, width = image_size
    left, top, right, bottom = boxes.unbind(-1)  # numbers of the host: a device would wait for a tensor of them
    left, right = left.clamp(0, width), right.clamp(0, width)
    return torch.stack([left, top.clamp(0, height), right, bottom.clamp(0, height)], dim=-1)


# ---- targets ---------------------------------------------------------------------------------------------------------


def _pooled(masks: Tensor, index: Tensor, boxes: Tensor, size: int, *, aligned: bool) -> Tensor:
    """Share of each bin's samples that lie on the mask, [P, size, size]; `index` [P] says which mask is a box's."""
    exact = at_least_float32(boxes)
    if not len(boxes):
        return boxes.new_zeros((0, size, size))
    rois = torch.cat([index[:, None].to(exact), exact], dim=1)
    step = max(1, CHUNK // max(1, masks.shape[1] * masks.shape[2]))
    if len(masks) <= step:
        return roi_align(masks[:, None].to(exact), rois, size, 1.0, -1, aligned)[:, 0].to(boxes.dtype)
    pooled = exact.new_zeros((len(boxes), size, size))
    for start in range(0, len(masks), step):
        rows = torch.where((index >= start) & (index < start + step))[0]
        own = rois[rows] - rois.new_tensor([start, 0, 0, 0, 0])
        pooled[rows] = roi_align(masks[start : start + step, None].to(exact), own, size, 1.0, -1, aligned)[:, 0]
    return pooled.to(boxes.dtype)


def _rasterised(polygons: Sequence[Sequence[Any]], boxes: Tensor, size: int, shortest: float) -> np.ndarray:
    """Polygons moved and scaled to their boxes and drawn there, uint8 [P, size, size]."""
    corners = boxes.detach().cpu().double().numpy()
    scales = size / np.maximum(corners[:, 2:] - corners[:, :2], shortest)
    drawn = np.zeros((len(polygons), size, size), dtype=np.uint8)
    for row, parts in enumerate(polygons):
        moved = []
        for part in parts:
            points = _points(part, row)
            if len(points) >= 3:
                moved.append(((points - corners[row, :2]) * scales[row]).reshape(-1).tolist())
        if moved:
            drawn[row] = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, size, size)))
    return drawn


def _points(part: Any, row: int) -> np.ndarray:
    try:
        flat = np.asarray(part, dtype=np.float64)
    except (TypeError, ValueError):
        flat = np.empty((0, 0))
    if flat.ndim != 1 or len(flat) % 2 or not np.isfinite(flat).all():
        raise ValueError(f"polygon of box {row}: each part must be a flat list of finite x, y pairs")
    return flat.reshape(-1, 2)


# ---- pasting ---------------------------------------------------------------------------------------------------------


def _fading(low: Tensor, high: Tensor, pixels: int, cells: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, pixels, cells] of a mask's cells in each pixel, 0 beyond the border and far from the box."""
    low, high = low[:, None].to(dtype), high[:, None].to(dtype)
    pixel = torch.arange(pixels, device=low.device, dtype=dtype)
    place = (pixel + 0.5 - low) / (high - low) * 2 - 1
    place = torch.where(place.isinf(), 0, place)  # a box without width shows the mask's middle, as in mmdetection
    near = (pixel >= low.floor() - 1) & (pixel < high.ceil() + 1)  # all that the original computes
    cell = torch.where(near, ((place + 1) * cells - 1) / 2, torch.inf)
    distance = (cell[:, :, None] - torch.arange(cells, device=low.device, dtype=dtype)).abs()
    return (1 - distance).clamp(min=0).nan_to_num(0.0)


def _resizing(low: Tensor, high: Tensor, pixels: int, cells: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, pixels, cells] of a mask resized to the pixels low..high, which are whole numbers; 0 outside them."""
    length = (high - low + 1).clamp(min=1)[:, None]
    inner = torch.arange(pixels, device=low.device) - low[:, None]
    place = ((cells / length.to(dtype)) * (inner.to(dtype) + 0.5) - 0.5).clamp(
        0, cells - 1
    )  # the border's cell goes on
    distance = (place[:, :, None] - torch.arange(cells, device=low.device, dtype=dtype)).abs()
    inside = (inner >= 0) & (inner < length)
    return (1 - distance).clamp(min=0) * inside[:, :, None]


def _grown(boxes: Tensor, cells: int) -> Tensor:
    """Boxes enlarged about their centres as a mask of `cells` is by its border of one cell, cut to integers."""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((cells + 2) / cells)
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    return torch.cat([centre - half, centre + half], dim=1).to(torch.int64)
