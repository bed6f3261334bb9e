"""A recipe as plain values, before the schema checks them: YAML text, the variants of a file, overrides.

A file is a base recipe, which may have variants::

    loss: softmax
    variants:
      seesaw:
        about: {title: "the Seesaw loss", published: {AP: 24.8}}
        overrides: {loss: seesaw, detector.classifier: cosine}

A variant is the base with its overrides: one level, nothing is inherited between files or variants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from tailfin.errors import UserError, nearest
from tailfin.files import check_values
from tailfin.schema.base import as_number
from tailfin.schema.upgrade import former_keys

# What `about` says of the base's own run: a variant states it itself or has none
OWN_FACTS = ("title", "table", "published", "hours")


class Variant(NamedTuple):
    """What a variant changes: facts of `about`, and values by dotted key."""

    about: dict[str, Any]
    overrides: dict[str, Any]


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
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        check_values(value)
        return value
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def parse_recipe(text: str, source: str) -> tuple[dict[str, Any], dict[str, Variant]]:
    """The base recipe's values and the variants of a file, whose shape is checked; their keys are the schema's part."""
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a recipe: a mapping of keys is needed, this is {_kind(values)}")
    if "variants" not in values:
        return values, {}
    given = values.pop("variants")
    if not isinstance(given, dict) or not given:
        raise UserError(f"{source}: variants must be a mapping of names, this is {_kind(given)}")
    return values, {str(name): _variant(name, value, source) for name, value in given.items()}


def with_variant(base: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """The base's values with a variant's overrides. Of `about` the base's notes follow the variant's own, and what says
    how the base itself was run or printed (`OWN_FACTS`) is left out."""
    values = dict(base)
    about = values.get("about", {})
    if isinstance(about, dict):
        notes = [str(one["notes"]).strip() for one in (variant.about, about) if one.get("notes")]
        inherited = {key: value for key, value in about.items() if key not in (*OWN_FACTS, *variant.about)}
        values["about"] = {**variant.about, **inherited, **({"notes": " ".join(notes)} if notes else {})}
    for key, value in variant.overrides.items():
        assign(values, key, value)
    return values


def split_override(text: str) -> tuple[str, Any]:
    """`"a.b=1e-4"` to `("a.b", 1e-4)`; values are YAML, and 1e-4, which YAML takes for text, is a number here."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f'"{text}" is not an override: write key=value, for example schedule.epochs=4')
    parsed = parse_yaml(value, f'the override "{text}"') if value.strip() else ""
    return key.strip(), as_number(parsed)


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the key "a.b" of a recipe's plain values, in place; former keys mean what they meant then."""
    try:
        with former_keys(values, key):
            _set(values, key, value)
    except ValueError as error:
        raise UserError(f"override {key}: {error}") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, in place at the top level; sections on the way are copied or made."""
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        inner = values.get(part)
        if isinstance(inner, str) and part in ("loss", "sampler", "classifier", "features", "calibration"):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f'override {key}: "{".".join(path[: depth + 1])}" is a value, not a section')
        values[part] = dict(inner)
        values = values[part]
    values[last] = value


def _variant(name: Any, given: Any, source: str) -> Variant:
    where = f"{source}: variants.{name}"
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: a variant's name has letters, digits, _, - and . only")
    if not isinstance(given, dict):
        raise UserError(f"{where}: a mapping with about and overrides is needed, this is {_kind(given)}")
    for key, value in given.items():
        if key not in Variant._fields:
            raise UserError(f'{where}: unknown key "{key}"{nearest(key, Variant._fields)}')
        if not isinstance(value, dict) or not all(isinstance(inner, str) for inner in value):
            raise UserError(f"{where}.{key}: a mapping of keys is needed, this is {_kind(value)}")
    return Variant(given.get("about", {}), given.get("overrides", {}))


def _kind(value: Any) -> str:
    if value == {}:
        return "empty"
    kinds = {
        type(None): "empty",
        dict: "a mapping whose keys are not all text",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "a truth value",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
