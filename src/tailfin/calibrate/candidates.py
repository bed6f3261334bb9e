"""The calibrations that are tried: a grid for each method, and what a user asks for by name and strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailfin.errors import UserError, nearest
from tailfin.schema.calibration import FRACAL, Calibration, LogitAdjustment, NorCal, Power, Temperature
from tailfin.stats import ClassStats

PLAIN = "none"  # the scores as they are, always among what is compared
KEPT = "keep"  # the scores as the model has them
METHODS = ("norcal", "fracal", "logit_adjustment", "temperature", "power")
OPTIONS = {  # the numbers of a method's strength, in order
    "norcal": ("gamma",),
    "fracal": ("lambda_",),
    "logit_adjustment": ("tau",),
    "temperature": ("value",),
    "power": ("rare", "common", "frequent"),
}
SECTIONS: dict[str, Any] = {
    "norcal": NorCal,
    "fracal": FRACAL,
    "logit_adjustment": LogitAdjustment,
    "temperature": Temperature,
    "power": Power,
}
GRIDS: dict[str, tuple[tuple[float, ...], ...]] = {
    "norcal": tuple((step / 10,) for step in range(1, 11)),
    "fracal": ((0.0,), (0.5,), (1.0,), (2.0,), (4.0,)),
    "logit_adjustment": ((0.25,), (0.5,), (0.75,), (1.0,), (1.5,)),
    "temperature": ((0.5,), (0.75,), (1.5,), (2.0,), (3.0,)),
    "power": tuple((rare, (1 + rare) / 2, 1.0) for rare in (0.4, 0.55, 0.7, 0.85)),
}


def methods_of(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of methods, checked; "a,b" is two of them, None all."""
    if names is None:
        return METHODS
    chosen = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in chosen:
        if name not in METHODS:
            raise UserError(f'--method: there is no calibration "{name}"{nearest(name, METHODS)}')
    return tuple(dict.fromkeys(chosen))


def with_strength(method: str, strength: str | float | Sequence[float], dimension: dict[str, float]) -> Calibration:
    """The calibration `method` with its numbers: `0.6`, or "0.5,0.8,1" for those of power."""
    options = OPTIONS[method]
    try:
        words = strength.split(",") if isinstance(strength, str) else strength
        values = [float(word) for word in words] if not isinstance(words, float | int) else [float(words)]
        if len(values) != len(options):
            raise ValueError
        return _section(method, values, dimension)
    except ValueError:
        wanted = ", ".join(option.strip("_") for option in options)
        raise UserError(f"--strength {strength}: {method} needs {wanted}, none of them negative") from None


def grid(methods: Sequence[str], dimension: dict[str, float]) -> dict[str, Calibration]:
    """What is tried of these methods, by label."""
    found = [_section(method, values, dimension) for method in methods for values in GRIDS[method]]
    return {label(config): config for config in found}


def label(config: Calibration | None) -> str:
    """`norcal gamma 0.6`: a calibration in a line."""
    if config is None:
        return PLAIN
    numbers = (f"{option.strip('_')} {getattr(config, option):g}" for option in OPTIONS[config.name])
    return f"{config.name} {', '.join(numbers)}"


def dimensions(stats: ClassStats, train: Any) -> dict[str, float]:
    """FRACAL's dimension of each class of `stats` by its name, from a training file."""
    from tailfin.calibration import fractal_dimension
    from tailfin.data.index import open_index
    from tailfin.joins import join_classes

    index = open_index(train, needs_names=False)
    join = join_classes(stats.names, index.names)
    if join.missing:
        raise UserError(f"{train}: the model's class {join.first_missing()} is not in the training file")
    found = fractal_dimension(index)[join.rows]
    return dict(zip(stats.names, (round(value, 6) for value in found.tolist()), strict=True))


def _section(method: str, values: Sequence[float], dimension: dict[str, float]) -> Calibration:
    own: dict[str, Any] = dict(zip(OPTIONS[method], values, strict=True))
    if method == "fracal":
        own["dimension"] = dimension
    section: Calibration = SECTIONS[method](**own)
    return section
