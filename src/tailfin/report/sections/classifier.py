"""Is the classifier balanced? Weight norms from frequent to rare classes, and the indicator of BACL's loss.

The norm of a class's weights goes with how often the class wins (BAGS, CVPR'20; BACL, TMM'23, figure 5): a plain
classifier's falls along the tail, a balanced one's is level. Weights and statistics are read from the model files,
tensor by tensor. Runs that differ in the indicator of `fcbl` are compared as in BACL's figure 4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import safetensors
import torch
from markupsafe import Markup

from tailfin import losses
from tailfin.config import parse_yaml, stored_recipe
from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.fcbl import FCBL
from tailfin.report.norms import balance, class_norms, trend
from tailfin.report.page import Section, chart, color, count, defined, label, render
from tailfin.report.runs import Run
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

_WEIGHT = re.compile(r"(?:.*\.)?(?:cls_score|class_embed(?:\.\d+)?)\.weight$")
_CROWD = 30  # from so many classes on the curve is faint and its trend solid (2DRCL, figure A.2)
_METRICS = ("AP", "APr", "APc", "APf")


def classifier(runs: Sequence[Run]) -> Section | None:
    """Charts of the final classifiers; None where no run has a known one and none compares indicators."""
    found = [_read(run) for run in runs]
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
            compared=compared,
            mixed=_mixed(runs),
        ),
    )


# ---- details ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What a model file says about its classifier; classes in label order."""

    recipe: Recipe
    stats: ClassStats
    norms: np.ndarray  # float64 [C] length of each class's weights
    indicator: np.ndarray | None  # float64 [C] of a run with fcbl, 0..1

    @property
    def order(self) -> np.ndarray:
        """Classes by training instances, the most frequent first."""
        return np.argsort(-self.stats.instance_count, kind="stable")


def _read(run: Run) -> _Model | None:
    path = run.path / "model.safetensors"
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            recipe = stored_recipe(parse_yaml(metadata["recipe"], str(path)), str(path))
            stats = ClassStats.from_dict(json.loads(metadata["categories"]))
            names = list(file.keys())
            weights = sorted((name for name in names if _WEIGHT.fullmatch(name)), key=_natural)
            layers = getattr(recipe.detector, "decoder_layers", 0)  # of a DETR; the encoder's head comes after theirs
            weights = [name for name in weights if name.endswith(f"class_embed.{layers - 1}.weight")] or weights
            if not weights:
                return None
            loss = losses.build(recipe.loss.name, stats, **recipe.loss.options)
            weight = file.get_tensor(weights[-1])  # of several heads the last one
            if weight.ndim != 2 or len(weight) != loss.num_logits:
                return None
            norms = class_norms(weight.double().numpy(), _columns(loss).numpy())
            state = {name.rpartition(".loss.")[2]: name for name in names if ".loss." in name}
            indicator = None
            if isinstance(loss, FCBL) and set(loss.state_dict()) <= state.keys():
                loss.load_state_dict({key: file.get_tensor(state[key]) for key in loss.state_dict()})
                indicator = loss.indicator_diagonal().double().numpy()
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OSError, *_OTHERS):
        return None  # of another version or damaged: the rest of the report is worth reading
    return _Model(recipe, stats, norms, indicator)


_OTHERS = (safetensors.SafetensorError, UserError)


def _columns(loss: ClassificationLoss) -> torch.Tensor:
    """The logits of the foreground classes: the first ones, unless the loss has an order of its own (BAGS)."""
    column = getattr(loss, "column", None)
    return torch.arange(loss.num_classes) if column is None else column


def _natural(name: str) -> list[int | str]:
    """`head.10` after `head.9`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _curves(runs: Sequence[Run], values: list[tuple[_Model, np.ndarray] | None], title: str) -> Markup | None:
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


def _balance(model: _Model) -> dict[str, Any]:
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
