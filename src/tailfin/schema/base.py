"""What every section of a recipe is made of: frozen models, ranges, and sections that are chosen by name."""

from __future__ import annotations

import math
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=16)]
ConfigName = Annotated[str, Field(min_length=1, pattern=r"^\S+$")]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _plain_types(cls, values: Any) -> Any:
        """What YAML reads differently from what was meant: a folder named 2017 is text; `true` is no number; one value,
        or text with commas, is a list where one is needed."""
        if values is None:
            raise ValueError("the section is empty: give it keys or leave it out")
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for key, value in values.items():
            kind = cls.model_fields[key].annotation if key in cls.model_fields else None
            if value is False and "no" in get_args(kind):  # `precision: no` without quotes
                values[key] = "no"
            elif isinstance(value, bool):
                if kind is not None and kind is not bool and bool not in get_args(kind):
                    raise ValueError(f"{key} cannot be {str(value).lower()}")
            elif kind is str and isinstance(value, int | float):
                values[key] = str(value)
            elif get_origin(kind) is tuple and isinstance(value, int | float | str):
                if isinstance(value, str) and "," in value:
                    values[key] = [part.strip() for part in value.split(",")]
                elif get_args(kind)[-1] is ...:
                    values[key] = [value]
        return values


class Named(BaseModel):
    """A choice by name with options of its own, which are checked by what the name stands for."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: ConfigName

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        """Options have no declared type: 1e-4, which YAML takes for text, is a number here; NaN is refused."""
        if not isinstance(values, dict):
            return values
        values = {key: value if key == "name" else as_number(value) for key, value in values.items()}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number")
        return values

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def by_name(value: Any) -> Any:
    """The bare name of a section that is chosen by name, as the section."""
    return {"name": value} if isinstance(value, str) else value


def as_number(value: Any) -> Any:
    """Text that YAML did not take for a number but that is one (1e-4); anything else as it is."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value
