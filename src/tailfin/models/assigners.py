"""Which anchor learns which object: ATSS (Zhang et al., CVPR'20) and the IoU rule of RetinaNet and the R-CNNs.

Both give one number per anchor, the object's row in `gt_boxes`, -1 for background or -2 for ignored::

    assigned = atss(anchors_per_level, gt_boxes)             # int64 [A], levels one after another
    positive = (assigned >= 0).nonzero()[:, 0]
    targets = centerness(anchors[positive], gt_boxes[assigned[positive]])

`atss_batch` and `max_iou_batch` do the same for the pictures of a batch at once, as a training step wants it. They are
mmdetection's rules, also where they surprise, see the functions. Boxes are xyxy in pixels, of any float dtype;
half precision is computed in float32. No gradient flows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tailfin.losses.base import at_least_float32

BACKGROUND, IGNORED = -1, -2
INSIDE = 0.01  # pixels by which an anchor's centre must lie within an object's box
FAR = 1e8  # distance of an anchor in an ignored region
SMALLEST_AREA = 1e-6  # square pixels that a union or an anchor counts at least
MOST_PAIRS = 2**24  # of anchors and objects whose IoUs are computed at a time: 64 MB


@torch.no_grad()
def atss(
    anchors_per_level: Sequence[Tensor],
    gt_boxes: Tensor,
    topk: int = 9,
    ignore_boxes: Tensor | None = None,
    ignore_iof: float | None = None,
) -> Tensor:
    """Adaptive training sample selection.

    Candidates of an object are the `topk` anchors of each level whose centres are nearest. Positive are those whose IoU
    reaches mean + standard deviation (n - 1) of the candidates' and whose centre lies in the object's box; an anchor
    that several objects claim goes to the largest IoU. An object may be left without anchor: there is no fallback.

    Args:
        anchors_per_level: [A_l, 4] per level; a level with fewer than `topk` anchors gives them all.
        gt_boxes: [G, 4].
        ignore_boxes: [I, 4] regions (crowds) that count only where `ignore_iof` is given.
        ignore_iof: anchors of which a larger share than this lies in an ignored region become -2 and are the last to be
            candidates. Without objects all anchors are background, as in mmdetection.

    Returns:
        int64 [A]: row of `gt_boxes`, -1 background, -2 ignored.
    """
    levels = [_boxes(level, "anchors") for level in anchors_per_level]
    gt_boxes = _boxes(gt_boxes, "gt_boxes")
    ignored = _in_ignored(torch.cat(levels), ignore_boxes, ignore_iof) if levels and len(gt_boxes) else None
    return _atss(levels, gt_boxes[None], None, topk, None if ignored is None else ignored[None])[0]


@torch.no_grad()
def atss_batch(anchors_per_level: Sequence[Tensor], gt_boxes: Tensor, valid: Tensor, topk: int = 9) -> Tensor:
    """`atss` for B pictures with the same anchors, without a loop over them or a read back to the host.

    Args:
        anchors_per_level: [A_l, 4] per level.
        gt_boxes, valid: [B, G, 4] and bool [B, G], as `pad_targets` gives them.

    Returns:
        int64 [B, A]: row of the picture's own boxes, -1 background.
    """
    levels = [_boxes(level, "anchors") for level in anchors_per_level]
    return _atss(levels, at_least_float32(gt_boxes), valid, topk)


def _atss(
    levels: list[Tensor], gt_boxes: Tensor, valid: Tensor | None, topk: int, ignored: Tensor | None = None
) -> Tensor:
    if topk < 1:
        raise ValueError(f"topk must be positive (given: {topk})")
    batch = len(gt_boxes)
    anchors = torch.cat(levels) if levels else gt_boxes[0, :0]
    assigned = torch.full((batch, len(anchors)), BACKGROUND, dtype=torch.int64, device=anchors.device)
    if not len(anchors) or not gt_boxes.shape[1]:
        return assigned
    distance = _distances((anchors[:, :2] + anchors[:, 2:]) / 2, (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2)
    if ignored is not None:
        assigned = torch.where(ignored, IGNORED, assigned)
        distance = torch.where(ignored[:, :, None], FAR, distance)
    start, nearest = 0, []
    for level in levels:  # a handful
        own = distance[:, start : start + len(level)]
        nearest.append(own.topk(min(topk, len(level)), dim=1, largest=False).indices + start)
        start += len(level)
    candidates = torch.cat(nearest, dim=1)  # [B, K, G]
    chosen = anchors[candidates]  # [B, K, G, 4]
    values = paired_iou(chosen, gt_boxes[:, None])
    positive = values >= candidate_threshold(values)[:, None]
    place = (chosen[..., :2] + chosen[..., 2:]) / 2
    inside = torch.cat([place - gt_boxes[:, None, :, :2], gt_boxes[:, None, :, 2:] - place], dim=3)
    positive &= inside.amin(dim=3) > INSIDE
    if valid is not None:
        positive &= valid[:, None]
    claimed = torch.full_like(distance, -1.0).scatter_(1, candidates, torch.where(positive, values, -1.0))
    best, owner = claimed.max(dim=2)
    return torch.where(best >= 0, owner, assigned)


def candidate_threshold(values: Tensor) -> Tensor:
    """[..., K, G] IoUs of the candidates to [..., G] thresholds, mean + unbiased standard deviation; NaN (none)
    where K is 1."""
    if values.shape[-2] < 2:
        return torch.full_like(values.sum(dim=-2), torch.nan)
    return values.mean(dim=-2) + values.std(dim=-2)


@torch.no_grad()
def max_iou(
    anchors: Tensor,
    gt_boxes: Tensor,
    pos_iou: float = 0.5,
    neg_iou: float = 0.4,
    min_pos_iou: float = 0.0,
    low_quality: bool = True,
    ignore_boxes: Tensor | None = None,
    ignore_iof: float | None = None,
) -> Tensor:
    """Assignment by the largest IoU.

    An anchor whose largest IoU is >= `pos_iou` belongs to that object, one below `neg_iou` is background, one between
    is ignored. With `low_quality` every object whose best IoU is >= `min_pos_iou` then takes all anchors that reach
    it, whatever they were, later objects last. With `min_pos_iou` 0 that holds for tiny IoUs too, and an object that
    touches no anchor takes all those that do not touch it: mmdetection's rule.

    Args:
        anchors, gt_boxes: [A, 4], [G, 4].
        ignore_boxes, ignore_iof: anchors of which a larger share than `ignore_iof` lies in a region of `ignore_boxes`
            [I, 4] overlap no object and become -2. Without objects all anchors are background, as in mmdetection.

    Returns:
        int64 [A]: row of `gt_boxes`, -1 background, -2 ignored.
    """
    anchors, gt_boxes = _boxes(anchors, "anchors"), _boxes(gt_boxes, "gt_boxes")
    ignored = _in_ignored(anchors, ignore_boxes, ignore_iof) if len(gt_boxes) else None
    return _max_iou(anchors, gt_boxes[None], None, pos_iou, neg_iou, min_pos_iou, low_quality, ignored=ignored)[0]


@torch.no_grad()
def max_iou_batch(
    anchors: Tensor,
    gt_boxes: Tensor,
    valid: Tensor,
    pos_iou: float = 0.5,
    neg_iou: float = 0.4,
    min_pos_iou: float = 0.0,
    low_quality: bool = True,
    keep_owner: bool = False,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """`max_iou` for B pictures, without a loop over them or a read back to the host.

    Pictures are taken so many at a time that a matrix of IoUs has at most `MOST_PAIRS` elements.

    Args:
        anchors: [A, 4], the same for all pictures, or [B, A, 4].
        gt_boxes, valid: [B, G, 4] and bool [B, G], as `pad_targets` gives them.
        keep_owner: an anchor that an object takes by `low_quality` becomes positive but stays with the object that it
            overlaps most, as in detectron2 and torchvision.
        counts: objects of each picture, where the host knows them and they stand first: the rest is not computed.

    Returns:
        int64 [B, A]: row of the picture's own boxes, -1 background, -2 ignored.
    """
    if anchors.ndim == 2:
        anchors = _boxes(anchors, "anchors")
    anchors, gt_boxes = at_least_float32(anchors), at_least_float32(gt_boxes)
    batch, most = gt_boxes.shape[:2]
    rule = (pos_iou, neg_iou, min_pos_iou, low_quality, keep_owner)
    step = max(1, MOST_PAIRS // max(1, most * anchors.shape[-2]))
    found = []
    for start in range(0, batch, step):
        part = slice(start, start + step)
        size = most if counts is None else max(1, *counts[part])
        own = anchors if anchors.ndim == 2 else anchors[part]
        found.append(_max_iou(own, gt_boxes[part, :size], valid[part, :size], *rule))
    return found[0] if len(found) == 1 else torch.cat(found)


def _max_iou(
    anchors: Tensor,
    gt_boxes: Tensor,
    valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    min_pos_iou: float,
    low_quality: bool,
    keep_owner: bool = False,
    ignored: Tensor | None = None,
) -> Tensor:
    if not neg_iou <= pos_iou:
        raise ValueError(f"neg_iou {neg_iou} must not be above pos_iou {pos_iou}")
    batch, count = gt_boxes.shape[:2]
    length = anchors.shape[-2]
    if not length or not count:
        return torch.full((batch, length), BACKGROUND, dtype=torch.int64, device=anchors.device)
    overlaps = iou(gt_boxes, anchors)  # [B, G, A]
    if ignored is not None:
        overlaps = torch.where(ignored, -1.0, overlaps)
    if valid is not None:
        overlaps = torch.where(valid[:, :, None], overlaps, -1.0)
    best, owner = overlaps.max(dim=1)
    background = (best >= 0) & (best < neg_iou)
    if valid is not None:
        background |= ~valid.any(dim=1, keepdim=True)
    assigned = torch.where(background, BACKGROUND, IGNORED)
    # said so that a box of NaN is an anchor's owner: its loss tells of it, where no match would hide it
    assigned = torch.where(best < pos_iou, assigned, owner)
    if low_quality:
        own_best = overlaps.amax(dim=2, keepdim=True)
        bound = torch.where(own_best >= max(min_pos_iou, 0.0), own_best, torch.inf)  # of an empty place: out of reach
        claims = overlaps == bound
        taken = owner
        if not keep_owner:
            taken = count - 1 - claims.flip(1).to(torch.uint8).argmax(dim=1)
        assigned = torch.where(claims.any(dim=1), taken, assigned)
    return assigned


def pad_targets(
    targets: Sequence[dict[str, Tensor]], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [B, G, 4] of `dtype`, labels int64 [B, G] and bool [B, G], which of them are real; G is the largest number
    of objects of a picture, at least 1. No read back to the host."""
    boxes, valid = pad_boxes([target["boxes"] for target in targets], device, dtype)
    labels = [target["labels"].to(device) for target in targets]
    return boxes, _padded(labels, valid.shape[1]), valid


