"""How training went: the loss and its parts, the learning rate, and AP over time where it was measured on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

from tailfin.report.page import Section, chart, color, defined, group_name, label, render
from tailfin.report.runs import Run

_POINTS = 1500  # per curve; longer ones are averaged in bins
_DASHES = {"AP": "solid", "APr": "dot", "APc": "dashdot", "APf": "dash"}


def curves(runs: Sequence[Run]) -> Section | None:
    """Charts over the iterations of all stages in a row; None where nothing was logged."""
    logs = [_log(run) for run in runs]
    if not any(len(log.iteration) or log.evaluations for log in logs):
        return None
    charts = [
        ("Loss", _total(runs, logs)),
        ("Parts of the loss", _grid(runs, logs, _parts(logs), smooth=True, log_switch="log scale")),
        ("Contrast and the terms' gradients", _grid(runs, logs, _diagnostics(logs), smooth=True, log_switch="")),
        ("Learning rate and speed", _grid(runs, logs, _machine(logs), smooth=False, log_switch="")),
        ("AP while training", _measured(runs, logs)),
    ]
    notes = [
        f"{run.name}: {log.broken} unreadable lines were left out."
        for run, log in zip(runs, logs, strict=True)
        if log.broken
    ]
    if not any(log.evaluations for log in logs):
        notes.append(
            "AP was not measured while training (evaluation.every is 0): the numbers above are those of the end."
        )
    return Section("Training", render("curves.html", charts=[item for item in charts if item[1]], notes=notes))


# ---- details ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Log:
    """The lines of all stages of a run, on one axis of iterations."""

    iteration: np.ndarray  # float64 [lines]
    columns: dict[str, np.ndarray]  # float64 [lines]; NaN where a stage does not log it
    parts: list[str]
    starts: list[tuple[float, str]]  # where each stage but the first begins
    evaluations: list[tuple[float, dict[str, float]]]
    broken: int


def _log(run: Run) -> _Log:
    """Stages count their iterations from 0; each is moved behind the one before it."""
    offset = 0.0
    iterations: list[np.ndarray] = []
    starts: list[tuple[float, str]] = []
    evaluations: list[tuple[float, dict[str, float]]] = []
    for number, stage in enumerate(run.stages):
        own = stage.training.get("iteration", np.empty(0))
        if number and (len(own) or stage.evaluations):
            starts.append((offset, stage.name))
        iterations.append(own + offset)
        for line in stage.evaluations:
            values = line["eval"].get("bbox") or line["eval"].get("segm") or {}
            evaluations.append((line["iteration"] + offset, values))
        ends = [float(own[-1])] if len(own) else []
        offset += max(ends + [float(line["iteration"]) for line in stage.evaluations], default=0.0)
    names = dict.fromkeys(name for stage in run.stages for name in stage.training)
    columns = {
        name: np.concatenate(
            [
                stage.training.get(name, np.full(len(own), np.nan))
                for stage, own in zip(run.stages, iterations, strict=True)
            ]
        )
        for name in names
    }
    parts = list(dict.fromkeys(name for stage in run.stages for name in stage.parts))
    joined = np.concatenate(iterations) if iterations else np.empty(0)
    return _Log(joined, columns, parts, starts, evaluations, sum(stage.broken_lines for stage in run.stages))


def _total(runs: Sequence[Run], logs: Sequence[_Log]) -> Markup | None:
    """The loss of every run: the lines as logged, faint, and their running mean."""
    figure = go.Figure()
    for index, x, y, mean in _series(logs, "loss"):
        name, tone = label(runs[index].name), color(index)
        shared = {"legendgroup": name, "mode": "lines", "name": name}
        figure.add_scatter(
            **_thin(x, y), **shared, line={"color": tone, "width": 1}, opacity=0.4, hoverinfo="skip", showlegend=False
        )
        figure.add_scatter(
            **_thin(x, mean),
            **shared,
            line={"color": tone, "width": 2.2},
            hovertemplate="%{y:.4f}",
            showlegend=True,
        )
        for start, stage in logs[index].starts:
            figure.add_vline(
                x=start, line={"color": tone, "width": 1, "dash": "dot"}, annotation={"text": label(stage)}
            )
    if not figure.data:
        return None
    figure.update_layout(
        hovermode="x unified", showlegend=len(runs) > 1, xaxis={"title": "iteration"}, yaxis={"title": "loss"}
    )
    return chart(figure, height=380, log_switch="log scale", note="Running mean; the logged values are faint.")


def _grid(
    runs: Sequence[Run], logs: Sequence[_Log], names: Sequence[tuple[str, str]], *, smooth: bool, log_switch: str
) -> Markup | None:
    """Small charts side by side, one per (column, title)."""
    if not names:
        return None
    across = len(names) if len(names) <= 4 else 3 if len(names) % 3 == 0 else 4
    down = -(-len(names) // across)
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=[label(title) for _, title in names],
        horizontal_spacing=0.07,
        vertical_spacing=0.28 / down,
    )
    named: set[int] = set()
    for position, (name, _) in enumerate(names):
        for index, x, y, mean in _series(logs, name):
            figure.add_scatter(
                **_thin(x, mean if smooth else y),
                mode="lines",
                line={"color": color(index), "width": 1.8},
                name=label(runs[index].name),
                legendgroup=str(index),
                showlegend=index not in named,
                hovertemplate="%{y:.4g}",
                row=position // across + 1,
                col=position % across + 1,
            )
            named.add(index)
    figure.update_layout(hovermode="x unified", showlegend=len(runs) > 1, legend={"y": 1 + 0.2 / down})
    return chart(figure, height=110 + 180 * down, log_switch=log_switch)


def _measured(runs: Sequence[Run], logs: Sequence[_Log]) -> Markup | None:
    """AP and AP by group at each evaluation on the way."""
    figure = go.Figure()
    for index, log in enumerate(logs):
        for key, dash in _DASHES.items():
            points = [(at, 100 * values[key]) for at, values in log.evaluations if defined(values.get(key))]
            if not points:
                continue
            title = key if key == "AP" else f"{key} ({group_name(key[2:])})"
            figure.add_scatter(
                x=[at for at, _ in points],
                y=[value for _, value in points],
                mode="lines+markers",
                line={"color": color(index), "dash": dash, "width": 2.4 if key == "AP" else 1.5},
                marker={"size": 7 if key == "AP" else 5},
                name=f"{label(runs[index].name)} {title}" if len(runs) > 1 else title,
                hovertemplate="%{y:.2f}",
            )
    if not figure.data:
        return None
    figure.update_layout(
        hovermode="x unified",
        showlegend=True,
        xaxis={"title": "iteration"},
        yaxis={"title": "AP (%)", "rangemode": "tozero"},
    )
    return chart(figure, height=380)


def _parts(logs: Sequence[_Log]) -> list[tuple[str, str]]:
    return [(name, name) for name in dict.fromkeys(name for log in logs for name in log.parts)]


def _machine(logs: Sequence[_Log]) -> list[tuple[str, str]]:
    titles = {
        "lr": "learning rate",
        "grad_norm": "norm of the gradient",
        "images_per_second": "images per second",
        "memory_gib": "memory (GiB)",
    }
    return [(name, title) for name, title in titles.items() if any(name in log.columns for log in logs)]


def _diagnostics(logs: Sequence[_Log]) -> list[tuple[str, str]]:
    """What a pre-training says of its terms (`tailfin.pretraining.shell.PreTrainer.diagnostics`)."""
    titles = {
        "accuracy_": "own key nearest",
        "spread_": "spread of embeddings",
        "unexplained_": "variance not reconstructed",
        "gradient_": "gradient over detection's",
    }
    names = dict.fromkeys(name for log in logs for name in log.columns)
    return [
        (name, f"{name.removeprefix(kind)}: {title}")
        for kind, title in titles.items()
        for name in names
        if name.startswith(kind)
    ]


def _series(logs: Sequence[_Log], name: str) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(run index, iterations, values, running mean) of the runs with the column; lines without a value are left out."""
    for index, log in enumerate(logs):
        if name not in log.columns:
            continue
        known = np.isfinite(log.columns[name])
        if known.any():
            x, y = log.iteration[known], log.columns[name][known]
            borders = np.searchsorted(x, [start for start, _ in log.starts], side="right")
            yield index, x, y, np.concatenate([_running_mean(part) for part in np.split(y, borders)])


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over 3 % of the curve; the window shrinks at both ends."""
    half = min(len(values) // 60, 200)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _thin(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """At most `_POINTS` points, each the mean of a bin of neighbours."""
    if len(x) > _POINTS:
        edges = np.linspace(0, len(x), _POINTS + 1).astype(np.int64)
        sizes = np.diff(edges)
        x, y = (np.add.reduceat(values, edges[:-1]) / sizes for values in (x, y))
    return {"x": x, "y": y.astype(np.float32)}
