"""Recipes by name: the YAML files in this folder and their variants, files of the user's own, and published rows.

`catalog.py` finds files and variants, `rows.py` has the papers' rows, `published.py` maps them to recipes and
overrides, `moved.py` has the former names.
"""

from __future__ import annotations

from pathlib import Path

from tailfin.errors import UserError, nearest
from tailfin.recipes.catalog import START, Found, files, find_file, for_row, names, variants
from tailfin.recipes.moved import MOVED
from tailfin.recipes.published import Blocked, Runnable, about_overrides, resolve
from tailfin.recipes.rows import Paper, Row, papers, published_row, rows

__all__ = [
    "MOVED",
    "START",
    "Blocked",
    "Found",
    "Paper",
    "Row",
    "Runnable",
    "files",
    "find",
    "find_file",
    "names",
    "papers",
    "published_row",
    "resolve",
    "rows",
    "variants",
]


def find(name: str) -> Found:
    """What `name` means: a recipe of the package, then a file, each with or without `:VARIANT`, then a published row.

    A row that cannot be run, and a name that is none of these, is a `UserError`.
    """
    found = find_file(name)
    if found is not None:
        return found
    if name not in {row.id for row in rows()}:
        hint = f", {name} is a folder" if Path(name).is_dir() else ""
        choices = [*names(), *(row.id for row in rows())]
        raise UserError(f'there is no recipe, file or published row "{name}"{hint}{nearest(name, choices)}')
    row = published_row(name)
    run = resolve(row)
    if isinstance(run, Blocked):
        raise UserError(f"the published row {name} cannot be run, {run}")
    recipe = find_file(run.recipe)
    assert recipe is not None  # or the row would be blocked
    return for_row(recipe, name, [*run.overrides, *about_overrides(row, run.recipe)])
