"""`calibration`: how a trained detector's scores are changed by class size before they are reported."""

from __future__ import annotations

from typing import Literal

from tailfin.schema.base import NotNegative, Section


class NorCal(Section):
    """NorCal, for the scores of a softmax: divided by the class's training images to the power gamma, normalised."""

    name: Literal["norcal"] = "norcal"
    gamma: NotNegative = 0.6  # `tailfin calibrate` picks it on training pictures


Calibration = NorCal
