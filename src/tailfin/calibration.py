"""Training-free calibration: the scores of a trained detector set right by class size, and by FRACAL's class geometry.

    norcal           s_c = (p_c / n_c^gamma) / (p_background + sum over k of p_k / n_k^gamma)   (Pan et al., NeurIPS'21)
    logit_adjusted   z_c - log(prior_c^tau + 1e-12)                                (Menon et al., ICLR'21, eq. 9)
    fracal           logits shifted by the rarity of a class, scores divided by its fractal dimension^lambda
                                                                                   (FRACAL, Alexandridis et al., 2025)

Each is a plain function on tensors; none changes weights::

    stats = ClassStats.from_json("train.json")
    scores = norcal(logits.softmax(1), stats, gamma=0.6)
    scores = fracal(logits, stats, fractal_dimension("train.json"))

n_c are the images that show class c, in training; a count of 0 acts as 1. Where there are no logits, in a results file
or behind a detector's own rule, `rescored` does the same to scores. `tailfin calibrate` chooses among them
(`calibrate/`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tailfin.errors import nearest
from tailfin.stats import ClassStats

if TYPE_CHECKING:
    from tailfin.data.index import AnnotationIndex

GRID = 64  # finest grid of the fractal dimension: GRID x GRID cells
FEWEST = 4  # objects of a class below which its dimension is 1
TINY_PRIOR = 1e-12
KINDS = ("softmax", "sigmoid")


# ---- FRACAL ----------------------------------------------------------------------------------------------------------


def fractal_dimension(source: str | Path | AnnotationIndex) -> NDArray[np.float64]:
    """How evenly the objects of each class fill the picture: box-counting dimension of their centres, float64 [C].

    Centres are taken relative to their pictures and pooled. For G = 1..64 count the cells of a G x G grid that hold a
    centre; the dimension is the least-squares slope of log(cells) over log(G), with the G whose G^2 is no more than the
    class's objects. It lies near 2 for objects everywhere, near 1 for a line; smaller slopes, and classes with fewer
    than 4 objects, count 1. All annotations count, as in the counts of `ClassStats`; cells are half open, so a centre
    on the right or lower border is in none.

    Args:
        source: path of a COCO or LVIS annotation file, or an open index. A broken file raises `UserError`.
    """
    if isinstance(source, (str, Path)):
        from tailfin.data.index import open_index

        source = open_index(source, needs_names=False)
    index = source
    boxes = np.asarray(index.boxes)
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    centres = centres / np.stack([index.widths, index.heights], axis=1)[index.image_of]
    return box_counting(centres, np.asarray(index.labels, dtype=np.int64), len(index.categories))


def box_counting(centres: NDArray[np.float64], labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """`fractal_dimension` of centres [N, 2] in 0..1 and their classes [N], float64 [classes]."""
    objects = np.bincount(labels, minlength=classes)
    inside = ((centres >= 0) & (centres < 1)).all(axis=1)
    centres, labels = centres[inside], labels[inside]
    cells = np.empty((classes, GRID))
    for grid in range(1, GRID + 1):
        column, row = np.floor(centres * grid).astype(np.int64).clip(max=grid - 1).T
        held = np.zeros((classes, grid * grid), dtype=bool)
        held[labels, row * grid + column] = True
        cells[:, grid - 1] = held.sum(axis=1)
    x, y = np.log(np.arange(1, GRID + 1)), np.log(cells.clip(min=1))
    # sums over the first G grids, then those of each class's largest one
    last = np.clip(np.sqrt(objects).astype(np.int64), 1, GRID) - 1
    count = last + 1.0
    sum_x, sum_xx = np.cumsum(x)[last], np.cumsum(x * x)[last]
    rows = np.arange(classes)
    sum_y, sum_xy = np.cumsum(y, axis=1)[rows, last], np.cumsum(x * y, axis=1)[rows, last]
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (count * sum_xy - sum_x * sum_y) / (count * sum_xx - sum_x**2)
    return np.where(objects >= FEWEST, np.maximum(slope, 1.0), 1.0)


def fracal(
    logits: Tensor,
    stats: ClassStats,
    dimension: ArrayLike | Tensor,
    kind: Literal["softmax", "sigmoid"] = "softmax",
    lambda_: float = 2.0,
) -> Tensor:
    """FRACAL's scores: rare classes up, classes that fill the picture evenly down.

    w_c = -log10(share of images with class c) - log10(C), released with the decimal logarithm beside natural logits.
    softmax: softmax(z + w) over classes and background (w = 0), divided by D_c^lambda (background by 1), renormalised.
    sigmoid: s(z) s(z + w + v), v_c = -log10(D_c^lambda / sum of D^lambda) - log10(C).

    Args:
        logits: softmax [N, C + 1], background last; sigmoid [N, C].
        stats: counts of the training set; shares are of all its images.
        dimension: [C], D_c of `fractal_dimension`.
        kind: what the logits are trained for.
        lambda_: strength of the dimension; 0 leaves the shift by frequency alone.

    Returns:
        [N, C] scores in 0..1, float32 or float64.
    """
    if kind not in KINDS:
        raise ValueError(f'there is no kind "{kind}"{nearest(kind, KINDS)}')
    if not 0 <= lambda_ < math.inf:
        raise ValueError(f"lambda_ must not be negative (given: {lambda_})")
    classes = stats.num_classes
    _check(logits, classes + (kind == "softmax"), "logits")
    logits = _float(logits)
    shift = fracal_shift(stats, dimension, kind, lambda_)
    if kind == "sigmoid":
        return logits.sigmoid() * (logits + shift.to(logits)).sigmoid()
    # softmax, division and renormalisation in one: exact where a quotient would underflow
    total = torch.cat([shift, shift.new_zeros(1)])
    return (logits + total.to(logits)).softmax(dim=1)[:, :-1]


def fracal_shift(
    stats: ClassStats, dimension: ArrayLike | Tensor, kind: Literal["softmax", "sigmoid"], lambda_: float
) -> Tensor:
    """What `fracal` adds to the logits, float64 [C]: softmax w - log D^lambda; sigmoid w + v, of the second factor."""
    classes = stats.num_classes
    sizes = torch.as_tensor(dimension, dtype=torch.float64, device="cpu")
    if sizes.shape != (classes,) or not bool(((sizes > 0) & sizes.isfinite()).all()):
        raise ValueError(f"dimension must be {classes} positive numbers, one per class")
    sizes = sizes.pow(lambda_)
    shift = -(_counts(stats) / max(stats.num_images, 1)).log10() - math.log10(classes)
    if kind == "sigmoid":
        return shift - (sizes / sizes.sum()).log10() - math.log10(classes)
    return shift - sizes.log()


# ---- NorCal ----------------------------------------------------------------------------------------------------------


def norcal(scores: Tensor, stats: ClassStats, gamma: float) -> Tensor:
    """NorCal's scores: [N, C + 1] softmax probabilities, background last, to [N, C], float32 or float64.

    Only foreground is divided; the normalisation over classes *and* background keeps a background box background when
    its scores move. On logits the same is softmax over (z_c - gamma log n_c, z_background).

    Args:
        scores: [N, C + 1] probabilities of any float dtype.
        stats: counts of the training set.
        gamma: strength; 0 leaves the scores as they are. The paper picks it on training images, per model.
    """
    _check(scores, stats.num_classes + 1, "scores")
    return norcal_foreground(scores[:, :-1], stats.image_count, gamma, scores[:, -1])


def norcal_foreground(
    scores: Tensor, class_count: ArrayLike | Tensor, gamma: float = 0.6, background: Tensor | None = None
) -> Tensor:
    """`norcal` for scores without a background column.

    Args:
        scores: [N, C] foreground probabilities in 0..1, any float dtype.
        class_count: [C] training images (or instances) of the classes; a count of 0 acts as 1.
        gamma: strength.
        background: [N] background probabilities; by default what the foreground scores leave of 1. Give it for scores
            that do not sum to 1 with the background, such as p_j (1 - p_background) of an objectness column.

    Returns:
        [N, C] scores in 0..1, float32 or float64.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must not be negative (given: {gamma})")
    counts = torch.as_tensor(class_count, dtype=torch.float64, device="cpu").clamp(min=1)
    if scores.ndim != 2 or counts.shape != scores.shape[1:]:
        raise ValueError(f"class_count must be one number per column of scores {list(scores.shape)}")
    scores = _float(scores)
    if background is None:
        background = (1 - scores.sum(dim=1)).clamp(min=0)
    elif background.shape != scores.shape[:1]:
        raise ValueError(f"background must be [{len(scores)}], this is {list(background.shape)}")
    divided = scores * counts.pow(-gamma).to(scores)
    total = divided.sum(dim=1) + background.to(scores)
    return divided / total.clamp(min=torch.finfo(scores.dtype).tiny)[:, None]


