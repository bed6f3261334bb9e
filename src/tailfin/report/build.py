"""The report: run directories in, one self-contained HTML file out.

write_report(["runs/baseline", "runs/bacl"])  # -> runs/report.html
"""

from __future__ import annotations

import base64
import functools
import gzip
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tailfin.errors import UserError, nearest
from tailfin.files import write_atomic, write_json
from tailfin.report.page import asset, render, run_marks
from tailfin.report.runs import Run, check_run, read_runs
from tailfin.report.sections import SECTIONS
from tailfin.report.sections.labels import labels_document
from tailfin.version import __version__

METHODS: dict[str, Literal["mean", "gradcam"]] = {"mean": "mean", "gradcam": "gradcam"}  # of activation maps


def write_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    title: str | None = None,
    activations: str | None = None,
) -> Path:
    """Write one HTML file about one or several run directories, the first being the reference.

    Args:
        runs: run directories; unfinished ones are fine.
        out: the file; by default `RUN/report.html` for one run and `report.html` in the closest folder that holds
            all runs for several.
        title: heading of the page; by default made of the names of the runs.
        activations: "mean" or "gradcam": the runs' models look at some pictures, which takes a while.

    Returns:
        The path of the file.

    Raises:
        UserError: a path is not a run directory, a finished file in it is corrupt, or `out` cannot be written.
    """
    paths = [check_run(run) for run in runs]
    target = Path(out).expanduser() if out is not None else default_path(paths)
    if target.is_dir():
        raise UserError(f"{target} is a folder: --out needs a file name, for example {target / 'report.html'}")
    page = build_report(paths, title=title, activations=activations)
    write_atomic(target, page)
    return target


def build_report(
    runs: Sequence[str | Path],
    *,
    title: str | None = None,
    live: bool = False,
    activations: str | None = None,
) -> str:
    """The page as text. `live` leaves Plotly's script to the server and lets the page reload itself."""
    if activations is not None and activations not in METHODS:
        raise UserError(f'--activations "{activations}" does not exist{nearest(activations, METHODS)}')
    if not runs:
        raise UserError("no run directory given: tailfin report RUN...")
    found = read_runs(runs)
    sections = [section for make in SECTIONS if (section := make(found)) is not None]
    if activations is not None:
        from tailfin.report.sections.activations import activations as looked_at  # the detectors load slowly

        sections.insert(-1, looked_at(found, METHODS[activations]))
    return render(
        "report.html",
        title=title or _title(found),
        sections=sections,
        runs=run_marks(found),
        style=asset("report.css"),
        script=asset("report.js"),
        plotly="" if live else packed_plotly(),
        live=live,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def write_labels(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the labels worth a look of runs on one file as a COCO document; see `tailfin.evaluation.doubts`."""
    target = Path(out).expanduser()
    write_json(target, labels_document(read_runs([check_run(run) for run in runs])))
    return target


def default_path(paths: Sequence[Path]) -> Path:
    """`RUN/report.html` for one run; for several, `report.html` in the closest folder that holds them all."""
    if not paths:
        raise UserError("no run directory given: tailfin report RUN...")
    try:
        return Path(os.path.commonpath(paths)) / "report.html"
    except ValueError:
        raise UserError("the runs are on different drives: say where the report goes with --out FILE") from None


@functools.cache
def plotly_script() -> Markup:
    """Plotly's JavaScript, ready to stand in a script element."""
    return Markup(get_plotlyjs().replace("</script", "<\\/script"))


@functools.cache
def packed_plotly() -> Markup:
    """The same, gzipped, as base64: the page's script unpacks it, which saves two thirds of its size."""
    return Markup(base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode())


# ---- details ---------------------------------------------------------------------------------------------------------


def _title(runs: Sequence[Run]) -> str:
    if len(runs) <= 3:
        return " vs ".join(run.name for run in runs)
    return f"{runs[0].name} and {len(runs) - 1} other runs"
