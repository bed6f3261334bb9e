"""Differences of arms over pictures: a paired bootstrap of the finished cells' detections, the mean of their seeds.

    found = PictureIntervals(cells, fates, out)
    found.of("road12", "rfs", "softmax")      # {"AP": (low, high), ...}, 95 %, over the seeds of both

Each pair is worked out once; OUT/pictures.json keeps the intervals for as long as the detections stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tailfin.api import train_counts, validation_files
from tailfin.evaluation import paired_bootstrap
from tailfin.files import read_object, write_json
from tailfin.study.cells import Cell
from tailfin.study.state import FINISHED, Fate

RESULTS = "results.bbox.json"
Intervals = dict[str, tuple[float, float]]


class PictureIntervals:
    """Intervals of pairs of arms, by name of the metric."""

    def __init__(self, cells: Sequence[Cell], fates: Mapping[str, Fate], out: Path, draws: int = 1000) -> None:
        self.finished = [cell for cell in cells if fates[cell.name].state == FINISHED]
        self.path, self.draws = out / "pictures.json", draws
        self.known = read_object(self.path) if self.path.is_file() else {}

    def of(self, set_name: str, arm: str, control: str) -> Intervals:
        """The intervals of arm - control; empty where the two have no seed in common."""
        pairs = self._pairs(set_name, arm, control)
        if not pairs:
            return {}
        stamps = [(cell.folder / RESULTS).stat().st_mtime_ns for pair in pairs for cell in pair]
        key = f"{set_name}/{arm}/{control}"
        if self.known.get(key, {}).get("stamps") != stamps:
            self.known[key] = {"stamps": stamps, "intervals": self._drawn(pairs)}
            write_json(self.path, self.known)
        return {name: (low, high) for name, (low, high) in self.known[key]["intervals"].items()}

    def _pairs(self, set_name: str, arm: str, control: str) -> list[tuple[Cell, Cell]]:
        """(cell of the control, cell of the arm) by seed."""
        own = {cell.seed: cell for cell in self.finished if (cell.set, cell.arm) == (set_name, arm)}
        other = {cell.seed: cell for cell in self.finished if (cell.set, cell.arm) == (set_name, control)}
        return [(other[seed], own[seed]) for seed in sorted(own.keys() & other.keys())]

    def _drawn(self, pairs: Sequence[tuple[Cell, Cell]]) -> dict[str, list[float]]:
        first = pairs[0][0]
        how = first.recipe.evaluation
        annotations, _ = validation_files(first.folder)
        found = paired_bootstrap(
            [control.folder / RESULTS for control, _ in pairs],
            [arm.folder / RESULTS for _, arm in pairs],
            annotations,
            protocol=how.protocol,
            max_dets=how.max_dets if how.protocol == "lvis" else None,
            draws=self.draws,
            group_bounds=how.group_bounds,
            train_counts=train_counts(first.folder, annotations),
        )["metrics"]
        return {name: [row["low"], row["high"]] for name, row in found.items()}
