"""Methods by name; a method is a function that trains the stages of its paper, in order."""

from __future__ import annotations

from collections.abc import Callable

from tailfin import plugins
from tailfin.errors import UserError, nearest
from tailfin.methods import bacl, baseline, decoupled, stepwise
from tailfin.run import Run

METHODS: dict[str, Callable[[Run], None]] = {
    "baseline": baseline.train,
    "decoupled": decoupled.train,
    "bacl": bacl.train,
    "stepwise": stepwise.train,
}


def method(name: str) -> Callable[[Run], None]:
    """The method `name`, of this table or of an installed package (`plugins.py`)."""
    if name in METHODS:
        return METHODS[name]
    own = plugins.load(plugins.METHODS, name)
    if own is None:
        raise UserError(f'there is no method "{name}"{nearest(name, [*METHODS, *plugins.names(plugins.METHODS)])}')
    train: Callable[[Run], None] = own.train
    return train
