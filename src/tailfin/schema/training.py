"""Sections about training: loss, sampler, schedule, and the second stage of a decoupled method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tailfin.schema.base import ConfigName, Count, Fraction, Named, NotNegative, Positive, Section, by_name
from tailfin.schema.features import Features, check_features
from tailfin.schema.heads import Classifier


class Loss(Named):
    """The classification loss of the box head, with the options of its constructor (`tailfin.losses`)."""

    name: ConfigName = "softmax"

    @model_validator(mode="after")
    def _check(self) -> Loss:
        from tailfin import losses  # the list of losses is the schema of this section

        losses.check_options(self.name, self.options)
        if not losses.LOSSES[self.name].alone:
            whole = [name for name, kind in losses.LOSSES.items() if kind.alone]
            choices = ", ".join(whole)
            raise ValueError(f'"{self.name}" is a term without scores, not a whole loss: take one of {choices}')
        return self


class Sampler(Section):
    """Which image, how often. `threshold` is RFS's t, a fraction of the training images."""

    name: Literal["plain", "rfs", "irfs", "class_aware", "dynamic", "eirfs", "eirfs_paper"] = "plain"
    threshold: Positive = 1e-3
    exponent: NotNegative = 0.5  # of threshold / share: a square root
    rounding: Literal["stochastic", "ceil", "floor", "round"] = "stochastic"
    alpha: NotNegative = 2.0  # of eirfs and eirfs_paper: strength
    first_epoch: Literal[0, 1] = 0  # of dynamic: number of the first epoch; 0 starts as rfs, 1 ends at the instances


class Schedule(Section):
    """Optimiser and learning rate; the rate is a pure function of the iteration."""

    epochs: Positive = 12
    batch: Count = 16  # images per optimiser step over all processes and accumulation steps
    accumulation: Count = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.02  # of a batch of `lr_batch`, see `rate`
    # for another batch than lr_batch: lr as it is; times batch / lr_batch (SGD); times its root (AdamW)
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    lr_batch: Annotated[int, Field(ge=0)] = 0  # 0: the recipe's own batch, before overrides
    lr_scales: dict[str, NotNegative] = {}  # factors of the rate by a text in the parameter's name
    momentum: Fraction = 0.9
    weight_decay: NotNegative = 1e-4
    norm_decay: bool = True  # weight decay on norm layers' scale and shift too
    warmup: Annotated[int, Field(ge=0)] = 500  # iterations
    warmup_ratio: Fraction = 0.001
    decay: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: tuple[Positive, ...] = (8, 11)  # epochs after which the rate is multiplied by gamma
    gamma: Positive = 0.1
    clip: Positive | None = None  # bound of the gradient's norm
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"  # auto: bf16 where the device computes in it, else no
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of an exponential moving average of the weights
    channels_last: bool = False
    compile: bool = False  # torch.compile of backbone and pyramid; takes minutes at the start

    @property
    def rate(self) -> float:
        """The learning rate of this batch: `lr`, scaled by `lr_rule`."""
        ratio = self.batch / (self.lr_batch or self.batch)
        return self.lr * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.lr_rule]

    def rate_told(self) -> str:
        """How the rule scales the rate; empty where it does not."""
        if self.rate == self.lr:
            return ""
        return f"lr {self.rate:.4g}: {self.lr_rule} from {self.lr:g} at batch {self.lr_batch} to batch {self.batch}"

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} is not a multiple of accumulation {self.accumulation}")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones must ascend")
        return self


class SecondStage(Section):
    """The classifier stage of a decoupled method: it starts from the first stage's detector."""

    loss: Annotated[Loss, BeforeValidator(by_name)] = Loss()
    sampler: Annotated[Sampler, BeforeValidator(by_name)] = Sampler()
    schedule: Schedule = Schedule()
    trains: tuple[str, ...] = ("classifier", "box", "rpn")  # parts of the detector, by its section's PARTS
    features: Annotated[Features | None, BeforeValidator(by_name)] = None  # of this stage; the first one's is not kept
    classifier: Annotated[Classifier, BeforeValidator(by_name)] | None = None  # none: that of the first stage
    fresh_classifier: bool = False  # start the classifier anew instead of from the first stage's
    data: dict[str, Any] = {}  # keys of `data` that differ in this stage (resize, sizes, flip, ...)

    @model_validator(mode="after")
    def _check(self) -> SecondStage:
        if not self.trains:
            raise ValueError("trains must name at least one part")
        check_features(self.features, self.loss.name)
        return self
