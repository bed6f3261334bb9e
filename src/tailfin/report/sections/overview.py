"""What was run: one card per run with recipe, data, commit, time and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailfin.report.page import Section, color, count, defined, render
from tailfin.report.runs import Run
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import stages

_HEADLINE = ("AP", "APr", "APc", "APf", "AP1", "AP2", "AP3", "AP4")


def overview(runs: Sequence[Run]) -> Section:
    """One card per run."""
    cards = [
        {
            "name": run.name,
            "color": color(index),
            "status": run.status,
            "rows": [(key, value) for key, value in _facts(run) if value],
            "headline": _headline(run),
            "missing": run.missing,
            "progress": _progress(run),
        }
        for index, run in enumerate(runs)
    ]
    return Section("Runs" if len(runs) > 1 else "Run", render("overview.html", cards=cards))


def training_seconds(run: Run) -> float:
    """Wall-clock seconds of training over all stages: each line of the log has those since the line before."""
    return sum(float(np.nansum(stage.training["seconds"])) for stage in run.stages if "seconds" in stage.training)


def duration(seconds: float) -> str:
    """Seconds as "2 h 05 min", "4 min 10 s" or "12 s"; nothing for none."""
    if seconds <= 0:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


# ---- details ---------------------------------------------------------------------------------------------------------


def _facts(run: Run) -> list[tuple[str, str]]:
    recipe, environment = run.recipe, run.environment
    rows: list[tuple[str, str]] = []
    if recipe is not None:
        rows += [
            ("Recipe", recipe.name),
            ("Method", _method(recipe)),
            ("Stages", _stages(run)),
            ("Detector", f"{recipe.detector.name} · {recipe.backbone} · weights {Path(recipe.weights).name}"),
            ("Schedule", _schedule(recipe)),
            (
                "Data",
                " → ".join(
                    _data_name(recipe.data.root, files.annotations) for files in (recipe.data.train, recipe.data.val)
                ),
            ),
        ]
    rows += [
        ("Commit", _text(environment.get("commit"))[:12]),
        ("Started", _text(environment.get("started")).replace("T", " ")[:16]),
        ("Trained for", duration(training_seconds(run))),
        ("Speed", _speed(run)),
        ("Folder", str(run.path)),
    ]
    return rows


def _method(recipe: Recipe) -> str:
    own = [stage.recipe for stage in stages(recipe)]
    losses, samplers = _over_stages(o.loss.name for o in own), _over_stages(o.sampler.name for o in own)
    return f"{recipe.method} · loss {losses} · sampler {samplers}"


def _schedule(recipe: Recipe) -> str:
    own = [stage.recipe.schedule for stage in stages(recipe)]
    epochs, batch = " → ".join(f"{o.epochs:g}" for o in own), _over_stages(str(o.batch) for o in own)
    optimizer, rate = _over_stages(o.optimizer for o in own), _over_stages(f"{o.rate:.4g}" for o in own)
    return f"{epochs} epochs · batch {batch} · {optimizer} · lr {rate}"


def _over_stages(values: Iterable[str]) -> str:
    """The value of every stage, or the one that all share."""
    own = list(values)
    return own[0] if len(set(own)) == 1 else " → ".join(own)


def _stages(run: Run) -> str:
    """Those of the recipe, in order, where there are several, and which of them another run has trained."""
    assert run.recipe is not None
    names = [stage.name for stage in stages(run.recipe)]
    listed = run.environment.get("reused")
    taken = {facts.get("stage") for facts in listed if isinstance(facts, dict)} if isinstance(listed, list) else set()
    shown = [f"{name} (of another run)" if name in taken else name for name in names]
    return " → ".join(shown) if len(shown) > 1 else ""


def _data_name(root: str, file: str) -> str:
    """The last two parts of a path: `fod31-lt/train.json`."""
    return "/".join((Path(root) / file).parts[-2:]) if file else "–"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _speed(run: Run) -> str:
    rates = [stage.training["images_per_second"] for stage in run.stages if "images_per_second" in stage.training]
    memory = [stage.training["memory_gib"] for stage in run.stages if "memory_gib" in stage.training]
    values = np.concatenate(rates) if rates else np.empty(0)
    parts = [f"training {np.nanmedian(values):.3g} images/s"] if np.isfinite(values).any() else []
    if memory and np.isfinite(np.concatenate(memory)).any():
        parts.append(f"{np.nanmax(np.concatenate(memory)):.1f} GiB at most")
    if run.metrics is not None and defined(run.metrics.get("images_per_second")):
        parts.append(f"inference {run.metrics['images_per_second']:.3g} images/s")
    return " · ".join(parts)


def _headline(run: Run) -> list[tuple[str, float]]:
    if run.metrics is None:
        return []
    kinds = [kind for kind in ("bbox", "segm") if isinstance(run.metrics.get(kind), dict)]
    values: dict[str, Any] = run.metrics[kinds[0]] if kinds else {}
    found = [(key, values[key]) for key in _HEADLINE if defined(values.get(key))]
    if len(kinds) == 2 and defined(run.metrics["segm"].get("AP")):
        found.append(("mask AP", run.metrics["segm"]["AP"]))
    return found


def _progress(run: Run) -> dict[str, Any] | None:
    """How far an unfinished run is, by its newest training line."""
    trained = [(number, stage) for number, stage in enumerate(run.stages, 1) if stage.training]
    if run.status != "unfinished" or not trained:
        return None
    number, stage = trained[-1]
    iteration, epoch = (stage.training.get(key, np.array([np.nan]))[-1] for key in ("iteration", "epoch"))
    own = {planned.name: planned.recipe for planned in stages(run.recipe)} if run.recipe is not None else {}
    epochs = float(own[stage.name].schedule.epochs) if stage.name in own else float("nan")
    share = min(1.0, float(epoch) / epochs) if np.isfinite(epoch) and np.isfinite(epochs) else 0.0
    text = f"stage {number} ({stage.name}), iteration {count(float(iteration))}"
    if np.isfinite(epoch):
        text += f", epoch {epoch:.2f}" + (f" of {epochs:g}" if np.isfinite(epochs) else "")
    return {"text": text, "share": f"{100 * share:.1f}"}
