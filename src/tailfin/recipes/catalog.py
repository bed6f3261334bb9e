"""The recipes that are files: those of the package by address, `FILE` or `FILE:VARIANT`, and files of the user's own.

A file's name is its path in this folder without `.yaml`: `<data set>/<detector>_<backbone>` or `<data set>/<family>`.
To add a recipe, add a file, or a variant to the file that it shares most with.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tailfin.errors import UserError, nearest
from tailfin.files import existing_file, read_text
from tailfin.recipe_values import Variant, assign, parse_recipe, split_override, with_variant
from tailfin.recipes.moved import MOVED

FOLDER = Path(__file__).parent

# The ten recipes to start from, and what each is for
START = {
    "demo/faster_rcnn_r18_softmax": "see everything work: a made-up set, minutes on a CPU",
    "demo/bacl": "the same with BACL, two stages",
    "fod/faster_rcnn_r18_softmax": "your own set of small pictures: the plain baseline",
    "fod/faster_rcnn_r18_rfs": "the same with repeat factor sampling, the first thing to try",
    "fod/losses:seesaw": "the same with a long-tailed loss, one of its variants",
    "fod/bacl_r18": "the same with BACL, two stages",
    "fod/drcl_r18": "the same with 2DRCL pre-training",
    "fod/stepwise_tiny": "step-wise learning on a small Deformable DETR",
    "coco/faster_rcnn_r50_softmax": "photos on a GPU, from ImageNet weights",
    "lvis_v1/faster_rcnn_r50": "the published baseline of LVIS v1, and its methods as variants",
}


@dataclass(frozen=True)
class Found:
    """Where a recipe comes from."""

    name: str  # what the recipe goes by
    label: str  # what messages call it
    path: Path
    variant: str = ""  # empty: the file's base
    overrides: tuple[str, ...] = ()  # of a published row

    @property
    def packaged(self) -> bool:
        """Whether it is one of the package's, not a file of the user's own."""
        return FOLDER in self.path.parents

    @property
    def text(self) -> str:
        """The YAML text of the whole file."""
        return read_text(self.path, "recipe")

    def values(self) -> dict[str, Any]:
        """The recipe's plain values, named, with its variant and overrides applied."""
        base, variants = _parsed(self.path) if self.packaged else parse_recipe(self.text, str(self.path))
        values = copy.deepcopy(base)
        given = values.get("name")
        if self.variant:
            values = with_variant(values, _chosen(variants, self.variant, self.label))
            if self.packaged:  # the base's command names the base
                command = values["about"]["command"]
                values["about"]["command"] = command.replace(f"{_file_name(self.path)} ", f"{self.name} ")
        values["name"] = self.name if given is None else f"{given}:{self.variant}" if self.variant else given
        for text in self.overrides:
            assign(values, *split_override(text))
        return values


@cache
def files() -> tuple[str, ...]:
    """Names of the package's recipe files, sorted."""
    return tuple(sorted(_file_name(path) for path in FOLDER.glob("*/*.yaml")))


@cache
def names() -> tuple[str, ...]:
    """Addresses of all recipes of the package: every file, followed by its variants in the order of the file."""
    return tuple(address for file in files() for address in (file, *(f"{file}:{name}" for name in variants(file))))


def variants(file: str) -> tuple[str, ...]:
    """Names of the variants of a file of the package."""
    return tuple(_parsed(FOLDER / f"{file}.yaml")[1])


def exists(address: str) -> bool:
    """Whether the package has a recipe with this address."""
    file, _, variant = address.partition(":")
    return file in files() and (not variant or variant in variants(file))


def find_file(name: str) -> Found | None:
    """The recipe of the package, or the file, that `name` means, both with or without `:VARIANT`; None is neither.

    A recipe of the package may end in `.yaml`; one of its former names is said to be one, once, on stderr. A variant
    that a file does not have is a `UserError`.
    """
    own = name.removesuffix(".yaml")
    if own in MOVED:
        _say_moved(own)
        own = MOVED[own]
    file, variant = _split(own, lambda part: part.removesuffix(".yaml") in files())
    file = file.removesuffix(".yaml")
    if file in files():
        address = f"{file}:{variant}" if variant else file
        path = FOLDER / f"{file}.yaml"
        if variant:
            _chosen(_parsed(path)[1], variant, f"recipe {file}")
        return Found(address, f"recipe {address}", path, variant)
    file, variant = (name, "") if _is_path(name) else _split(name, _is_path)
    if not _is_path(file):
        return None
    path = existing_file(file, "recipe")
    if not variant:
        return Found(path.stem, str(path), path)
    _chosen(parse_recipe(read_text(path, "recipe"), str(path))[1], variant, str(path))
    return Found(f"{path.stem}:{variant}", f"{path}:{variant}", path, variant)


def for_row(found: Found, row_id: str, overrides: list[str]) -> Found:
    """The recipe as a published row runs it."""
    label = f"published row {row_id} (recipe {found.name})"
    return replace(found, name=row_id, label=label, overrides=tuple(overrides))


@cache
def _parsed(path: Path) -> tuple[dict[str, Any], dict[str, Variant]]:
    """A file of the package; not to be changed."""
    return parse_recipe(read_text(path, "recipe"), f"recipe {_file_name(path)}")


def _file_name(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def _split(name: str, is_file: Callable[[str], bool]) -> tuple[str, str]:
    """At the last colon, where a recipe or file stands before it: `C:\\mine.yaml` has no variant."""
    file, _, variant = name.rpartition(":")
    return (file, variant) if variant and is_file(file) else (name, "")


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or Path(name).is_file()


def _chosen(variants: dict[str, Variant], name: str, source: str) -> Variant:
    if not variants:
        raise UserError(f'{source} has no variants, there is no "{name}" of it')
    if name not in variants:
        raise UserError(f'{source} has no variant "{name}"{nearest(name, variants)}')
    return variants[name]


@cache
def _say_moved(old: str) -> None:
    """Once per process, on the first rank alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"note: recipe {old} is now {MOVED[old]}; the old name works in this version alone", file=sys.stderr)
