"""The recipe as a whole, with `about`, `evaluation` and `logging`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tailfin.schema.base import Count, Fraction, Section, by_name
from tailfin.schema.calibration import Calibration
from tailfin.schema.data import Data
from tailfin.schema.detectors import Detector, FasterRCNN
from tailfin.schema.features import Features, check_features
from tailfin.schema.pretraining import Pretraining
from tailfin.schema.problems import explain
from tailfin.schema.stepwise import Step, Stepwise
from tailfin.schema.training import Loss, Sampler, Schedule, SecondStage
from tailfin.schema.upgrade import upgraded


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
    features: Annotated[Features | None, BeforeValidator(by_name)] = None
    pretraining: Pretraining | None = None  # a stage before the method's
    second: SecondStage | None = None
    stepwise: Stepwise | None = None
    data: Data = Data()
    calibration: Annotated[Calibration | None, BeforeValidator(by_name)] = None  # of the scores that are reported
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @model_validator(mode="before")
    @classmethod
    def _former_keys(cls, values: Any) -> Any:
        return upgraded(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.weights == "none" and self.detector.norm == "frozen_bn":
            raise ValueError(
                'a random start (weights: none) cannot train with detector.norm "frozen_bn": use "bn" or "gn"'
            )
        if self.detector.name == "localizer" and self.data.val.annotations:
            raise ValueError(
                "detector.name localizer knows no classes to be measured by: leave the validation set out, and measure "
                "its recall with `tailfin data proposals RUN --annotations VAL.json --out FILE --evaluate`"
            )
        if self.weights == "none" and self.detector.frozen_layers:
            raise ValueError("a random start (weights: none) cannot freeze layers: set detector.frozen_layers to 0")
        if self.pretraining is not None:
            self._check_pretraining(self.pretraining)
        check_features(self.features, self.loss.name)
        if not isinstance(self.detector, FasterRCNN):
            for features in (self.features, self.second.features if self.second else None):
                if features is not None:
                    raise ValueError(f"{features.name} needs a box head on proposals: detector.name faster_rcnn")
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
        if (self.stepwise is not None) != (self.method == "stepwise"):
            raise ValueError(f"method {self.method} {'has no' if self.stepwise else 'needs a'} section `stepwise`")
        if self.stepwise is not None:
            self._check_steps(self.stepwise)
        return self

    def _check_steps(self, stepwise: Stepwise) -> None:
        for name in ("head", "tail", "both"):
            step = getattr(stepwise, name)
            try:
                if step is not None:
                    self.step_recipe(step)
            except ValidationError as error:
                raise ValueError(explain(error, f"stepwise.{name}.data", Data)) from None
        if self.detector.name == "localizer":
            raise ValueError("method stepwise needs a detector with classes: detector.name localizer has none")
        if stepwise.base == "given" and self.pretraining is not None:
            raise ValueError("stepwise.base given is a trained detector: pretraining has no place before it")
        if stepwise.base == "head" and self.sampler.name != "plain":
            raise ValueError("stepwise.base head shows its images evenly: set sampler plain")

    def step_recipe(self, step: Step) -> Recipe:
        """The recipe of one step of step-wise learning: its rates and pictures, all else as in the whole recipe."""
        own = {name: getattr(step, name) for name in ("epochs", "lr", "decay", "milestones", "warmup")}
        schedule = self.schedule.model_copy(update=own)
        data = Data.model_validate({**self.data.model_dump(), "photometric": step.photometric, **step.data})
        return self.base_step().model_copy(update={"schedule": schedule, "data": data})

    def base_step(self) -> Recipe:
        """The recipe of step 0 of step-wise learning: a plain detector."""
        return self.model_copy(update={"method": "baseline", "stepwise": None, "pretraining": None})

    def _check_pretraining(self, pretraining: Pretraining) -> None:
        if not isinstance(self.detector, FasterRCNN):
            raise ValueError("pretraining needs a box head on proposals: detector.name faster_rcnn")
        if pretraining.freeze_backbone and self.weights == "none":
            raise ValueError(
                f"a random start (weights: none) cannot freeze the backbone, as pretraining.preset "
                f"{pretraining.preset} does: set pretraining.freeze_backbone=false"
            )
        if pretraining.schedule.precision != self.schedule.precision:
            raise ValueError(
                f'pretraining.schedule.precision is "{pretraining.schedule.precision}", schedule.precision '
                f'"{self.schedule.precision}": a run has one precision, set both'
            )
        reconstructs = pretraining.weights.ar > 0 or pretraining.weights.sr > 0
        if reconstructs and max(self.detector.fpn_layers) < 3:
            raise ValueError("pretraining: the reconstructions need detector.fpn_layers up to 3 or 4")

    def pretraining_stage(self) -> Recipe:
        """The recipe of the pre-training stage: its loss, sampler and schedule, a plain detector, no evaluation."""
        if self.pretraining is None:
            raise ValueError("this recipe has no pre-training")
        own = {name: getattr(self.pretraining, name) for name in ("loss", "sampler", "schedule")}
        evaluation = self.evaluation.model_copy(update={"every": 0, "patience": 0, "select": "last"})
        without = {"method": "baseline", "features": None, "second": None, "stepwise": None, "pretraining": None}
        return self.model_copy(update={**own, **without, "evaluation": evaluation})

    def second_stage(self) -> Recipe:
        """The recipe of the second stage alone: its loss, sampler, schedule and pictures, all else as in the first."""
        if self.second is None:
            raise ValueError("this recipe has no second stage")
        data = Data.model_validate({**self.data.model_dump(), **self.second.data})
        own = {name: getattr(self.second, name) for name in ("loss", "sampler", "schedule", "features")}
        if self.second.classifier is not None:
            if not isinstance(self.detector, FasterRCNN):
                raise ValueError("second.classifier needs a box head on proposals: detector.name faster_rcnn")
            own["detector"] = self.detector.with_classifier(self.second.classifier)
        return self.model_copy(update={**own, "data": data, "method": "baseline", "second": None})
