"""`stepwise`: step-wise learning on smooth-tail data (Dong et al., ICCV'23).

Defaults are the paper's, and the released code's where the paper is silent. What a step does not say (optimiser, batch,
weight decay, clipping, precision) is the recipe's own `schedule`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tailfin.schema.base import Count, Fraction, NotNegative, Positive, Section, by_name

Kept = Annotated[int, Field(ge=0)] | Literal["all"]  # annotations of each class
Replayed = Kept | Literal["balanced"]  # of old classes; balanced: as many as the step's own classes have on average
Rates = Literal["multistep", "cosine", "constant"]
EVERYTHING = "all"  # in `trains`: every part


def _one_or_several(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


class ExemplarSelection(Section):
    """Which annotations stand for their class (3.1): those that the step-0 model is sure of, from different images."""

    # an exemplars.json of these annotations, or a run that has one, in the place of a selection by step 0; the keys
    # below are then those of that selection
    file: str = ""
    # random: whole pictures by chance, without a look at the step-0 model, and the keys below mean nothing
    order: Literal["score", "random"] = "score"
    score: Literal["max", "gt_class"] = "max"  # of the matched query: over all classes (released), or of its own class
    threshold: Fraction = 0.5  # first come scores above it ...
    distinct_images: bool = True  # ... from images that the class has none of yet; then plain order of scores
    length: Count = 500  # entries of a class's list
    shard: Count = 512  # images after which an interrupted selection goes on


class Band(Section):
    """Repeat factors of classes with at most `images` training images: max(1, (threshold / share) ** power)."""

    images: Count
    threshold: Positive
    power: Positive


class StepSampler(Section):
    """Step-wise repeat factor sampling; shares are of the step's own images."""

    name: Literal["released", "paper", "plain", "bands"] = "released"  # "bands": those given here
    bands: tuple[Band, ...] = ()
    rounding: Literal["ceil", "stochastic"] = "ceil"

    @model_validator(mode="after")
    def _check(self) -> StepSampler:
        if (self.name == "bands") != bool(self.bands):
            raise ValueError('bands go with name "bands", and it needs some')
        if list(self.bands) != sorted(self.bands, key=lambda band: band.images):
            raise ValueError("bands must ascend by images")
        return self


class Distillation(Section):
    """What the teacher, the model of the step before, hands on (3.3, eq. 2 and 3)."""

    feature: NotNegative = 1.0  # lambda_fm; 0 switches the term off
    classes: NotNegative = 0.1  # lambda_cls; 0 switches the term off
    shared_queries: bool = True  # the student's classifier sees the teacher's queries; false: its own
    over: Literal["head", "all"] = "head"  # classes of both distributions: those of earlier steps, or all
    layers: Literal["all", "last"] = "all"  # decoder layers of the class term
    temperature: Positive = 1.0
    # of the class term. kl: eq. 3; l2: length of the difference of the logits (LST), without a temperature
    distance: Literal["kl", "l2"] = "kl"
    teacher_eval: bool = True  # false: the teacher's dropout is live, as in the released code
    mask_rounding: Literal["outer", "released"] = "outer"


class Step(Section):
    """A step on smooth-tail data."""

    per_head_class: Replayed  # annotations of each class of the parts before this step's own (step 1: of the head)
    per_tail_class: Kept  # of each class of its own part (step 1: of all others)
    # COCO files with the annotations that the step keeps, as `tailfin data smooth-tail` writes them, in the place of
    # the two counts: one for each step of the section
    annotations: Annotated[tuple[str, ...], BeforeValidator(_one_or_several)] = ()
    # "all": a control, the step's rates and number of iterations on all annotations in the place of those that it keeps
    shows: Literal["exemplars", "all"] = "exemplars"
    trains: tuple[str, ...] = ()  # parts of the detector that train, or "all"; empty: the class-specific ones
    distillation: Distillation | None = None
    rfs: Annotated[StepSampler, BeforeValidator(by_name)] = StepSampler()
    epochs: Positive = 1
    lr: Positive = 2e-5
    decay: Rates = "multistep"
    milestones: tuple[Positive, ...] = ()
    warmup: Annotated[int, Field(ge=0)] = 0
    photometric: bool = True  # colours, grey and blur on top of the recipe's own augmentation
    data: dict[str, Any] = {}  # other keys of `data` that differ in this step

    @model_validator(mode="after")
    def _check(self) -> Step:
        if self.per_head_class == 0 and self.per_tail_class == 0:
            raise ValueError("per_head_class and per_tail_class are both 0: nothing would be left to train on")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones must ascend")
        return self


class HeadStep(Step):
    """Step 1: the expert of the head classes (3.2)."""

    per_head_class: Replayed = 200
    per_tail_class: Kept = 30


class TailStep(Step):
    """Step 2: head and tail together, taught by the expert (3.3); repeated where there are more than two parts."""

    per_head_class: Replayed = 50
    per_tail_class: Kept = "all"
    distillation: Distillation | None = Distillation()
    epochs: Positive = 2
    lr: Positive = 2e-4
    milestones: tuple[Positive, ...] = (1,)


class Stepwise(Section):
    """Step 0 on whole data, step 1 on head-dominant and step 2 on tail-dominant exemplars."""

    # image counts that part the classes; with `parts` rank numbers of classes, the most frequent ones first
    division: Annotated[tuple[Count, ...], Field(min_length=1)] = (30,)
    boundary: Literal["gt", "ge"] = "gt"  # head has more images than the cut (released), or at least as many (text)
    # images: the classes are parted by `division`; rank: so are the classes by falling number of annotations; known:
    # those that `weights` knows are the head, new ones the tail
    parts: Literal["images", "rank", "known"] = "images"
    base: Literal["whole", "head", "given"] = "whole"  # step 0: all data, head classes alone, or `weights` as they are
    exemplars: ExemplarSelection = ExemplarSelection()
    head: HeadStep | None = HeadStep()  # null: knowledge transfer alone
    tail: TailStep | None = TailStep()  # null: fine-tuning alone
    both: Step | None = None  # a last step on head and tail classes together

    @model_validator(mode="after")
    def _check(self) -> Stepwise:
        if list(self.division) != sorted(set(self.division)):
            raise ValueError("division must ascend")
        if self.parts == "known" and (self.base != "given" or len(self.division) > 1):
            raise ValueError("parts known is for classes added to a trained detector: base given, one cut in division")
        if self.head is not None and self.head.per_head_class == "balanced":
            raise ValueError("head.per_head_class balanced is for later steps: in step 1 no class is old")
        for name in ("head", "tail", "both"):
            step = getattr(self, name)
            counts = () if step is None else (step.per_head_class, step.per_tail_class)
            few = not self.exemplars.file and (step is None or not step.annotations)
            if few and any(isinstance(count, int) and count > self.exemplars.length for count in counts):
                raise ValueError(
                    f"{name} wants more annotations of a class than exemplars.length, {self.exemplars.length}"
                )
            needed = len(self.division) if name == "tail" else 1
            if step is not None and len(step.annotations) not in (0, needed):
                raise ValueError(f"{name}.annotations names {len(step.annotations)} files, {needed} are needed")
        return self
