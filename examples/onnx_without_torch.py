"""A detector that `tailfin export RUN --out model.onnx` wrote, on a photo, with onnxruntime, Pillow and numpy alone.

python examples/onnx_without_torch.py model.onnx photo.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def detect(model: str, photo: str) -> list[tuple[str, float, list[float]]]:
    """(class, score, box xyxy in pixels of the photo) of every detection, best first."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["tailfin"])
    picture = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    sides = np.array(picture.size)  # width, height
    scale = min(facts["short_side"] / sides.min(), facts["long_side"] / sides.max())
    small = np.asarray(picture.resize([round(side * scale) for side in sides], Image.Resampling.BILINEAR))
    images = np.ascontiguousarray(small.transpose(2, 0, 1)[None])
    sizes = np.array([small.shape[:2]])
    boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"images": images, "sizes": sizes})
    boxes = boxes[0] * np.tile(sides / small.shape[1::-1], 2)
    return [
        (facts["names"][label], float(score), box.tolist())
        for box, score, label in zip(boxes, scores[0], labels[0], strict=True)
        if label >= 0  # places that no detection fills have the label -1
    ]


if __name__ == "__main__":
    for name, score, box in detect(*sys.argv[1:3]):
        print(f"{name} {score:.3f} {[round(side, 1) for side in box]}")
