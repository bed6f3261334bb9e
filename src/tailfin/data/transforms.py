"""Training and test transforms of one picture with its boxes and masks, on torchvision's v2 kernels.

Every random choice comes from the generator that is handed in, so a sample is a pure function of its key and does not
depend on workers, ranks or a resume.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tailfin.data.photometric import photometric
from tailfin.schema.data import Data

MIN_SIDE = 1.0  # pixels of the transformed picture; thinner boxes are dropped after a crop
Sample = dict[str, Tensor]


def augment(image: Tensor, target: Sample, config: Data, rng: np.random.Generator) -> tuple[Tensor, Sample]:
    """A training picture uint8 [3, H, W] and its target (boxes xyxy float32 [M, 4], labels, masks uint8 [M, H, W])."""
    if config.photometric and config.photometric_on == "file":
        image = photometric(image, rng)
    if config.color_jitter:
        image = _color_jitter(image, config.color_jitter, rng)
    if config.resize == "jitter":
        image, target = large_scale_jitter(image, target, config.sizes[0], config.jitter_scale, rng)
    elif config.resize == "stretch":
        image, target = resize(image, target, (config.sizes[0], config.sizes[0]))
    else:
        if config.resize == "detr" and rng.random() < 0.5:
            image, target = resize_and_crop(image, target, config.crop_resize, config.crop, rng)
        size = config.sizes[0] if config.resize == "square" else int(rng.choice(config.sizes))
        bound = size if config.resize == "square" else config.max_size
        image, target = resize(image, target, shortest_edge_size(image.shape[-2:], size, bound))
    if rng.random() < config.flip:
        image, target = horizontal_flip(image, target)
    if config.photometric and config.photometric_on == "resized":
        image = photometric(image, rng)
    if config.canvas and config.resize == "jitter":
        image, target = pad(image, target, config.sizes[0])
    return image, target


def pad(image: Tensor, target: Sample, size: int) -> tuple[Tensor, Sample]:
    """Fill a picture up to `size` x `size` with black, right and below; masks with 0."""
    height, width = image.shape[-2:]
    more = [0, 0, max(size - width, 0), max(size - height, 0)]
    if not any(more):
        return image, target
    image = F.pad_image(image, more, fill=0)
    return image, {**target, "masks": F.pad_mask(target["masks"], more)} if "masks" in target else target


def shortest_edge_size(size: tuple[int, int] | torch.Size, short: int, bound: int) -> tuple[int, int]:
    """(height, width) with short side `short`, or less where the long side would pass `bound`; the aspect is kept."""
    height, width = int(size[0]), int(size[1])
    scale = min(short / min(height, width), bound / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: Tensor, target: Sample, size: tuple[int, int]) -> tuple[Tensor, Sample]:
    """Picture, boxes and masks to (height, width)."""
    height, width = int(image.shape[-2]), int(image.shape[-1])
    if (height, width) == size:
        return image, target
    image = F.resize_image(image, list(size), antialias=True)
    scale = torch.tensor([size[1] / width, size[0] / height] * 2)
    target = {**target, "boxes": target["boxes"] * scale}
    if "masks" in target:
        target["masks"] = F.resize_mask(target["masks"], list(size))
    return image, target


def horizontal_flip(image: Tensor, target: Sample) -> tuple[Tensor, Sample]:
    """Mirror left and right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    target = {**target, "boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return image.flip(-1), target


def large_scale_jitter(
    image: Tensor, target: Sample, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[Tensor, Sample]:
    """Large-scale jitter (Ghiasi et al., CVPR'21): the picture fits into a random multiple of the `size` square, and a
    random `size` x `size` crop of it is taken where it is larger. Smaller ones are padded by the batch.
    """
    factor = rng.uniform(*scale)
    target_side = max(1, round(factor * size))
    image, target = resize(image, target, shortest_edge_size(image.shape[-2:], target_side, target_side))
    height, width = int(image.shape[-2]), int(image.shape[-1])
    top = int(rng.integers(0, max(height - size, 0) + 1))
    left = int(rng.integers(0, max(width - size, 0) + 1))
    return crop(image, target, top, left, min(size, height), min(size, width))


def resize_and_crop(
    image: Tensor, target: Sample, sizes: tuple[int, ...], sides: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, Sample]:
    """Cropping of DETR (Carion et al., ECCV'20): one of `sizes` becomes the short side, then a window is cut whose
    height and width are drawn from `sides` (both ends included, at most the picture's).
    """
    image, target = resize(image, target, shortest_edge_size(image.shape[-2:], int(rng.choice(sizes)), 2**31))
    window = []
    for side in image.shape[-2:]:
        length = int(rng.integers(min(sides[0], side), min(sides[1], side) + 1))
        window.append((int(rng.integers(0, side - length + 1)), length))
    (top, height), (left, width) = window
    return crop(image, target, top, left, height, width)


def crop(image: Tensor, target: Sample, top: int, left: int, height: int, width: int) -> tuple[Tensor, Sample]:
    """Cut a window; boxes are clipped to it, those thinner than `MIN_SIDE` are dropped with their labels and masks."""
    image = image[..., top : top + height, left : left + width]
    boxes = target["boxes"] - torch.tensor([left, top, left, top], dtype=torch.float32)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height], dtype=torch.float32))
    target = {**target, "boxes": boxes}
    if "masks" in target:
        target["masks"] = target["masks"][..., top : top + height, left : left + width]
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(dim=1)
    return image, {key: value[keep] for key, value in target.items()}


def _color_jitter(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation, each by a factor in 1 +- strength."""
    for change in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = change(image, rng.uniform(1 - strength, 1 + strength))
    return image
