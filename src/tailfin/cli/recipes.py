"""`tailfin recipes list|show|copy`: every recipe and every published row, what it runs, and a copy to edit."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from tailfin import recipes
from tailfin.cli.output import table_console
from tailfin.config import dump_recipe, load_recipe
from tailfin.errors import UserError, nearest
from tailfin.files import write_atomic
from tailfin.recipes import Blocked, Row, Runnable
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import PRETRAIN, Stage, stages

app = typer.Typer(help="List, show and copy recipes and published rows.", no_args_is_help=True, add_completion=False)

Columns = tuple[str, str, str, str]
GROUPS = ("AP", "APr", "APc", "APf")
WIDTH = 100  # of the plain list


@app.command("list")
def list_recipes(
    words: Annotated[list[str] | None, typer.Argument(help="Show only what contains all of these words.")] = None,
    paper: Annotated[str | None, typer.Option(help="Only this paper: 2drcl, stepwise or bacl.")] = None,
    runnable: Annotated[bool, typer.Option("--runnable", help="Only what can be run.")] = False,
    rows: Annotated[
        bool | None, typer.Option("--rows/--no-rows", help="The papers' result rows too. Default: only in a search.")
    ] = None,
) -> None:
    """List the recipes; with words or options, a table of what matches with the published numbers in percent."""
    if paper is not None and paper not in recipes.papers():
        raise UserError(f'there is no paper "{paper}"{nearest(paper, recipes.papers())}')
    if not words and paper is None and not runnable and rows is None:
        typer.echo("\n".join(_plain_list()))
        return
    wanted = [word.lower() for word in words or []]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    for column in ("paper", "table", "method"):
        table.add_column(column)
    for column in GROUPS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("runs as", overflow="fold")

    runs = [(row, recipes.resolve(row)) for row in recipes.rows() if paper in (None, row.paper)]
    used = {name: _papers_of(name, runs) for name in recipes.names()}
    entries = [_recipe_entry(name, keys) for name, keys in used.items() if paper is None or keys]
    if rows is not False:
        entries += [_row_entry(row, run) for row, run in runs if not (runnable and isinstance(run, Blocked))]
    shown = [entry for entry in entries if all(word in " ".join(entry).lower() for word in wanted)]
    for entry in shown:
        table.add_row(*map(Text, entry))

    if shown:
        table_console().print(table)
    typer.echo(f"{len(shown)} shown; {len(recipes.names())} recipes and {len(recipes.rows())} published rows in all")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe or YAML file, with :VARIANT, or a row's id.")],
) -> None:
    """Print a recipe in full, every default resolved, with the published numbers above it as comments."""
    row = _row_named(name)
    if row is not None:
        run = recipes.resolve(row)
        typer.echo(_comment(_row_facts(row, run)))
        if isinstance(run, Blocked):
            return
        recipe = load_recipe(name)
    else:
        recipe = load_recipe(name)
        typer.echo(_comment(_recipe_facts(recipe)))
    typer.echo(dump_recipe(recipe), nl=False)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A recipe or YAML file, with :VARIANT, or a row's id.")],
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="A file or a folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe to edit: a file with its comments, a variant or a published row with its overrides applied."""
    row = _row_named(name)
    found = recipes.find(name)  # a row that cannot be run, and an unknown name, end here
    if row is not None:
        text = f"{_comment(_row_facts(row, recipes.resolve(row)))}\n{dump_recipe(load_recipe(name))}"
    elif found.variant:
        load_recipe(name)
        text = f"# {found.name}, a variant of {found.name.rpartition(':')[0]}\n{_plain_yaml(found.values())}"
    else:
        text = found.text
    file_name = f"{(row.id.replace('/', '-') if row else Path(found.name).name.replace(':', '-'))}.yaml"
    target = destination or Path(file_name)
    if target.is_dir():
        target /= file_name
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already: choose another name or give --overwrite")
    write_atomic(target, text)
    typer.echo(f"wrote {target}; run it with: tailfin train {target}")


# ---- details ---------------------------------------------------------------------------------------------------------


def _row_named(name: str) -> Row | None:
    """The published row that `name` means, in the order in which `recipes.find` looks: recipes and files come first."""
    if recipes.find_file(name) is not None:
        return None
    return next((row for row in recipes.rows() if row.id == name), None)


