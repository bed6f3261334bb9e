"""Calibration of a trained detector's scores: `calibration` in a recipe, the `rescore` of a detector.

    norcal            NorCal: odds divided by the class's training images to a power
    fracal            FRACAL: by image counts and by how evenly the class's objects fill the picture
    logit_adjustment  by the class's share of images
    temperature       logits divided by one number
    power             scores to a power that belongs to the class's frequency group

Each is a module from scores [..., C] to those that are reported, made from the training counts of the model and the
kind of its scores: those of a softmax over classes and background, or of classes that know nothing of each other
(sigmoids, with an objectness or without, group softmax). It has no state of its own: the recipe in the model file and
its counts make it. The formulas alone are in `tailfin.calibration`.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tailfin.calibration import adjustment_shift, fracal_shift, rescored
from tailfin.errors import UserError
from tailfin.joins import join_classes
from tailfin.losses.base import ClassificationLoss
from tailfin.schema.calibration import FRACAL, Calibration, LogitAdjustment, NorCal, Power, Temperature
from tailfin.stats import ClassStats

Kind = Literal["softmax", "sigmoid"]


def score_kind(loss: ClassificationLoss) -> Kind:
    """ "softmax" where a row's scores never add up to more than 1, so that they leave the background's, else "sigmoid".

    One class is the same in both.
    """
    probe = 10 * torch.linspace(1, 99, 16 * loss.num_logits).square().sin().view(16, -1)
    device = next((value.device for value in loss.buffers()), torch.device("cpu"))
    with torch.no_grad():
        return "sigmoid" if bool((loss.scores(probe.to(device)).sum(dim=1) > 1 + 1e-4).any()) else "softmax"


class Shift(nn.Module):
    """`rescored`: logits divided by a temperature and moved by a number per class."""

    shift: Tensor

    def __init__(self, kind: Kind, shift: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        self.kind, self.temperature = kind, temperature
        self.register_buffer("shift", shift.float(), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        return rescored(scores, self.shift, self.kind, self.temperature)


class Product(Shift):
    """FRACAL for sigmoids: the score times the moved score."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores * super().forward(scores)


class Exponent(nn.Module):
    """Scores to a power per class."""

    exponent: Tensor

    def __init__(self, exponent: Tensor) -> None:
        super().__init__()
        self.register_buffer("exponent", exponent.float(), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        return scores.pow(self.exponent.to(scores))


def build_rescorer(config: Calibration, stats: ClassStats, loss: ClassificationLoss | None) -> nn.Module:
    """The module of `config` for a detector with the classes of `stats` and the scores of `loss`."""
    if loss is None:
        raise UserError(f"calibration {config.name} needs scores of classes: this detector has none")
    return rescorer(config, stats, score_kind(loss))


def rescorer(config: Calibration, stats: ClassStats, kind: Kind) -> nn.Module:
    """The module of `config` for scores of `kind`."""
    return RESCORERS[config.name](config, stats, kind)


def _norcal(config: NorCal, stats: ClassStats, kind: Kind) -> nn.Module:
    counts = torch.as_tensor(stats.image_count, dtype=torch.float64).clamp(min=1)
    return Shift(kind, -config.gamma * counts.log())


def _fracal(config: FRACAL, stats: ClassStats, kind: Kind) -> nn.Module:
    join = join_classes(stats.names, list(config.dimension))
    if join.missing:
        raise UserError(
            f"calibration fracal has no dimension of the class {join.first_missing()}: `tailfin calibrate MODEL "
            "--method fracal --train TRAIN.json` measures them"
        )
    dimension = [config.dimension[name] for name in stats.names]
    shift = fracal_shift(stats, dimension, kind, config.lambda_)
    return Product(kind, shift) if kind == "sigmoid" else Shift(kind, shift)


def _logit_adjustment(config: LogitAdjustment, stats: ClassStats, kind: Kind) -> nn.Module:
    return Shift(kind, adjustment_shift(stats, config.tau))


def _temperature(config: Temperature, stats: ClassStats, kind: Kind) -> nn.Module:
    return Shift(kind, torch.zeros(stats.num_classes, dtype=torch.float64), config.value)


def _power(config: Power, stats: ClassStats, kind: Kind) -> nn.Module:
    of_group = {"r": config.rare, "c": config.common, "f": config.frequent, "": config.rare}
    return Exponent(torch.tensor([of_group[group] for group in stats.frequency], dtype=torch.float64))


RESCORERS = cast(
    dict[str, Any],
    {
        "norcal": _norcal,
        "fracal": _fracal,
        "logit_adjustment": _logit_adjustment,
        "temperature": _temperature,
        "power": _power,
    },
)
