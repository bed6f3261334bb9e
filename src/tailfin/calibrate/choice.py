"""Which calibration is the best, by what the user wants, and what it is worth on pictures that it was not chosen on.

Every candidate has been measured on each of K folds of pictures. The choice is the best mean over the folds. What it
gains is told by cross-validation: for each fold the best candidate of the other folds, measured on this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tailfin.calibrate.candidates import PLAIN
from tailfin.errors import UserError, nearest
from tailfin.schema.calibration import Calibration

NUMBERS = ("AP", "APr", "APc", "APf")
TIE = 5e-4  # a gain up to this is none: scores are not changed for it
Numbers = dict[str, float]  # of NUMBERS, fractions; -1 where there are no such classes


@dataclass(frozen=True)
class Goal:
    """The best `by`, among candidates whose AP_f falls by at most `f_loss` (a fraction; none: however much)."""

    by: str = "AP"
    f_loss: float | None = None

    def __post_init__(self) -> None:
        if self.by not in NUMBERS:
            raise UserError(f'--by: "{self.by}" is not a number that is compared{nearest(self.by, NUMBERS)}')
        if self.f_loss is not None and self.f_loss < 0:
            raise UserError(f"--f-loss must not be negative (given: {100 * self.f_loss:g})")


@dataclass(frozen=True)
class Choice:
    """What was chosen and how it was found; numbers by label, "none" being the scores as they are."""

    label: str
    config: Calibration | None
    tried: dict[str, Numbers] = field(default_factory=dict)  # mean over the folds
    crossed: tuple[Numbers, Numbers] | None = None  # plain, and chosen on the other folds, both on folds kept out
    tested: dict[str, Numbers] = field(default_factory=dict)  # on pictures that nothing was chosen on
    seen: str = ""  # how many of these are pictures of the choice after all
    dropped: str = ""  # what the new file no longer has


def choose(folds: Mapping[str, Sequence[Numbers]], goal: Goal) -> tuple[str, dict[str, Numbers]]:
    """(label of the best candidate, each candidate's mean numbers); plain scores win a tie."""
    means = {label: mean(own) for label, own in folds.items()}
    return _best(means, goal), means


def crossed(folds: Mapping[str, Sequence[Numbers]], goal: Goal) -> tuple[Numbers, Numbers] | None:
    """Numbers of plain scores and of what the other folds choose, on each fold in turn; none with fewer than two."""
    count = len(next(iter(folds.values())))
    if count < 2:
        return None
    chosen = []
    for kept in range(count):
        others = {label: mean([n for k, n in enumerate(own) if k != kept]) for label, own in folds.items()}
        try:
            chosen.append(folds[_best(others, goal)][kept])
        except UserError:  # the classes of the goal are in this fold alone
            return None
    return mean(folds[PLAIN]), mean(chosen)


def best_of_each(means: Mapping[str, Numbers], goal: Goal) -> list[str]:
    """The best label of every method, plain scores first."""
    methods = dict.fromkeys(label.split()[0] for label in means)
    rows = []
    for method in methods:
        own = {label: numbers for label, numbers in means.items() if label.split()[0] == method}
        rows.append(max(own, key=lambda label: own[label][goal.by]))
    return rows


def mean(numbers: Sequence[Numbers]) -> Numbers:
    """Means over the folds that have such classes; -1 where none has."""
    columns = {name: np.array([own[name] for own in numbers]) for name in NUMBERS}
    return {name: float(own[own > -1].mean()) if (own > -1).any() else -1.0 for name, own in columns.items()}


def _best(means: Mapping[str, Numbers], goal: Goal) -> str:
    plain = means[PLAIN]
    if plain[goal.by] < 0:
        raise UserError(f"--by {goal.by}: the pictures show no class of this group; choose by another number")
    allowed = [
        label
        for label, own in means.items()
        if goal.f_loss is None or plain["APf"] < 0 or own["APf"] >= plain["APf"] - goal.f_loss - 1e-12
    ]
    best = max(allowed, key=lambda label: means[label][goal.by])
    return best if means[best][goal.by] > plain[goal.by] + TIE else PLAIN
