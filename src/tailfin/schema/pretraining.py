"""`pretraining`: a stage before the method that trains the whole detector on two views of every picture.

`preset` names a published pre-training: its terms and their weights, how each term contrasts, and the views. It fills
the keys that are not given, and a key that is given wins, but a preset trains its own terms alone: a weight or an
option of a term that it does not have is refused by name. A preset chosen over that of a recipe file drops the file's
weights and its options of other terms (`presets.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tailfin.schema.base import Count, Fraction, NotNegative, Positive, Section, Size, by_name
from tailfin.schema.presets import OWNERS, PRESETS, TERMS, merged, terms
from tailfin.schema.training import Loss, Sampler, Schedule

Norm = Literal["batch", "layer", "none"]
FEW = 16  # rows, the published batch
Preset = Literal["drcl", "moco_v2", "simclr", "byol", "soco", "aligndet", "densecl", "slotcon", "self_emd"]


class Views(Section):
    """Two independent views of a picture. Pairs of values are for the first and the second view."""

    crop_area: tuple[Fraction, Fraction] = (0.5, 1.0)  # share of the picture that a crop keeps; (1, 1) is no crop
    crop_ratio: tuple[Positive, Positive] = (0.75, 4 / 3)  # width over height
    # short: one of `sizes` becomes the short side of a view; square: every crop becomes a square of one of them
    resize: Literal["short", "square"] = "short"
    sizes: tuple[Size, ...] = ()  # empty: data.sizes
    max_size: Annotated[int, Field(ge=0)] = 0  # bound of the long side; 0: data.max_size
    flip: Fraction = 0.5
    jitter: tuple[NotNegative, NotNegative, NotNegative, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: Fraction = 0.8  # of the jitter of brightness, contrast, saturation and hue, in random order
    gray_p: Fraction = 0.2
    blur_p: tuple[Fraction, Fraction] = (0.5, 0.5)
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)  # pixels of the view
    solarise_p: tuple[Fraction, Fraction] = (0.0, 0.2)
    min_kept: Fraction = 0.5  # a box is valid where a view keeps this share of its area ...
    min_side: NotNegative = 8.0  # ... and both sides have so many pixels of the view
    min_valid: Annotated[int, Field(ge=0)] = 2  # fewer pairs that are valid in both views: the crops are drawn again
    keep_rarest: bool = True  # so are they where the first view loses the picture's rarest class, by `min_kept`
    min_overlap: Fraction = 0.0  # so are they where less of the second crop than this lies in the first
    redraws: Annotated[int, Field(ge=0)] = 10  # as often as that; then neither view is cropped
    # what the losses of det_loss class_aware look at. weak: a picture of its own, by `data` as in fine-tuning: it loses
    # no object, and costs one more pass of the detector; first: the first view, whose cut objects are ignored
    detection: Literal["weak", "first"] = "weak"
    box_jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # shift and scale of a proposal in a view, share of it
    box_jitter_p: Fraction = 0.5

    @model_validator(mode="after")
    def _check(self) -> Views:
        for name in ("crop_area", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (smaller, larger)")
        if not self.crop_area[0]:
            raise ValueError("crop_area must be larger than 0")
        return self


class Proposals(Section):
    """Boxes around objects of any class, which the box term contrasts."""

    # file: written by `tailfin data proposals` or another program; rpn: the same, and it must come from a detector of
    # tailfin; gt: the annotations; gt_jitter: shifted copies of them and random boxes; selective_search: on the fly
    source: Literal["file", "gt", "gt_jitter", "rpn", "selective_search"] = "file"
    file: str = ""  # of file and rpn; relative to data.root
    fallback: Literal["gt_jitter", "gt", "none"] = "gt_jitter"  # takes the place of fewer than `fallback_below` boxes
    fallback_below: Annotated[int, Field(ge=0)] = 1
    per_image: Count = 8  # drawn at random for every sample
    top: Annotated[int, Field(ge=0)] = 100  # draw from so many of the best boxes; 0: from all
    min_side: NotNegative = 0.0  # pixels of the picture
    max_aspect: Annotated[float, Field(ge=0)] = 0.0  # longer over shorter side; 0: any
    size: tuple[Fraction, Fraction] = (0.0, 1.0)  # bounds of the square root of a box's share of the picture
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.25  # of gt_jitter: shift and scale, share of the box's side
    random: Fraction = 0.25  # of gt_jitter: share of boxes at random places

    @model_validator(mode="after")
    def _check(self) -> Proposals:
        if self.size[0] > self.size[1]:
            raise ValueError("size must be (smaller, larger)")
        if 0 < self.max_aspect < 1:
            raise ValueError("max_aspect is the longer over the shorter side: at least 1, or 0 for any")
        return self


class Weights(Section):
    """Factor of each term in the sum, by default the preset's; a term of weight 0 is not computed."""

    hcl: NotNegative = 0.0  # holistic contrast: the two views of a picture
    lcl: NotNegative = 0.0  # local contrast: a box in both views
    dense: NotNegative = 0.0  # contrast of matched cells (DenseCL)
    slots: NotNegative = 0.0  # grouping of cells by prototypes, and contrast of the groups (SlotCon)
    emd: NotNegative = 0.0  # optimal transport between the views' cells (Self-EMD)
    ar: NotNegative = 0.0  # appearance reconstruction
    sr: NotNegative = 0.0  # semantic reconstruction
    det: NotNegative = 0.0  # the detector's own losses, by `det_loss`


