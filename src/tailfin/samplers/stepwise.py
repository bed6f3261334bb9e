"""Step-wise repeat factor sampling (Step-wise Learning, Dong et al., ICCV'23): bands of classes with own factors.

    f_c = images of the step with class c / images of the step
    r_c = max(1, (t / f_c)^p),   t and p those of the first band whose image count bounds the class; 1 above all bands
    r_image = max over its classes, rounded up

The bands are those of the whole training set's image counts. Presets, with the cuts of `division`:

    released  step 1: classes below the cut t .003 p .5, the others up to 100 images t .003 p .3
              step 2: classes below the cut t .0015 p 1
              of more than two parts: step 1 up to 30 images p .5, up to 100 p .3; steps 2.. classes below the smallest
              cut t .0015 p .5
    paper     the same numbers, for the step's own classes alone: head classes in step 1, tail classes in step 2

The released code has one cut, 30 images; here the bands follow it, so that each tail class is repeated at any cut.

A worked number: D_tail has 10,000 images and a class with 8 training images shows in 5 of them. f = 5e-4, so step 2
repeats these by .0015 / .0005 = 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tailfin.samplers.repeat_factor import image_factors
from tailfin.schema.stepwise import Band, StepSampler

RELEASED_CUT, COMMON = 30, 100  # images


def bands_of(
    sampler: StepSampler, expert: bool, division: Sequence[int] = (RELEASED_CUT,), boundary: str = "gt"
) -> tuple[Band, ...]:
    """The bands of step 1 (`expert`) or a later step, where `division` parts the classes (`smooth_tail.divide`)."""
    if sampler.name in ("plain", "bands"):
        return sampler.bands
    several = len(division) > 1
    cut = RELEASED_CUT if several and expert else min(division) - (boundary == "ge")
    bands = [(cut, 0.003, 0.5), (COMMON, 0.003, 0.3)] if expert else [(cut, 0.0015, 0.5 if several else 1.0)]
    kept = [own for number, own in enumerate(bands) if own[0] > max((0, *(before[0] for before in bands[:number])))]
    return tuple(Band(images=images, threshold=threshold, power=power) for images, threshold, power in kept)


def band_factors(
    image_count: NDArray[np.int64], own_count: NDArray[np.int64], own_images: int, bands: Sequence[Band]
) -> NDArray[np.float64]:
    """Repeat factor of each class, float64 [C] (>= 1).

    Args:
        image_count: [C] images of the whole training set that show the class.
        own_count: [C] images of the step that show it; a class without any has factor 1.
        own_images: images of the step.
        bands: ascending by `images`.
    """
    band = np.searchsorted([band.images for band in bands], image_count)
    threshold = np.array([*(band.threshold for band in bands), 0.0])[band]
    power = np.array([*(band.power for band in bands), 1.0])[band]
    share = own_count / max(own_images, 1)
    ratio = np.divide(threshold, share, out=np.zeros(len(share)), where=share > 0)
    return np.maximum(1.0, ratio**power)


def step_factors(
    image_of: NDArray[np.int64],
    labels: NDArray[np.int64],
    num_images: int,
    image_count: NDArray[np.int64],
    sampler: StepSampler,
    own_classes: NDArray[np.bool_],
    *,
    expert: bool,
    division: Sequence[int] = (RELEASED_CUT,),
    boundary: str = "gt",
) -> NDArray[np.float64]:
    """Repeat factor of every image of the index, float64 [num_images], for `BatchPlan.factors`.

    Args:
        image_of, labels: image row and class of every annotation of the step.
        num_images: images of the whole training set.
        image_count: [C] images of it with each class.
        own_classes: bool [C], the classes that the step is for.
        expert: whether this is step 1.
        division, boundary: what parts the classes.
    """
    classes = len(image_count)
    pairs = np.unique(image_of * classes + labels)
    own_count = np.bincount(pairs % classes, minlength=classes)
    factors = band_factors(
        image_count, own_count, len(np.unique(image_of)), bands_of(sampler, expert, division, boundary)
    )
    if sampler.name == "paper":
        factors = np.where(own_classes, factors, 1.0)
    return image_factors(factors, image_of, labels, num_images)
