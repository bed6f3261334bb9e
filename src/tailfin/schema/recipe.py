"""The recipe as a whole, with `about`, `evaluation` and `logging`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tailfin.schema.backbones import check_backbone, known_backbone
from tailfin.schema.base import Count, Fraction, Section, by_name
from tailfin.schema.calibration import Calibration
from tailfin.schema.data import Data
from tailfin.schema.detectors import Detector, FasterRCNNConfig
from tailfin.schema.features import Features, check_features
from tailfin.schema.pretraining import Pretraining
from tailfin.schema.stages import check_stages, known_method, one_precision
from tailfin.schema.stepwise import Stepwise
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


class Classes(Section):
    """How the data's classes are joined with those that weights are of."""

    map: str = ""  # YAML or JSON file of aliases: `name here: name in the weights`, or a list of names


class Logging(Section):
    """What is written while training."""

    every: Count = 20  # iterations per line of metrics.jsonl
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000  # iterations between resume points; 0 = once per epoch
    trackers: tuple[str, ...] = ()  # Accelerate's names: tensorboard, wandb, ...


class Recipe(Section):
    """A method on a detector, a data set and a schedule."""

    name: str = ""
    about: About = About()
    method: Annotated[str, AfterValidator(known_method)] = "baseline"  # of `schema.stages.METHODS`
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # "imagenet" (torchvision's or timm's loader), "packaged", "coco", "none", or a file: a tailfin model or a backbone
    weights: str = "none"
    classes: Classes = Classes()
    backbone: Annotated[str, AfterValidator(known_backbone)] = "resnet50"  # a ResNet, or timm/NAME
    detector: Detector = FasterRCNNConfig()
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
        check_backbone(self.backbone, self.weights, self.detector.norm)
        if self.weights == "coco" and not self.detector.coco_backbone:
            raise ValueError(f"weights: coco has no {self.detector.name}: start from imagenet or a file")
        if self.weights == "coco" and self.backbone != self.detector.coco_backbone:
            raise ValueError(f"weights: coco is for backbone {self.detector.coco_backbone}, not {self.backbone}")
        if self.weights == "none" and self.detector.norm in ("frozen_bn", "frozen_stats"):
            raise ValueError(
                f'a random start (weights: none) cannot train with detector.norm "{self.detector.norm}": use "bn" or '
                '"gn"'
            )
        if not self.detector.CLASSES and self.data.val.annotations:
            raise ValueError(
                f"detector.name {self.detector.name} knows no classes to be measured by: leave the validation set out, "
                "and measure its recall with `tailfin data proposals RUN --annotations VAL.json --out FILE --evaluate`"
            )
        if self.weights == "none" and self.detector.frozen_layers:
            raise ValueError("a random start (weights: none) cannot freeze layers: set detector.frozen_layers to 0")
        if self.pretraining is not None:
            self._check_pretraining(self.pretraining)
        check_features(self.features, self.loss.name)
        for features in (self.features, self.second.features if self.second else None):
            if features is not None and not self.detector.BOX_HEAD:
                raise ValueError(f"{features.name} needs a box head on proposals: detector.name faster_rcnn")
            if features is not None and features.ONE_BOX_HEAD and self.detector.CASCADE:
                raise ValueError(f"{features.name} needs one box head, and {self.detector.name} has one per stage")
        check_stages(self)
        return self

    def _check_pretraining(self, pretraining: Pretraining) -> None:
        if not (self.detector.BOX_HEAD or self.detector.DENSE):
            raise ValueError(
                "pretraining needs a box head on proposals, or anchors on a pyramid: detector.name faster_rcnn, "
                "retinanet or atss"
            )
        if self.detector.DENSE and pretraining.detects and pretraining.det_loss == "class_agnostic":
            raise ValueError(
                f"pretraining.det_loss class_agnostic trains an RPN and a box head, which {self.detector.name} lacks"
            )
        if self.detector.CASCADE:
            raise ValueError(f"pretraining needs one box head, and {self.detector.name} has one per stage")
        if pretraining.freeze_backbone and self.weights == "none":
            raise ValueError(
                f"a random start (weights: none) cannot freeze the backbone, as pretraining.preset "
                f"{pretraining.preset} does: set pretraining.freeze_backbone=false"
            )
        if pretraining.one_curve and self.method == "stepwise":
            raise ValueError("pretraining.one_curve: the steps of method stepwise have rates of their own")
        one_precision(self, "pretraining")
        reconstructs = pretraining.weights.ar > 0 or pretraining.weights.sr > 0
        if reconstructs and max(getattr(self.detector, "fpn_layers", (4,))) < 3:
            raise ValueError("pretraining: the reconstructions need detector.fpn_layers up to 3 or 4")
