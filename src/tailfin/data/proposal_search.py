"""Boxes around anything that stands out: selective search, by OpenCV where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tailfin.errors import UserError

Boxes = NDArray[np.float32]  # [N, 4] xyxy, pixels of the picture's file


EXTRA = "opencv-contrib-python-headless"


def selective_search(image: Tensor) -> Boxes:
    """Boxes of OpenCV's selective search (fast mode) on a picture uint8 [3, H, W], largest first, each once.

    About half a second for a small photo: write them once with `tailfin data proposals selective_search`.
    """
    cv2 = opencv()
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image.permute(1, 2, 0).numpy()[:, :, ::-1]))
    search.switchToSelectiveSearchFast()
    found = np.unique(np.asarray(search.process(), dtype=np.float32).reshape(-1, 4), axis=0)  # it ranks at random
    found = found[np.argsort(-found[:, 2] * found[:, 3], kind="stable")]
    found[:, 2:] += found[:, :2]
    return found


def opencv() -> Any:
    """OpenCV with its selective search, or how to get it."""
    try:
        cv2 = importlib.import_module("cv2")
        cv2.ximgproc.segmentation.createSelectiveSearchSegmentation  # noqa: B018
    except (ImportError, AttributeError):
        raise UserError(
            f"proposals by selective search need OpenCV with its contributed modules: pip install {EXTRA}; or take "
            "proposals.source=gt_jitter"
        ) from None
    return cv2
