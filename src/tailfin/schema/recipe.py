"""The recipe as a whole, with `about`, `evaluation` and `logging`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tailfin.schema.base import Count, Fraction, Section, by_name
from tailfin.schema.data import Data
from tailfin.schema.detectors import Detector, FasterRCNN
from tailfin.schema.problems import explain
from tailfin.schema.training import Hallucination, Loss, Sampler, Schedule, SecondStage


class About(Section):
    """Where a recipe comes from; printed by `recipes list` and `recipes show`."""

    title: str = ""
    paper: str = ""
    table: str = ""
    published: dict[str, float] = {}  # the paper's numbers, in percent, e.g. {AP: 19.3, APr: 1.1}
    hardware: str = ""  # what the published or measured run used
    hours: float | None = None  # measured wall-clock time, where one is known
    command: str = ""
    notes: str = ""


class Evaluation(Section):
    """How the detector is measured, while it trains and at the end."""

    protocol: Literal["lvis", "coco", "lvis-fixed", "groups"] = "lvis"
    iou: tuple[Literal["bbox", "segm"], ...] = ("bbox",)
    max_dets: Annotated[int, Field(ge=-1)] = 300  # detections per image; -1 = no limit
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    nms: Fraction = 0.5
    batch: Count = 8  # images per step and process
    every: Annotated[int, Field(ge=0)] = 0  # epochs between evaluations; 0 = only at the end
    group_bounds: tuple[Count, ...] | None = None  # image-count bounds of rare and common; none: the documented rule
    patience: Annotated[int, Field(ge=0)] = 0  # stop after so many evaluations without a better AP; 0 = never
    select: Literal["last", "best"] = "last"  # which weights become the final model, where `every` is set

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        if self.max_dets == 0:
            raise ValueError("max_dets must be positive, or -1 for no limit")
        return self


class Logging(Section):
    """What is written while training."""

    every: Count = 20  # iterations per line of metrics.jsonl
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000  # iterations between resume points; 0 = once per epoch
    trackers: tuple[str, ...] = ()  # Accelerate's names: tensorboard, wandb, ...


class Recipe(Section):
    """A method on a detector, a data set and a schedule."""

    name: str = ""
    about: About = About()
    method: Literal["baseline", "decoupled", "bacl", "stepwise"] = "baseline"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    weights: str = "none"  # "imagenet" (torchvision's own loader), "none", or a file: a tailfin model or a ResNet
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    detector: Detector = FasterRCNN()
    loss: Annotated[Loss, BeforeValidator(by_name)] = Loss()
    sampler: Annotated[Sampler, BeforeValidator(by_name)] = Sampler()
    schedule: Schedule = Schedule()
    hallucination: Hallucination | None = None
    second: SecondStage | None = None
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.weights == "none" and self.detector.norm == "frozen_bn":
            raise ValueError(
                'a random start (weights: none) cannot train with detector.norm "frozen_bn": use "bn" or "gn"'
            )
        if self.weights == "none" and self.detector.frozen_layers:
            raise ValueError("a random start (weights: none) cannot freeze layers: set detector.frozen_layers to 0")
        if (self.second is not None) != (self.method in ("decoupled", "bacl")):
            raise ValueError(f"method {self.method} {'has no' if self.second else 'needs a'} section `second`")
        if self.second is not None:
            try:
                self.second_stage()
            except ValidationError as error:
                raise ValueError(explain(error, "second.data", Data)) from None
            if self.second.schedule.precision != self.schedule.precision:
                raise ValueError(
                    f'second.schedule.precision is "{self.second.schedule.precision}", schedule.precision '
                    f'"{self.schedule.precision}": a run has one precision, set both'
                )
        return self

    def second_stage(self) -> Recipe:
        """The recipe of the second stage alone: its loss, sampler, schedule and pictures, all else as in the first."""
        if self.second is None:
            raise ValueError("this recipe has no second stage")
        data = Data.model_validate({**self.data.model_dump(), **self.second.data})
        own = {name: getattr(self.second, name) for name in ("loss", "sampler", "schedule", "hallucination")}
        return self.model_copy(update={**own, "data": data, "method": "baseline", "second": None})
