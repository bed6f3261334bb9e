"""`features`: rows, terms or weights for the classifier beside the sampled proposals, told apart by `features.name`.

A key of the recipe, and of `second`, that is absent by default; a second stage does not inherit that of the first.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from tailfin.schema.base import Count, NotNegative, Positive, Section

# What draws are counted by. batch: the pictures, as many for each as in the published runs of 8 processes with 2, so
# that an optimiser batch has the same however it is split; process, as released: each process and accumulation step
Per = Literal["batch", "process"]


class Hallucination(Section):
    """BACL's feature hallucination (III-E): made-up rows for the classifier, from running statistics per class."""

    ONE_BOX_HEAD: ClassVar[bool] = False  # whether it cannot stand beside each of a cascade's
    name: Literal["hallucination"] = "hallucination"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9  # momentum of the statistics
    per: Per = "batch"
    sampled_num_classes: Count = 8  # c, classes drawn for every two pictures, or by every process
    sampled_num_features: Count = 12  # m, features per drawn class
    spread: Literal["deviation", "variance"] = "deviation"  # what the noise is multiplied with: released code, or text
    independent_boxes: bool = False  # draw the 16 boxes' shifts independently (text), not once per image (released)
    across_ranks: bool = True  # statistics over all processes; false, as released: each process has its own


class FeatureMemory(Section):
    """LOCE's feature memory: stored rows of classes that score low train the classifier and the boxes again."""

    ONE_BOX_HEAD: ClassVar[bool] = True
    name: Literal["feature_memory"] = "feature_memory"
    size: Count = 80  # rows kept per class
    per: Per = "batch"
    sampled_num_classes: Count = 8  # classes drawn for every two pictures, or by every process
    sampled_num_features: Count = 4  # rows per drawn class
    stores: Literal["shared", "pooled"] = "shared"  # behind the shared layers; before them where they train
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the stored features
    keep_on_cpu: bool = False  # leave them in main memory, as released
    prefill: bool = True  # fill the memory class by class before a second stage begins


class FASA(Section):
    """FASA: made-up features of classes, drawn with probabilities that follow how the classes' losses change."""

    ONE_BOX_HEAD: ClassVar[bool] = False
    name: Literal["fasa"] = "fasa"
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1  # by how much a batch moves the class statistics
    loss_aug_weight: NotNegative = 0.1  # weight of the made-up features' loss
    instance_prob_power: NotNegative = 1.0  # first probability: scale * n^-power / sum(n^-power), n training instances
    instance_prob_scale: NotNegative = 1.0
    dynamic_up: Positive = 1.1  # factor of the probability where the loss of a cluster of classes fell in an epoch
    dynamic_down: Positive = 0.9  # and where it rose
    clustering: Literal["released", "negated"] = "released"  # squared distances taken for similarities, or negated
    start_epoch: Annotated[int, Field(ge=0)] = 1  # first epoch with made-up features
    per: Per = "batch"  # a draw for every two pictures, or one by every process
    across_ranks: bool = True  # statistics over all processes; false, as released: each process has its own


class RIO(Section):
    """RIO's object bank: the newest rows of a rare class join each batch that has the class."""

    ONE_BOX_HEAD: ClassVar[bool] = False
    name: Literal["rio"] = "rio"
    size: Count = 60  # rows kept per class
    cache: Count = 20  # rows that join per class in a picture, or in a process's pictures
    per: Per = "batch"
    max_images: Count = 30  # classes with at most so many training images have a bank


class MetaReweighting(Section):
    """BALMS's meta reweighter: class weights learnt on a class-balanced stream through an inner step."""

    ONE_BOX_HEAD: ClassVar[bool] = True
    name: Literal["meta_reweighting"] = "meta_reweighting"
    lr: Positive = 0.01  # of Adam on the class weights
    inner_lr: Positive | None = None  # of the inner step; none: the stage's rate at the iteration


def _name(value: Any) -> str:
    return str(value.get("name", "") if isinstance(value, dict) else getattr(value, "name", ""))


Features = Annotated[
    Annotated[Hallucination, Tag("hallucination")]
    | Annotated[FeatureMemory, Tag("feature_memory")]
    | Annotated[FASA, Tag("fasa")]
    | Annotated[RIO, Tag("rio")]
    | Annotated[MetaReweighting, Tag("meta_reweighting")],
    Discriminator(_name),
]
NEEDS = {  # feature module -> (loss that it works with, what it takes from it)
    "hallucination": ("fcbl", "draws classes by the indicator of fcbl"),
    "feature_memory": ("ebl", "draws classes by the mean score of ebl"),
    "fasa": ("softmax", "adds a softmax cross-entropy of its own"),
    "meta_reweighting": ("balanced_sigmoid", "weighs the rows of balanced_sigmoid"),
}


def check_features(features: Features | None, loss: str) -> None:
    """Raise `ValueError` where a stage's feature module does not go with the name of its loss."""
    needed, why = NEEDS.get(features.name, ("", "")) if features is not None else ("", "")
    if features is not None and needed and loss != needed:
        hint = " (loss.alpha=0 loss.reweight=false switch its margin and weight off)" if needed == "fcbl" else ""
        raise ValueError(f"{features.name} {why}: set loss={needed}{hint}")
