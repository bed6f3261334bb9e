"""What a study writes about its cells: `study.md`, `study.csv`, `differences.csv`, and a page of the runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tailfin.errors import UserError
from tailfin.files import write_atomic
from tailfin.report.build import write_report
from tailfin.study.bootstrap import Intervals, PictureIntervals
from tailfin.study.cells import Cell, differing
from tailfin.study.collect import Row, csv_value, difference, rows_of, spread
from tailfin.study.spec import Study
from tailfin.study.state import FINISHED, Fate

COMPARED = ("AP", "APr")  # whose differences the table of arms has
IN_REPORT = 12  # runs side by side
OverPictures = Callable[[str, str, str], Intervals]  # of a set, an arm and its control


def write_tables(study: Study, cells: Sequence[Cell], fates: Mapping[str, Fate], out: Path) -> list[Path]:
    """Write all tables of what is finished, and the page; returns the files."""
    rows = rows_of(cells, fates, study.metrics)
    pictures = PictureIntervals(cells, fates, out)
    files = {
        "study.md": markdown(study, rows, pictures.of, differing(cells), unfinished=len(cells) - len(rows)),
        "study.csv": cells_csv(rows),
        "differences.csv": differences_csv(study, rows, pictures.of),
    }
    for name, text in files.items():
        write_atomic(out / name, text)
    written = [out / name for name in files]
    runs = report_runs(study, cells, fates)
    if runs:
        try:
            written.append(write_report(runs, out / "report.html", title=study.title or None))
        except UserError as error:
            print(f"no report: {error}")
    return written


def markdown(
    study: Study, rows: Sequence[Row], pictures: OverPictures, notes: Sequence[str] = (), unfinished: int = 0
) -> str:
    """One table per set, and what arms differ in beside their method."""
    lines = [f"# {study.title or 'Study'}", ""]
    if unfinished:
        lines += [f"{unfinished} of {unfinished + len(rows)} cells are not finished.", ""]
    for name in dict.fromkeys(row["set"] for row in rows):
        lines += [f"## {name}", "", *set_table(study.metrics, rows, name, pictures), ""]
    if notes:
        lines += ["Not equal to the control:", "", *(f"* {note}" for note in notes), ""]
    return "\n".join(lines)


def set_table(metrics: Sequence[str], rows: Sequence[Row], set_name: str, pictures: OverPictures) -> list[str]:
    """The lines of a set's table: means over seeds, AP's range, and differences over common seeds with 95 % intervals,
    first over seeds, then over pictures."""
    own = [row for row in rows if row["set"] == set_name]
    compared = [name for name in COMPARED if name in metrics]
    head = ["arm", "seeds", *metrics]
    head += [f"{metrics[0]} range", *(f"{name} - control" for name in compared), "control", "minutes", "steps"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for arm in dict.fromkeys(row["arm"] for row in own):
        mine = [row for row in own if row["arm"] == arm]
        control = mine[0]["control"]
        found = {name: spread(own, set_name, arm, name) for name in metrics}
        first = found[metrics[0]]
        span = f"{first[1]:.3f} to {first[2]:.3f}" if first is not None and first[3] > 1 else ""
        values = ["" if one is None else f"{one[0]:.3f}" for one in found.values()]
        drawn = pictures(set_name, arm, control) if arm != control else {}
        apart = [difference_text(own, set_name, arm, control, name, drawn.get(name)) for name in compared]
        minutes = f"{sum(row['minutes'] for row in mine) / len(mine):.1f}"
        steps = " or ".join(sorted({str(row["steps"]) for row in mine}))
        seeds = ", ".join(str(row["seed"]) for row in mine)
        shown = control if control != arm else ""
        lines.append(f"| {' | '.join([arm, seeds, *values, span, *apart, shown, minutes, steps])} |")
    return lines


def difference_text(
    rows: Sequence[Row], set_name: str, arm: str, control: str, metric: str, drawn: tuple[float, float] | None = None
) -> str:
    """A paired difference as text; bold where its interval over seeds, with one seed that over pictures, excludes
    zero."""
    found = difference(rows, set_name, arm, control, metric)
    if found is None:
        return ""
    text = f"{found.mean:+.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")
    text += f" [{drawn[0]:+.3f}, {drawn[1]:+.3f}]" if drawn is not None else ""
    beyond = found.sign != 0 if found.half is not None else drawn is not None and (drawn[0] > 0 or drawn[1] < 0)
    return f"**{text}**" if beyond else text


def cells_csv(rows: Sequence[Row]) -> str:
    """One line per cell."""
    return csv_text(list(rows[0]) if rows else ["set", "arm", "seed"], [list(row.values()) for row in rows])


def differences_csv(study: Study, rows: Sequence[Row], pictures: OverPictures) -> str:
    """One line per arm, set and metric: its difference to the control."""
    lines = []
    for set_name, arm, control in pairs(study, rows):
        drawn = pictures(set_name, arm, control)
        for metric in study.metrics:
            found = difference(rows, set_name, arm, control, metric)
            if found is not None:
                half = None if found.half is None else round(found.half, 5)
                low, high = drawn.get(metric, (None, None))
                ends = [None if end is None else round(end, 5) for end in (low, high)]
                lines.append([set_name, arm, control, metric, round(found.mean, 5), half, found.seeds, *ends])
    head = ["set", "arm", "control", "metric", "mean", "half_interval", "seeds", "low_pictures", "high_pictures"]
    return csv_text(head, lines)


def pairs(study: Study, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(set, arm, other arm) of all differences: to its control and to those that it is `against`."""
    found = [
        (row["set"], row["arm"], other)
        for row in rows
        for other in (row["control"], *study.arms[row["arm"]].against)
        if other != row["arm"]
    ]
    return list(dict.fromkeys(found))


def report_runs(study: Study, cells: Sequence[Cell], fates: Mapping[str, Fate]) -> list[Path]:
    """The runs of the page: of each arm the first finished seed, the control first, on the first set that has any."""
    for name in study.sets:
        finished = [cell for cell in cells if cell.set == name and fates[cell.name].state == FINISHED]
        first = {cell.arm: cell.folder for cell in reversed(finished)}
        order = sorted(first, key=lambda arm: (arm != study.control, list(study.arms).index(arm)))
        if order:
            return [first[arm] for arm in order[:IN_REPORT]]
    return []


def csv_text(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([csv_value(value) for value in line] for line in lines)
    return text.getvalue()