# ---- logit adjustment ------------------------------------------------------------------------------------------------


def logit_adjusted(logits: Tensor, stats: ClassStats, tau: float = 1.0) -> Tensor:
    """Post-hoc logit adjustment: z_c - log(prior_c^tau + 1e-12), priors as shares of the classes' image counts.

    The paper is about classification; of detection's columns the background is left as it is. To use the same term in
    training, add it instead (`losses.build("logit_adjusted", stats)`).

    Args:
        logits: [N, C], or [N, C + 1] with the background last.
        stats: counts of the training set.
        tau: strength; 0 leaves the logits as they are.

    Returns:
        Adjusted logits of the same shape, float32 or float64.
    """
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must not be negative (given: {tau})")
    classes = stats.num_classes
    if logits.ndim != 2 or logits.shape[1] not in (classes, classes + 1):
        raise ValueError(f"logits must be [N, {classes}] or [N, {classes + 1}], these are {list(logits.shape)}")
    logits = _float(logits)
    shift = adjustment_shift(stats, tau)
    shift = torch.cat([shift, shift.new_zeros(logits.shape[1] - classes)])
    return logits + shift.to(logits)


def adjustment_shift(stats: ClassStats, tau: float) -> Tensor:
    """What `logit_adjusted` adds to the logits of the classes, float64 [C]."""
    counts = _counts(stats)
    return -((counts / counts.sum()).pow(tau) + TINY_PRIOR).log()


