"""BACL's parts from packaged ImageNet weights, each on the very same stage 1, beside their control and two baselines.

    python benchmarks/evidence/bacl.py --data DATA                                 # road12: 3 seeds x 10 arms
    python benchmarks/evidence/bacl.py --data DATA --set fod --epochs 8 --out OUT
    python benchmarks/evidence/bacl.py --data DATA --arms control all objectness --seeds 0 --epochs 12
    python benchmarks/evidence/bacl.py --data DATA --list                          # the commands alone

    control         stage 2 with the plain objectness loss: the same epochs of the classifier, none of BACL's parts
    margin, weight, margin_weight, hallucination, all           stage 2 with these of III-D and III-E
    control_rfs, all_rfs                                        the same two on a stage 1 with repeat factor sampling
    objectness      one stage of equal epochs with the first stage's loss, weight decay and copy-paste
    rfs             softmax and repeat factor sampling, for as many epochs

Half of the epochs are the first stage's. Differences are to `control`; see `cells.py` for resuming and intervals.
Copy-paste follows polygons, so only sets with masks have it (road12).
"""

from __future__ import annotations

import argparse
from typing import Any

import cells
from cells import SETS, Arm, schedule

PARTS: dict[str, dict[str, Any]] = {
    "control": {"second.loss.alpha": 0, "second.loss.reweight": False, "second.features": None},
    "margin": {"second.loss.reweight": False, "second.features": None},
    "weight": {"second.loss.alpha": 0, "second.features": None},
    "margin_weight": {"second.features": None},
    "hallucination": {"second.loss.alpha": 0, "second.loss.reweight": False},
    "all": {},
}


def arms(options: argparse.Namespace) -> list[Arm]:
    """All arms, those that others are compared to first."""
    base, threshold = SETS[options.set]
    half = options.epochs / 2
    both = {**schedule(half), **schedule(half, "second.")}
    rfs = {"sampler": f"{{name: rfs, threshold: {threshold}}}"}
    masks = options.set == "road12"
    objectness = {"loss": "objectness", "schedule.weight_decay": 5e-5, "data.copy_paste": masks}
    found = [Arm(name, f"{base}:bacl", {**both, **own}, "plain") for name, own in PARTS.items()]
    found += [Arm(f"{name}_rfs", f"{base}:bacl", {**both, **rfs, **PARTS[name]}, "rfs") for name in ("control", "all")]
    found.append(Arm("objectness", base, {**schedule(options.epochs), **objectness}))
    found.append(Arm("rfs", f"{base}:rfs", schedule(options.epochs)))
    order = ("control", "all", "objectness")
    return sorted(found, key=lambda arm: order.index(arm.name) if arm.name in order else len(order))


if __name__ == "__main__":
    given = cells.parser(__doc__, "evidence/bacl").parse_args()
    cells.run(arms(given), "control", given)