def _plain_list() -> list[str]:
    """The recipes to start from, then every file with the names of its variants below it."""
    lines = ["START FROM"]
    lines += [f"  {name:<30}{purpose}" for name, purpose in recipes.START.items()]
    lines += ["", "ALL RECIPES, with their variants (FILE:VARIANT)"]
    for file in recipes.files():
        found = recipes.find_file(file)
        title = found.values()["about"]["title"] if found is not None else ""
        lines += [f"  {file:<38}{textwrap.shorten(title, WIDTH - 40, placeholder=' ...')}"]
        names = " ".join(f":{variant}" for variant in recipes.variants(file))
        lines += textwrap.wrap(names, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    rows = recipes.rows()
    runnable = sum(isinstance(recipes.resolve(row), Runnable) for row in rows)
    count = f"{len(recipes.names())} recipes in {len(recipes.files())} files, {len(rows)} published rows"
    return [*lines, "", f"{count} ({runnable} can be run); search: tailfin recipes list WORD"]


def _plain_yaml(values: dict[str, Any]) -> str:
    """What a recipe states, without the defaults and without a name: the copy's is that of its file."""
    kept = {key: value for key, value in values.items() if key != "name"}
    return yaml.dump(kept, Dumper=_ListsInLine, sort_keys=False, allow_unicode=True, width=120)


class _ListsInLine(yaml.SafeDumper):
    """`sizes: [160]` in the place of a line per number."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


def _papers_of(name: str, runs: list[tuple[Row, Runnable | Blocked]]) -> list[str]:
    """Keys of the papers that have a row which this recipe runs."""
    return sorted({row.paper for row, run in runs if isinstance(run, Runnable) and run.recipe == name})


def _recipe_entry(name: str, papers: list[str]) -> tuple[str, ...]:
    recipe = load_recipe(name)
    losses = [stage.recipe.loss.name for stage in stages(recipe) if stage.name != PRETRAIN]
    method = ", then ".join(dict.fromkeys(losses))  # a loss that goes on in the next stage is said once
    if recipe.sampler.name != "plain":
        method += f", {recipe.sampler.name}"
    about = recipe.about
    paper, table = ", ".join(papers) or about.paper, about.table.removeprefix("table ")
    return (name, paper, table, method, *_numbers(about.published), "variant" if ":" in name else "recipe")


def _row_entry(row: Row, run: Runnable | Blocked) -> tuple[str, ...]:
    how = " ".join((run.recipe, *run.overrides)) if isinstance(run, Runnable) else str(run)
    return (row.id, row.paper, row.table, row.method, *_numbers(row.numbers), how)


def _numbers(published: dict[str, float]) -> Columns:
    """AP and its groups, box where a table has both; mask numbers carry an "m"."""
    texts = []
    for key in GROUPS:
        box, mask = published.get(key), published.get(f"{key}_m")
        texts.append(f"{box:.1f}" if box is not None else f"{mask:.1f} m" if mask is not None else "")
    return texts[0], texts[1], texts[2], texts[3]


def _recipe_facts(recipe: Recipe) -> list[str]:
    about = recipe.about
    facts = [
        f"{recipe.name}: {about.title}".rstrip(": "),
        f"paper: {about.paper or 'none'}" + (f", {about.table}" if about.table else ""),
        f"published: {_listed(about.published)}",
    ]
    for row in recipes.rows():
        run = recipes.resolve(row)
        if isinstance(run, Runnable) and run.recipe == recipe.name:
            facts.append(f"row {row.id}: {_listed(row.numbers)}; {' '.join(run.overrides) or 'as it is'}")
    return facts


def _row_facts(row: Row, run: Runnable | Blocked) -> list[str]:
    paper = recipes.papers()[row.paper]
    facts = [
        f"{row.id}: {row.method}",
        f"paper: {paper.title} ({paper.venue}, {paper.year}), table {row.table}: {row.caption}",
        f"data set {row.dataset}, detector {row.detector or 'not stated'}, backbone {row.backbone}, "
        f"sampler {row.sampler or 'not stated'}, schedule {row.schedule or 'not stated'}, "
        f"pre-training {row.pretraining or 'not stated'}",
        f"published: {_listed(row.numbers)}",
    ]
    if row.settings:
        facts.append("switches: " + ", ".join(f"{key} {value}" for key, value in row.settings.items()))
    if row.inferred:
        facts.append("not in the table, taken from elsewhere in the paper: " + ", ".join(row.inferred))
    if row.same_numbers_as:
        facts.append("same numbers as: " + ", ".join(row.same_numbers_as))
    if row.doubt:
        facts.append(f"doubt: {row.doubt}")
    if isinstance(run, Runnable):
        facts.append(f"recipe: {run.recipe}; overrides: {' '.join(run.overrides) or 'none'}")
        first = stages(load_recipe(row.id))[0]
        others = _rows_that_share(row, first)
        if others:
            facts.append(
                f"stage 1 ({first.name}) is the same in {len(others)} more rows, a finished run of one of them takes "
                f"its place: --stage1 RUN: {', '.join(others)}"
            )
    else:
        facts.append(f"cannot be run, {run}")
    return facts


def _rows_that_share(row: Row, first: Stage[Recipe]) -> list[str]:
    """Ids of the other rows that begin with the same stage, where it is not the whole of both."""
    alike = [
        other
        for other in recipes.rows()
        if (other.dataset, other.backbone) == (row.dataset, row.backbone) and other.id != row.id
    ]
    found = {other.id: stages(load_recipe(other.id)) for other in alike if isinstance(recipes.resolve(other), Runnable)}
    several = len(stages(load_recipe(row.id))) > 1
    return [
        name
        for name, own in found.items()
        if own[0].inputs == first.inputs
        and (own[0].name == PRETRAIN) == (first.name == PRETRAIN)
        and (several or len(own) > 1)
    ]


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{key} {value}" for key, value in numbers.items()) or "nothing printed"


def _comment(lines: list[str]) -> str:
    return "\n".join(f"# {' '.join(line.split())}" for line in lines)
