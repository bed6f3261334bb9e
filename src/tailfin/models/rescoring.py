"""Calibration of a trained detector's scores by class size: `calibration` in a recipe, the `rescore` of a detector.

    norcal    NorCal: divided by the class's training images to a power, the background kept apart

Each is a module from scores [N, C] to those that are reported, made from the training counts of the model and a check
that the scores of its loss are of the kind that it needs. The formulas alone are in `tailfin.calibration`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tailfin.calibration import norcal_foreground
from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.schema.calibration import Calibration
from tailfin.stats import ClassStats


class NorCal(nn.Module):
    """`norcal_foreground` with the training counts of a model: scores [N, C] to calibrated ones, both float.

    Raises `UserError` for a loss whose scores are not probabilities that leave the background's.
    """

    counts: Tensor

    def __init__(self, stats: ClassStats, loss: ClassificationLoss, *, gamma: float) -> None:
        super().__init__()
        probe = 10 * torch.linspace(1, 99, 16 * loss.num_logits).square().sin().view(16, -1)
        if bool((loss.scores(probe).sum(dim=1) > 1 + 1e-4).any()):
            raise UserError(
                "calibration norcal needs the scores of a softmax over classes and background: those of the loss "
                f"{type(loss).__name__} add up to more than 1"
            )
        self.gamma = gamma
        self.register_buffer("counts", torch.as_tensor(stats.image_count, dtype=torch.float64), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        return norcal_foreground(scores, self.counts, self.gamma)


RESCORERS: dict[str, type[nn.Module]] = {"norcal": NorCal}


def build_rescorer(config: Calibration, stats: ClassStats, loss: ClassificationLoss | None) -> nn.Module:
    """The module of `config` for a detector with the classes of `stats` and the scores of `loss`."""
    if loss is None:
        raise UserError(f"calibration {config.name} needs scores of classes: this detector has none")
    return RESCORERS[config.name](stats, loss, **config.model_dump(exclude={"name"}))
