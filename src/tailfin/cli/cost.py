"""`tailfin cost`: multiply-adds, parameters and pictures per second of recipes and models, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailfin.errors import UserError

if TYPE_CHECKING:
    from tailfin.cost import Cost


def cost(
    subjects: Annotated[
        list[str], typer.Argument(metavar="RECIPE_OR_MODEL... [KEY=VALUE]...", help="The first is compared with.")
    ],
    size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="H W", help="Picture in pixels. Default: the recipe's test size.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes of the recipes, whatever their data.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Pictures to measure the speed on (may be given several times).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds; the median counts.")] = 5,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure pictures per second.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: a GPU where there is one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Count multiply-adds and parameters, and measure pictures per second part by part."""
    from tailfin.cost import cost as measure
    from tailfin.files import write_json
    from tailfin.processes import limit_threads

    overrides = [word for word in subjects if "=" in word and not Path(word).exists()]
    named = [word for word in subjects if word not in overrides]
    if not named:
        raise UserError("give a recipe, a run folder or a model file")
    limit_threads()
    found = measure(
        named,
        size=size,
        overrides=overrides,
        classes=classes,
        images=images or (),
        rounds=rounds,
        speed=speed,
        device=device,
    )
    show(found)
    if json_file is not None:
        write_json(json_file, [one.as_dict() for one in found], indent=1)


def show(costs: list[Cost]) -> None:
    """A line per detector with ratios to the first, then its parts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title="cost of one picture", title_justify="left")
    for number, title in enumerate(("", "GMACs", "params (M)", "images/s")):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    first = costs[0]
    for one in costs:
        kind = "trained" if one.trained else "random weights"
        table.add_row(
            f"{escape(one.name)}\n{one.size[0]} x {one.size[1]}, {one.classes:,} classes, {kind}",
            f"{one.gmacs:,.2f}" + _ratio(one.gmacs, first.gmacs, one is first),
            f"{one.parameters / 1e6:,.2f}" + _ratio(one.parameters, first.parameters, one is first),
            "–"
            if one.images_per_second is None
            else f"{one.images_per_second:.2f}" + _ratio(one.images_per_second, first.images_per_second, one is first),
        )
    console.print(table)
    parts = Table(title="by part: GMACs | parameters (M) | milliseconds", title_justify="left")
    parts.add_column("")
    for one in costs:
        parts.add_column(escape(one.name), justify="right", overflow="fold")
    every = [name for one in costs for name in (*one.part_parameters, *one.part_gmacs, *one.part_seconds)]
    for name in dict.fromkeys(every):
        parts.add_row(name, *(_part(one, name) for one in costs))
    if any(one.candidates is not None for one in costs):
        counts = ("–" if one.candidates is None else f"{one.candidates:,.0f}" for one in costs)
        parts.add_row("candidates above the threshold", *counts)
    console.print(parts)
    for one in costs:
        if one.published:
            printed = ", ".join(f"{key} {value:g}" for key, value in one.published.items())
            typer.echo(f"{one.name}: published {printed}")


def _ratio(value: float, reference: float | None, same: bool) -> str:
    return "" if same or not reference else f"\nx {value / reference:.3f}"


def _part(one: Cost, name: str) -> str:
    macs, parameters, seconds = one.part_gmacs.get(name), one.part_parameters.get(name), one.part_seconds.get(name)
    return " | ".join(
        (
            "–" if macs is None else f"{macs:.2f}",
            "–" if parameters is None else f"{parameters / 1e6:.2f}",
            "–" if seconds is None else f"{1000 * seconds:.1f}",
        )
    )