class Contrast(Section):
    """How one term contrasts: its loss, its negatives, and the layers between feature and unit vector."""

    # info_nce: against a queue of earlier keys; nt_xent: against the rest of the batch; cosine: no negatives
    loss: Literal["info_nce", "nt_xent", "cosine"] = "info_nce"
    temperature: Positive = 0.2
    same_class: Literal["negative", "left_out"] = "negative"  # keys of the query's own class in the queue
    queue: Count = 65536  # keys remembered, for info_nce; should not exceed the keys of one epoch
    hidden: Count = 256  # width of the projector's hidden layer
    dim: Count = 256
    # of projector and predictor. batch: over the rows of all processes; layer: every row by itself, for small batches
    norm: Norm = "batch"
    predictor: bool = True  # one more such network, on the trained side only

    @model_validator(mode="before")
    @classmethod
    def _former(cls, values: Any) -> Any:
        """`norm` was `true` or `false` before."""
        if isinstance(values, dict) and isinstance(values.get("norm"), bool):
            return {**values, "norm": "batch" if values["norm"] else "none"}
        return values


class BoxContrast(Contrast):
    """The same for boxes."""

    rois: Literal["proposals", "assigned"] = "proposals"  # assigned: the RoI head's foreground rows around a proposal
    levels: Literal["assigned", "all"] = "assigned"  # pyramid levels a box is pooled from: that of its size, or each


class DenseContrast(Contrast):
    """The same for matched cells."""

    hidden: Count = 2048
    dim: Count = 128
    norm: Norm = "none"
    predictor: bool = False


class TransportContrast(Contrast):
    """The same for the maps of two views, compared by optimal transport."""

    loss: Literal["info_nce", "nt_xent", "cosine"] = "cosine"
    hidden: Count = 4096
    epsilon: Positive = 0.05  # weight of the flow's entropy
    iterations: Count = 10  # of Sinkhorn


class Slots(Section):
    """Prototypes that group the cells of the backbone's last layer, and how the groups are contrasted."""

    prototypes: Count = 256
    hidden: Count = 4096  # width of the hidden layers of projector and predictor
    dim: Count = 256
    group_weight: Fraction = 0.5  # of grouping; the rest is that of the contrast of slots
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.07  # also that of the cells' shares of a slot
    temperature: Positive = 0.2  # of the contrast of slots
    centre_momentum: Fraction = 0.9


class Reconstruction(Section):
    """The generator on the backbone's last layer, and what its pictures are compared on."""

    widths: tuple[Count, Count, Count] = (512, 256, 64)  # between the four transposed convolutions
    # how four doublings reach the backbone's stride of 32: the result is enlarged, the first one quadruples (a larger
    # error and a pattern of squares: docs/results.md), or the target is shrunk
    bridge: Literal["bilinear", "first_stride4", "half_target"] = "bilinear"
    mask_fraction: Fraction = 0.25  # of a proposal's area
    mask_proposals: Literal["one", "all"] = "one"  # per picture
    mask_fill: Literal["zero", "noise"] = "zero"  # zero is the mean colour
    layers: tuple[Annotated[int, Field(ge=1, le=4)], ...] = (1, 2, 3, 4)  # backbone layers that SR compares
    stop_gradient: bool = False  # the real picture's features are a fixed target of SR
    # of SR per layer: its features' own mean square, or raw, where SR is as large as the backbone's features are
    sr_unit: Literal["energy", "raw"] = "energy"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the pictures that SR encodes again: its mean is over these


