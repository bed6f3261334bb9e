"""tailfin: long-tailed object detection in PyTorch.

The names below load on first use, so that `import tailfin` and the command line start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tailfin.version import __version__ as __version__

__all__ = [
    "ClassStats",
    "Detector",
    "UserError",
    "calibration",
    "evaluate",
    "load",
    "losses",
    "models",
    "samplers",
    "train",
]

if TYPE_CHECKING:
    from tailfin import calibration, losses, models, samplers
    from tailfin.api import Detector, evaluate, load, train
    from tailfin.errors import UserError
    from tailfin.stats import ClassStats

_HOMES = {
    "ClassStats": "tailfin.stats",
    "Detector": "tailfin.api",
    "UserError": "tailfin.errors",
    "evaluate": "tailfin.api",
    "load": "tailfin.api",
    "train": "tailfin.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"tailfin.{name}")
    raise AttributeError(f"module 'tailfin' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
