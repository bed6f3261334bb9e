"""Repeat factors: how often an image is shown per epoch, from how rare its rarest class is.

    rfs      f_c = share of images with class c                       (Gupta et al., LVIS, CVPR'19)
    irfs     f_c = sqrt(share of images x share of instances)         (Yaman et al., instance-aware RFS)
    dynamic  f_c = f_im f_in / (a f_im + (1 - a) f_in), a = progress   (2DRCL, NeurIPS'24, eq. 4)

    r_c = max(1, (threshold / f_c)^exponent),   r_image = max over its classes (1 where it has none)

    eirfs, eirfs_paper   r_c = exp(alpha (threshold / sqrt(f_im f_in))^exponent)   (E-IRFS)

The exponent is 1/2, a square root, but where a method says otherwise. A worked number: with 100,000 training images
and threshold 1e-3, a class seen in 25 images has f = 2.5e-4, so r = 2, and every image that shows it comes twice an
epoch; classes in 100 images or more (f >= threshold) are not repeated. Shares are of all images, also those without
annotation.

E-IRFS's released code differs from its paper, and `eirfs` follows the code: f_im is the class's part of the *sum* of
all classes' image counts (at least 1 each), and every instance count is one more than it is. `eirfs_paper` is the
formula with the shares above. Images are drawn with replacement, with chances as their factors; its threshold is 1e-4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tailfin.data.index import AnnotationIndex, open_index
from tailfin.errors import UserError, nearest
from tailfin.stats import ClassStats

Policy = Literal["rfs", "irfs", "dynamic", "eirfs", "eirfs_paper"]
POLICIES = get_args(Policy)
WITH_REPLACEMENT = ("eirfs", "eirfs_paper")  # images are drawn with chances as their factors
REPEATS = (2.0, 10.0)  # of the rarest class: less changes nothing, more only learns the same pictures by heart
PIECE = 1 << 20  # annotations
LEAST_THRESHOLD = 1e-3  # LVIS practice
Rounding = Literal["stochastic", "ceil", "floor", "round"]


def category_factors(
    stats: ClassStats,
    policy: str = "rfs",
    threshold: float = 1e-3,
    progress: float = 0.0,
    *,
    exponent: float = 0.5,
    alpha: float = 2.0,
) -> NDArray[np.float64]:
    """Repeat factor of each class, float64 [C] (>= 1); a class without training image has 1 (not with "eirfs").

    Args:
        policy: see the top of this file.
        threshold: t, a share of the images (or of what the policy counts).
        progress: share of training done in 0..1, used by "dynamic" alone: 0 gives RFS's image share, 1 the share of
            instances.
        exponent: of threshold / f; 0.5 is a square root.
        alpha: strength of "eirfs" and "eirfs_paper", used by them alone.
    """
    if policy not in POLICIES:
        raise UserError(f'there is no sampling policy "{policy}"{nearest(policy, POLICIES)}')
    if not threshold > 0:
        raise UserError(f"the sampling threshold must be positive (given: {threshold})")
    if not 0 <= progress <= 1:
        raise UserError(f"progress must lie in 0..1 (given: {progress})")
    for name, value in (("exponent", exponent), ("alpha", alpha)):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name} must not be negative (given: {value})")
    share = class_shares(stats, policy, progress)
    if policy == "eirfs":
        return _exponential(threshold / share, exponent, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        known = np.isfinite(share) & (share > 0)
        ratio = np.where(known, threshold / share, 0.0)
    if policy == "eirfs_paper":
        return np.where(known, _exponential(ratio, exponent, alpha), 1.0)
    return np.where(known, np.maximum(1.0, ratio**exponent), 1.0)


def class_shares(stats: ClassStats, policy: str = "rfs", progress: float = 0.0) -> NDArray[np.float64]:
    """f_c, what a class's threshold is compared with, float64 [C]; 0 or NaN of a class without training image."""
    image_count = np.asarray(stats.image_count, dtype=np.float64)
    instances = np.asarray(stats.instance_count, dtype=np.float64)
    if policy == "eirfs":
        seen = np.maximum(image_count, 1.0)
        return np.sqrt(seen / seen.sum() * (instances + 1) / (instances + 1).sum())
    images = image_count / max(float(stats.num_images), 1.0)
    instances = instances / max(instances.sum(), 1.0)
    if policy == "rfs":
        return images
    if policy == "dynamic":
        with np.errstate(divide="ignore", invalid="ignore"):
            return images * instances / (progress * images + (1 - progress) * instances)
    return np.sqrt(images * instances)  # irfs, eirfs_paper


