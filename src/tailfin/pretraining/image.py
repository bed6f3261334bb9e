"""Contrast of whole pictures: 2DRCL's holistic contrast (HCL, 3.1.1), MoCo, SimCLR and BYOL.

h = mean of the backbone's last layer over the picture's own cells
HCL, MoCo v2   InfoNCE of h's embedding and the other view's key against a queue of pictures       (eq. 1)
BYOL           2 - 2 cos of both, no negatives
SimCLR         NT-Xent: both views carry gradients, the rest of the batch are the negatives
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tailfin.pretraining.contrast import nt_xent
from tailfin.pretraining.reconstruction import real_cells
from tailfin.pretraining.term import Contrastive, Features, Iteration, View


class HolisticContrast(Contrastive):
    """`loss_hcl` against a momentum network, by InfoNCE or cosine."""

    loss_name = "loss_hcl"

    def vectors(self, seen: Iteration, number: int, *, keys: bool = False) -> Tensor:
        return pooled(seen.keys(number) if keys else seen.features(number), seen.view(number))

    def labels(self, seen: Iteration) -> Tensor:
        """The rarest class of each picture."""
        return torch.stack([target["rarest"] for target in seen.targets])


class BatchContrast(HolisticContrast):
    """`loss_hcl` as SimCLR has it: no queue, no momentum network, both views trained."""

    def followed(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {}

    def shown(self, seen: Iteration) -> dict[str, Tensor]:
        return {}

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        first, second = (self.queries(seen, number) for number in (0, 1))
        return {self.loss_name: self.weight * nt_xent(first, second, self.head.config.temperature)}


def pooled(features: Features, view: View) -> Tensor:
    """Mean of the deepest layer over each picture's own cells, [B, C]."""
    feature = features.deepest
    if all(tuple(size) == tuple(view.batch.tensors.shape[-2:]) for size in view.batch.image_sizes):
        return feature.mean((2, 3))
    valid = real_cells(view, feature)
    return (feature * valid).sum((2, 3)) / valid.sum((2, 3)).to(feature.dtype)
