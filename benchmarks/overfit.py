"""Does every detector learn sixteen photographs by heart? AP50 of boxes, and of masks where there are any, above 0.9.

    python benchmarks/overfit.py --data road12-masks-lt
    python benchmarks/overfit.py --data road12-masks-lt --detectors retinanet --epochs 300

The recipes are road12's from packaged ImageNet weights, all layers of the backbone that they train included; the dense
ones have the same start. The sixteen pictures are those with most classes among the set's, taken one by one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tailfin

START = ["weights=packaged", "backbone=timm/tf_efficientnet_lite0", "detector.norm=frozen_bn", "data.sizes=[128]"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "faster_rcnn": ("road12/packaged", []),
    "mask_rcnn": ("road12/mask_rcnn_lite0", []),
    "cascade_mask_rcnn": ("road12/cascade_mask_rcnn_lite0", []),
    "retinanet": ("road12/retinanet_r18", [*START, "detector.frozen_layers=2", "detector.anchor_scale=2"]),
    "atss": ("road12/atss_r18", [*START, "detector.frozen_layers=2", "detector.anchor_scales=[2.7]"]),
}
COUNT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of road12-masks-lt")
    parser.add_argument("--detectors", nargs="*", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=200, help="passes over the sixteen pictures, 2 steps of 8 each")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "sixteen.json"
        chosen.write_text(json.dumps(sixteen(json.loads((options.data / "train.json").read_text()))))
        for name in options.detectors:
            begin = time.process_time()
            metrics = overfit(name, chosen, options, Path(folder) / name)
            found = {kind: f"{metrics[kind]['AP50']:.3f}" for kind in ("bbox", "segm") if kind in metrics}
            print(name, "AP50", found, f"{time.process_time() - begin:.0f} CPU seconds", flush=True)
            assert all(float(value) > 0.9 for value in found.values()), found


def overfit(name: str, file: Path, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Metrics of a detector on the pictures that it was trained on."""
    recipe, changes = RECIPES[name]
    late = round(0.8 * options.epochs)
    overrides = [
        *changes,
        *(f"schedule.epochs={options.epochs}", f"schedule.milestones=[{late}]", "schedule.batch=8"),
        *("schedule.warmup=20", "data.workers=0", "evaluation.batch=8", "evaluation.protocol=coco", "logging.every=20"),
    ]
    images = options.data / "train"
    run = tailfin.train(
        recipe, train=file, val=file, train_images=images, val_images=images, out=out, overrides=overrides
    )
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def sixteen(document: dict[str, Any]) -> dict[str, Any]:
    """The file with sixteen of its pictures: always that one next which has most objects of the classes seen least."""
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    seen: dict[int, int] = {}
    kept: list[int] = []
    while len(kept) < COUNT:
        left = [image for image in by_image if image not in kept and by_image[image]]
        best = max(left, key=lambda image: sum(1 / (1 + seen.get(a["category_id"], 0)) ** 2 for a in by_image[image]))
        kept.append(best)
        for annotation in by_image[best]:
            seen[annotation["category_id"]] = seen.get(annotation["category_id"], 0) + 1
    return {
        **document,
        "images": [image for image in document["images"] if image["id"] in kept],
        "annotations": [annotation for image in kept for annotation in by_image[image]],
    }


if __name__ == "__main__":
    main()
