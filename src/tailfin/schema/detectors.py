"""`detector`: one section per detector, chosen by `detector.name` from the table `DETECTORS`.

A section says of its detector what the rest of the schema needs to know (`PARTS`, `BOX_HEAD`, `CLASSES`), so nothing
asks which one it is. A detector of one's own is a subclass of `DetectorSection` and a line in `DETECTORS`; its builder
is a line in `tailfin.models.BUILDERS` (`examples/own_detector.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from tailfin.errors import nearest
from tailfin.schema.base import Count, Fraction, NotNegative, Positive, by_name
from tailfin.schema.detector_section import DetectorSection
from tailfin.schema.heads import Classifier
from tailfin.schema.problems import explained, told
from tailfin.schema.realtime_detr import DFineConfig, RFDETRConfig, RTDETRv2Config

# `detector.style`: what the two-stage detectors of two libraries do differently, by key; a key that is given counts
STYLES: dict[str, dict[str, Any]] = {
    "torchvision": {},  # the defaults
    "mmdetection": {
        "norm": "frozen_stats",
        "anchor_style": "exact",
        "rpn_box_loss": "l1",
        "rpn_min_pos_iou": 0.3,
        "rpn_low_quality": "take",
        "roi_aligned": True,
        "roi_sampling": 0,
        "init": "xavier",
    },
}


class FasterRCNNConfig(DetectorSection):
    """Faster R-CNN's parts; defaults are detection practice for LVIS and COCO at batch 16."""

    PARTS: ClassVar[tuple[str, ...]] = ("classifier", "box", "head", "rpn", "fpn", "backbone")
    BOX_HEAD: ClassVar[bool] = True
    COCO: ClassVar[str] = "resnet50"
    name: Literal["faster_rcnn"] = "faster_rcnn"
    # ---- `style` sets these and `norm` where they are not given (`STYLES`) ----
    style: Literal["torchvision", "mmdetection"] = "torchvision"
    anchor_style: Literal["torchvision", "exact"] = "torchvision"  # torchvision: whole pixels, strides guessed
    rpn_box_loss: Literal["smooth_l1", "l1"] = "smooth_l1"  # smooth_l1: with beta 1/9
    # objects whose anchors all overlap them little: from which IoU on the best of them are positive, and whether these
    # learn that object ("take") or the one that they overlap most ("keep_owner")
    rpn_min_pos_iou: Fraction = 0.0
    rpn_low_quality: Literal["keep_owner", "take", "none"] = "keep_owner"
    roi_aligned: bool = False  # half-pixel correction
    roi_sampling: Annotated[int, Field(ge=0)] = 2  # samples per bin and side; 0 = as many as the box has cells
    init: Literal["torchvision", "xavier"] = "torchvision"  # first weights of the pyramid and the shared layers
    # ---- the same in every style ----
    fpn_channels: Count = 256
    fpn_layers: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1)] = (1, 2, 3, 4)
    fpn_pool: bool = True  # one more level, pooled from the last
    anchor_sizes: tuple[Count, ...] = (32, 64, 128, 256, 512)  # one per level, in pixels
    anchor_ratios: tuple[Positive, ...] = (0.5, 1.0, 2.0)
    rpn_batch: Count = 256
    rpn_fg_fraction: Fraction = 0.5
    rpn_fg_iou: Fraction = 0.7
    rpn_bg_iou: Fraction = 0.3
    rpn_nms: Fraction = 0.7
    # Forest R-CNN: proposals on rarer objects survive more of the RPN's suppression in training
    rpn_nms_resampling: Literal["none", "discrete", "linear"] = "none"
    rpn_pre_nms: tuple[Count, Count] = (2000, 1000)  # per level, training and test
    rpn_post_nms: tuple[Count, Count] = (1000, 1000)  # per image, training and test
    roi_size: Count = 7
    roi_batch: Count = 512
    roi_fg_fraction: Fraction = 0.25
    roi_fg_iou: Fraction = 0.5
    head_channels: Count = 1024
    classifier: Annotated[Classifier, BeforeValidator(by_name)] = Classifier()
    box_regression: Literal["class_agnostic", "class_specific"] = "class_specific"
    box_loss: Literal["l1", "smooth_l1"] = "l1"
    box_loss_beta: Positive = 1 / 9  # of smooth_l1, below which it is quadratic
    box_loss_weight: NotNegative = 1.0
    rpn_loss_weight: NotNegative = 1.0

    @model_validator(mode="before")
    @classmethod
    def _of_style(cls, values: Any) -> Any:
        style = values.get("style") if isinstance(values, dict) else None
        return {**STYLES.get(style, {}), **values} if isinstance(style, str) else values

    @model_validator(mode="after")
    def _check(self) -> FasterRCNNConfig:
        levels = len(self.fpn_layers) + self.fpn_pool
        if len(self.anchor_sizes) != levels:
            raise ValueError(f"anchor_sizes needs one size per level: {levels} levels, {len(self.anchor_sizes)} sizes")
        if list(self.fpn_layers) != sorted(set(self.fpn_layers)):
            raise ValueError("fpn_layers must ascend")
        return self

    def with_classifier(self, classifier: Classifier) -> FasterRCNNConfig:
        """Another classifier; one of a second stage is told what it is put around."""
        return self.model_copy(update={"classifier": classifier.around(self.classifier)})

    def unwrapped(self) -> FasterRCNNConfig:
        """The detector before a second stage put its classifier around the trained one; any other as it is."""
        return self.with_classifier(self.classifier.inner) if self.classifier.second_stage else self