class ProposalSampler(Sampler):
    """`sampler`, where instances may be proposals."""

    # what counts as instances of a class: its annotations, or the proposals that overlap one by half
    instance_source: Literal["gt", "proposal"] = "gt"


class Pretraining(Section):
    """Terms, networks and schedule of the pre-training stage."""

    preset: Preset = "drcl"
    views: Views = Views()
    proposals: Proposals = Proposals()
    weights: Weights = Weights()
    image: Contrast = Contrast()
    box: BoxContrast = BoxContrast()
    dense: DenseContrast = DenseContrast()
    slots: Slots = Slots()
    transport: TransportContrast = TransportContrast()
    reconstruction: Reconstruction = Reconstruction()
    # class_aware: all losses of the detector; class_agnostic: RPN and box losses with the proposals as objects
    det_loss: Literal["class_aware", "class_agnostic", "none"] = "class_aware"
    loss: Annotated[Loss, BeforeValidator(by_name)] = Loss()  # the classification loss of class_aware
    momentum: Fraction = 0.999  # of the momentum network
    # iterations that the momentum network remembers at most, share of the stage's: 0.999 needs 20,000 to mean 0.999 at
    # 0.05, less is used before; 0: `momentum` in a stage of any length
    momentum_horizon: Fraction = 0.05
    momentum_schedule: Literal["constant", "cosine"] = "constant"  # cosine: rises to 1 at the end of the stage
    symmetric: bool = False  # contrast both ways; costs another pass of both networks
    third_view: bool = False  # the second view at half size, as one more target of the box term
    freeze_backbone: bool = False
    # go on with classifier and box layer too; none: where det_loss is class_aware and `loss` that of what follows
    keep_predictor: bool | None = None
    sampler: Annotated[ProposalSampler, BeforeValidator(by_name)] = ProposalSampler(name="dynamic")
    schedule: Schedule = Schedule()
    # the learning rate goes on where the pre-training leaves it, in one curve over the epochs of both: that of the
    # recipe's `schedule`, whose milestones then count from the start of the pre-training; the optimiser starts anew
    one_curve: bool = False

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset", "drcl") not in PRESETS:
            return values  # said by the field's own check
        return merged(PRESETS[values.get("preset", "drcl")], values)

    @model_validator(mode="after")
    def _check(self) -> Pretraining:
        weights = self.weights
        self._check_terms()
        backbone_terms = (weights.hcl, weights.dense, weights.slots, weights.emd, weights.ar, weights.sr)
        if not any((*backbone_terms, weights.lcl, self.detects)):
            raise ValueError("every weight is 0: nothing would be trained")
        if weights.dense and self.dense.loss != "info_nce":
            raise ValueError(f"dense.loss cannot be {self.dense.loss}: cells are contrasted by info_nce")
        if weights.lcl and self.box.rois == "assigned" and self.box.loss != "nt_xent":
            raise ValueError('box.rois "assigned" has several rows per box: it needs box.loss nt_xent')
        if weights.lcl and self.box.rois == "assigned" and not (self.detects and self.det_loss == "class_agnostic"):
            raise ValueError('box.rois "assigned" takes the rows of det_loss class_agnostic')
        if weights.lcl and self.box.rois == "assigned" and (self.symmetric or self.third_view):
            raise ValueError('box.rois "assigned" contrasts one way, without symmetric and third_view')
        if weights.lcl and self.box.rois == "proposals" and self.box.loss == "nt_xent":
            raise ValueError('box.loss nt_xent needs box.rois "assigned"')
        if self.keep_predictor and (self.det_loss != "class_aware" or not self.detects):
            raise ValueError("keep_predictor needs det_loss class_aware: no other trains classifier and box layer")
        if weights.emd and self.transport.loss != "cosine":
            raise ValueError(f"transport.loss cannot be {self.transport.loss}: the cost of transport is cosine")
        if weights.slots and self.third_view:
            raise ValueError("third_view has no part in the contrast of slots (weights.slots)")
        if self.freeze_backbone and any(backbone_terms) and not (weights.lcl or self.detects):
            raise ValueError("freeze_backbone leaves nothing to train: its terms train the backbone alone")
        for name in ("image", "box", "dense", "transport"):
            own = getattr(self, name)
            if own.same_class == "left_out" and (own.loss != "info_nce" or name == "dense"):
                raise ValueError(
                    f"{name}.same_class left_out needs negatives with classes: image or box, loss info_nce"
                )
        if self.box.same_class == "left_out" and self.box.rois == "assigned":
            raise ValueError("box.same_class left_out needs box.rois proposals")
        if self.sampler.instance_source == "proposal":
            self._check_proposal_counts()
        if list(self.reconstruction.layers) != sorted(set(self.reconstruction.layers)):
            raise ValueError("reconstruction.layers must ascend")
        return self

    def _check_terms(self) -> None:
        """What belongs to terms that the preset does not have is as the preset leaves it."""
        have = terms(self.preset)
        for key, owners in OWNERS.items():
            if not set(owners) & set(have):
                usual, own = _usual(type(self), self.preset, key), getattr(self, key)
                if own != usual:
                    raise ValueError(self._foreign(_difference(key, own, usual), owners))
        for term in TERMS:
            if getattr(self.weights, term) and term not in have:
                raise ValueError(self._foreign(f"weights.{term}", (term,)))

    def _foreign(self, key: str, owners: Sequence[str]) -> str:
        return (
            f"{key} belongs to {' and '.join(owners)}, which preset {self.preset} does not have (it has "
            f"{', '.join(terms(self.preset))}): leave it out"
        )

    def _check_proposal_counts(self) -> None:
        source, what = self.proposals.source, "sampler.instance_source proposal"
        if self.sampler.name not in ("dynamic", "irfs"):
            raise ValueError(f"{what} needs a sampler that counts instances: dynamic or irfs, not {self.sampler.name}")
        if not self.uses_proposals:
            raise ValueError(f"{what}: no term of this pre-training uses proposals")
        if source == "gt_jitter":
            raise ValueError(
                f'{what}: proposals.source "gt_jitter" draws new boxes for every sample, they cannot be counted; take '
                'instance_source "gt", or proposals.source file, rpn or gt'
            )
        if source == "selective_search":
            raise ValueError(
                f'{what}: proposals.source "selective_search" has no boxes before training; write them with `tailfin '
                'data proposals selective_search` and take proposals.source "file"'
            )

    def normed_by_few(self, pictures: int) -> str:
        """What to know about batch norm over `pictures`, those of all processes at a time; empty where they suffice.

        In a batch of n rows the others' mean cosine with a row is -1/(n - 1) behind the norm, whatever the pictures
        are, and gradients grow: with 2 rows they are twenty times those of 16.
        """
        rows = {
            "image": (self.weights.hcl, self.image.norm, pictures),
            "box": (self.weights.lcl, self.box.norm, pictures * self.proposals.per_image),
        }
        few = [
            f"pretraining.{name}.norm" for name, (own, norm, n) in rows.items() if own and norm == "batch" and n < FEW
        ]
        return (
            f"{' and '.join(few)} batch: projector and predictor normalise over the {pictures} pictures that all "
            f"processes have at a time; fewer than {FEW} rows tell each other apart by the norm alone. Take a larger "
            f"batch, or {few[0]}=layer"
            if few
            else ""
        )

    def described(self) -> str:
        """The terms with their weights, on one line."""
        given = {term: getattr(self.weights, term) for term in terms(self.preset)}
        return ", ".join(f"{term} {weight:g}" for term, weight in given.items() if weight)

    @property
    def detects(self) -> bool:
        """Whether the detector's own losses take part."""
        return self.weights.det > 0 and self.det_loss != "none"

    @property
    def weak_view(self) -> bool:
        """Whether the detector's own losses have a picture of their own."""
        return self.detects and self.det_loss == "class_aware" and self.views.detection == "weak"

    @property
    def needs_overlap(self) -> bool:
        """Whether a term asks where the two views show the same."""
        return self.weights.slots > 0

    @property
    def uses_proposals(self) -> bool:
        """Whether any term looks at the boxes."""
        agnostic = self.detects and self.det_loss == "class_agnostic"
        return agnostic or self.weights.lcl > 0 or self.weights.sr > 0


def _usual(section: type[Pretraining], preset: str, key: str) -> Any:
    """What a key is where only the preset is given."""
    default, given = section.model_fields[key].default, PRESETS[preset].get(key)
    if given is None:
        return default
    return type(default).model_validate(given) if isinstance(default, Section) else given


def _difference(key: str, own: Any, usual: Any) -> str:
    """The key, or that key of the section which differs."""
    if not isinstance(own, Section):
        return key
    return next(f"{key}.{name}" for name in type(own).model_fields if getattr(own, name) != getattr(usual, name))
