"""What each published pre-training is: its terms with their weights, and what it sets of the section `pretraining`.

A preset trains its own terms alone. `OWNERS` says which keys of the section serve which terms, so that what belongs to
terms of another preset can be refused (`pretraining.py`) or dropped (`change_preset`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Holistic (pictures), local (boxes) and dense (cells) contrast; slots, transport of maps; appearance and semantic
# reconstruction; detection
TERMS = ("hcl", "lcl", "dense", "slots", "emd", "ar", "sr", "det")

# Crops for whole-picture terms (MoCo v2) and those of BYOL's two views; small crops need no box in common
_MOCO_VIEWS = {
    "crop_area": (0.2, 1.0),
    "resize": "square",
    "sizes": (224,),
    "min_valid": 0,
    "keep_rarest": False,
    "solarise_p": (0.0, 0.0),
}
_BYOL_VIEWS = {**_MOCO_VIEWS, "jitter": (0.4, 0.4, 0.2, 0.1), "blur_p": (1.0, 0.1), "solarise_p": (0.0, 0.2)}
# What each published method sets; `weights` are all terms that it has. Sources and what is left out: docs/methods.md
PRESETS: dict[str, dict[str, Any]] = {
    "drcl": {
        "weights": {"hcl": 0.1, "lcl": 0.05, "ar": 0.1, "sr": 0.9, "det": 1.0},
        "sampler": {"name": "dynamic"},
    },
    "moco_v2": {
        "weights": {"hcl": 1.0},
        "proposals": {"source": "gt"},
        "views": _MOCO_VIEWS,
        "image": {"hidden": 2048, "dim": 128, "norm": "none", "predictor": False},
        "det_loss": "none",
        "sampler": {"name": "plain"},
    },
    "simclr": {
        "weights": {"hcl": 1.0},
        "proposals": {"source": "gt"},
        "views": {**_MOCO_VIEWS, "crop_area": (0.08, 1.0)},
        "image": {"loss": "nt_xent", "temperature": 0.1, "hidden": 2048, "dim": 128, "predictor": False},
        "det_loss": "none",
        "sampler": {"name": "plain"},
    },
    "byol": {
        "weights": {"hcl": 1.0},
        "proposals": {"source": "gt"},
        "views": _BYOL_VIEWS,
        "image": {"loss": "cosine", "hidden": 4096},
        "det_loss": "none",
        "momentum": 0.996,
        "momentum_schedule": "cosine",
        "symmetric": True,
        "sampler": {"name": "plain"},
    },
    "soco": {
        "weights": {"lcl": 1.0},
        "proposals": {"per_image": 4, "min_side": 32.0, "max_aspect": 3.0, "size": (0.3, 0.8)},
        "views": {**_BYOL_VIEWS, "crop_area": (0.5, 1.0), "min_valid": 2, "box_jitter": 0.1},
        "box": {"loss": "cosine", "hidden": 4096, "levels": "all"},
        "det_loss": "none",
        "momentum": 0.99,
        "momentum_schedule": "cosine",
        "symmetric": True,
        "third_view": True,
        "sampler": {"name": "plain"},
    },
    "aligndet": {
        "weights": {"lcl": 1.0, "det": 1.0},
        "proposals": {"max_aspect": 3.0, "size": (0.0, 0.8)},
        "views": {"crop_area": (1.0, 1.0), "gray_p": 0.0, "blur_p": (0.0, 0.0), "solarise_p": (0.0, 0.0)},
        "box": {"loss": "nt_xent", "temperature": 0.5, "rois": "assigned", "predictor": False},
        "det_loss": "class_agnostic",
        "momentum": 0.996,
        "momentum_schedule": "cosine",
        "freeze_backbone": True,
        "sampler": {"name": "plain"},
    },
    "densecl": {
        "weights": {"hcl": 0.5, "dense": 0.5},
        "proposals": {"source": "gt"},
        "views": _MOCO_VIEWS,
        "image": {"hidden": 2048, "dim": 128, "norm": "none", "predictor": False},
        "det_loss": "none",
        "sampler": {"name": "plain"},
    },
    "slotcon": {
        "weights": {"slots": 1.0},
        "proposals": {"source": "gt"},
        "views": {**_BYOL_VIEWS, "crop_area": (0.08, 1.0), "min_overlap": 0.01},
        "det_loss": "none",
        "momentum": 0.99,
        "momentum_schedule": "cosine",
        "symmetric": True,
        "sampler": {"name": "plain"},
    },
    "self_emd": {
        "weights": {"emd": 1.0},
        "proposals": {"source": "gt"},
        "views": _BYOL_VIEWS,
        "det_loss": "none",
        "momentum": 0.996,
        "momentum_schedule": "cosine",
        "symmetric": True,
        "third_view": True,
        "sampler": {"name": "plain"},
    },
}
# Keys of the section that serve some terms alone
OWNERS: dict[str, tuple[str, ...]] = {
    "image": ("hcl",),
    "box": ("lcl",),
    "third_view": ("lcl", "emd"),
    "dense": ("dense",),
    "slots": ("slots",),
    "transport": ("emd",),
    "reconstruction": ("ar", "sr"),
    "proposals": ("lcl", "sr"),
    "det_loss": ("det",),
    "loss": ("det",),
    "keep_predictor": ("det",),
}


def terms(preset: str) -> tuple[str, ...]:
    """Names of the terms that a preset has, those of its weights."""
    return tuple(PRESETS[preset]["weights"])


def own_terms(values: Mapping[str, Any], preset: str) -> tuple[dict[str, Any], list[str]]:
    """A section without what belongs to terms that `preset` does not have; and the keys that were dropped."""
    have = set(terms(preset))
    kept, dropped = {}, []
    for key, value in values.items():
        if key == "weights" and isinstance(value, Mapping):
            kept[key] = {term: weight for term, weight in value.items() if term in have or term not in TERMS}
            dropped += [f"weights.{term}" for term in value if term not in kept[key]]
        elif have & set(OWNERS.get(key, have)):
            kept[key] = value
        else:
            dropped.append(key)
    return {**kept, "preset": preset}, dropped


def change_preset(values: Mapping[str, Any], preset: str) -> tuple[dict[str, Any], list[str]]:
    """The same of a section that was written for another preset, whose weights balance that one's terms and go too."""
    kept, dropped = own_terms({key: value for key, value in values.items() if key != "weights"}, preset)
    return kept, dropped + (["weights"] if "weights" in values else [])


def merged(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's keys under those that are given, section by section."""
    result = dict(preset)
    for key, value in given.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and "name" not in value:
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result
