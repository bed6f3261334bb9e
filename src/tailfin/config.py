"""The recipe: one YAML file that says everything about a training run, checked against the schema below.

A recipe stands alone (no inheritance). It states what differs from the defaults here; `tailfin recipes show NAME` and
`RUN/recipe.yaml` print all of it. An unknown key is an error that names its path and the nearest key that exists.
Overrides are `a.b=c` and pass the same check::

    recipe = load_recipe("fod/faster_rcnn_r18_softmax", ["schedule.epochs=4", "loss=focal", "loss.focal_gamma=1.5"])

A section that is chosen by name (`loss`, `sampler`, `detector.classifier`) may be given as the bare name; a new name
drops the options of the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tailfin.errors import UserError
from tailfin.files import existing_file, read_text
from tailfin.schema.base import as_number
from tailfin.schema.problems import explain
from tailfin.schema.recipe import Recipe


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice (plain YAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key}" is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, source: str) -> Any:
    """YAML text to plain values; a syntax error is a `UserError` with file, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def load_recipe(name: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """A recipe by package name, YAML path or published row id, with overrides (`["a.b=c"]` or `{"a.b": c}`) on top."""
    from tailfin import recipes  # imports this module

    text, source, row_overrides = recipes.find(str(name))
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a recipe: a mapping of keys is needed, this is {_kind(values)}")
    values.setdefault("name", str(name) if row_overrides else recipes.name_of(name))
    given = overrides.items() if isinstance(overrides, Mapping) else [split_override(text) for text in overrides]
    for key, value in [*(split_override(text) for text in row_overrides), *given]:
        _assign(values, key, value)
    return check_recipe(values, source)


def recipe_from_file(path: str | Path) -> Recipe:
    """A recipe from one YAML file, for example `RUN/recipe.yaml`."""
    path = existing_file(path, "recipe")
    values = parse_yaml(read_text(path, "recipe"), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a recipe: a mapping of keys is needed, this is {_kind(values)}")
    return check_recipe(values, str(path))


def check_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Plain values to a `Recipe`; the first problem becomes a `UserError` that names its path."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, source, Recipe)) from None


def split_override(text: str) -> tuple[str, Any]:
    """`"a.b=1e-4"` to `("a.b", 1e-4)`; values are YAML, and 1e-4, which YAML takes for text, is a number here."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f'"{text}" is not an override: write key=value, for example schedule.epochs=4')
    parsed = parse_yaml(value, f'the override "{text}"') if value.strip() else ""
    return key.strip(), as_number(parsed)


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML text that loads to the same recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        inner = values.get(part)
        if isinstance(inner, str) and part in ("loss", "sampler", "classifier"):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f'override {key}: "{".".join(path[: depth + 1])}" is a value, not a section')
        values[part] = dict(inner)
        values = values[part]
    values[last] = value


def _kind(value: Any) -> str:
    kinds = {
        type(None): "empty",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "a truth value",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
