"""Is the classifier balanced? Weight norms from frequent to rare classes, and the indicator of BACL's loss.

The norm of a class's weights goes with how often the class wins (BAGS, CVPR'20; BACL, TMM'23, figure 5): a plain
classifier's falls along the tail, a balanced one's is level. Weights and statistics are read from the model files,
tensor by tensor. Runs that differ in the indicator of `fcbl` are compared as in BACL's figure 4.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from tailfin.report.classifiers import Classifier, read_classifier
from tailfin.report.norms import balance, trend
from tailfin.report.page import Section, chart, color, count, defined, label, render
from tailfin.report.runs import Run
from tailfin.schema.recipe import Recipe

_CROWD = 30  # from so many classes on the curve is faint and its trend solid (2DRCL, figure A.2)
_METRICS = ("AP", "APr", "APc", "APf")


def classifier(runs: Sequence[Run]) -> Section | None:
    """Charts of the final classifiers; None where no run has a known one and none compares indicators."""
    found = [read_classifier(run.path / "model.safetensors") for run in runs]
    compared = _compared(runs)
    if compared is None and not any(found):
        return None
    return Section(
        "Classifier",
        render(
            "classifier.html",
            norms=_curves(runs, [(model, model.norms) if model else None for model in found], "norm of the weights"),
            rows=[
                {"name": run.name, "color": color(index), **_balance(model)}
                for index, (run, model) in enumerate(zip(runs, found, strict=True))
                if model
            ],
            indicator=_curves(
                runs,
                [(model, model.indicator) if model and model.indicator is not None else None for model in found],
                "indicator",
            ),
            indicators=[
                (run.name, _indicator_name(model.recipe))
                for run, model in zip(runs, found, strict=True)
                if model and model.indicator is not None
            ],
            weight=_weight(found),
            compared=compared,
            mixed=_mixed(runs),
        ),
    )


# ---- details ---------------------------------------------------------------------------------------------------------


def _weight(found: Sequence[Classifier | None]) -> Markup | None:
    """BACL's figure 3: which other classes of a row count in the loss, of the first run with `fcbl`."""
    for model in found:
        if model is None or model.indicator is None:
            continue
        stage = model.recipe.second.loss if model.recipe.second is not None else model.recipe.loss
        if not stage.options.get("reweight", True):
            continue
        threshold = float(stage.options.get("prob_thr", 0.7))
        steps = np.linspace(0, 1, 51)
        counts = (steps[:, None] >= steps[None]) | (steps[:, None] >= threshold)
        figure = go.Figure(
            go.Heatmap(
                x=steps,
                y=steps,
                z=counts.astype(np.int8),
                colorscale=[[0, "rgba(47,125,225,0.08)"], [1, "rgba(47,125,225,0.75)"]],
                showscale=False,
                hovertemplate="own class %{x:.2f}, other class %{y:.2f}: weight <b>%{z}</b><extra></extra>",
            )
        )
        figure.update_layout(
            xaxis={"title": "probability of the own class"}, yaxis={"title": "probability of another class"}
        )
        return chart(figure, height=300, note=f"Blue: weight 1, else 0; threshold {threshold:g}.")
    return None


def _curves(runs: Sequence[Run], values: list[tuple[Classifier, np.ndarray] | None], title: str) -> Markup | None:
    if not any(values):
        return None
    figure = go.Figure()
    for index, (run, found) in enumerate(zip(runs, values, strict=True)):
        if found is None:
            continue
        model, value = found
        order, tone, name = model.order, color(index), label(run.name)
        crowd = len(order) > _CROWD
        names = model.stats.names
        figure.add_scatter(
            x=np.arange(1, len(order) + 1),
            y=value[order],
            text=[f"<b>{label(names[i])}</b><br>{count(int(model.stats.instance_count[i]))} instances" for i in order],
            mode="lines" if crowd else "lines+markers",
            name=name,
            legendgroup=name,
            opacity=0.35 if crowd else 1,
            line={"color": tone, "width": 1 if crowd else 2},
            marker={"size": 6},
            hovertemplate="%{text}<br>" + title + " %{y:.3g}<extra>" + name + "</extra>",
        )
        if crowd:
            figure.add_scatter(
                x=np.arange(1, len(order) + 1),
                y=trend(value[order]),
                mode="lines",
                name=f"{name}, trend",
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
                line={"color": tone, "width": 2.5},
            )
    figure.update_layout(
        showlegend=len(runs) > 1,
        xaxis={"title": "classes, most training instances first", "showgrid": False},
        yaxis={"title": title, "rangemode": "tozero"},
    )
    return chart(figure, height=400)


