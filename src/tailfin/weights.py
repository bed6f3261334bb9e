"""Weights into a model: which of them fit, which were left out, and what starts anew.

loaded = load_fitting(model, weights)         # by name and shape
loaded.names, loaded.reshaped, loaded.unknown, loaded.new
lines = load_weights(model, weights, "FILE")  # the same, in words; nothing that fits is a mistake
load_whole(model, weights, "FILE")            # everything must fit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tailfin.class_rows import Aliases, class_names, join_class_rows
from tailfin.errors import UserError

SHOWN = 3  # names in a line


@dataclass(frozen=True)
class Loaded:
    """What became of weights: sorted names, in the model's or the file's words."""

    names: frozenset[str]  # loaded
    reshaped: tuple[str, ...]  # in both, with another shape
    unknown: tuple[str, ...]  # not in the model
    new: tuple[str, ...]  # in the model, and not among the weights

    @property
    def dropped(self) -> tuple[str, ...]:
        """Weights that were not loaded."""
        return (*self.reshaped, *self.unknown)

    @property
    def missing(self) -> tuple[str, ...]:
        """What the model keeps of its own: new, or of another shape there."""
        return (*self.new, *self.reshaped)


def load_fitting(
    model: nn.Module, weights: Mapping[str, Tensor], take: Callable[[str], bool] = lambda name: True
) -> Loaded:
    """Copy the weights that fit `model` by name and shape; `take` says of a name whether it is wanted at all."""
    own = model.state_dict()
    wanted = {key: value for key, value in weights.items() if take(key)}
    fitting = {key: value for key, value in wanted.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    return Loaded(
        frozenset(fitting),
        tuple(sorted(key for key in wanted if key in own and key not in fitting)),
        tuple(sorted(key for key in weights if key not in wanted or key not in own)),
        tuple(sorted(key for key in own if key not in wanted)),
    )


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    names: Sequence[str] | None = None,
    *,
    old: Sequence[str] | None = None,
    aliases: Aliases | None = None,
) -> list[str]:
    """Copy the weights that fit by name and shape; returns lines that say what was loaded, left out and new.

    With the model's class `names`, and where it is known which classes the weights are of, rows of classes are joined
    by name (`class_rows.py`): `old` are theirs, by default those of `source` where that is a model file.
    """
    old = class_names(source) if old is None and names is not None else old
    said: list[str] = []
    if names is not None and old is not None:
        weights, said = join_class_rows(model.state_dict(), weights, old, names, aliases)
    elif aliases:
        raise UserError(f"classes.map: {source} does not say which classes its weights are of, nothing can be joined")
    loaded = load_fitting(model, weights)
    if not loaded.names:
        raise UserError(f"{source}: none of its {len(weights)} weights fits this detector")
    own = len(loaded.names) + len(loaded.missing)
    lines = [f"{source}: {len(loaded.names)} of {own} weights loaded"]
    found = (("another shape", loaded.reshaped), ("not in this detector", loaded.unknown), ("start anew", loaded.new))
    return [*lines, *(f"  {what}: {_named(keys)}" for what, keys in found if keys), *said]


def load_whole(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy all weights; one that does not fit, or that `model` lacks, is a `UserError` (memories of a stage aside)."""
    loaded = load_fitting(model, weights)
    lacking = [key for key in loaded.new if not key.startswith(memories(model))]
    found = (("another shape", loaded.reshaped), ("not in the detector", loaded.unknown), ("not in the file", lacking))
    wrong = [f"{what}: {_named(keys)}" for what, keys in found if keys]
    if wrong:
        raise UserError(f"{source}: its weights do not fit its recipe: {'; '.join(wrong)}")


def state_of(model: nn.Module, *modules: nn.Module | None) -> frozenset[str]:
    """Names in the state of `model` of what belongs to some of its modules; `None` has no state."""
    own = {
        id(value) for module in modules if module is not None for value in module.state_dict(keep_vars=True).values()
    }
    return frozenset(key for key, value in model.state_dict(keep_vars=True).items() if id(value) in own)


def memories(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of what serves one stage's training alone and can be large: stored rows of a feature
    module (`stage_memory`). Resume points have them, model files do not, and no stage takes over those of another.
    """
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "stage_memory", False))


def _named(keys: tuple[str, ...] | list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''})"
