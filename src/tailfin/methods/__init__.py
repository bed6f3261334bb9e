"""Methods by name; a method is a function that trains the stages of its paper, in order."""

from __future__ import annotations

from collections.abc import Callable

from tailfin.methods import bacl, baseline, decoupled, stepwise
from tailfin.run import Run

METHODS: dict[str, Callable[[Run], None]] = {
    "baseline": baseline.train,
    "decoupled": decoupled.train,
    "bacl": bacl.train,
    "stepwise": stepwise.train,
}
