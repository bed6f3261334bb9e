"""A picture looked at in parts and mirrored: tiles with overlap, flips, and what is found in all of them as one.

A tile is a picture of its own to the detector, resized as any. Boxes move back to the whole picture, and NMS within
each class leaves one of those that several views have found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from tailfin.api import Detector
from tailfin.mask_encoding import encode_masks
from tailfin.models.detections import nms_per_class


class Looks(NamedTuple):
    """How a picture is looked at."""

    tile: int = 0  # side of the tiles in pixels; 0: the whole picture
    overlap: float = 0.2  # of neighbouring tiles, a share of their side
    flip: bool = False  # look at the mirrored picture too
    across: float | None = None  # IoU of a suppression over all classes

    @property
    def plain(self) -> bool:
        """Whether one look at the whole picture is all."""
        return not self.tile and not self.flip and self.across is None


class View(NamedTuple):
    picture: int
    top: int
    left: int
    pixels: np.ndarray  # [h, w, 3], not mirrored
    mirrored: bool


def look(
    detector: Detector,
    pictures: Sequence[np.ndarray],
    looks: Looks,
    *,
    score_threshold: float | None,
    max_dets: int | None,
    batch: int,
) -> list[dict[str, Any]]:
    """`Detector.results` of pictures uint8 [H, W, 3], each looked at as `looks` says."""
    if looks.plain:
        return detector.results(pictures, score_threshold=score_threshold, max_dets=max_dets, batch=batch)
    views = [
        View(number, top, left, picture[top : top + height, left : left + width], mirrored)
        for number, picture in enumerate(pictures)
        for top, left, height, width in windows(picture.shape[:2], looks.tile, looks.overlap)
        for mirrored in ((False, True) if looks.flip else (False,))
    ]
    parts: list[list[dict[str, Tensor]]] = [[] for _ in pictures]
    for start in range(0, len(views), batch):
        group = views[start : start + batch]
        arrays = [np.ascontiguousarray(v.pixels[:, ::-1]) if v.mirrored else v.pixels for v in group]
        for view, found in zip(group, detector.raw(arrays, score_threshold, -1), strict=True):
            parts[view.picture].append(_moved(found, view))
    most = detector.limits(None, max_dets).max_dets
    return [
        _joined(own, picture.shape[:2], detector.model.limits.nms, looks.across, most)
        for own, picture in zip(parts, pictures, strict=True)
    ]


def windows(size: Sequence[int], tile: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of tiles that cover a picture (H, W), evenly, with at least `overlap` between them."""
    if not tile:
        return [(0, 0, size[0], size[1])]
    starts = []
    for side in size[:2]:
        count = 1 if side <= tile else 1 + int(np.ceil((side - tile) / (tile * (1 - overlap))))
        starts.append(np.linspace(0, max(side - tile, 0), count).round().astype(int).tolist())
    return [(top, left, min(tile, size[0]), min(tile, size[1])) for top in starts[0] for left in starts[1]]


def _moved(found: dict[str, Tensor], view: View) -> dict[str, Tensor]:
    """What a view has found, in the whole picture."""
    boxes = found["boxes"]
    if view.mirrored:
        left, top, right, bottom = boxes.unbind(1)
        width = view.pixels.shape[1]
        boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
        if "masks" in found:
            found = {**found, "masks": found["masks"].flip(-1)}
    return {**found, "boxes": boxes + boxes.new_tensor([view.left, view.top, view.left, view.top])}


def _joined(
    parts: Sequence[dict[str, Tensor]], size: Sequence[int], iou: float, across: float | None, most: int
) -> dict[str, Any]:
    """The views' detections as one, best first."""
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "size"}
    boxes, scores, labels = joined["boxes"], joined["scores"].float(), joined["labels"]
    keep = nms_per_class(boxes, scores, labels, iou) if len(parts) > 1 else scores.argsort(descending=True, stable=True)
    if across is not None:
        keep = keep[nms(boxes[keep], scores[keep], across)]
    keep = keep[:most] if most >= 0 else keep
    result: dict[str, Any] = {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
    if "masks" in joined:
        shape = (int(size[0]), int(size[1]))
        result.update(rles=encode_masks(joined["masks"][keep], boxes[keep], shape), size=shape)
    return result
