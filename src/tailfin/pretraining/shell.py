"""The shell in which pre-training trains a detector: momentum network, projectors, queues and generator around it.

One iteration, in this order (2DRCL, NeurIPS'24):

    the momentum network follows the trained one
    view 1 -> backbone -> pyramid                      trained; every term below shares these features
           -> RPN, box head -> detection losses
           -> pooled, projected, predicted -> queries
    view 2 -> momentum network -> keys                 no gradients
    queries, keys, queues -> contrast of pictures (HCL), of boxes (LCL), of cells (DenseCL)
    view 1's features -> generator -> picture -> AR; masked, encoded again -> SR
    keys of all processes -> queues

The presets of a recipe (MoCo v2, SimCLR, BYOL, SoCo, AlignDet, DenseCL) are the same shell with other weights. A term
of weight 0 has no network, no queue and no pass. Parts of the detector that no term reaches are frozen, so that
training on several processes never waits for their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from tailfin.collectives import sum_over_ranks
from tailfin.errors import UserError
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.features.base import Targets
from tailfin.models.images import batch_images
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.pretraining import reconstruction as recon
from tailfin.pretraining.contrast import (
    ProjectionMLP,
    RingQueue,
    box_nt_xent,
    cosine_distance,
    gather_rows,
    info_nce,
    nt_xent,
)
from tailfin.pretraining.momentum import cosine_momentum, follow, momentum_copy
from tailfin.schema.pretraining import Contrast, Pretraining

GRID = 7  # cells per side that the dense term contrasts
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class View(NamedTuple):
    """One augmented picture of every image of a batch, and its proposals, float32 [P, 4] per image."""

    batch: ImageList
    boxes: list[Tensor]


class Features(NamedTuple):
    """What a network makes of a view."""

    layers: dict[str, Tensor]  # of the backbone: layer1..layer4, as many as it has
    pyramid: dict[str, Tensor]  # empty where no term needs it


class PreTrainer(nn.Module):
    """`shell(images, targets) -> named losses`, each with its weight in it.

    Images are the first views (uint8 or float in 0..1, [3, H, W]). Targets hold boxes, labels (objects in view 1),
    `view` (the second view), `proposals` and `view_proposals` (float32 [P, 4], pairwise in both views; P may be 0), and
    with `third_view` also `third` and `third_proposals`.

    Args:
        detector: trained in place; what is in it afterwards is the result.
        config: terms and networks.
        iterations: optimiser steps of the stage, for momentum that rises.
        accumulation: calls per optimiser step.
    """

    step: Tensor

    def __init__(
        self, detector: FasterRCNN, config: Pretraining, *, iterations: int = 1, accumulation: int = 1
    ) -> None:
        super().__init__()
        self.detector = detector
        self.config = config
        self.iterations, self.accumulation = iterations, accumulation
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # calls so far
        weights = config.weights
        self.image_term, self.box_term, self.dense_term = weights.hcl > 0, weights.lcl > 0, weights.dense > 0
        self.reconstructs = weights.ar > 0 or weights.sr > 0
        self.needs_pyramid = self.box_term or config.detects
        self._freeze_unreached()

        width = _width(layer_modules(detector.backbone.body)[self.deepest])
        head = self.detector.roi_heads.predictor.cls_score.in_features
        options = {"image": (config.image, width), "box": (config.box, head), "dense": (config.dense, width)}
        on = {"image": self.image_term, "box": self.box_term, "dense": self.dense_term}
        terms = {name: option for name, option in options.items() if on[name]}
        self.projectors = nn.ModuleDict({name: _projector(own, channels) for name, (own, channels) in terms.items()})
        self.predictors = nn.ModuleDict(
            {name: _projector(own, own.dim) for name, (own, _) in terms.items() if own.predictor}
        )
        self.queues = nn.ModuleDict(
            {name: RingQueue(own.queue, own.dim) for name, (own, _) in terms.items() if own.loss == "info_nce"}
        )
        self.average = nn.ModuleDict({name: momentum_copy(self._trained(name)) for name in self._followers()})
        pool = detector.roi_heads.pool
        levels = zip(pool.featmap_names, pool.scales, strict=True)
        self.level_pools = [  # a box from every level, for `levels: all`
            PyramidRoIAlign([name], [round(1 / scale)], pool.output_size[0], pool.sampling_ratio)
            for name, scale in levels
        ]
        if self.reconstructs:
            own = config.reconstruction
            stride = 2 ** (1 + int(self.deepest.removeprefix("layer")))
            if stride < 16:
                raise UserError(
                    "pretraining: reconstruction starts from a backbone layer of stride 16 or 32; "
                    f"detector.fpn_layers ends at stride {stride}"
                )
            self.generator = recon.Generator(width, stride=stride, bridge=own.bridge, widths=own.widths)
        if config.detects and config.det_loss == "class_agnostic":
            self.box_layer = nn.Linear(head, 4)
            nn.init.normal_(self.box_layer.weight, std=0.001)
            nn.init.zeros_(self.box_layer.bias)
        self.train(self.training)

    def forward(self, images: Sequence[Tensor], targets: Targets) -> dict[str, Tensor]:
        if self.training:
            self._follow()
        channels_last = self.detector.channels_last
        first = View(batch_images(images, channels_last=channels_last), [target["proposals"] for target in targets])
        features = self.encode(first)
        losses: dict[str, Tensor] = {}
        assigned: tuple[Tensor, Tensor] | None = None
        if self.config.detects:
            detection, assigned = self._detection(first, features, targets)
            losses |= {name: self.config.weights.det * value for name, value in detection.items()}
        if self.projectors:
            names = ("view", "third") if self.config.third_view else ("view",)
            others = [
                View(
                    batch_images([target[name] for target in targets], channels_last=channels_last),
                    [target[f"{name}_proposals"] for target in targets],
                )
                for name in names
            ]
            losses |= self._contrast([first, *others], features, assigned)
        if self.reconstructs:
            losses |= self._reconstruction(first, features)
        return losses

    def train(self, mode: bool = True) -> PreTrainer:
        """Training or evaluation mode; norms of the momentum network are in the mode of those that they follow."""
        super().train(mode)
        for name, copy in getattr(self, "average", {}).items():
            for mine, theirs in zip(copy.modules(), self._trained(name).modules(), strict=True):
                mine.training = theirs.training
            if name == "rpn":
                copy.eval()  # proposals alone, no losses
        return self

    # ---- networks --------------------------------------------------------------------------------------------------

    def encode(self, view: View) -> Features:
        """The trained network's features of a view."""
        backbone = self.detector.backbone
        layers = body_layers(backbone.body, view.batch.tensors)
        return Features(layers, pyramid(backbone.fpn, backbone.body, layers) if self.needs_pyramid else {})

    @torch.no_grad()
    def encode_keys(self, view: View) -> Features:
        """The momentum network's features of a view; a frozen backbone is its own average."""
        backbone = self.detector.backbone
        body = getattr(self.average, "body", backbone.body)
        layers = body_layers(body, view.batch.tensors)
        found = pyramid(self.average["fpn"], body, layers) if "fpn" in self.average else {}
        return Features(layers, found)

    def embed(self, term: str, features: Tensor, *, keys: bool = False) -> Tensor:
        """Unit rows float32 [N, dim] of a term from pooled features [N, C]: queries, or keys of the momentum side."""
        projector = self.average[f"{term}_projector"] if keys else self.projectors[term]
        rows = projector(features)
        if term in self.predictors and not keys:
            rows = self.predictors[term](rows)
        return F.normalize(rows.float(), dim=1)

    def box_features(self, view: View, features: Features, *, keys: bool = False) -> Tensor:
        """The shared vector of every proposal, images one after another; for `levels: all` once per level."""
        head = self.average["head"] if keys else self.detector.roi_heads.head
        sizes = view.batch.image_sizes
        if self.config.box.levels == "assigned":
            return head(self.detector.roi_heads.pool(features.pyramid, view.boxes, sizes))
        return head(torch.cat([pool(features.pyramid, view.boxes, sizes) for pool in self.level_pools]))

    def _follow(self) -> None:
        """The momentum network's step, before any key is computed."""
        momentum, config = self.config.momentum, self.config
        if config.momentum_schedule == "cosine" or self.accumulation > 1:
            call = int(self.step)
            if call % self.accumulation:
                self.step += 1
                return
            if config.momentum_schedule == "cosine":
                momentum = cosine_momentum(momentum, call / (self.accumulation * max(self.iterations, 1)))
        for name, copy in self.average.items():
            follow(copy, self._trained(name), momentum)
        self.step += 1

    def _followers(self) -> list[str]:
        """Modules that have a momentum copy."""
        config = self.config
        image = self.image_term and config.image.loss != "nt_xent"
        names = [] if config.freeze_backbone or not (image or self.box_term or self.dense_term) else ["body"]
        if image:
            names.append("image_projector")
        if self.box_term:
            names += ["fpn", "head", "box_projector"] + (["rpn"] if config.box.rois == "assigned" else [])
        if self.dense_term:
            names.append("dense_projector")
        return names

    def _trained(self, name: str) -> nn.Module:
        """The module that a momentum copy follows."""
        if name.endswith("_projector"):
            return self.projectors[name.removesuffix("_projector")]
        detector = self.detector
        parts = {"fpn": detector.backbone.fpn, "rpn": detector.rpn, "head": detector.roi_heads.head}
        return parts.get(name, detector.backbone.body)

    @property
    def deepest(self) -> str:
        """Name of the backbone's last layer."""
        return list(layer_modules(self.detector.backbone.body))[-1]

    def _freeze_unreached(self) -> None:
        """Freeze the parts of the detector that no term of this recipe trains."""
        config = self.config
        reached = {
            "backbone": not config.freeze_backbone,
            "fpn": self.needs_pyramid,
            "rpn": config.detects,
            "head": self.needs_pyramid,
            "classifier": config.detects and config.det_loss == "class_aware",
            "box": config.detects and config.det_loss == "class_aware",
        }
        self.detector.freeze_but([name for name, trains in reached.items() if trains])

    # ---- terms -----------------------------------------------------------------------------------------------------

    def _detection(
        self, view: View, features: Features, targets: Targets
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """The detector's losses on view 1; class-agnostic ones also give their foreground rows and each one's box."""
        detector, batch = self.detector, view.batch
        if self.config.det_loss == "class_aware":
            return detector.losses(detector.from_features(features.pyramid, batch, targets), targets), None
        objects = self._as_objects(view)
        heads = detector.roi_heads
        raw, proposals, _ = detector.rpn(batch, features.pyramid, objects)
        losses = detector.rpn_losses(raw, objects)
        rows = heads.sample(proposals, objects)
        shared = heads.head(heads.pool(features.pyramid, rows.boxes, batch.image_sizes))
        box = heads.box_regression_loss(self.box_layer(shared).float(), rows.boxes, rows.labels, rows.matched)
        foreground = torch.where(rows.gt_index >= 0)[0]
        return {
            "loss_box_reg": box,
            **losses,
        }, (shared[foreground], rows.gt_index[foreground])

    def _contrast(
        self, views: Sequence[View], features: Features, assigned: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """The weighted contrastive terms over the pairs of views; fills the queues when all of them are done."""
        config, weights = self.config, self.config.weights
        pairs = [(0, number) for number in range(1, len(views))]  # (queries of, keys of)
        if config.symmetric:
            pairs += [(b, a) for a, b in pairs]
        both_trained = self.image_term and config.image.loss == "nt_xent"
        trained = {a for a, _ in pairs} | ({1} if both_trained else set())
        online = {a: features if a == 0 else self.encode(views[a]) for a in sorted(trained)}
        keys = {b: self.encode_keys(views[b]) for b in sorted({b for _, b in pairs})} if self.average else {}
        terms: dict[str, list[Tensor]] = {}
        waiting: dict[str, list[Tensor]] = {name: [] for name in self.queues}
        if both_trained:
            pooled = [self.pooled(online[number], views[number]) for number in (0, 1)]
            one, two = (self.embed("image", value) for value in pooled)
            terms["hcl"] = [nt_xent(one, two, config.image.temperature)]
        elif self.image_term:
            queries = {a: self.embed("image", self.pooled(found, views[a])) for a, found in online.items()}
            with torch.no_grad():
                found = {b: self.embed("image", self.pooled(own, views[b]), keys=True) for b, own in keys.items()}
            terms["hcl"] = [self._term("image", queries[a], found[b]) for a, b in pairs]
            if "image" in waiting:
                waiting["image"] = list(found.values())
        if self.box_term and assigned is not None and config.box.rois == "assigned":
            terms["lcl"] = [self._assigned_boxes(views[1], keys[1], *assigned)]
        elif self.box_term:
            queries = {a: self.embed("box", self.box_features(views[a], own)) for a, own in online.items()}
            with torch.no_grad():
                found = {
                    b: self.embed("box", self.box_features(views[b], own, keys=True), keys=True)
                    for b, own in keys.items()
                }
            share = self._share(len(queries[0]), views[0])
            terms["lcl"] = [self._term("box", queries[a], found[b], share) for a, b in pairs]
            if not config.detects:  # a level without a box would leave its weights without gradients
                terms["lcl"][0] = terms["lcl"][0] + sum(
                    level[:1, :1, :1, :1].sum() * 0 for level in online[0].pyramid.values()
                )
            if "box" in waiting:
                waiting["box"] = list(found.values())
        if self.dense_term:
            cells = [self._dense(online[a], keys[b]) for a, b in pairs]
            terms["dense"] = [self._term("dense", rows, own) for rows, own, _ in cells]
            waiting["dense"] = [means for *_, means in cells]
        if self.training:
            for name, rows in waiting.items():
                self.queue(name).enqueue(gather_rows(torch.cat(rows)))
        factors = {"hcl": weights.hcl, "lcl": weights.lcl, "dense": weights.dense}
        return {f"loss_{name}": factors[name] * torch.stack(values).mean() for name, values in terms.items()}

    def _term(self, name: str, queries: Tensor, keys: Tensor, share: float | None = None) -> Tensor:
        own: Contrast = getattr(self.config, name)
        if own.loss == "cosine":
            return cosine_distance(queries, keys, rows=share)
        return info_nce(queries, keys, self.queue(name).rows, own.temperature, rows=share)

    def _assigned_boxes(self, view: View, features: Features, shared: Tensor, ids: Tensor) -> Tensor:
        """AlignDet's box term: foreground rows of view 1 against those that the momentum network finds in view 2."""
        with torch.no_grad():
            heads = self.detector.roi_heads
            _, proposals, _ = self.average["rpn"](view.batch, features.pyramid)
            rows = heads.sample(proposals, self._as_objects(view))
            counts = [len(boxes) for boxes in rows.boxes]
            inside = [own >= 0 for own in rows.gt_index.split(counts)]
            boxes = [own[keep] for own, keep in zip(rows.boxes, inside, strict=True)]
            vectors = self.average["head"](heads.pool(features.pyramid, boxes, view.batch.image_sizes))
            keys = self.embed("box", vectors, keys=True)
        queries = self.embed("box", shared)
        key_ids = rows.gt_index[rows.gt_index >= 0]
        return box_nt_xent(queries, ids, keys, key_ids, self.config.box.temperature)

    def _dense(self, online: Features, keys: Features) -> tuple[Tensor, Tensor, Tensor]:
        """DenseCL: queries [N, dim] of cells, the keys of the most alike cells of the other view, and the mean keys."""
        cells, others = (F.adaptive_avg_pool2d(own.layers[self.deepest].float(), GRID) for own in (online, keys))
        cells, others = cells.flatten(2).transpose(1, 2), others.flatten(2).transpose(1, 2)  # [B, cells, C]
        count = cells.shape[1]
        with torch.no_grad():
            alike = torch.einsum("bsc,btc->bst", F.normalize(cells, dim=2), F.normalize(others, dim=2)).argmax(2)
            every = self.embed("dense", others.flatten(0, 1), keys=True)
            means = F.normalize(every.view(len(others), count, -1).mean(1), dim=1)
            first = torch.arange(len(others), device=alike.device)[:, None] * count
        return self.embed("dense", cells.flatten(0, 1)), every[(alike + first).flatten()], means

    def _reconstruction(self, view: View, features: Features) -> dict[str, Tensor]:
        """The weighted AR and SR."""
        config, weights = self.config.reconstruction, self.config.weights
        pictures = view.batch.tensors
        made = self.generator(features.layers[self.deepest])
        height, width = pictures.shape[-2:]
        valid = recon.valid_pixels(view.batch.image_sizes, height, width, pictures.device)
        losses = {}
        if self.generator.scale == 1:
            made = made if valid is None else made * valid  # padding is 0 in both
        if weights.ar and self.generator.scale == 1:
            losses["loss_ar"] = weights.ar * recon.appearance_loss(pictures, made, valid)
        elif weights.ar:
            small = F.interpolate(pictures, size=made.shape[-2:], mode="area")
            inside = None if valid is None else F.interpolate(valid.float(), size=made.shape[-2:], mode="area") == 1
            if inside is not None:
                losses["loss_ar"] = weights.ar * recon.appearance_loss(small * inside, made * inside, inside)
            else:
                losses["loss_ar"] = weights.ar * recon.appearance_loss(small, made, None)
        if weights.sr:
            taken = slice(math.ceil(config.share * len(pictures)))  # a batch is in random order: any will do
            made = made[taken]
            if self.generator.scale != 1:
                made = F.interpolate(made, size=pictures.shape[-2:], mode="bilinear", align_corners=False)
                made = made if valid is None else made * valid[taken]
            rectangles = recon.mask_rectangles(view.boxes[taken], config.mask_fraction, which=config.mask_proposals)
            masked = recon.mask_pictures(made, rectangles, fill=config.mask_fill)
            body = self.detector.backbone.body
            with running_statistics_kept(body):
                again = body_layers(body, masked)
            names = [f"layer{layer}" for layer in config.layers if f"layer{layer}" in again]
            value = recon.semantic_loss(
                [features.layers[name][taken] for name in names],
                [again[name] for name in names],
                stop_gradient=config.stop_gradient,
            )
            losses["loss_sr"] = weights.sr * value
        return losses

    def queue(self, term: str) -> RingQueue:
        """The queue of a term that has one."""
        queue = self.queues[term]
        assert isinstance(queue, RingQueue)
        return queue

    # ---- small things ----------------------------------------------------------------------------------------------

    def pooled(self, features: Features, view: View) -> Tensor:
        """Mean of the deepest layer over each picture's own cells, [B, C]."""
        feature = features.layers[self.deepest]
        height, width = feature.shape[-2:]
        down = view.batch.tensors.shape[-2] // height
        cells = [(-(-h // down), -(-w // down)) for h, w in view.batch.image_sizes]
        valid = recon.valid_pixels(cells, height, width, feature.device)
        if valid is None:
            return feature.mean((2, 3))
        return (feature * valid).sum((2, 3)) / valid.sum((2, 3)).to(feature.dtype)

    def _share(self, rows: int, view: View) -> float:
        """What this process divides its sum over boxes by, so that the mean of the processes is that over all boxes."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return rows
        total = sum_over_ranks(torch.tensor([float(rows)], device=view.batch.tensors.device))[0]
        return float(total) / torch.distributed.get_world_size()

    @staticmethod
    def _as_objects(view: View) -> list[dict[str, Tensor]]:
        """Proposals as the objects of one class."""
        return [
            {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)}
            for boxes in view.boxes
        ]


def layer_modules(body: nn.Module) -> dict[str, nn.Module]:
    """A ResNet body's layer1..layer4, as many as it has."""
    return {name: module for name, module in body.items() if name.startswith("layer")}  # type: ignore[operator]


def body_layers(body: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
    """Outputs of all layers of a ResNet body, not of those alone that the pyramid takes."""
    found = {}
    for name, module in body.items():  # type: ignore[operator]
        pictures = module(pictures)
        if name.startswith("layer"):
            found[name] = pictures
    return found


def pyramid(fpn: nn.Module, body: Any, layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pyramid over those layers that it was built for."""
    return fpn({name: layers[layer] for layer, name in body.taken.items()})


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms go on normalising by the batch, but what passes leaves no trace in their running statistics."""
    norms = [own for own in module.modules() if isinstance(own, BATCH_NORM) and own.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _projector(own: Contrast, channels: int) -> ProjectionMLP:
    return ProjectionMLP(channels, own.hidden, own.dim, norm=own.norm)


def _width(layer: nn.Module) -> int:
    """Channels that a ResNet layer puts out."""
    block = layer[-1]  # type: ignore[index]
    return (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels
