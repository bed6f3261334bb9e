"""2DRCL's terms and other pre-trainings from packaged ImageNet weights, at equal epochs, each followed by RFS or BACL.

    python benchmarks/evidence/drcl.py --data DATA --epochs 12          # road12: localizer, proposals, arms x seeds
    python benchmarks/evidence/drcl.py --data DATA --epochs 12 --arms none detection drcl --seeds 0
    python benchmarks/evidence/drcl.py --data DATA --list                      # the commands alone

    none            no pre-training: RFS for all epochs
    detection       half of them in the pre-training's shell with the detection loss alone, then RFS
    hcl, lcl, ar, sr                            the same with one term beside the detection loss
    drcl            all terms of 2DRCL, SR at the recipe's weight of 0.1
    drcl_published  with SR at 0.9
    drcl_plain_heads                            all terms, no prediction network behind the projectors, as eq. 1 has it
    drcl_ar                                     all terms, AR at 10 in the place of 0.1
    drcl_tuned                                  both, and boxes from the 10 best proposals in the place of 100
    tuned_hcl, tuned_lcl, tuned_ar, tuned_ar_sr these settings with one term (SR needs the generator that AR trains)
    aligndet, moco_v2                           other pre-trainings for as long, then RFS
    detection_curve, drcl_curve, drcl_tuned_curve
                                                three of these with one curve of the learning rate over both stages
    none_bacl, detection_bacl, drcl_bacl        the same followed by BACL's two stages of half the remaining epochs each

All pre-trainings draw pictures by dynamic rebalancing, but for those whose preset has another sampler. Boxes come from
a class-agnostic localizer, trained once in OUT/localizer on the same pictures (`--localizer-epochs`), by the commands
that the recipes print. Differences are to `detection`, the arm that 2DRCL must beat; see `cells.py` for resuming and
intervals.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import cells
from cells import SETS, Arm, schedule

TERMS = ("hcl", "lcl", "ar", "sr")
# bf16 where the processor computes in it, twice as fast, for every arm
FAST = {"precision": "auto", "channels_last": True}


def arms(options: argparse.Namespace) -> list[Arm]:
    """All arms, those that others are compared to first."""
    base, _ = SETS[options.set]
    half, quarter = options.epochs / 2, options.epochs / 4
    fast = {f"schedule.{key}": value for key, value in FAST.items()}
    second = {f"second.{key}": value for key, value in fast.items()}
    before = {f"pretraining.{key}": value for key, value in fast.items()}
    shell = {
        **schedule(half),
        **schedule(half, "pretraining."),
        **fast,
        **before,
        "pretraining.views.sizes": [options.size],
    }

    def pretrained(name: str, only: tuple[str, ...] = TERMS, **more: Any) -> Arm:
        off = {f"pretraining.weights.{term}": 0 for term in TERMS if term not in only}
        return Arm(name, f"{base}:drcl", {**shell, **off, **more}, "", files)

    files = {"pretraining.proposals.file": options.out / "proposals.npz"}
    bacl = {**schedule(quarter), **schedule(quarter, "second."), **second}
    found = [
        Arm("none", f"{base}:rfs", {**schedule(options.epochs), **fast}),
        pretrained("detection", ()),
        pretrained("drcl"),
        *(pretrained(term, (term,)) for term in TERMS),
    ]
    found.append(pretrained("drcl_published", **{"pretraining.weights.sr": 0.9}))
    heads = {"pretraining.image.predictor": False, "pretraining.box.predictor": False}
    ar = {"pretraining.weights.ar": 10}
    found += [pretrained("drcl_plain_heads", **heads), pretrained("drcl_ar", **ar)]
    tuned = {**heads, **ar, "pretraining.proposals.top": 10}
    found.append(pretrained("drcl_tuned", **tuned))
    for terms in (("hcl",), ("lcl",), ("ar",), ("ar", "sr")):
        off = {} if "ar" in terms else {"pretraining.weights.ar": 0}
        found.append(pretrained(f"tuned_{'_'.join(terms)}", terms, **{**tuned, **off}))
    for preset in ("aligndet", "moco_v2"):
        own = {"pretraining.preset": preset, **shell}
        found.append(Arm(preset, f"{base}:drcl", own, "", files if preset == "aligndet" else {}))
    milestones = schedule(options.epochs)["schedule.milestones"]  # counted from the start of the pre-training
    curve = {"pretraining.one_curve": True, "schedule.milestones": milestones}
    found += [pretrained("detection_curve", (), **curve), pretrained("drcl_curve", **curve)]
    found.append(pretrained("drcl_tuned_curve", **tuned, **curve))
    both = {**schedule(half), **schedule(half, "second."), **fast, **second}
    found.append(Arm("none_bacl", f"{base}:bacl", both))
    for name, only in (("detection", ()), ("drcl", TERMS)):
        own = pretrained(f"{name}_bacl", only, **bacl)
        found.append(Arm(own.name, f"{base}:drcl_bacl", own.overrides, "", files))
    return found


def proposals(options: argparse.Namespace) -> None:
    """The localizer and its boxes, once."""
    out, model = options.out / "proposals.npz", options.out / "localizer"
    if out.is_file():
        return
    options.out.mkdir(parents=True, exist_ok=True)
    base, _ = SETS[options.set]
    epochs = [f"schedule.epochs={options.localizer_epochs}", f"data.sizes=[{options.size}]"]
    train = ["train", f"{base}:localizer", f"data.root={options.data}", *epochs, "--out", str(model)]
    write = ["data", "proposals", str(model), "--annotations", str(options.data / "train.json"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with (options.out / "localizer.log").open("a", encoding="utf-8") as log:
        if not (model / "model.safetensors").is_file():
            if (model / "recipe.yaml").is_file():
                train = ["train", "--resume", str(model)]
            cells.checked([sys.executable, "-m", "tailfin", *train], environment, log)
        cells.checked([sys.executable, "-m", "tailfin", *write, "--top", "300"], environment, log)


if __name__ == "__main__":
    parser = cells.parser(__doc__, "evidence/drcl")
    parser.add_argument("--localizer-epochs", type=float, default=8)
    given = parser.parse_args()
    given.out = Path(given.out).absolute()
    chosen = [arm for arm in arms(given) if not given.arms or arm.name in given.arms]
    if not given.list and any(arm.files for arm in chosen):
        proposals(given)
    cells.run(arms(given), "detection", given)
