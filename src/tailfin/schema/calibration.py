"""`calibration`: how a trained detector's scores are changed before they are reported; `tailfin calibrate` chooses it.

Each goes with the scores of a softmax and with those of independent sigmoids; the detector's loss says which they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from tailfin.schema.base import NotNegative, Positive, Section


class NorCal(Section):
    """NorCal: odds of a class divided by its training images to the power gamma."""

    name: Literal["norcal"] = "norcal"
    gamma: NotNegative = 0.6


class FRACAL(Section):
    """FRACAL: classes on few images up, those whose objects fill the picture evenly down."""

    name: Literal["fracal"] = "fracal"
    lambda_: NotNegative = 2.0
    dimension: dict[str, Positive] = {}  # by class name, of the training file; `tailfin calibrate` fills it


class LogitAdjustment(Section):
    """Logit adjustment: the logarithm of a class's share of images, times tau, taken from its logit."""

    name: Literal["logit_adjustment"] = "logit_adjustment"
    tau: NotNegative = 1.0


class Temperature(Section):
    """Logits divided by one number: below 1 sharper, above 1 flatter."""

    name: Literal["temperature"] = "temperature"
    value: Positive = 1.0


class Power(Section):
    """Scores to a power that belongs to the class's frequency group: below 1 lifts, above 1 lowers."""

    name: Literal["power"] = "power"
    rare: Positive = 1.0  # also of classes without training images
    common: Positive = 1.0
    frequent: Positive = 1.0


def _name(value: Any) -> str:
    return str(value.get("name", "norcal") if isinstance(value, dict) else getattr(value, "name", ""))


Calibration = Annotated[
    Annotated[NorCal, Tag("norcal")]
    | Annotated[FRACAL, Tag("fracal")]
    | Annotated[LogitAdjustment, Tag("logit_adjustment")]
    | Annotated[Temperature, Tag("temperature")]
    | Annotated[Power, Tag("power")],
    Discriminator(_name),
]
