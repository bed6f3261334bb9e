"""What all sections of the report share: templates that escape, numbers as text, charts, colours of the runs.

A section is a function that takes the runs and returns a `Section` (title and HTML), or None where it has nothing to
say. Class names and file names come from users: they reach the page through `render`, which escapes every value, or
through a chart, where `label` escapes them for Plotly's own small markup.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup

from tailfin.errors import printable
from tailfin.report.runs import Run

# Told apart by people with any kind of colour vision, and readable on white and on near-black.
COLORS = ("#2f7de1", "#f0801a", "#10a37f", "#d6409f", "#8e6bf0", "#c9a100", "#e5484d", "#5b7083")
GROUPS = {"r": "rare", "c": "common", "f": "frequent"}
_GROUP_RANK = {"r": 0, "c": 1, "f": 2}


class Section(NamedTuple):
    """One section of the page."""

    title: str
    html: Markup

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def render(template: str, **values: Any) -> Markup:
    """A template of this package filled with `values`, each of them escaped."""
    return Markup(_environment().get_template(template).render(**values))


def asset(name: str) -> Markup:
    """A style sheet or script of this package, as it is."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def color(index: int) -> str:
    """The colour of the run at `index`, the same in all charts."""
    return COLORS[index % len(COLORS)]


def label(text: object) -> str:
    """A name for use in a chart: shown letter by letter, never read as Plotly's markup."""
    return html.escape(printable(str(text)), quote=False)


def group_name(key: object) -> str:
    """ "r" -> "rare"; "1" -> "group 1"; nothing for a class that belongs to no group."""
    text = "" if key is None else str(key)
    return GROUPS.get(text, f"group {text}" if text.isdecimal() else text)


def group_choices(groups: Iterable[object]) -> list[tuple[str, str]]:
    """The frequency groups that occur, rarest first, with their names: buttons of a table's filter."""
    found = {str(group) for group in groups if group}
    return [(key, group_name(key)) for key in sorted(found, key=lambda key: (_GROUP_RANK.get(key, 9), key))]


def percent(value: Any, digits: int = 1) -> str:
    """A fraction in percent; "–" where the protocol defines none (-1) or the value is missing."""
    return "–" if not defined(value) else f"{100 * value:.{digits}f}"


def signed(value: Any, digits: int = 1) -> str:
    """A difference of fractions in percentage points, with its sign."""
    text = f"{100 * value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"±{0:.{digits}f}"


def direction(value: float, digits: int = 1) -> str:
    """ "up", "down" or "same", as `signed` shows the difference."""
    rounded = round(100 * value, digits)
    return "up" if rounded > 0 else "down" if rounded < 0 else "same"


def defined(value: Any) -> TypeGuard[float]:
    """Whether a metric has a value: a number that is neither -1 nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def count(value: Any) -> str:
    """An integer with separators between thousands."""
    return f"{value:,.0f}" if isinstance(value, int | float) and not isinstance(value, bool) else "–"


def chart(figure: go.Figure, *, height: int, log_switch: str = "", note: str = "") -> Markup:
    """A Plotly figure for the page; the page's script draws it in the colours of the reader's theme.

    `log_switch` is the label of a button that turns the y axes logarithmic and back; empty for none.
    """
    figure.update_layout(template="none", margin={"l": 60, "r": 20, "t": 40, "b": 50}, height=height)
    return render("chart.html", figure=_script_text(figure.to_json()), height=height, log_switch=log_switch, note=note)


def embedded(values: Any) -> Markup:
    """Plain values as JSON for a script element."""
    return _script_text(json.dumps(values, separators=(",", ":")))


def _script_text(text: str) -> Markup:
    """In a script element nothing is escaped, so nothing may look like the end of it."""
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def run_marks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Name and colour of each run, for legends in HTML."""
    return [{"name": run.name, "color": color(index)} for index, run in enumerate(runs)]


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain values as (dotted key, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows.extend(flat(value, f"{name}."))
        elif isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
            rows.append((name, ", ".join(str(item) for item in value)))
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _visible(value: Any) -> Any:
    """Text on its way to the page: marks that would turn the direction of what follows are shown, not obeyed."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        signed=signed,
        number=count,
        defined=defined,
        direction=direction,
        group=group_name,
        json=embedded,
    )
    return environment