def repeating_threshold(share: NDArray[np.float64]) -> float:
    """A threshold t for repeat factors r = sqrt(t / share) of classes with these shares, to two digits.

    t is the share of the median class, so that half of the classes are repeated; at least LVIS's 1e-3, and within what
    repeats the rarest class 2 to 10 times. LVIS itself gets 1e-3.
    """
    share = share[np.isfinite(share) & (share > 0)]
    least, most = (float(share.min()) * repeats**2 for repeats in REPEATS)
    return float(f"{min(max(float(np.median(share)), LEAST_THRESHOLD, least), most):.2g}")


def _exponential(ratio: NDArray[np.float64], exponent: float, alpha: float) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        factors = np.exp(alpha * ratio**exponent)
    if not np.isfinite(factors).all():
        raise UserError(
            f"E-IRFS's factors grow beyond all numbers (alpha {alpha:g}, threshold {ratio.max():g} times the share "
            "of the rarest class): lower the threshold or alpha"
        )
    return factors


def repeat_factors(
    source: str | Path | AnnotationIndex,
    policy: str = "rfs",
    threshold: float = 1e-3,
    progress: float = 0.0,
    *,
    exponent: float = 0.5,
    alpha: float = 2.0,
) -> NDArray[np.float64]:
    """Repeat factor of each image of an annotation file (path or open index), float64 [num_images], in file order.

    The options are those of `category_factors`.
    """
    index = source if isinstance(source, AnnotationIndex) else open_index(source, needs_names=False)
    stats = ClassStats.from_index(index)
    factors = category_factors(stats, policy, threshold, progress, exponent=exponent, alpha=alpha)
    return factors_of_images(index, factors)


def factors_of_images(index: AnnotationIndex, category_factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """`image_factors` of an index, whose columns are read piece by piece."""
    factors = np.ones(len(index))
    trained = index.clean().rows
    for start in range(0, len(trained), PIECE):
        rows = trained[start : start + PIECE]
        np.maximum.at(factors, index.image_of[rows], category_factors[index.labels[rows]])
    return factors


def training_labels(index: AnnotationIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(image row, class) of every annotation that trains: crowds and boxes without area are out."""
    rows = index.clean().rows
    return index.image_of[rows].astype(np.int64), index.labels[rows].astype(np.int64)


def image_factors(
    category_factors: NDArray[np.float64], image_of: NDArray[np.int64], labels: NDArray[np.int64], num_images: int
) -> NDArray[np.float64]:
    """Largest class factor in each image, 1 where it has none; `image_of` and `labels` list every annotation."""
    factors = np.ones(num_images)
    np.maximum.at(factors, image_of, category_factors[labels])
    return factors


def round_factors(
    factors: NDArray[np.float64], rounding: str, uniform: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """How often each image comes, int64: "ceil", "floor", "round" (a half goes to the even number), or "stochastic".

    "stochastic" is the floor, plus one where `uniform` in 0..1, one number per image, is below the fraction.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f'there is no rounding "{rounding}"{nearest(rounding, get_args(Rounding))}')
    if rounding != "stochastic":
        whole = {"ceil": np.ceil, "floor": np.floor, "round": np.rint}[rounding](factors)
        return np.asarray(whole, dtype=np.int64)
    if uniform is None:
        raise ValueError("stochastic rounding needs its uniform numbers")
    floor = np.floor(factors)
    return (floor + (uniform < factors - floor)).astype(np.int64)
