"""Classification losses by name; one file per loss, the table below lists them all.

To add one: write the module in its own file (its constructor is its schema) and add a line to `LOSSES`. Those of other
packages are found by name (`plugins.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tailfin import plugins
from tailfin.errors import UserError, nearest
from tailfin.losses.acsl import ACSL
from tailfin.losses.bags import BAGS
from tailfin.losses.balanced_sigmoid import BalancedSigmoid
from tailfin.losses.balanced_softmax import BalancedSoftmax
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.class_balanced import ClassBalanced
from tailfin.losses.droploss import DropLoss
from tailfin.losses.ebl import EBL
from tailfin.losses.ecm import ECM
from tailfin.losses.efl import EFL
from tailfin.losses.eqfl import EQFL
from tailfin.losses.eql import EQL
from tailfin.losses.eqlv2 import EQLv2
from tailfin.losses.fcbl import FCBL
from tailfin.losses.fedloss import FedLoss
from tailfin.losses.focal import Focal
from tailfin.losses.gap import GAP
from tailfin.losses.ia_bce import IABCE
from tailfin.losses.ldam import LDAM
from tailfin.losses.logit_adjusted import LogitAdjusted
from tailfin.losses.objectness import Objectness
from tailfin.losses.pcb import PCB
from tailfin.losses.rog import ROG
from tailfin.losses.seesaw import Seesaw
from tailfin.losses.sigmoid import Sigmoid
from tailfin.losses.softmax import Softmax
from tailfin.losses.varifocal import Varifocal
from tailfin.stats import ClassStats

LOSSES: dict[str, type[ClassificationLoss]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "objectness": Objectness,
    "focal": Focal,
    "fcbl": FCBL,
    "eql": EQL,
    "eqlv2": EQLv2,
    "efl": EFL,
    "eqfl": EQFL,
    "droploss": DropLoss,
    "seesaw": Seesaw,
    "ecm": ECM,
    "ebl": EBL,
    "acsl": ACSL,
    "bags": BAGS,
    "balanced_sigmoid": BalancedSigmoid,
    "balanced_softmax": BalancedSoftmax,
    "pcb": PCB,
    "gap": GAP,
    "rog": ROG,
    "ldam": LDAM,
    "class_balanced": ClassBalanced,
    "logit_adjusted": LogitAdjusted,
    "fedloss": FedLoss,
    "varifocal": Varifocal,
    "ia_bce": IABCE,
}

__all__ = ["LOSSES", "ClassificationLoss", "build", "check_options", "names"]


def names() -> list[str]:
    """Names that `build` knows."""
    return list(LOSSES)


def build(name: str, stats: ClassStats, **options: Any) -> ClassificationLoss:
    """The loss `name` for the classes of `stats`; an unknown name, option or value is a `UserError`."""
    try:
        check_names(name, options)
        return LOSSES[name](stats, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss {name}: {error}") from None


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an unknown loss or option, or a wrong value: the schema of a recipe's `loss`."""
    check_names(name, options)
    probe = ClassStats(image_count=np.array([20, 10]), instance_count=np.array([20, 10]), num_images=30)
    try:
        LOSSES[name](probe, **options)
    except TypeError as error:
        raise ValueError(str(error)) from None


def check_names(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an unknown loss or option name, with the nearest one."""
    if name not in LOSSES and (own := plugins.load(plugins.LOSSES, name)) is not None:
        if not (isinstance(own, type) and issubclass(own, ClassificationLoss)):
            raise ValueError(f'the loss "{name}" of an installed package is no ClassificationLoss')
        LOSSES[name] = own
    if name not in LOSSES:
        raise ValueError(f'there is no loss "{name}"{nearest(name, [*LOSSES, *plugins.names(plugins.LOSSES)])}')
    known = option_names(name)
    for option in options:
        if option not in known:
            choices = nearest(option, known) if known else " (it has no options)"
            raise ValueError(f'the loss {name} has no option "{option}"{choices}')


def option_names(name: str) -> list[str]:
    """Option names of a loss, in the order of its constructor."""
    return list(LOSSES[name].option_names())
