"""`detector.classifier`: what makes class logits of the shared features, by name, with the options of each.

A classifier with `bases` is put around another one, which its option `base` names; one with `second_stage` is put
around a trained one. `tailfin.models.heads` makes the modules; the defaults here are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from tailfin.errors import nearest
from tailfin.schema.base import ConfigName, Named, Section, by_name

TREES = ("geometry", "company", "names")  # what the trees of a forest are grown from


class HeadOptions(Section):
    """Options of a classifier; only those that a recipe gives reach the module."""

    bases: ClassVar[tuple[str, ...]] = ()  # classifiers that it can be put around
    second_stage: ClassVar[bool] = False  # around a trained one, by a second stage

    def _not_negative(self, name: str) -> None:
        if not getattr(self, name) >= 0:
            raise ValueError(f"{name} must not be negative (given: {getattr(self, name)})")

    def _above_zero(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 (given: {getattr(self, name)})")


class Linear(HeadOptions):
    """A linear layer."""


class Cosine(HeadOptions):
    temperature: float = 20.0
    power: float = 1.0
    eps: float = 1e-6

    @model_validator(mode="after")
    def _check(self) -> Cosine:
        self._above_zero("temperature", "eps")
        return self


class WeightCosine(HeadOptions):
    temperature: float = 48.0
    eps: float = 1e-5

    @model_validator(mode="after")
    def _check(self) -> WeightCosine:
        self._above_zero("temperature", "eps")
        return self


class TDE(HeadOptions):
    num_heads: int = 2
    tau: float = 16.0
    gamma: float = 1 / 32
    alpha: float = 1.5
    mu: float = 0.9998
    keep_background: bool = True
    released: bool = False

    @model_validator(mode="after")
    def _check(self) -> TDE:
        if self.num_heads < 1:
            raise ValueError(f"the features cannot be shared by {self.num_heads} heads")
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu must be in 0..1 (given: {self.mu})")
        self._not_negative("gamma")
        return self


class Forest(HeadOptions):
    trees: str | tuple[str, ...] = TREES
    parents: tuple[Annotated[int, Field(strict=True)], ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Forest:
        file = isinstance(self.trees, str) and self.trees.endswith(".json")
        sources = (self.trees,) if isinstance(self.trees, str) else self.trees
        for source in sources if not file else ():
            if source not in TREES:
                raise ValueError(f'trees: "{source}" is no source of trees{nearest(source, TREES)} nor a .json file')
        if self.parents is None:
            if file:
                raise ValueError("trees from a file need `parents`, the number of parents of each tree: [25, 50]")
            return self
        if not file and len(self.parents) != len(sources):
            raise ValueError(f"parents has {len(self.parents)} entries for {len(sources)} trees")
        for number in self.parents:
            if number < 1:
                raise ValueError(f"parents must lie in 1..C, C the number of classes (given: {number})")
        return self


class PCB(HeadOptions):
    bases = ("linear", "cosine")
    base: Any = "linear"
    step_weights: tuple[float, ...] = (0.2, 0.2, 0.6)

    @model_validator(mode="after")
    def _check(self) -> PCB:
        if not all(weight >= 0 for weight in self.step_weights):
            raise ValueError(f"step_weights must not be negative (given: {list(self.step_weights)})")
        return self


class DisAlign(HeadOptions):
    bases = ("linear", "cosine", "weight_cosine")
    second_stage = True
    base: Any = "linear"
    exponent: float = 0.8

    @model_validator(mode="after")
    def _check(self) -> DisAlign:
        self._not_negative("exponent")
        return self


class SimCal(HeadOptions):
    bases = ("linear", "cosine")
    second_stage = True
    base: Any = "linear"
    instance_threshold: float = 100
    fresh: bool = False

    @model_validator(mode="after")
    def _check(self) -> SimCal:
        self._not_negative("instance_threshold")
        return self


CLASSIFIERS: dict[str, type[HeadOptions]] = {
    "linear": Linear,
    "cosine": Cosine,
    "weight_cosine": WeightCosine,
    "tde": TDE,
    "forest": Forest,
    "pcb": PCB,
    "disalign": DisAlign,
    "simcal": SimCal,
}


class Classifier(Named):
    """A classifier by name with options of its own."""

    name: ConfigName = "linear"

    @model_validator(mode="after")
    def _check(self) -> Classifier:
        assert self.model_extra is not None
        self.model_extra.update(checked_options(self.name, self.options))
        return self

    @property
    def keywords(self) -> dict[str, Any]:
        """The options without `base`: what the module takes."""
        return {key: value for key, value in self.options.items() if key != "base"}

    @property
    def second_stage(self) -> bool:
        """Whether a second stage puts it around a trained classifier."""
        return CLASSIFIERS[self.name].second_stage

    @property
    def inner(self) -> Classifier:
        """The classifier inside one that is put around another; any other is its own."""
        if not CLASSIFIERS[self.name].bases:
            return self
        return Classifier.model_validate(by_name(self.options.get("base", "linear")))

    def around(self, trained: Classifier) -> Classifier:
        """The same, told which classifier it is put around, where it is one of a second stage and does not say."""
        if not self.second_stage or "base" in self.options:
            return self
        return Classifier.model_validate({"name": self.name, "base": trained.model_dump(), **self.options})


def checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The given options with their types; `ValueError` for an unknown classifier or option, or a wrong value."""
    if name not in CLASSIFIERS:
        raise ValueError(f'there is no classifier "{name}"{nearest(name, CLASSIFIERS)}')
    kind = CLASSIFIERS[name]
    for option in options:
        if option not in kind.model_fields:
            choices = nearest(option, kind.model_fields) if kind.model_fields else " (it has no options)"
            raise ValueError(f'the classifier {name} has no option "{option}"{choices}')
    if kind.bases:
        base = by_name(options.get("base", "linear"))
        if not isinstance(base, Mapping) or base.get("name") not in kind.bases:
            raise ValueError(f'base must be one of {", ".join(kind.bases)} (given: "{options["base"]}")')
        checked_options(base["name"], {key: value for key, value in base.items() if key != "name"})
    try:
        values = kind.model_validate(dict(options))
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "value_error":
            raise ValueError(problem["msg"].removeprefix("Value error, ")) from None
        at = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{at}: {problem['msg']} (given: {problem['input']!r})") from None
    return {option: getattr(values, option) for option in options}
