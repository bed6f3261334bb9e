"""What a trained pre-training makes of a few fixed pictures, as arrays for the report."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchvision.models.detection.image_list import ImageList

from tailfin.data.views import PretrainingDataset
from tailfin.models.detector import Detector
from tailfin.pretraining import reconstruction
from tailfin.pretraining.shell import PreTrainer

PICTURES = 6  # in the file

Array = np.ndarray[Any, Any]


@torch.no_grad()
def look(shell: PreTrainer, dataset: PretrainingDataset) -> dict[str, Array]:
    """Arrays by name. For n pictures, padded to the largest (`size1`, `size2`: int [n, 2], their own height and width):

        view1, view2          uint8 [n, 3, H, W]
        boxes1, boxes2        float32 [n, P, 4], paired boxes, NaN where a picture has fewer than P
        reconstruction        uint8 [n, 3, H, W] of view 1; masks: int [n, 4], the masked rectangle (xyxy)
        positive, negative    float32 [n] and [n, Q]: similarity of the query with its key and with rows of the queue
        box_positive, box_negative    float32 [m] and [m, Q], the same for all boxes, pictures one after another

    The last three lines are what terms show of themselves (`Term.shown`).
    """
    training, device = shell.training, shell.step.device
    shell.eval()
    rows = dataset.rows()
    chosen = rows[np.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).astype(int)]
    samples = [dataset.sample(0, int(row), 0) for row in chosen]
    images = [image.to(device) for image, _ in samples]
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in samples]
    seen = shell.look_at(images, targets)
    first, second = seen.view(0), seen.view(1)
    pixels = functools.partial(_pixels, shell.detector)
    found: dict[str, Array] = {
        "view1": pixels(first.batch),
        "view2": pixels(second.batch),
        "size1": np.array(first.batch.image_sizes),
        "size2": np.array(second.batch.image_sizes),
        "boxes1": _padded(first.boxes),
        "boxes2": _padded(second.boxes),
        "image_id": chosen,
    }
    for name, value in shell.shown(seen).items():
        pictures = value.ndim == 4
        found[name] = pixels(ImageList(value, first.batch.image_sizes)) if pictures else value.cpu().numpy()
    shell.train(training)
    return found


def unexplained(arrays: Mapping[str, Array]) -> float | None:
    """Share of `view1`'s variance that `reconstruction` leaves, over the pictures' own pixels; none without one."""
    if "reconstruction" not in arrays:
        return None
    pictures, made = (torch.from_numpy(arrays[name]) for name in ("view1", "reconstruction"))
    height, width = pictures.shape[-2:]
    valid = reconstruction.valid_pixels(arrays["size1"].tolist(), height, width, pictures.device)
    return float(reconstruction.unexplained(pictures, made, valid))


def _pixels(detector: Detector, batch: ImageList) -> Array:
    """A batch as uint8 pictures again."""
    tensors = batch.tensors.float().cpu()
    deviation, mean = (torch.tensor(own)[:, None, None] for own in (detector.std, detector.mean))
    pictures = ((tensors * deviation + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    for picture, (height, width) in zip(pictures, batch.image_sizes, strict=True):
        picture[:, height:] = 0
        picture[:, :, width:] = 0
    return pictures.numpy()


def _padded(boxes: list[torch.Tensor]) -> Array:
    most = max(len(own) for own in boxes)
    result = np.full((len(boxes), most, 4), np.nan, dtype=np.float32)
    for row, own in zip(result, boxes, strict=True):
        row[: len(own)] = own.cpu().numpy()
    return result