def pad_boxes(boxes: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`pad_targets` without labels."""
    boxes = [own.to(device, dtype) if len(own) else torch.zeros((0, 4), device=device, dtype=dtype) for own in boxes]
    counts = torch.tensor([len(own) for own in boxes])
    most = max(1, *(len(own) for own in boxes))
    return _padded(boxes, most), (torch.arange(most) < counts[:, None]).to(device, non_blocking=True)


def _padded(parts: Sequence[Tensor], most: int) -> Tensor:
    """Parts [n, ...] to [B, most, ...], zeros behind each: read from one list by places that the host knows."""
    every = torch.cat(list(parts))
    every = torch.cat([every, every.new_zeros((1, *every.shape[1:]))])
    counts = torch.tensor([len(own) for own in parts])
    place = torch.arange(most)
    place = torch.where(place < counts[:, None], place + (counts.cumsum(0) - counts)[:, None], len(every) - 1)
    return every[place.to(every.device, non_blocking=True)]


@torch.no_grad()
def centerness(anchors: Tensor, gt_boxes: Tensor) -> Tensor:
    """How central each anchor lies in its object (FCOS, eq. 3): [P, 4] and [P, 4] to [P] in 0..1.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), the distances of the anchor's centre from the box's sides; 0
    where it lies outside.
    """
    anchors, gt_boxes = _boxes(anchors, "anchors"), _boxes(gt_boxes, "gt_boxes")
    if anchors.shape != gt_boxes.shape:
        raise ValueError(f"one gt box per anchor is needed: {list(anchors.shape)}, {list(gt_boxes.shape)}")
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centre - gt_boxes[:, :2], gt_boxes[:, 2:] - centre
    shares = torch.minimum(before, after) / torch.maximum(before, after)
    return shares.clamp(min=0).nan_to_num(0.0).prod(dim=1).sqrt()


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """[..., N, 4] and [M, 4] or [..., M, 4] to [..., N, M]; two boxes without area overlap by 0."""
    return paired_iou(boxes[..., None, :], others if others.ndim == 2 else others[..., None, :, :])


def _in_ignored(anchors: Tensor, ignore_boxes: Tensor | None, ignore_iof: float | None) -> Tensor | None:
    """bool [A]: more than `ignore_iof` of the anchor lies in one of the regions; None where the option is off."""
    if ignore_iof is None or ignore_iof <= 0 or ignore_boxes is None or not len(ignore_boxes):
        return None
    regions = _boxes(ignore_boxes, "ignore_boxes").to(anchors)
    share = _shared_area(anchors[:, None], regions) / _area(anchors).clamp(min=SMALLEST_AREA)[:, None]
    return share.amax(dim=1) > ignore_iof


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU [...] of boxes [..., 4] and others [..., 4], which broadcast."""
    shared = _shared_area(boxes, others)
    union = _area(boxes) + _area(others) - shared
    return shared / union.clamp(min=SMALLEST_AREA)


