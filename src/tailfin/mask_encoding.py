"""A detector's masks to COCO's RLE at the size of the picture file: the one place where masks are pasted.

A detector's `masks` are probabilities [D, m, m] beside its boxes. Here they are drawn at file size and encoded, so that
result files, drawings and `Detector.predict` show the same pixels::

    rles = encode_masks(output["masks"], boxes, (height, width))      # [{"size": [height, width], "counts": bytes}]
    pixels = decode_masks(rles, (height, width))                      # bool [D, height, width]

Only a window around each box is drawn. Boxes of similar size share a tensor, and the windows' runs are moved to their
place in the picture as numbers: time and memory follow the objects' areas, not objects x picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from tailfin.models.mask_ops import paste_masks

CHUNK = 2**23  # pixels drawn at a time, about 100 MB at most; a single larger window is drawn alone
Rle = dict[str, Any]


@torch.inference_mode()
def encode_masks(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Rle]:
    """Compressed RLEs of masks pasted into a picture, as mmdetection and detectron2 paste them (threshold 0.5).

    Args:
        probs: [D, m, m] after the sigmoid, on any device.
        boxes: [D, 4] xyxy in pixels of the picture file; one outside of it gets an empty mask.
        size: (H, W) of the picture file.

    Returns:
        D dicts of `size` [H, W] and `counts` (COCO's compressed bytes), in order.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if probs.ndim != 3 or boxes.shape != (len(probs), 4):
        raise ValueError(f"masks must be [D, m, m] beside boxes [D, 4], not {list(probs.shape)}, {list(boxes.shape)}")
    height, width = size
    encoded: list[Rle] = [{}] * len(probs)
    probs, boxes = probs.float(), boxes.to(probs.device, torch.float32)
    windows = _windows(boxes.cpu().numpy().astype(np.float64), height, width)
    for rows, (left, top), (tall, wide) in _groups(windows, height, width):
        own = torch.from_numpy(rows).to(probs.device)
        corner = torch.from_numpy(np.stack([left, top, left, top], axis=1)).to(boxes)
        drawn = paste_masks(probs[own], boxes[own] - corner, (tall, wide))
        counts = _counts(drawn, left, top, height, width)
        found = coco_mask.frPyObjects([{"size": [height, width], "counts": each} for each in counts], height, width)
        for row, rle in zip(rows.tolist(), found, strict=True):
            encoded[row] = rle
    return encoded


def decode_masks(rles: Sequence[Rle], size: tuple[int, int]) -> Tensor:
    """bool [D, H, W] of RLEs of one picture of `size` (H, W)."""
    if not rles:
        return torch.zeros((0, *size), dtype=torch.bool)
    pixels = coco_mask.decode(list(rles))  # uint8 [H, W, D] in Fortran order
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).view(bool))


# ---- details ---------------------------------------------------------------------------------------------------------


def _windows(boxes: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    """Whole pixels [D, 4] (left, top, right, bottom) that a mask can touch, one at least, inside the picture."""
    edges = np.array([width, height])
    boxes = np.nan_to_num(boxes, posinf=1e9, neginf=-1e9)
    low = np.clip(np.floor(boxes[:, :2]) - 1, 0, edges - 1)
    high = np.clip(np.ceil(boxes[:, 2:]) + 1, low + 1, edges)
    return np.concatenate([low, high], axis=1).astype(np.int64)


def _groups(
    windows: NDArray[np.int64], height: int, width: int
) -> Iterator[tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64]], tuple[int, int]]]:
    """(rows, their left and top corners, height and width of a window for all of them), within `CHUNK` pixels.

    Windows whose sides lie between the same powers of two go together, so less than four times their pixels are drawn.
    """
    wide, tall = (windows[:, 2] - windows[:, 0]), (windows[:, 3] - windows[:, 1])
    kind = np.ceil(np.log2(tall)).astype(np.int64) * 64 + np.ceil(np.log2(wide)).astype(np.int64)
    for value in np.unique(kind):
        rows = np.flatnonzero(kind == value)
        shape = int(tall[rows].max()), int(wide[rows].max())
        step = max(1, CHUNK // (shape[0] * shape[1]))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            left = np.minimum(windows[part, 0], width - shape[1])  # the shared size may not pass the border
            top = np.minimum(windows[part, 1], height - shape[0])
            yield part, (left, top), shape


def _counts(
    drawn: Tensor, left: NDArray[np.int64], top: NDArray[np.int64], height: int, width: int
) -> list[NDArray[np.int64]]:
    """COCO's uncompressed counts of masks bool [n, h, w] whose upper left corners lie at (left, top) of the picture.

    Runs go down the columns: the change of every column, with a zero before and after it, gives starts and ends, which
    become places in the picture's own order of pixels. Runs that meet, at the foot of one column and the head of the
    next, are one.
    """
    columns = torch.nn.functional.pad(drawn.transpose(1, 2), (1, 1))
    changes = torch.nonzero(columns[..., 1:] != columns[..., :-1]).cpu().numpy()
    number = changes[0::2, 0]
    places = (left[changes[:, 0]] + changes[:, 1]) * height + top[changes[:, 0]] + changes[:, 2]
    starts, ends = places[0::2], places[1::2]
    meets = np.flatnonzero((starts[1:] == ends[:-1]) & (number[1:] == number[:-1]))
    starts, number, ends = np.delete(starts, meets + 1), np.delete(number, meets + 1), np.delete(ends, meets)
    bounds = np.stack([starts, ends], axis=1).ravel()
    cuts = 2 * np.searchsorted(number, np.arange(len(drawn) + 1))
    total, counts = height * width, []
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        own = np.diff(bounds[first:last], prepend=0, append=total)
        counts.append(own if own[-1] or len(own) == 1 else own[:-1])  # a mask that ends with the picture has no rest
    return counts
