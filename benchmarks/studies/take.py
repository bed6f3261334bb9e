"""Cells of a script of benchmarks/evidence as stored numbers of a study: a line per cell, and paired differences.

    python benchmarks/studies/take.py OUT/cells.jsonl --set "Road12, 12 epochs" --name evidence-drcl \
        --pairs drcl:detection drcl:none

Intervals over seeds come from the cells' lines, those over pictures from the run folders OUT/ARM/seed-N beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tailfin.api import train_counts, validation_files
from tailfin.config import recipe_from_file
from tailfin.evaluation import paired_bootstrap
from tailfin.files import read_object
from tailfin.study.collect import difference
from tailfin.study.state import progress
from tailfin.study.tables import cells_csv, csv_text

RESULTS = Path(__file__).parent / "results"
METRICS = ("AP", "AP50", "APr", "APc", "APf")
HEAD = ["set", "arm", "control", "metric", "mean", "half_interval", "seeds", "low_pictures", "high_pictures"]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--set", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--pairs", nargs="*", default=[], metavar="ARM:CONTROL")
    given = parser.parse_args()
    folder, rows = given.cells.parent, []
    for text in given.cells.read_text(encoding="utf-8").splitlines():
        cell = json.loads(text)
        run = folder / cell["arm"] / f"seed-{cell['seed']}"
        steps, seconds = progress(run)
        numbers = {name: round(cell[name], 6) for name in METRICS}
        own = {"set": given.set, "arm": cell["arm"], "seed": cell["seed"], "control": "", **numbers}
        commit = read_object(run / "environment.json").get("commit", "")
        command = "tailfin " + " ".join(f"'{word}'" if "[" in word else word for word in cell["command"])
        cost = {"minutes": round(seconds / 60, 2), "steps": steps, "taken": " ".join(cell["reused"])}
        rows.append(
            {**own, **cost, "commit": commit, "tailfin": cell["tailfin"], "command": f"{command} data.root=DATA"}
        )
    lines = []
    for arm, control in (pair.split(":") for pair in given.pairs):
        seeds = [
            row["seed"]
            for row in rows
            if row["arm"] == arm and any(one["arm"] == control and one["seed"] == row["seed"] for one in rows)
        ]
        if not seeds:
            continue
        files = [[folder / name / f"seed-{seed}" / "results.bbox.json" for seed in seeds] for name in (control, arm)]
        first = files[0][0].parent
        how, annotations = recipe_from_file(first / "recipe.yaml").evaluation, validation_files(first)[0]
        counts = train_counts(first, annotations)
        options = {"max_dets": how.max_dets, "group_bounds": how.group_bounds, "train_counts": counts}
        drawn = paired_bootstrap(*files, annotations, protocol=how.protocol, **options)["metrics"]
        for metric in METRICS:
            found = difference(rows, given.set, arm, control, metric)
            half = None if found.half is None else round(found.half, 5)
            ends = [round(drawn[metric][end], 5) for end in ("low", "high")] if metric in drawn else [None, None]
            lines.append([given.set, arm, control, metric, round(found.mean, 5), half, found.seeds, *ends])
    (RESULTS / f"{given.name}.csv").write_text(cells_csv(rows), encoding="utf-8")
    (RESULTS / f"{given.name}.differences.csv").write_text(csv_text(HEAD, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
