"""A term of a pre-training, and what it sees of an iteration.

A term is a module `term(seen) -> weighted losses by name`. It says which parts of the detector its gradients reach and
which modules it needs an average of; the shell (`shell.py`) freezes what no term reaches, keeps the averages, and calls
the terms one after another on one `Iteration`, where views, features and keys are computed once, when first asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from tailfin.models.backbones import Body
from tailfin.models.dense import DenseDetector
from tailfin.models.detector import Targets
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.pretraining.contrast import ContrastHead
from tailfin.pretraining.momentum import MomentumNetwork

SHOWN = 256  # rows of a queue, at most, that the report has
WEAK = 3  # number of the view that only the detector's own losses look at


class View(NamedTuple):
    """One augmented picture of every image of a batch, and its proposals, float32 [P, 4] per image."""

    batch: ImageList
    boxes: list[Tensor]


class Features(NamedTuple):
    """What a network makes of a view."""

    layers: dict[str, Tensor]  # of the backbone, from the first to the deepest
    pyramid: dict[str, Tensor]  # empty where no term needs it

    @property
    def deepest(self) -> Tensor:
        """The backbone's last layer, [B, C, h, w]."""
        return next(reversed(self.layers.values()))


class Iteration:
    """One iteration as its terms see it.

    Args:
        detector: the trained network.
        average: the momentum network.
        images: the first views, [3, H, W] each.
        targets: per image boxes and labels of view 1, or of the picture `weak` where there is one, `proposals`, and for
            contrast `view`, `view_proposals`, `third` and `third_proposals`.
        pyramid: whether a term needs the pyramid.
        pairs: (view of the queries, view of the keys), which contrastive terms compare.
    """

    def __init__(
        self,
        detector: FasterRCNN | DenseDetector,
        average: MomentumNetwork,
        images: Sequence[Tensor],
        targets: Targets,
        *,
        pyramid: bool = True,
        pairs: Sequence[tuple[int, int]] = ((0, 1),),
    ) -> None:
        self.detector, self.average, self.targets, self.pairs = detector, average, targets, pairs
        self.assigned: tuple[Tensor, Tensor] | None = None  # detection leaves it: foreground rows, the box of each
        self.diagnosed: dict[str, Tensor] | None = None  # terms add figures for the log, where it is a dictionary
        self._images, self._pyramid = images, pyramid
        self._views: dict[int, View] = {}
        self._features: dict[int, Features] = {}
        self._keys: dict[int, Features] = {}

    @property
    def box_head(self) -> RoIHeads:
        """Of a detector that has one."""
        return cast(FasterRCNN, self.detector).roi_heads

    @property
    def detected(self) -> int:
        """The view whose objects `targets` has as `boxes` and `labels`."""
        return WEAK if self.targets and "weak" in self.targets[0] else 0

    def view(self, number: int) -> View:
        """View 0 is the first, 1 the second, 2 the third, 3 (`WEAK`) the one for detection alone, without proposals."""
        if number not in self._views:
            name = ("", "view", "third", "weak")[number]
            pictures = [target[name] for target in self.targets] if name else self._images
            if number == WEAK:
                boxes = [target["proposals"][:0] for target in self.targets]
            else:
                boxes = [target[f"{name}_proposals" if name else "proposals"] for target in self.targets]
            self._views[number] = View(self.detector.batch(pictures), boxes)
        return self._views[number]

    def features(self, number: int) -> Features:
        """The trained network's features of a view; all terms share them."""
        if number not in self._features:
            backbone = self.detector.backbone
            layers = backbone.layers(self.view(number).batch.tensors)
            self._features[number] = Features(layers, backbone.pyramid(layers) if self._pyramid else {})
        return self._features[number]

    @torch.no_grad()
    def keys(self, number: int) -> Features:
        """The momentum network's features of a view; a backbone without an average is frozen, its own average."""
        if number not in self._keys:
            average, found = self.average, {}
            body = cast(Body, average.get("backbone", self.detector.backbone.body))
            layers = body.layers(self.view(number).batch.tensors)
            if "fpn" in average:
                found = average["fpn"]({name: layers[layer] for layer, name in body.taken.items()})
            self._keys[number] = Features(layers, found)
        return self._keys[number]


