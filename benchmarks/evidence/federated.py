"""Partial labels: half of the pictures were checked for some classes only, and lose the annotations of the others.

    python benchmarks/evidence/federated.py --data DATA                      # road12: 3 seeds x 5 arms
    python benchmarks/evidence/federated.py --data DATA --set fod --epochs 5 --seeds 0

    whole      sigmoid on all annotations: what partial labels cost
    plain      sigmoid on the cut; a class that nobody looked for is a negative
    fedloss    federated loss on the cut, half of the classes a picture
    mask       sigmoid; classes that nobody looked for have no part in a picture's loss (`unchecked_classes: ignore`)
    both       federated loss with that mask

The cut is made once, from seed 0: in every second picture each class is checked with a chance of one half; checked and
absent classes are listed in `neg_category_ids`. Differences are to `plain`; see `cells.py` for resuming and intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cells
import numpy as np
from cells import SETS, Arm, schedule


def cut(source: Path, out: Path) -> Path:
    """Write the federated cut of an annotation file."""
    document = json.loads(source.read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)
    ids = np.array([category["id"] for category in document["categories"]])
    shown: dict[int, set[int]] = {}
    for annotation in document["annotations"]:
        shown.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
    hidden: set[tuple[int, int]] = set()
    for number, image in enumerate(document["images"]):
        checked = set(ids[rng.random(len(ids)) < (0.5 if number % 2 else 2.0)].tolist())
        own = shown.get(image["id"], set())
        image["neg_category_ids"] = sorted(checked - own)
        hidden |= {(image["id"], category) for category in own - checked}
    kept = [a for a in document["annotations"] if (a["image_id"], a["category_id"]) not in hidden]
    print(f"{out}: {len(kept)} of {len(document['annotations'])} annotations kept")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**document, "annotations": kept}), encoding="utf-8")
    return out


def arms(options: argparse.Namespace) -> list[Arm]:
    """All arms; every picture trains, with annotations or without."""
    base, _ = SETS[options.set]
    places = {"road12": 6, "fod": 15}[options.set]
    files = {
        "data.train.annotations": cut(options.data / "train.json", options.out.absolute() / "federated.json"),
        "data.train.images": options.data.absolute() / "train",
    }
    both: dict[str, Any] = {**schedule(options.epochs), "data.keep_empty": True}
    sigmoid, fedloss = {"loss": "sigmoid"}, {"loss": f"{{name: fedloss, num_classes: {places}}}"}
    ignore = {"data.unchecked_classes": "ignore"}
    return [
        Arm("plain", base, {**both, **sigmoid}, files=files),
        Arm("mask", base, {**both, **sigmoid, **ignore}, files=files),
        Arm("fedloss", base, {**both, **fedloss}, files=files),
        Arm("both", base, {**both, **fedloss, **ignore}, files=files),
        Arm("whole", base, {**both, **sigmoid}),
    ]


if __name__ == "__main__":
    given = cells.parser(__doc__, "evidence/federated").parse_args()
    cells.run(arms(given), "plain", given)
