"""Random finished cells of a study, trained again from nothing: are their weights and detections equal bit for bit?

    python benchmarks/studies/again.py OUT --cells 2 --seed 0 --into AGAIN

A cell that took stages from another one trains them itself here. A killed run goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from tailfin.checkpoint import content_hash
from tailfin.files import read_object
from tailfin.study.cells import make_cells
from tailfin.study.loop import run_cells
from tailfin.study.spec import open_study
from tailfin.study.state import FINISHED, fate


def main() -> bool:
    """Whether all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of a study")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--arms", help="choose among these, by commas")
    given = parser.parse_args()
    study, out = open_study(given.out)
    arms = given.arms.split(",") if given.arms else ()
    finished = [one for one in make_cells(study, out, arms=arms) if fate(one).state == FINISHED and not one.calibrate]
    rng = np.random.default_rng(given.seed)
    chosen = [finished[k] for k in sorted(rng.choice(len(finished), min(given.cells, len(finished)), replace=False))]
    equal = True
    for cell in chosen:
        into = given.into.absolute() / cell.set / cell.arm / str(cell.seed)  # apart: no stage is shared
        again = make_cells(study, into, arms=[cell.arm], seeds=[cell.seed], sets=[cell.set])
        ended = run_cells(study, again, into)
        if any(own.state != FINISHED for own in ended.values()):
            print(f"{cell.name}: not finished")
            return False
        weights = [content_hash(one.folder / "model.safetensors") for one in (cell, again[0])]
        detections = [(one.folder / "results.bbox.json").read_bytes() for one in (cell, again[0])]
        numbers = [read_object(one.folder / "metrics.json")["bbox"] for one in (cell, again[0])]
        same = weights[0] == weights[1] and detections[0] == detections[1] and numbers[0] == numbers[1]
        print(f"{cell.name}: AP {numbers[0]['AP']:.6f} and {numbers[1]['AP']:.6f}, {'equal' if same else 'NOT EQUAL'}")
        equal &= same
    return equal


if __name__ == "__main__":
    sys.exit(not main())
