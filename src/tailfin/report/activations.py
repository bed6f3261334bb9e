"""Where a backbone looks (2DRCL, figure 3): activation maps of its last layer, and how much of them lies on objects.

    maps = activation_maps("RUN/model.safetensors", [picture], method="mean")
    energy_inside(maps[0], boxes)                 # share of the map within the boxes

`mean` needs no class: the mean over the channels of the absolute activation, 0..1 per picture. `gradcam` weighs the
channels by the gradient of the score of the best detection of a class (Selvaraju et al., ICCV'17).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tailfin.checkpoint import load_model_file
from tailfin.data.dataset import to_test_size
from tailfin.errors import UserError, nearest
from tailfin.models import Detector, build_detector
from tailfin.models.backbones import Body
from tailfin.models.detector import Limits
from tailfin.weights import load_whole

Method = Literal["mean", "gradcam"]


def activation_maps(
    model: str | Path,
    pictures: Sequence[np.ndarray],
    method: Method = "mean",
    classes: Sequence[str] | None = None,
) -> list[NDArray[np.float64]]:
    """A map per picture, float64 [H, W] in 0..1, of the picture's size.

    Args:
        model: model file.
        pictures: uint8 [H, W, 3].
        method: "mean", or "gradcam" for the class of each picture.
        classes: a class name per picture, for "gradcam"; a picture without a detection of it gets zeros.
    """
    if method not in get_args(Method):
        raise UserError(f'activation maps: there is no method "{method}"{nearest(method, get_args(Method))}')
    if method == "gradcam" and (classes is None or len(classes) != len(pictures)):
        raise UserError("activation maps by gradcam need a class name per picture")
    file = load_model_file(model)
    detector, _ = build_detector(file.recipe, file.stats, start=False)
    load_whole(detector, file.weights, f"model {model}")
    detector.eval()
    names = list(file.stats.names)
    maps = []
    for number, picture in enumerate(pictures):
        small = to_test_size(torch.from_numpy(np.array(picture)).permute(2, 0, 1), file.recipe.data)
        label = None
        if method == "gradcam" and classes is not None:
            if classes[number] not in names:
                raise UserError(f'the model has no class "{classes[number]}"{nearest(classes[number], names)}')
            label = names.index(classes[number])
        maps.append(_map(detector, small, (picture.shape[0], picture.shape[1]), label))
    return maps


def mean_activation(features: Tensor) -> Tensor:
    """[K, h, w] to [h, w]: the mean of the absolute values over the channels."""
    return features.abs().mean(dim=0)


def weighted_activation(features: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM: [K, h, w] twice to [h, w], the channels weighted by the mean of their gradient, negatives cut off."""
    return (features * gradient.mean(dim=(1, 2), keepdim=True)).sum(dim=0).relu()


def spread(
    small: Tensor, covered: tuple[int, int], shown: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.float64]:
    """A map [h, w] of a padded picture at the picture's size, in 0..1; a constant map gives zeros.

    Args:
        covered: height and width of the padded picture.
        shown: of the part that is the picture.
        size: of the picture as it came.
    """
    small = small.detach().double()[None, None]
    if covered != shown:  # the padding has activations too: only what lies in the picture counts
        whole = functional.interpolate(small, size=covered, mode="bilinear", align_corners=False)
        small = whole[..., : shown[0], : shown[1]]
    large = functional.interpolate(small, size=size, mode="bilinear", align_corners=False)[0, 0]
    low, high = float(large.min()), float(large.max())
    if high - low <= 1e-12 * max(abs(high), 1e-300):
        return np.zeros(size)
    return np.asarray(((large - low) / (high - low)).numpy())


def energy_inside(values: ArrayLike, boxes: ArrayLike) -> float:
    """Share of a map [H, W] that lies within boxes [N, 4] (xyxy pixels, overlapping ones once); 0 of an empty map."""
    values = np.asarray(values, dtype=np.float64)
    inside = np.zeros(values.shape, dtype=bool)
    for left, top, right, bottom in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
        inside[max(0, int(np.floor(top))) : int(np.ceil(bottom)), max(0, int(np.floor(left))) : int(np.ceil(right))] = (
            True
        )
    total = float(values.sum())
    return float(values[inside].sum()) / total if total > 0 else 0.0


def overlaid(picture: np.ndarray, values: ArrayLike, alpha: float = 0.5) -> Image.Image:
    """A map [H, W] in 0..1 on its picture uint8 [H, W, 3], from blue (low) to red (high)."""
    x = np.asarray(values, dtype=np.float64)[..., None]
    jet = np.clip(1.5 - np.abs(4 * x - np.array([3.0, 2.0, 1.0])), 0, 1)
    mixed = (1 - alpha) * picture + alpha * 255 * jet
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


# ---- details ---------------------------------------------------------------------------------------------------------


def _map(detector: Detector, picture: Tensor, size: tuple[int, int], label: int | None) -> NDArray[np.float64]:
    body = next((module for module in detector.modules() if isinstance(module, Body)), None)
    if body is None:
        raise UserError("activation maps need a detector whose backbone names its layers")
    kept: dict[str, Tensor] = {}

    own_layers = body.layers

    def layers(given: Tensor) -> dict[str, Tensor]:
        made = own_layers(given)
        last = list(made)[-1]
        kept["input"] = given
        kept["features"] = made[last] = made[last].detach().requires_grad_(label is not None)
        return made

    body.__dict__["layers"] = layers  # before the class's own, for this picture
    try:
        with torch.set_grad_enabled(label is not None):
            limits: Limits = detector.limits.replaced(0.0 if label is not None else None, None)
            (found,) = detector([picture], limits=limits)
    finally:
        del body.__dict__["layers"]
    features = kept["features"][0].float()
    covered = (int(kept["input"].shape[-2]), int(kept["input"].shape[-1]))
    shown = (int(picture.shape[-2]), int(picture.shape[-1]))
    if label is None:
        return spread(mean_activation(features), covered, shown, size)
    own = found["scores"][found["labels"] == label]
    if not len(own):
        return np.zeros(size)
    if not own.requires_grad:
        raise UserError("gradcam: this detector's scores have no gradient; the method mean works for every detector")
    (gradient,) = torch.autograd.grad(own.max(), kept["features"])
    return spread(weighted_activation(features, gradient[0].float()), covered, shown, size)
