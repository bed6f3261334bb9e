"""What the sampler really fed: instances of every class in each epoch, against those of the training file.

The order of the pictures is a pure function of recipe and epoch (`tailfin.samplers.plan`): it is worked out again, not
logged. Objects that augmentation cuts away or pastes are not counted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from numpy.typing import NDArray
from scipy import sparse

from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.errors import UserError
from tailfin.report.page import Section, chart, color, count, group_name, label, percent, render
from tailfin.report.runs import Run
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import stages
from tailfin.stats import GROUPS, ClassStats

_EPOCHS = 40  # of a stage, spread evenly, where it has more


@dataclass(frozen=True)
class _Fed:
    """Of one stage."""

    stage: str
    epochs: NDArray[np.int64]  # [E]
    instances: NDArray[np.int64]  # [E, C]
    pictures: NDArray[np.int64]  # [E]


def fed(runs: Sequence[Run]) -> Section | None:
    """Instances per class, and their growth by group over the epochs; None where no training file is there."""
    found = []
    for number, run in enumerate(runs):
        if run.recipe is None or not run.stages:
            continue
        try:
            found.append((number, *_of(run)))
        except (UserError, OSError, ValueError):
            continue  # the file is gone or another one by now: the log says what was trained on
    found = [own for own in found if own[2]]
    if not found:
        return None
    return Section(
        "What the sampler fed",
        render(
            "fed.html",
            classes=_classes(runs, found),
            growth=_growth(runs, found),
            rows=[row for own in found for row in _rows(runs, *own)],
            groups=[group_name(group) for group in GROUPS],
        ),
    )


# ---- details ---------------------------------------------------------------------------------------------------------

_Found = Sequence[tuple[int, ClassStats, list[_Fed]]]


def _of(run: Run) -> tuple[ClassStats, list[_Fed]]:
    assert run.recipe is not None
    data = run.recipe.data
    if not data.train.annotations:
        raise UserError("the recipe names no training file")
    file = Path(data.root) / data.train.annotations
    return _worked_out((str(file), file.stat().st_mtime_ns), run.recipe.model_dump_json(), len(run.stages))


@functools.lru_cache(maxsize=16)
def _worked_out(file: tuple[str, int], text: str, trained: int) -> tuple[ClassStats, list[_Fed]]:
    recipe = Recipe.model_validate_json(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # training has said it
        source = open_source(recipe.data.train, recipe.data.root, "train")
    stats = ClassStats.from_index(source.index, recipe.evaluation.group_bounds)
    own = []
    for stage in [stage for stage in stages(recipe) if stage.number][:trained]:
        settings = stage.recipe
        if recipe.method == "stepwise" and stage.number > 1 or stage.name == "pretrain":
            continue  # these have samples of their own
        dataset = TrainingDataset(source, settings.data, settings.seed)
        plan = BatchPlan(
            source.index,
            dataset.rows(),
            stats,
            settings.sampler,
            settings.schedule.batch,
            settings.schedule.epochs,
            settings.seed,
            settings.data.group_by_aspect,
        )
        every = int(np.ceil(settings.schedule.epochs))
        epochs = np.unique(np.linspace(0, every - 1, min(every, _EPOCHS)).round().astype(np.int64))
        clean = dataset.clean
        images = np.repeat(np.arange(len(source.index)), np.diff(clean.offsets))
        table = sparse.csr_matrix(
            (np.ones(len(images), dtype=np.int64), (images, source.index.labels[clean.rows])),
            shape=(len(source.index), stats.num_classes),
        )
        shown = [np.bincount(plan.epoch(int(epoch))[..., 0].ravel(), minlength=len(source.index)) for epoch in epochs]
        times = np.stack(shown)
        own.append(_Fed(stage.name, epochs, np.asarray(times @ table), times.sum(axis=1)))
    return stats, own


def _name(runs: Sequence[Run], number: int, own: _Fed, several: bool) -> str:
    return f"{runs[number].name}, {own.stage}" if several else runs[number].name


def _classes(runs: Sequence[Run], found: _Found) -> Markup:
    """Instances of an epoch by class, most frequent first, over those of the file."""
    figure = go.Figure()
    _, stats, _ = found[0]
    order = np.argsort(-stats.instance_count, kind="stable")
    texts = [label(stats.names[place]) for place in order]
    figure.add_scatter(
        x=np.arange(1, len(order) + 1),
        y=stats.instance_count[order].astype(np.int64),
        text=texts,
        mode="lines",
        line={"color": "#93a1b1", "width": 2, "dash": "dot"},
        name="in the file",
        hovertemplate="%{text}: <b>%{y}</b> in the file<extra></extra>",
    )
    for number, own_stats, stages_of in found:
        if own_stats.names != stats.names:
            continue
        for place, own in enumerate(stages_of):
            mean = own.instances.mean(axis=0)[order]
            figure.add_scatter(
                x=np.arange(1, len(order) + 1),
                y=np.where(mean > 0, mean, np.nan).round(1),
                text=texts,
                mode="lines",
                line={"color": color(number), "width": 2, "dash": ("solid", "dash", "dashdot")[place % 3]},
                name=label(_name(runs, number, own, len(stages_of) > 1)),
                hovertemplate="%{text}: <b>%{y:.0f}</b> an epoch<extra></extra>",
            )
    figure.update_layout(
        xaxis={"title": "classes, most training instances first", "showgrid": False},
        yaxis={"title": "instances an epoch", "type": "log"},
    )
    return chart(figure, height=380)


def _growth(runs: Sequence[Run], found: _Found) -> Markup | None:
    """How often an instance of a group is seen in an epoch, over the epochs; None where that never changes."""
    figure = go.Figure()
    moved = False
    for number, stats, stages_of in found:
        letters = np.array([str(letter) for letter in stats.frequency])
        start = 0
        for place, own in enumerate(stages_of):
            for group, dash in zip(GROUPS, ("solid", "dash", "dot"), strict=True):
                chosen = letters == group
                total = int(stats.instance_count[chosen].sum())
                if not total:
                    continue
                times = own.instances[:, chosen].sum(axis=1) / total
                moved = moved or bool(np.ptp(times) > 0.02)
                figure.add_scatter(
                    x=start + own.epochs + 1,
                    y=times.round(3),
                    mode="lines+markers" if len(times) < 3 else "lines",
                    line={"color": color(number), "dash": dash, "width": 2},
                    name=f"{label(runs[number].name)} {group_name(group)}",
                    showlegend=place == 0,
                    hovertemplate="epoch %{x}: <b>%{y:.2f}</b> times<extra></extra>",
                )
            start += int(own.epochs[-1]) + 1
    if not moved:
        return None
    figure.update_layout(xaxis={"title": "epoch"}, yaxis={"title": "times an instance is seen", "rangemode": "tozero"})
    return chart(figure, height=340)


def _rows(runs: Sequence[Run], number: int, stats: ClassStats, stages_of: list[_Fed]) -> list[dict[str, Any]]:
    letters = np.array([str(letter) for letter in stats.frequency])
    members = [letters == group for group in GROUPS]
    rows = []
    for own in stages_of:
        mean = own.instances.mean(axis=0)
        in_file = [
            float(stats.instance_count[chosen].sum()) / max(float(stats.instance_count.sum()), 1) for chosen in members
        ]
        shares = [float(mean[chosen].sum()) / max(float(mean.sum()), 1) for chosen in members]
        rows.append(
            {
                "name": _name(runs, number, own, len(stages_of) > 1),
                "color": color(number),
                "pictures": count(float(own.pictures.mean())),
                "instances": count(float(mean.sum())),
                "cells": [(percent(share), percent(before)) for share, before in zip(shares, in_file, strict=True)],
            }
        )
    return rows