class MaskRCNNConfig(FasterRCNNConfig):
    """Mask R-CNN: Faster R-CNN's parts and the mask branch."""

    PARTS: ClassVar[tuple[str, ...]] = (*FasterRCNNConfig.PARTS, "mask")
    name: Literal["mask_rcnn"] = "mask_rcnn"  # type: ignore[assignment]
    mask_roi_size: Count = 14  # of the pooled features; masks have twice as many cells per side
    mask_channels: Count = 256
    mask_layers: Count = 4
    masks_by_class: Literal["class_specific", "class_agnostic"] = "class_specific"  # filters of the last layer
    mask_predictor: Literal["linear", "normed"] = "linear"  # normed: cosines, as in Seesaw's models
    mask_temperature: Positive = 20.0  # of the normed one
    mask_targets: Literal["mmdet_bitmap", "d2_bitmap", "torchvision"] = "mmdet_bitmap"  # how masks become targets
    mask_loss_weight: NotNegative = 1.0


Stds = tuple[Positive, Positive, Positive, Positive]


class CascadeRCNNConfig(MaskRCNNConfig):
    """Cascade R-CNN, three stages as published; with `masks` Cascade Mask R-CNN."""

    CASCADE: ClassVar[bool] = True
    COCO: ClassVar[str] = ""
    name: Literal["cascade_rcnn"] = "cascade_rcnn"  # type: ignore[assignment]
    masks: bool = False  # a mask branch per stage; the keys mask_* are its
    box_regression: Literal["class_agnostic", "class_specific"] = "class_agnostic"
    box_loss: Literal["l1", "smooth_l1"] = "smooth_l1"
    box_loss_beta: Positive = 1.0
    stage_ious: tuple[Fraction, ...] = (0.5, 0.6, 0.7)  # in the place of roi_fg_iou
    stage_weights: tuple[NotNegative, ...] = (1.0, 0.5, 0.25)  # of the stages' losses
    stage_mean: Literal["logits", "scores"] = "logits"  # of which the stages' mean is taken; scores: of a softmax
    stage_stds: tuple[Stds, ...] = (  # of the box deltas
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    )

    @model_validator(mode="after")
    def _check_stages(self) -> CascadeRCNNConfig:
        count = len(self.stage_ious)
        if not count or count != len(self.stage_weights) or count != len(self.stage_stds):
            raise ValueError("stage_ious, stage_weights and stage_stds need one entry per stage")
        if "roi_fg_iou" in self.model_fields_set and self.roi_fg_iou != FasterRCNNConfig().roi_fg_iou:
            raise ValueError("roi_fg_iou is Faster R-CNN's; a cascade has stage_ious")
        return self

    def with_classifier(self, classifier: Classifier) -> CascadeRCNNConfig:
        if classifier.second_stage:
            raise ValueError(f"classifier {classifier.name} needs one box head, and {self.name} has one per stage")
        return self.model_copy(update={"classifier": classifier})


class DeformableDETRConfig(DetectorSection):
    """Deformable DETR, two-stage with box refinement; defaults are the published ones (300 queries, 6+6 layers)."""

    PARTS: ClassVar[tuple[str, ...]] = ("classifier", "box", "projection", "encoder", "decoder", "backbone")
    COCO: ClassVar[str] = "resnet50"
    name: Literal["deformable_detr"]
    widths: tuple[Count, ...] = ()  # stem, layer1..4 of a small ResNet in the place of `backbone`; empty: `backbone`
    blocks: tuple[Count, ...] = ()  # its blocks in layer1..4
    levels: Annotated[int, Field(ge=1, le=4)] = 4  # the last backbone layers and one more by a strided convolution
    channels: Count = 256  # a multiple of 32
    encoder_layers: Count = 6
    decoder_layers: Count = 6
    heads: Count = 8
    points: Count = 4
    feedforward: Count = 1024
    dropout: Fraction = 0.1
    queries: Count = 300
    two_stage: bool = True  # queries are the best proposals of the encoder; false: learned ones
    refine: bool = True  # every decoder layer refines the boxes of the one before
    auxiliary: bool = True  # losses on every decoder layer
    class_weight: NotNegative = 3.0  # released code of step-wise learning; Deformable DETR's own is 2
    box_weight: NotNegative = 5.0  # L1
    giou_weight: NotNegative = 2.0
    class_cost: NotNegative = 2.0  # of the matching
    box_cost: NotNegative = 5.0
    giou_cost: NotNegative = 2.0
    # what the encoder's class head is: one logit that ranks proposals, or as released one for every class beside it,
    # which learn that nothing is theirs
    encoder_head: Literal["one", "classes"] = "one"
    # Xavier start of the decoder's queries, keys and values: each for itself, or as released for the one matrix that
    # they are in there, smaller by sqrt(2)
    attention_init: Literal["separate", "packed"] = "separate"
    # losses are divided by the objects of all processes per process: at least one in the batch, or as released at least
    # one for every process
    normalizer: Literal["batch", "process"] = "batch"
    checkpointing: bool = False  # encoder layers are computed again in backward: less memory, about a third more time

    @model_validator(mode="after")
    def _check(self) -> DeformableDETRConfig:
        if self.channels % 32:
            raise ValueError(f"channels must be a multiple of 32 (given: {self.channels})")
        if self.channels % self.heads:
            raise ValueError(f"channels {self.channels} is not a multiple of heads {self.heads}")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine: proposals are boxes, which the decoder layers start from")
        if self.refine and not self.auxiliary:
            raise ValueError("refine needs auxiliary: each layer's boxes learn from its own loss alone")
        if (self.widths or self.blocks) and (len(self.widths), len(self.blocks)) != (5, 4):
            raise ValueError("widths needs five numbers (stem, layer1..4) and blocks four (layer1..4)")
        if self.norm == "gn" and any(width % 32 for width in self.widths):
            raise ValueError('widths must be multiples of 32 with norm "gn"')
        return self


class LocalizerConfig(DetectorSection):
    """Class-agnostic detector that scores how well a box lies; its boxes are proposals. Defaults are OLN's."""

    PARTS: ClassVar[tuple[str, ...]] = ("box", "head", "rpn", "fpn", "backbone")
    CLASSES: ClassVar[bool] = False
    name: Literal["localizer"]
    fpn_channels: Count = 256
    fpn_layers: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1)] = (1, 2, 3, 4)
    fpn_pool: bool = True
    anchor_sizes: tuple[Count, ...] = (32, 64, 128, 256, 512)  # one square anchor per cell and level, in pixels
    rpn_batch: Count = 256  # anchors near an object that train, per image
    rpn_fg_iou: Fraction = 0.3
    rpn_proposals: Count = 2000  # per image to the second stage, without suppression
    roi_size: Count = 7
    roi_sampling: int = 2
    roi_batch: Count = 512  # proposals near an object that train, per image
    roi_fg_iou: Fraction = 0.3
    head_channels: Count = 1024
    background: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of rows without object, to be scored 0; OLN: none
    centerness_weight: NotNegative = 1.0
    rpn_box_weight: NotNegative = 10.0
    iou_weight: NotNegative = 1.0
    box_weight: NotNegative = 1.0
    nms: Fraction = 0.7
    max_proposals: Annotated[int, Field(ge=-1)] = 1500  # reported per image; -1: all

    @model_validator(mode="after")
    def _check(self) -> LocalizerConfig:
        levels = len(self.fpn_layers) + self.fpn_pool
        if len(self.anchor_sizes) != levels:
            raise ValueError(f"anchor_sizes needs one size per level: {levels} levels, {len(self.anchor_sizes)} sizes")
        if list(self.fpn_layers) != sorted(set(self.fpn_layers)):
            raise ValueError("fpn_layers must ascend")
        return self


