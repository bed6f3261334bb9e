"""What pydantic found wrong, as one message that names the key and the nearest choice."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from tailfin.errors import nearest

TOLD = "told"  # kind of a mistake whose message is complete

# What other tools call a key
ELSEWHERE = {
    "size": "data.sizes",
    "image_size": "data.sizes",
    "img_size": "data.sizes",
    "imgsz": "data.sizes",
    "learning_rate": "schedule.lr",
    "batch_size": "schedule.batch",
    "num_workers": "data.workers",
    "warmup_iters": "schedule.warmup",
    "device": "CUDA_VISIBLE_DEVICES, a variable of the environment",
}


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
        known = _keys_called(str(location[-1]), schema)
        own = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1) if len(location) > 1 else []
        if known and not inside and not own and not isinstance(location[-1], int):
            near = f" (did you mean {', or '.join(known)}?)"
        else:
            near = nearest(location[-1], section.model_fields)
        return f'unknown key "{path}"{near}{others}'
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


def _keys_called(name: str, schema: type[BaseModel]) -> list[str]:
    """Whole keys of the recipe that end in `name`, or are what other tools mean by it; those of the fewest parts."""
    if name in ELSEWHERE:
        return [ELSEWHERE[name]]
    level: list[tuple[str, Any]] = [("", schema)]
    for _ in range(3):
        if found := [f"{path}{name}" for path, section in level if name in section.model_fields]:
            return list(dict.fromkeys(found))
        level = [
            (f"{path}{key}.", inner)
            for path, section in level
            for key, field in section.model_fields.items()
            for inner in (*_sections(field.annotation), *_sections(type(field.default)))
        ]
    return []


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