def giou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - GIoU [...] of boxes [..., 4] and others [..., 4] (Rezatofighi et al., CVPR'19), with gradients."""
    shared = _shared_area(boxes, others)
    union = _area(boxes) + _area(others) - shared
    left, top, right, bottom = boxes.unbind(-1)
    from_left, from_top, to_right, to_bottom = others.unbind(-1)
    width = torch.maximum(right, to_right) - torch.minimum(left, from_left)
    height = torch.maximum(bottom, to_bottom) - torch.minimum(top, from_top)
    hull = width * height
    tiny = 1e-7  # torchvision's
    return 1 - shared / (union + tiny) + (hull - union) / (hull + tiny)


def _shared_area(boxes: Tensor, others: Tensor) -> Tensor:
    # coordinate by coordinate: a last dimension of two is slow to multiply along
    left, top, right, bottom = boxes.unbind(-1)
    from_left, from_top, to_right, to_bottom = others.unbind(-1)
    width = torch.minimum(right, to_right) - torch.maximum(left, from_left)
    height = torch.minimum(bottom, to_bottom) - torch.maximum(top, from_top)
    return width.clamp(min=0) * height.clamp(min=0)


def _area(boxes: Tensor) -> Tensor:
    left, top, right, bottom = boxes.unbind(-1)
    return (right - left) * (bottom - top)


def _distances(points: Tensor, others: Tensor) -> Tensor:
    """Euclidean, points [N, 2] and others [..., M, 2] to [..., N, M]."""
    return (points[:, None] - others[..., None, :, :]).square().sum(dim=-1).sqrt()


def _boxes(boxes: Tensor, name: str) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"{name} must be floats [N, 4], these are {boxes.dtype} {list(boxes.shape)}")
    return at_least_float32(boxes)
