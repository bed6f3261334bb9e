"""What pydantic found wrong, as one message that names the key and the nearest choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from tailfin.errors import nearest

TOLD = "told"  # kind of a mistake whose message is complete


def explain(error: ValidationError, source: str, schema: type[BaseModel]) -> str:
    """One message for the first problem that pydantic found in values of `schema`."""
    return f"{source}: {explained(error, schema)}"


def told(text: str) -> PydanticCustomError:
    """A mistake whose message is complete: the key is named in it."""
    return PydanticCustomError(TOLD, "{text}", {"text": text})


def explained(error: ValidationError, schema: type[BaseModel], inside: str = "") -> str:
    """`explain` without the source; `inside` is the key whose section `schema` is."""
    problem = error.errors()[0]
    location, section = _located(problem["loc"], schema)
    path = ".".join(str(part) for part in ([inside] if inside else []) + location)
    others = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
    if problem["type"] == TOLD:
        return problem["msg"] + others
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{path}"{nearest(location[-1], section.model_fields)}{others}'
    detail = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":  # a section whose kind its name decides
        choices = [choice.strip(" '") for choice in problem["ctx"]["expected_tags"].split(",")]
        tag = problem["ctx"]["tag"]
        return f'{path}.name: "{tag}" is not a choice{nearest(tag, choices)}{others}'
    if problem["type"] == "literal_error":
        choices = problem.get("ctx", {}).get("expected", "").replace(" or ", ", ").replace("'", "").split(", ")
        return f'{path}: "{problem["input"]}" is not a choice{nearest(problem["input"], choices)}{others}'
    given = "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
    return f"{path + ': ' if path else ''}{detail}{given}{others}"


def _located(location: Sequence[int | str], schema: type[BaseModel]) -> tuple[list[int | str], Any]:
    """The path as a user writes it (without the tags of unions), and the section that its last part belongs to."""
    path: list[int | str] = []
    section: Any = schema
    kinds: list[Any] = []
    for part in location:
        tagged = [
            kind
            for kind in kinds
            if getattr(kind.model_fields.get("name"), "annotation", None) is not None
            and part in get_args(kind.model_fields["name"].annotation)
        ]
        if tagged:
            section, kinds = tagged[0], []
            continue
        if kinds:
            section, kinds = kinds[0], []
        path.append(part)
        if part in getattr(section, "model_fields", {}):
            kinds = _sections(section.model_fields[part].annotation)
    return path, section


def _sections(annotation: Any) -> list[Any]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for option in get_args(annotation) for kind in _sections(option)]
