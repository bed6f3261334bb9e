"""What tailfin finds, in the forms of other libraries: supervision and FiftyOne.

    found = detector.predict("photo.jpg")[0]
    detections = to_supervision(found, detector.names)                 # supervision.Detections
    sample["tailfin"] = to_fiftyone(found, detector.names, (height, width))      # fiftyone.Detections

The libraries are imported where they are needed; neither is a dependency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tailfin.errors import UserError


def to_supervision(found: Mapping[str, Tensor], names: Sequence[str]) -> Any:
    """One picture of `Detector.predict` as `supervision.Detections`, with `class_name` in its data.

    Args:
        found: boxes [D, 4] (xyxy), scores [D], labels [D], perhaps masks bool [D, H, W].
        names: class names by label.
    """
    supervision = _imported("supervision")
    labels = found["labels"].numpy()
    masks = found["masks"].numpy() if "masks" in found else None
    return supervision.Detections(
        xyxy=found["boxes"].numpy().astype(np.float32).reshape(-1, 4),
        mask=masks if masks is not None and len(masks) else None,  # the library wants none rather than an empty one
        confidence=found["scores"].numpy().astype(np.float32),
        class_id=labels.astype(int),
        data={"class_name": np.array([names[label] for label in labels.tolist()], dtype=str)},
    )


def to_fiftyone(found: Mapping[str, Tensor], names: Sequence[str], size: tuple[int, int]) -> Any:
    """One picture of `Detector.predict` as `fiftyone.Detections`: boxes [x, y, width, height] in fractions of the
    picture of `size` (H, W); masks, where there are some, cut to their boxes."""
    fiftyone = _imported("fiftyone")
    height, width = size
    detections = []
    for row, (box, label) in enumerate(zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)):
        left, top, right, bottom = box
        own: dict[str, Any] = {
            "label": names[label],
            "confidence": float(found["scores"][row]),
            "bounding_box": [left / width, top / height, (right - left) / width, (bottom - top) / height],
        }
        if "masks" in found:
            x, y = int(np.floor(left)), int(np.floor(top))
            own["mask"] = found["masks"][row].numpy()[y : int(np.ceil(bottom)), x : int(np.ceil(right))]
        detections.append(fiftyone.Detection(**own))
    return fiftyone.Detections(detections=detections)


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"this needs {name}: pip install {name}") from None