# ---- scores without their logits -------------------------------------------------------------------------------------


def rescored(scores: Tensor, shift: Tensor, kind: Literal["softmax", "sigmoid"], temperature: float = 1.0) -> Tensor:
    """Scores as if their logits had been divided by `temperature` and moved by `shift`.

    The odds of a class are multiplied by e^shift: against all others and the background, which has what the scores
    leave of 1, for a softmax; each against its own complement for sigmoids.

    Args:
        scores: [..., C] foreground scores in 0..1, any float dtype.
        shift: [C].
        kind: what made the scores.
        temperature: above 0.

    Returns:
        [..., C] scores in 0..1, float32 or float64.
    """
    if kind not in KINDS:
        raise ValueError(f'there is no kind "{kind}"{nearest(kind, KINDS)}')
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 (given: {temperature})")
    scores = _float(scores)
    rest = 1 - (scores.sum(dim=-1, keepdim=True) if kind == "softmax" else scores)
    rest = rest.clamp(min=0)
    if temperature != 1:
        scores, rest = scores.pow(1 / temperature), rest.pow(1 / temperature)
    moved = scores * shift.exp().to(scores)
    total = (moved.sum(dim=-1, keepdim=True) if kind == "softmax" else moved) + rest
    return moved / total.clamp(min=torch.finfo(scores.dtype).tiny)


def _check(values: Tensor, width: int, name: str) -> None:
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(f"{name} must be [N, {width}], these are {list(values.shape)}")


def _counts(stats: ClassStats) -> Tensor:
    """Image counts, float64 [C], at least 1."""
    return torch.as_tensor(stats.image_count, dtype=torch.float64).clamp(min=1)


def _float(values: Tensor) -> Tensor:
    """Half precision to float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