class Term(nn.Module):
    """`term(seen) -> losses by name`, each a scalar with its weight in it."""

    reaches: tuple[str, ...] = ("backbone",)  # parts of the detector that its gradients reach, as in `parts()`
    averages: tuple[str, ...] = ()  # parts that it needs a momentum copy of

    def followed(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """By name the modules of which the momentum network has a copy for this term."""
        return {name: parts[name] for name in self.averages}

    def shown(self, seen: Iteration) -> dict[str, Tensor]:
        """By name what the report shows of the term; normalised pictures of view 1's size have four dimensions."""
        return {}


class Contrastive(Term, ABC):
    """A term that compares two views: pooled vectors -> queries of one, keys of the other -> loss; keys -> queue.

    A subclass says what the vectors are. The networks in `head` are registered by who made them.
    """

    averages: tuple[str, ...] = ("backbone",)
    loss_name: str
    prefix = ""  # of the names in `shown`

    def __init__(self, weight: float, head: ContrastHead) -> None:
        super().__init__()
        self.weight, self.head = weight, head

    def followed(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {**super().followed(parts), self.head.average: self.head.projector}

    @abstractmethod
    def vectors(self, seen: Iteration, number: int, *, keys: bool = False) -> Tensor:
        """[N, C] vectors of a view, by the trained or by the momentum network."""

    def queries(self, seen: Iteration, number: int) -> Tensor:
        """Unit rows float32 [N, dim] with gradients."""
        return self.head.queries(self.vectors(seen, number))

    @torch.no_grad()
    def keys(self, seen: Iteration, number: int) -> Tensor:
        """Unit rows float32 [N, dim] of the momentum network."""
        return self.head.keys(self.vectors(seen, number, keys=True), seen.average[self.head.average])

    def labels(self, seen: Iteration) -> Tensor:
        """int64 [N]: the class of each row, the same in all views; -1 where it has none."""
        raise ValueError(f"{type(self).__name__} knows no classes of its rows")

    def rows(self, queries: Tensor) -> float | None:
        """What sums over queries are divided by; none is their number."""
        return None

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        queries = {number: self.queries(seen, number) for number in sorted({one for one, _ in seen.pairs})}
        keys = {number: self.keys(seen, number) for number in sorted({other for _, other in seen.pairs})}
        rows = self.rows(queries[0])
        labels = self.labels(seen) if self.head.looks_at_classes else None
        each = [self.head.loss(queries[one], keys[other], rows=rows, labels=labels) for one, other in seen.pairs]
        if seen.diagnosed is not None:
            found = self.head.diagnosed(queries[0], keys[seen.pairs[0][1]], labels)
            name = self.loss_name.removeprefix("loss_")
            seen.diagnosed |= {f"{kind}_{name}": value for kind, value in found.items()}
        if self.training:
            self.head.remember(list(keys.values()), None if labels is None else [labels] * len(keys))
        return {self.loss_name: self.weight * torch.stack(each).mean()}

    def shown(self, seen: Iteration) -> dict[str, Tensor]:
        """Similarities of view 1's queries with view 2's keys, [N], and with some of the queue, [N, Q]."""
        queries, positives = self.queries(seen, 0), self.keys(seen, 1)
        found = {f"{self.prefix}positive": (queries * positives).sum(1)}
        if self.head.queue is not None:
            stored = self.head.queue.rows
            some = torch.linspace(0, len(stored) - 1, min(SHOWN, len(stored))).long().to(stored.device)
            found[f"{self.prefix}negative"] = queries @ stored[some].T
        return found
