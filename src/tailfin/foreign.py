"""Checkpoint files of other projects, read without running what is in them: .pth of torch, .pkl of numpy arrays.

    checkpoint = read_checkpoint(Path("model_final.pkl"))
    checkpoint.state, checkpoint.facts         tensors by name; what stands beside them

A pickle can name any function and have it called. torch's own reader for plain tensors takes .pth files; .pkl files,
detectron2's, are read here by an unpickler that knows arrays and nothing else.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tailfin.errors import UserError, nearest
from tailfin.files import existing_file

# dictionaries in which a checkpoint keeps its weights, the first that it has; step-wise learning's released code keeps
# the expert in `model_l0` and the student of its last step, which is the result, in `model_l1`
STATES = ("model", "state_dict", "model_l1")
CORES = ("core", "_core")
# the functions that a pickle of numpy arrays calls, by their modules of numpy 1 and 2
ARRAYS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),  # bytes in protocols before 3
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0] for core in CORES},
    **{(f"numpy.{core}.multiarray", "scalar"): np.float32(1).__reduce__()[0] for core in CORES},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0] for core in CORES},
}


class Checkpoint(NamedTuple):
    """A file's weights and what stands beside them."""

    state: dict[str, Tensor]
    facts: dict[str, Any]


def read_checkpoint(path: Path, part: str = "") -> Checkpoint:
    """A .pth, .pt, .bin or .pkl file; `part` is the key of its weights, where that is none of `STATES`.

    Raises:
        UserError: the file is missing or damaged, wants code to be run, or holds no dictionary of tensors.
    """
    path = existing_file(path, "weights")
    value = _arrays(path) if path.suffix == ".pkl" else _tensors(path)
    inner = ""
    if isinstance(value, dict):
        if part and part not in value:
            raise UserError(f'weights {path}: there is no "{part}" in it{nearest(part, [str(key) for key in value])}')
        inner = part or next((key for key in STATES if key in value), "")
    facts = {str(key): one for key, one in value.items() if key not in STATES} if inner else {}
    if inner == STATES[-1] and not part:
        text = f"{path}: {inner}, the student of its last step, is taken; {path}#model_l0 would be the expert"
        warnings.warn(text, UserWarning, stacklevel=2)
    state = value[inner] if inner else value
    if isinstance(state, Mapping):
        state = {key: _tensor(one) for key, one in state.items()}
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise UserError(f"weights {path} hold no dictionary of tensors")
    parallel = bool(state) and all(str(key).startswith("module.") for key in state)  # around DistributedDataParallel
    return Checkpoint({str(key).removeprefix("module." if parallel else ""): one for key, one in state.items()}, facts)


def _tensors(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in a released checkpoint
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        if reason.startswith("Weights only load failed"):  # torch's advice to load it with its code
            reason = "it is damaged, or holds objects that would run code"
        raise UserError(f"weights {path} cannot be read as plain tensors: {reason[:160]}") from None


def _arrays(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Arrays(file, encoding="latin1").load()
    except _Code as code:
        raise UserError(f"weights {path}: the pickle wants {code}: files that want code are not read") from None
    except Exception as error:
        raise UserError(
            f"weights {path} are no readable pickle of arrays: {' '.join(str(error).split())[:160]}"
        ) from None


class _Code(Exception):
    """What a pickle wants beside arrays."""


class _Arrays(pickle.Unpickler):
    """Knows numpy arrays alone."""

    def find_class(self, module: str, name: str) -> Any:
        found = ARRAYS.get((module, name))
        if found is None:
            raise _Code(f"{module}.{name}, which is no array")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _Code("something that lies outside of it")


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))  # a copy that may be written to
    return value
