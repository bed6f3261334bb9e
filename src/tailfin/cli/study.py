"""`tailfin study`: train every cell of a grid of recipes, sets and seeds once, and compare the arms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailfin.errors import UserError

SHOW = "show"


def study(
    words: Annotated[list[str], typer.Argument(metavar="[show] STUDY.yaml|FOLDER", help="`show` says how far it is.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the cells; by default studies/NAME.")] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="SET=FOLDER", help="Where a set's files are.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms, by commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds, by commas.")] = None,
    sets: Annotated[str | None, typer.Option(help="Only these sets, by commas.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print cells, steps and minutes; train nothing.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --plan: take a few steps of each set's control, for the minutes.")
    ] = False,
    most: Annotated[int | None, typer.Option(min=1, help="At most so many cells now.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Write the tables of what is there; train nothing.")] = False,
) -> None:
    """Train a grid of recipes, sets and seeds once, each cell resumable, and compare the arms.

    The same command goes on with what is not finished. Stages that cells have in common are trained once.
    """
    from tailfin.cli.output import echo, table_console
    from tailfin.study.cells import differing, make_cells
    from tailfin.study.loop import TERMINATED, Terminated, run_cells, unfinished
    from tailfin.study.plan import measured_step, minutes_left, plan_table, seconds_per_step, status_lines
    from tailfin.study.spec import keep, open_study
    from tailfin.study.state import fate
    from tailfin.study.tables import write_tables

    show = words[0] == SHOW
    if len(words) != 1 + show:
        raise UserError("give one study: tailfin study STUDY.yaml, or tailfin study show STUDY.yaml|FOLDER")
    loaded, folder = open_study(Path(words[-1]), out, data or [])
    numbers = [_number(text) for text in _parted(seeds)]
    cells = make_cells(loaded, folder, arms=_parted(arms), seeds=numbers, sets=_parted(sets))
    if not cells:
        raise UserError("no cell is left of the study: --arms, --seeds and --sets exclude all")
    everything = make_cells(loaded, folder) if arms or seeds or sets else cells  # tables are of all that is there
    own = {cell.name for cell in cells}
    others = [cell for cell in everything if cell.name not in own]  # what of them is finished is taken, too
    fates = {cell.name: fate(cell) for cell in cells}
    if show:
        for line in status_lines(cells, fates, loaded.workers, others):
            echo(line)
        return
    for note in differing(cells):
        echo(f"note: {note}")
    if plan:
        rates = seconds_per_step(cells, fates)
        for name in dict.fromkeys(cell.set for cell in cells) if measure else ():
            one = next(cell for cell in cells if cell.set == name and cell.calibrate is None)
            rates.setdefault((name, ""), measured_step(one, loaded.threads))
        table_console().print(
            plan_table(cells, fates, rates, f"{loaded.title or words[-1]}, {len(cells)} cells", others)
        )
        left = minutes_left(cells, fates, rates, loaded.workers, others)
        unknown = "not known: --measure takes a few steps, and finished cells tell it too"
        echo(
            "minutes of training: " + (unknown if left is None else f"about {left:.0f} with {loaded.workers} at a time")
        )
        return
    if not tables:
        keep(loaded, folder)
        try:
            fates = run_cells(loaded, cells, folder, others=others, most=most, retry=retry, say=echo)
        except (KeyboardInterrupt, Terminated) as error:
            echo("stopped; the same command goes on", err=True)
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else TERMINATED) from None
    whole = {cell.name: fates[cell.name] if cell.name in fates else fate(cell) for cell in everything}
    for path in write_tables(loaded, everything, whole, folder):
        echo(f"{path}")
    for line in status_lines(cells, fates, loaded.workers, others):
        echo(line)
    if any(fates[name].state == "failed" for name in unfinished(fates)):
        raise typer.Exit(1)


def _parted(text: str | None) -> list[str]:
    """Words that are parted by commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _number(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f'--seeds: "{text}" is no seed')
    return int(text)
