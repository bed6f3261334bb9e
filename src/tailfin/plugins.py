"""Losses and methods from outside: by an installed package's entry points, or from a file that the user names.

    [project.entry-points."tailfin.losses"]     # of a package of one's own: name in recipes = class
    mine = "my_package:MyLoss"
    [project.entry-points."tailfin.methods"]    # a module with `METHOD` (schema.stages.Method) and `train(run)`
    mine = "my_package.my_method"

    tailfin train RECIPE loss=mine --import my_loss.py      # a file that writes itself into `losses.LOSSES`

A package's code runs when a recipe asks for its name, a file's when `--import` names it; a model file never runs code.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from tailfin.errors import UserError, nearest

LOSSES, METHODS = "tailfin.losses", "tailfin.methods"


def names(group: str) -> list[str]:
    """Names that installed packages give to losses or methods."""
    return sorted(point.name for point in entry_points(group=group))


def load(group: str, name: str) -> Any:
    """What an installed package calls `name`, or none; two of one name, or one that fails, are a `UserError`."""
    found: list[EntryPoint] = list(entry_points(group=group, name=name))
    if not found:
        return None
    if len({point.value for point in found}) > 1:
        listed = " and ".join(sorted(point.value for point in found))
        raise UserError(f'{group}: "{name}" is given by {listed}: uninstall one of them')
    try:
        return found[0].load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{group}: "{name}" ({found[0].value}) cannot be loaded: {_reason(error)}') from None


def import_file(path: str | Path) -> None:
    """Run a Python file of the user's, once per process; what it registers is known from then on."""
    file = Path(path)
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        raise UserError(f"--import {path}: no such file{near if 'did you mean' in near else ''}")
    name = f"tailfin_import_{file.resolve().stem}_{abs(hash(str(file.resolve())))}"
    if name in sys.modules:
        return
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise UserError(f"--import {path}: this is no Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where pickles and pydantic look for what the file defines
    try:
        specification.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"--import {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
