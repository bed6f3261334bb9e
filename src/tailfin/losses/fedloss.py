"""Federated loss (Zhou et al., CenterNet2, 2021): the negatives of a step come from a few classes.

    kept = classes of the picture + classes drawn without replacement, class c with weight n_c^power, to `num_classes`
    loss = the base loss over the columns of the kept classes alone, for the rows of the picture

LVIS leaves most classes of a picture unjudged, so a missing label says little; and a rare class, which is drawn
seldom, gets few of the negatives that outnumber its objects. As released, and seen nowhere in the formula: among the
`num_classes` the background counts as one where there are background rows (so 49 of 50 are real classes; with focal and
its kin, Detic's form for Deformable DETR, it does not), and n are image counts. The released code draws once in every
call on every process, for the classes of all its pictures (`per="process"`): with 2 pictures most of the 50 are drawn,
with 16 hardly any, another method. So here every picture has its own, where the detector says which rows are whose. A
class without training images is never drawn. Bases are losses on sigmoids: one on softmax has no column that could go
alone::

    loss = losses.build("fedloss", stats)                       # sigmoid BCE on 50 classes
    value = loss(logits, labels, drawn=torch.tensor([3, 17]))   # a stored draw, for tests
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.errors import nearest
from tailfin.losses.base import DROP, ClassificationLoss
from tailfin.losses.ecm import ECM
from tailfin.losses.efl import EFL
from tailfin.losses.eqfl import EQFL
from tailfin.losses.eql import EQL
from tailfin.losses.eqlv2 import EQLv2
from tailfin.losses.fcbl import FCBL
from tailfin.losses.focal import Focal
from tailfin.losses.objectness import Objectness
from tailfin.losses.sigmoid import Sigmoid
from tailfin.stats import ClassStats

BASES: dict[str, type[ClassificationLoss]] = {
    "sigmoid": Sigmoid,
    "focal": Focal,
    "efl": EFL,
    "eqfl": EQFL,
    "eql": EQL,
    "eqlv2": EQLv2,
    "ecm": ECM,
    "objectness": Objectness,
    "fcbl": FCBL,
}
PER = ("picture", "process")
PRIOR = 0.01  # first score of a class in the released models


class FedLoss(ClassificationLoss):
    """Federated loss on the base's logits. State: the base's, under `base`.

    Args:
        base: one of `BASES`, e.g. "sigmoid", divided by the number of rows, or "focal" (alpha .25, gamma 2), divided by
            the foreground rows. A column of its own for objects or background is always kept.
        base_options: options of the base loss.
        num_classes: classes kept per picture; those of its rows are kept even where they are more.
        power: exponent of a class's image count in the draw; 0 draws all classes alike.
        per: "picture", or "process": the rows of a call have one draw together.
    """

    row_facts: tuple[str, ...] = ("normalizer", "picture", "pictures")  # and those of the base
    weight: Tensor

    def __init__(
        self,
        stats: ClassStats,
        *,
        base: str = "sigmoid",
        num_classes: int = 50,
        power: float = 0.5,
        base_options: Mapping[str, Any] | None = None,
        per: str = "picture",
    ) -> None:
        super().__init__(stats)
        if base not in BASES:
            raise ValueError(f'there is no base "{base}"{nearest(base, BASES)}')
        known = BASES[base].option_names()
        for option in base_options or {}:
            if option not in known:
                raise ValueError(f'base_options: the loss {base} has no option "{option}"{nearest(option, known)}')
        if num_classes < 1 or num_classes != int(num_classes):
            raise ValueError(f"num_classes must be a positive whole number (given: {num_classes})")
        if not 0 <= power < math.inf:
            raise ValueError(f"power must not be negative (given: {power})")
        if per not in PER:
            raise ValueError(f'per must be "picture" or "process" (given: "{per}")')
        self.per = per
        self.base = BASES[base](stats, **(base_options or {}))
        self.num_logits = self.base.num_logits
        self.of_objects = "normalizer" in self.base.row_facts  # divides by foreground rows
        self.row_facts = tuple({*self.base.row_facts, "normalizer", "picture", "pictures"})
        self.places = int(num_classes)
        counts = torch.from_numpy(stats.image_count).double()
        self.register_exact("weight", counts.pow(power) * (counts > 0), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
        if keywords.get("drawn") is not None:  # classes, not rows: out of reach of the filter by row
            keywords["drawn"] = (keywords["drawn"],)
        return super().forward(logits, labels, **keywords)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        drawn: Tensor | tuple[Tensor] | None = None,
        generator: torch.Generator | None = None,
        normalizer: float | Tensor | None = None,
        picture: Tensor | None = None,
        pictures: int | None = None,
        **facts: Any,
    ) -> Tensor:
        """`drawn` are negatives, int64 [K]; without them `generator`, by default torch's of the device, draws.

        `picture` int64 [N] is the picture of each row; without it all are of one. `pictures` is how many there are (on
        an accelerator, reading it back from `picture` waits). `normalizer` takes the place of the
        base's divisor (the number of objects, in Deformable DETR); `facts` are those of its rows that the base asks
        for.
        """
        if picture is None or self.per == "process" or not len(labels):
            picture, pictures = torch.zeros_like(labels), 1
        if pictures is None:
            pictures = int(picture.max()) + 1
        present = logits.new_zeros((pictures, self.num_classes + 1), dtype=torch.bool)
        present[picture, labels] = True
        if drawn is None:
            chosen = self._draw(present, generator)
        else:
            chosen = self._given(drawn[0] if isinstance(drawn, tuple) else drawn)
        kept = F.pad((present[:, :-1] | chosen)[picture], (0, self.num_logits - self.num_classes), value=True)
        # a column lowered so far has no loss and no gradient as a negative, and positives are all in kept columns
        logits = torch.where(kept, logits, -DROP)
        if self.of_objects:
            facts["normalizer"] = normalizer
            value = self.base.loss(logits, labels, **facts)
        else:
            value = self.base.loss(logits, labels, **facts)
            value = value if normalizer is None else value * (max(len(labels), 1) / normalizer)
        self.parts = self.base.parts
        return value

    def _draw(self, present: Tensor, generator: torch.Generator | None) -> Tensor:
        """bool [P, C]: the first places of an order in which each next class comes with a chance as its weight.

        Weights over exponential draws, largest first: what `torch.multinomial` does, without having to know the number
        of places on the host, and without classes of weight 0 where the others run out.
        """
        counted = present[:, :-1] if self.of_objects else present
        taken = counted.sum(1, keepdim=True)
        weight = torch.where(present[:, :-1], 0, self.weight)
        keys = weight / torch.empty_like(weight).exponential_(generator=generator)
        best = keys.topk(min(self.places, self.num_classes), dim=1)
        rank = torch.arange(best.indices.shape[1], device=keys.device)
        wanted = (rank < self.places - taken) & (best.values > 0)
        return torch.zeros_like(present[:, :-1]).scatter_(1, best.indices, wanted)

    def _given(self, drawn: Tensor) -> Tensor:
        """bool [C] of a stored draw."""
        if drawn.ndim != 1 or drawn.is_floating_point():
            raise ValueError(f"drawn must be classes, int64 [K], this is {drawn.dtype} {list(drawn.shape)}")
        if drawn.device.type == "cpu" and not bool(((drawn >= 0) & (drawn < self.num_classes)).all()):
            raise ValueError(f"drawn must be classes in 0..{self.num_classes - 1}")
        chosen = torch.zeros(self.num_classes, dtype=torch.bool, device=drawn.device)
        return chosen.index_fill_(0, drawn, True).to(self.weight.device)

    def at_epoch(self, epoch: float) -> None:
        self.base.at_epoch(epoch)

    def scores(self, logits: Tensor) -> Tensor:
        return self.base.scores(logits)

    def prior_bias(self) -> Tensor:
        return torch.cat(
            [torch.full((self.num_classes,), -math.log(1 / PRIOR - 1)), self.base.prior_bias()[self.num_classes :]]
        )
