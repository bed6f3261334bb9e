"""From a list of pictures to one normalised, padded batch: what every detector's forward starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from tailfin.models.constants import constant

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pictures, RGB in 0..1
STD = (0.229, 0.224, 0.225)


def batch_images(
    images: Sequence[Tensor],
    *,
    divisor: int = 32,
    channels_last: bool = False,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> ImageList:
    """Pictures [3, H, W], uint8 or float in 0..1, to an `ImageList` normalised by `mean` and deviation `std`.

    The batch is zero-padded right and below to the largest height and width, rounded up to `divisor`; the list keeps
    the true sizes (H, W).
    """
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    height = -(-max(size[0] for size in sizes) // divisor) * divisor
    width = -(-max(size[1] for size in sizes) // divisor) * divisor
    device = images[0].device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    own_mean, own_std = (constant(values, device)[:, None, None] for values in (mean, std))
    if all(size == (height, width) for size in sizes):
        batch = _normalise(torch.stack(list(images)), own_mean, own_std).contiguous(memory_format=layout)
    else:
        batch = torch.zeros((len(images), 3, height, width), device=device).contiguous(memory_format=layout)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]] = _normalise(image, own_mean, own_std)
    return ImageList(batch, sizes)


def size_limits(image_sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """float32 [B, 4]: the largest x, y, x, y of boxes in pictures of (height, width)."""
    return on_device([[width, height, width, height] for height, width in image_sizes], device)


def pictures_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """int64 [sum of counts]: 0 as often as the first count says, then 1, ..."""
    picture = np.repeat(np.arange(len(counts)), np.asarray(counts, dtype=np.int64))  # also of no pictures
    return torch.from_numpy(picture).to(device, non_blocking=True)


def on_device(values: Any, device: torch.device) -> Tensor:
    """float32 numbers of the host as a tensor of `device`, without waiting for it."""
    made = torch.tensor(values, dtype=torch.float32)
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels as torchvision's detectors see them, bit for bit: division by 255, then the mean, then the deviation."""
    images = images / 255 if images.dtype == torch.uint8 else images.float()
    return (images - mean).div_(std)
