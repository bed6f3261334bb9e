"""The shell in which pre-training trains a detector: terms on two views, and a momentum network that follows.

One iteration, in this order (2DRCL, NeurIPS'24):

    the momentum network follows the trained one
    view 1 -> backbone -> pyramid                      trained; all terms share these features
           -> detection losses                         detection.py; of a view of their own, by default
    view 2 -> momentum network -> keys                 no gradients
    queries of view 1, keys, queues -> contrast        of pictures: image.py, of boxes: box.py, of cells: dense.py, of
                                                       groups of cells: slots.py, of maps: transport.py; a term's keys
                                                       enter its queue when its loss is done
    view 1's features -> generator -> picture          reconstruction.py

`build_terms` is the one place where a weight of the recipe becomes a term. A term of weight 0 has no network, no queue
and no pass. Parts of the detector that no term reaches are frozen, so that training on several processes never waits
for their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.errors import UserError
from tailfin.models.backbones import Body
from tailfin.models.dense import DenseDetector
from tailfin.models.detector import Targets
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.pretraining.box import AssignedBoxContrast, LocalContrast
from tailfin.pretraining.contrast import ContrastHeads
from tailfin.pretraining.dense import DenseContrast
from tailfin.pretraining.detection import ClassAgnosticDetection, ClassAwareDetection
from tailfin.pretraining.image import BatchContrast, HolisticContrast
from tailfin.pretraining.momentum import MomentumNetwork, cosine_momentum
from tailfin.pretraining.reconstruction import DualReconstruction
from tailfin.pretraining.slots import SlotContrast
from tailfin.pretraining.term import Iteration, Term
from tailfin.pretraining.transport import TransportContrast
from tailfin.schema.pretraining import Pretraining


class PreTrainer(nn.Module):
    """`shell(images, targets) -> named losses`, each with its weight in it.

    Images are the first views (uint8 or float in 0..1, [3, H, W]). Targets hold boxes, labels (objects in view 1),
    `view` (the second view), `proposals` and `view_proposals` (float32 [P, 4], pairwise in both views; P may be 0), and
    with `third_view` also `third` and `third_proposals`, for slots `overlap` and `flipped`. Where they hold `weak`,
    boxes and labels are that picture's.

    Args:
        detector: trained in place; what is in it afterwards is the result.
        config: terms and networks.
        iterations: optimiser steps of the stage, for the momentum; 0: not known.
        accumulation: calls per optimiser step.
        diagnose_every: calls in training from one look at how the terms fare to the next, `diagnostics`; 0: never.
    """

    step: Tensor

    def __init__(
        self,
        detector: FasterRCNN | DenseDetector,
        config: Pretraining,
        *,
        iterations: int = 0,
        accumulation: int = 1,
        diagnose_every: int = 0,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.config = config
        self.iterations, self.accumulation = iterations, accumulation
        self.momentum = momentum_of(config, iterations)
        self.diagnose_every = diagnose_every
        self.calls = -1  # `step` as a plain number, known at the first call
        # of the call just made: accuracy and spread of each contrast (`ContrastHead.diagnosed`), and `gradient_*`, see
        # `gradient_ratios`; empty where it was not looked at
        self.diagnostics: dict[str, Tensor] = {}
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # calls so far
        self.heads = contrast_heads(detector, config)
        terms = build_terms(detector, config, self.heads)
        self.terms = nn.ModuleDict({name: terms[name] for name in ORDER if name in terms})

        reached = {part for term in terms.values() for part in term.reaches}
        parts = detector.parts()
        followed = {name: own for term in terms.values() for name, own in term.followed(parts).items()}
        if config.freeze_backbone:
            reached.discard("backbone")
            followed.pop("backbone", None)  # it is its own average
        self.needs_pyramid = "fpn" in reached
        others = (1, 2) if config.third_view else (1,)
        self.pairs = [(0, other) for other in others] + [(other, 0) for other in others if config.symmetric]
        detector.freeze_but([name for name in parts if name in reached])
        self.average = MomentumNetwork(followed)  # after what it follows: `train` asks in this order
        self.train(self.training)

    def forward(self, images: Sequence[Tensor], targets: Targets) -> dict[str, Tensor]:
        if self.calls < 0:
            self.calls = int(self.step)
        looks = self.training and self.diagnose_every > 0 and self.calls % self.diagnose_every == 0
        if self.training:
            self._follow()
            self.calls += 1
        seen = self.look_at(images, targets)
        if looks:
            seen.diagnosed = {}
        losses: dict[str, Tensor] = {}
        for term in self.terms.values():
            losses |= term(seen)
        self.diagnostics = {}
        if looks and seen.diagnosed is not None:
            self.diagnostics = seen.diagnosed | gradient_ratios(losses, self.detector)
        return losses

    def shown(self, seen: Iteration) -> dict[str, Tensor]:
        """What the terms show of themselves in the report, see `Term.shown`."""
        terms: list[Any] = list(self.terms.values())
        return {name: value for term in terms for name, value in term.shown(seen).items()}

    def look_at(self, images: Sequence[Tensor], targets: Targets) -> Iteration:
        """The batch as its terms see it; nothing is computed yet."""
        return Iteration(self.detector, self.average, images, targets, pyramid=self.needs_pyramid, pairs=self.pairs)

    def _follow(self) -> None:
        """The momentum network's step, before any key is computed."""
        momentum, config = self.momentum, self.config
        if config.momentum_schedule == "cosine" or self.accumulation > 1:
            call = int(self.step)
            if call % self.accumulation:
                self.step += 1
                return
            if config.momentum_schedule == "cosine":
                momentum = cosine_momentum(momentum, call / (self.accumulation * max(self.iterations, 1)))
        self.average.follow(momentum)
        self.step += 1