class RetinaNetConfig(DetectorSection):
    """RetinaNet's parts; defaults are mmdetection's."""

    PARTS: ClassVar[tuple[str, ...]] = ("classifier", "box", "head", "fpn", "backbone")
    DENSE: ClassVar[bool] = True
    COCO: ClassVar[str] = "resnet50"
    name: Literal["retinanet"]
    fpn_channels: Count = 256
    fpn_layers: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1)] = (2, 3, 4)
    fpn_convs: Literal["none", "body", "pyramid"] = "body"  # two more levels, from C5 or from P5 (torchvision)
    fpn_convs_relu: bool = True  # before the second of them; false: mmdetection
    init: Literal["torchvision", "xavier"] = "torchvision"  # first weights of the pyramid; xavier: mmdetection's
    head_convs: Annotated[int, Field(ge=0)] = 4  # layers of each tower
    head_norm: Literal["none", "gn"] = "none"
    anchor_scale: Positive = 4.0  # side of the smallest anchor in strides
    octaves: Count = 3  # sizes per level, 2^(k / octaves) apart
    anchor_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)  # height to width
    anchor_style: Literal["exact", "torchvision"] = "exact"  # torchvision: sides in whole pixels
    pos_iou: Fraction = 0.5
    neg_iou: Fraction = 0.4
    # an object whose anchors all overlap it little: it takes the best of them (mmdetection); they become positive but
    # stay with the object that they overlap most (torchvision, detectron2); none
    low_quality: Literal["take", "keep_owner", "none"] = "take"
    normalizer: Literal["batch", "positives", "picture"] = "batch"  # see `tailfin.models.dense`
    prior: Annotated[float, Field(gt=0, lt=1)] = 0.01  # first score of every class
    box_loss: Literal["l1", "smooth_l1", "giou"] = "l1"
    smooth_l1_beta: Positive = 0.11
    box_loss_weight: NotNegative = 1.0
    pre_nms: Count = 1000  # candidates per level

    @model_validator(mode="after")
    def _check(self) -> RetinaNetConfig:
        _check_dense(self.fpn_layers, self.head_norm, self.fpn_channels)
        if self.neg_iou > self.pos_iou:
            raise ValueError(f"neg_iou {self.neg_iou} must not be above pos_iou {self.pos_iou}")
        return self


class ATSSConfig(DetectorSection):
    """ATSS's parts; defaults are mmdetection's."""

    PARTS: ClassVar[tuple[str, ...]] = ("classifier", "box", "head", "fpn", "backbone")
    DENSE: ClassVar[bool] = True
    name: Literal["atss"]
    fpn_channels: Count = 256
    fpn_layers: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1)] = (2, 3, 4)
    fpn_convs: Literal["none", "body", "pyramid"] = "pyramid"  # two more levels, from C5 or from P5
    fpn_convs_relu: bool = True  # before the second of them; false: mmdetection
    init: Literal["torchvision", "xavier"] = "torchvision"  # first weights of the pyramid; xavier: mmdetection's
    head_convs: Annotated[int, Field(ge=0)] = 4  # layers of each tower
    head_norm: Literal["none", "gn"] = "gn"
    anchor_scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (8.0,)  # sides of the squares in strides
    topk: Count = 9  # candidates of an object per level
    delta_stds: tuple[Positive, Positive, Positive, Positive] = (0.1, 0.1, 0.2, 0.2)
    quality: Literal["centerness", "iou"] = "centerness"  # what the third branch learns; iou: as in EFL's detector
    quality_weight: NotNegative = 1.0
    normalizer: Literal["batch", "positives"] = "batch"  # see `tailfin.models.dense`
    prior: Annotated[float, Field(gt=0, lt=1)] = 0.01  # first score of every class
    box_loss_weight: NotNegative = 2.0  # GIoU
    pre_nms: Count = 1000  # candidates per level
    rank: Literal["class", "product"] = "class"  # by the class's score or by its product with the quality

    @model_validator(mode="after")
    def _check(self) -> ATSSConfig:
        _check_dense(self.fpn_layers, self.head_norm, self.fpn_channels)
        return self


def _check_dense(fpn_layers: tuple[int, ...], head_norm: str, channels: int) -> None:
    if list(fpn_layers) != sorted(set(fpn_layers)):
        raise ValueError("fpn_layers must ascend")
    if head_norm == "gn" and channels % 32:
        raise ValueError(f'fpn_channels must be a multiple of 32 with head_norm "gn" (given: {channels})')


DETECTORS: dict[str, type[DetectorSection]] = {
    "faster_rcnn": FasterRCNNConfig,
    "mask_rcnn": MaskRCNNConfig,
    "cascade_rcnn": CascadeRCNNConfig,
    "deformable_detr": DeformableDETRConfig,
    "localizer": LocalizerConfig,
    "retinanet": RetinaNetConfig,
    "atss": ATSSConfig,
    "d_fine": DFineConfig,
    "rt_detr_v2": RTDETRv2Config,
    "rf_detr": RFDETRConfig,
}


def _chosen(value: Any) -> DetectorSection:
    """The section that `name` stands for; its mistakes are told as those of the recipe."""
    if isinstance(value, DetectorSection):
        return value
    if not isinstance(value, dict):
        raise ValueError("a section of keys is needed")
    name = str(value.get("name", "faster_rcnn"))
    if name not in DETECTORS:
        raise told(f'detector.name: "{name}" is not a choice{nearest(name, DETECTORS)}')
    try:
        return DETECTORS[name].model_validate(value)
    except ValidationError as error:
        raise told(explained(error, DETECTORS[name], "detector")) from None


Detector = Annotated[SerializeAsAny[DetectorSection], BeforeValidator(_chosen)]