def _balance(model: Classifier) -> dict[str, Any]:
    """Mean norm of each group, rare over frequent, and the rank correlation of norm and training instances."""
    group = np.array([str(letter) for letter in model.stats.frequency])
    means = {
        letter: float(model.norms[group == letter].mean()) if (group == letter).any() else None for letter in "rcf"
    }
    rare, frequent = means["r"], means["f"]
    return {
        "means": [None if mean is None else f"{mean:.3f}" for mean in means.values()],
        "ratio": f"{rare / frequent:.2f}" if rare is not None and frequent else None,
        "span": f"{span:.1f}" if np.isfinite(span := balance(model.norms)) else None,
        "correlation": _rank_correlation(model.norms, model.stats.instance_count),
    }


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> str | None:
    """Spearman's; ties share their mean rank."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(rank.std() == 0 for rank in ranks):
        return None
    return f"{np.corrcoef(ranks[0], ranks[1])[0, 1]:+.2f}".replace("-", "−")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, number = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(number) - (number - 1) / 2)[place]


# ---- runs that differ in the indicator -------------------------------------------------------------------------------


def _indicator_name(recipe: Recipe) -> str:
    """The long-term indicator of a recipe whose last stage has fcbl; empty for any other loss."""
    loss = recipe.second.loss if recipe.second is not None else recipe.loss
    if loss.name != "fcbl":
        return ""
    name = str(loss.options.get("indicator", "confusion"))
    return f"{name}, hard" if name == "confusion" and loss.options.get("matrix") == "hard" else name


def _by_indicator(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Measured runs with fcbl by their indicator."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.recipe is not None and (name := _indicator_name(run.recipe)) and _box_metrics(run):
            found.setdefault(name, []).append(run)
    return found


def _box_metrics(run: Run) -> dict[str, Any]:
    return (run.metrics or {}).get("bbox") or {}


def _compared(runs: Sequence[Run]) -> Markup | None:
    """AP by frequency group for each indicator, the mean where several runs (seeds) have the same one."""
    found = _by_indicator(runs)
    if len(found) < 2:
        return None
    figure = go.Figure()
    ticks = [f"{label(name)}<br>{len(own)} runs" if len(own) > 1 else label(name) for name, own in found.items()]
    titles = dict(zip(_METRICS, ("all", "rare", "common", "frequent"), strict=True))
    for number, (key, title) in enumerate(titles.items()):
        values = [[100 * ap for run in own if defined(ap := _box_metrics(run).get(key))] for own in found.values()]
        if not any(values):
            continue
        means = [float(np.mean(value)) if value else None for value in values]
        figure.add_bar(
            x=ticks,
            y=means,
            name=title,
            marker={"color": color(number), "cornerradius": 4},
            text=["" if mean is None else f"{mean:.1f}" for mean in means],
            textposition="outside",
            cliponaxis=False,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [max(value) - np.mean(value) if value else 0 for value in values],
                "arrayminus": [np.mean(value) - min(value) if value else 0 for value in values],
                "visible": any(len(value) > 1 for value in values),
            },
            hovertemplate="%{x}<br><b>%{y:.2f}</b><extra>" + title + "</extra>",
        )
    figure.update_layout(
        meta={"lies": True},  # on a narrow page
        barmode="group",
        bargap=0.3,
        yaxis={"title": "AP (%)", "rangemode": "tozero"},
        xaxis={"type": "category", "tickangle": 0, "showgrid": False},
    )
    return chart(figure, height=380)


def _mixed(runs: Sequence[Run]) -> bool:
    """Whether the runs compared by indicator differ in more than that (and the seed)."""
    return len({_rest(run) for own in _by_indicator(runs).values() for run in own}) > 1


def _rest(run: Run) -> str:
    assert run.recipe is not None
    values = run.recipe.model_dump(mode="json", exclude={"name", "about", "seed", "logging"})
    loss = values["second"]["loss"] if values["second"] else values["loss"]
    for key in ("indicator", "matrix"):
        loss.pop(key, None)
    return json.dumps(values, sort_keys=True)
