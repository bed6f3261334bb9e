"""A detector of one's own behind tailfin's contract: torchvision's FCOS with any classification loss.

    python examples/own_detector.py [FOLDER]

A section of the recipe, a subclass of `Detector` with the three steps and its parts, and two lines that give it a name:
recipes, overrides, training, resume, evaluation, `predict` and the report then know it. The run trains it with Seesaw
and repeat factor sampling, about a minute on two CPU cores; so few steps show that everything fits together, not
that the detector is good.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS, FCOSHead

import tailfin
from tailfin import losses, models
from tailfin.data.synth import make_synthetic
from tailfin.models.backbones import Backbone, load_body, pyramid_backbone, resnet_body
from tailfin.models.detections import select_detections
from tailfin.models.detector import Detections, Detector, Limits, Targets, reported
from tailfin.models.rpn import Float32Anchors
from tailfin.schema import detectors


class FCOSConfig(detectors.DetectorSection):
    """The section `detector` of a recipe; what it says of itself decides which methods take it."""

    PARTS: ClassVar[tuple[str, ...]] = ("classifier", "box", "fpn", "backbone")
    name: Literal["fcos"]
    fpn_channels: detectors.Count = 64
    convolutions: detectors.Count = 2  # in each of the two towers


class Head(FCOSHead):
    """torchvision's head, whose classification term is tailfin's loss: its rows are the cells of all levels."""

    def __init__(self, channels: int, loss: losses.ClassificationLoss, convolutions: int) -> None:
        super().__init__(channels, 1, loss.num_logits, convolutions)
        self.loss = loss
        nn.init.constant_(self.classification_head.cls_logits.bias, 0.0)
        with torch.no_grad():
            self.classification_head.cls_logits.bias += loss.prior_bias()

    def compute_loss(
        self, targets: Any, head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        found = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        labels = [
            torch.where(match >= 0, target["labels"][match.clamp(min=0)], self.loss.num_classes)
            if len(target["labels"])
            else torch.full_like(match, self.loss.num_classes)
            for target, match in zip(targets, matched_idxs, strict=True)
        ]
        classes = self.loss(head_outputs["cls_logits"].float().flatten(0, 1), torch.cat(labels))
        return {"loss_classifier": classes, "loss_box": found["bbox_regression"], "loss_center": found["bbox_ctrness"]}


class Outputs(NamedTuple):
    """Tensors of a batch; B pictures, A cells of all levels."""

    image_sizes: list[tuple[int, int]]
    head: dict[str, Tensor]  # cls_logits [B, A, num_logits], bbox_regression [B, A, 4], bbox_ctrness [B, A, 1]
    anchors: list[Tensor]  # per picture [A, 4]
    per_level: list[int]


class OwnFCOS(Detector):
    """FCOS as a function of pictures; see `Detector`."""

    def __init__(self, backbone: Backbone, loss: losses.ClassificationLoss, config: FCOSConfig, limits: Limits) -> None:
        super().__init__(backbone, limits, mean=backbone.body.mean, std=backbone.body.std)
        self.head = Head(config.fpn_channels, loss, config.convolutions)
        strides = [*backbone.strides.values()]
        anchors = Float32Anchors(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        self.anchors = anchors
        self.fcos = (FCOS(backbone, loss.num_classes, anchor_generator=anchors, head=self.head),)  # for its matching

    def outputs(self, images: Sequence[Tensor], targets: Targets | None = None) -> Outputs:
        batch = self.batch(images)
        levels = list(self.backbone(batch.tensors).values())
        per_level = [level.shape[-1] * level.shape[-2] for level in levels]
        return Outputs(batch.image_sizes, self.head(levels), self.anchors(batch, levels), per_level)

    def losses(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return self.fcos[0].compute_loss(list(targets), outputs.head, outputs.anchors, outputs.per_level)

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        logits, deltas, center = (outputs.head[key] for key in ("cls_logits", "bbox_regression", "bbox_ctrness"))
        scores = reported(self, self.loss.scores(logits.flatten(0, 1))).unflatten(0, logits.shape[:2])
        scores = (scores * center.sigmoid()).sqrt()
        coder: Any = SimpleNamespace(decode_single=self.head.box_coder.decode)
        return [
            select_detections(own, score, delta[:, None], coder, size, limits)
            for own, score, delta, size in zip(outputs.anchors, scores, deltas, outputs.image_sizes, strict=True)
        ]

    def parts(self) -> dict[str, nn.Module]:
        head = self.head
        return {
            "classifier": head.classification_head,
            "box": head.regression_head,
            "fpn": self.backbone.fpn,
            "backbone": self.backbone.body,
        }

    @property
    def loss(self) -> losses.ClassificationLoss:
        return self.head.loss


def build(recipe: Any, stats: tailfin.ClassStats, loss: Any, body_state: Any, source: str) -> OwnFCOS:
    """The recipe's detector, as `models.BUILDERS` asks for it; `body_state` are weights of the backbone, or none."""
    config = recipe.detector
    body = resnet_body(recipe.backbone, norm=config.norm)
    if body_state is not None:
        load_body(body, body_state, source)
    body.freeze(config.frozen_layers)
    backbone = pyramid_backbone(body, layers=(2, 3, 4), channels=config.fpn_channels, pool=False)
    own = recipe.evaluation
    return OwnFCOS(backbone, loss, config, Limits(own.score_threshold, own.max_dets, own.nms))


detectors.DETECTORS["fcos"] = FCOSConfig
models.BUILDERS["fcos"] = build
RECIPE = """\
weights: none
backbone: resnet18
detector: {name: fcos, norm: bn, frozen_layers: 0}
loss: seesaw
sampler: {name: rfs, threshold: 0.1}
schedule: {epochs: 4, batch: 8, lr: 0.01, warmup: 10, milestones: [3], clip: 10}
data: {sizes: [128], max_size: 128, workers: 0}
"""


def main(folder: Path, epochs: float = 4, images: int = 120) -> Path:
    """Train, measure and report the detector, then use it; returns the run's folder."""
    data = make_synthetic(
        folder / "data", images_train=images, images_val=images // 4, classes=8, size=128, overwrite=True
    )
    recipe = folder / "fcos.yaml"
    recipe.write_text(RECIPE)
    run = tailfin.train(
        recipe,
        train=data.train,
        val=data.val,
        out=folder / "run",
        overrides={"schedule.epochs": epochs},
        overwrite=True,
    )
    detector = tailfin.load(run)  # a program that loads the model must register the detector too
    found = detector.predict(folder / "data" / "val" / "000001.jpg")[0]
    best, score = detector.names[found["labels"][0]], found["scores"][0]
    print(f"{run}: {(run / 'report.html')}; best detection of a picture: {best}, score {score:.2f}")
    return run


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own-detector"))
