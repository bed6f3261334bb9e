"""Former keys of a recipe: files, overrides and model files of before go on working.

    hallucination: {beta: 0.9}     features: {name: hallucination, beta: 0.9}     in `second` too
    feature_memory, fasa, rio and meta_reweighting likewise
    evaluation: {norcal: 0.6}      calibration: {name: norcal, gamma: 0.6}

`upgraded` maps the values of a recipe before they are checked. An override may use a former key on a recipe of today,
or one of today on a former recipe: it is made inside `former_keys`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FEATURE_KEYS = ("hallucination", "feature_memory", "fasa", "rio", "meta_reweighting")


def upgraded(values: Mapping[str, Any], *, check: bool = True) -> dict[str, Any]:
    """The values of a recipe with the keys of today.

    With `check`, raises `ValueError` where a stage has more than one feature module; without, leaves such keys as they
    are, for what may come after them.
    """
    values = _with_features(dict(values), check)
    if isinstance(values.get("second"), dict):
        values["second"] = _with_features(dict(values["second"]), check)
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and "norcal" in evaluation:
        values["evaluation"] = {key: value for key, value in evaluation.items() if key != "norcal"}
        if evaluation["norcal"] not in (0, None):
            if check and values.get("calibration") is not None:
                raise ValueError("evaluation.norcal is the former key of `calibration`, which is set too: keep one")
            values["calibration"] = {"name": "norcal", "gamma": evaluation["norcal"]}
    return values


@contextmanager
def former_keys(values: dict[str, Any], key: str) -> Iterator[None]:
    """While the override `key` changes `values`, in place, its section has the former key again if `key` uses it.

    `ValueError` for a former section that is none.
    """
    _replace(values, upgraded(values, check=False))
    _former_view(values, key)
    yield
    _replace(values, upgraded(values, check=False))


def _replace(values: dict[str, Any], by: dict[str, Any]) -> None:
    values.clear()
    values.update(by)


def _former_view(values: dict[str, Any], key: str) -> None:
    stage, path = values, key.split(".")
    if path[0] == "second" and isinstance(values.get("second"), dict):
        stage, path = values["second"], path[1:]
    features = _named(stage.get("features"))
    if path and path[0] in FEATURE_KEYS and features is not None and features.get("name") == path[0]:
        stage[path[0]] = {option: value for option, value in features.items() if option != "name"}
        del stage["features"]
    calibration = _named(values.get("calibration"))
    if key == "evaluation.norcal" and calibration is not None and calibration.get("name") == "norcal":
        del values["calibration"]


def _with_features(stage: dict[str, Any], check: bool) -> dict[str, Any]:
    """A recipe, or its second stage, with `features` in the place of the former keys."""
    given = {key: stage[key] for key in FEATURE_KEYS if key in stage}
    active = {key: value for key, value in given.items() if value is not None}
    features = _named(stage.get("features"))
    named = [features.get("name")] if features is not None else []
    several = sorted([*named, *active], key=lambda name: FEATURE_KEYS.index(name) if name in FEATURE_KEYS else -1)
    if len(several) > 1:
        if check:
            raise ValueError(f"a stage has at most one feature module, these are set: {', '.join(map(str, several))}")
        return stage
    stage = {key: value for key, value in stage.items() if key not in given}
    for name, options in active.items():
        if not isinstance(options, Mapping):
            raise ValueError(f"{name}: a section of keys is needed (given: {options!r})")
        stage["features"] = {"name": name, **options}
    return stage


def _named(section: Any) -> dict[str, Any] | None:
    """A section that is chosen by name, also where it is the bare name; none for anything else."""
    if isinstance(section, str):
        return {"name": section}
    return section if isinstance(section, dict) else None