def gradient_ratios(losses: Mapping[str, Tensor], detector: Any) -> dict[str, Tensor]:
    """`gradient_hcl`, ...: the length of a term's gradient over that of the detection losses (without them: over that
    of all terms together), on the last weights of the backbone that train, which all terms share.

    It costs a backward pass of each term down to these weights.
    """
    shared = [own for own in detector.backbone.body.parameters() if own.requires_grad and own.ndim > 1]
    shared = shared or [own for own in detector.backbone.parameters() if own.requires_grad and own.ndim > 1]
    own = {name: value for name, value in losses.items() if name in OWN_LOSSES and value.requires_grad}
    detection = [value for name, value in losses.items() if name not in OWN_LOSSES and value.requires_grad]
    if not shared or not own:
        return {}
    weights = shared[-1]

    def length(values: Sequence[Tensor]) -> Tensor:
        total = torch.stack([value.float() for value in values]).sum()
        (gradient,) = torch.autograd.grad(total, [weights], retain_graph=True, allow_unused=True)
        return weights.new_zeros(()) if gradient is None else gradient.detach().float().norm()

    whole = length(detection or list(own.values())).clamp(min=1e-12)
    return {f"gradient_{name.removeprefix('loss_')}": length([value]) / whole for name, value in own.items()}


def momentum_of(config: Pretraining, iterations: int) -> float:
    """`momentum`, or less where a stage of so many iterations is too short for it: the average then remembers the share
    `momentum_horizon` of them, and not mostly the start. 0.999 keeps 0.37 of the start after 1,000 iterations."""
    if not config.momentum_horizon or not iterations:
        return config.momentum
    return min(config.momentum, 1 - 1 / max(config.momentum_horizon * iterations, 1))


# Detection comes first: it leaves rows for the contrast of assigned boxes
# all others are the detector's
OWN_LOSSES = ("loss_hcl", "loss_lcl", "loss_dense", "loss_group", "loss_slot", "loss_emd", "loss_ar", "loss_sr")
ORDER = ("detection", "image", "box", "dense", "slots", "transport", "reconstruction")


def contrast_heads(detector: FasterRCNN | DenseDetector, config: Pretraining) -> ContrastHeads:
    """Projectors, predictors and queues of the contrastive terms."""
    weights = config.weights
    channels, _ = deepest(detector.backbone.body)
    options = {
        "image": (weights.hcl, config.image, channels),
        "box": (weights.lcl, config.box, detector.box_channels),
        "dense": (weights.dense, config.dense, channels),
        "transport": (weights.emd, config.transport, channels),
    }
    return ContrastHeads({name: (own, width) for name, (weight, own, width) in options.items() if weight})


def build_terms(detector: FasterRCNN | DenseDetector, config: Pretraining, heads: ContrastHeads) -> dict[str, Term]:
    """The terms whose weight is not 0, by name."""
    weights = config.weights
    terms: dict[str, Term] = {}
    if weights.hcl:
        kind = BatchContrast if config.image.loss == "nt_xent" else HolisticContrast
        terms["image"] = kind(weights.hcl, heads["image"])
    if weights.lcl:
        box = AssignedBoxContrast if config.box.rois == "assigned" else LocalContrast
        pool, trunk = detector.box_layers()
        options: dict[str, Any] = {"levels": config.box.levels, "alone": not config.detects, "trunk": trunk}
        terms["box"] = box(weights.lcl, heads["box"], pool, **options)
    if weights.dense:
        terms["dense"] = DenseContrast(weights.dense, heads["dense"])
    if weights.slots:
        terms["slots"] = SlotContrast(weights.slots, config.slots, deepest(detector.backbone.body)[0])
    if weights.emd:
        terms["transport"] = TransportContrast(weights.emd, heads["transport"], config.transport)
    if weights.ar or weights.sr:
        channels, stride = deepest(detector.backbone.body)
        if stride < 16:
            raise UserError(
                "pretraining: reconstruction starts from a backbone layer of stride 16 or 32; "
                f"detector.fpn_layers ends at stride {stride}"
            )
        terms["reconstruction"] = DualReconstruction(
            weights.ar, weights.sr, config.reconstruction, channels=channels, stride=stride
        )
    if config.detects and config.det_loss == "class_aware":
        terms["detection"] = ClassAwareDetection(weights.det)
    elif config.detects:
        terms["detection"] = ClassAgnosticDetection(weights.det, detector.box_channels)
    return terms


def deepest(body: Body) -> tuple[int, int]:
    """(channels, stride) of the last layer."""
    name = body.layer_names[-1]
    return body.channels[name], body.strides[name]
