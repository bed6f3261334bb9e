"""How much memory a training step takes, from one step on one picture on the CPU.

    step = watched_step(model, image, target)          # forward and backward, every storage followed
    training_memory(model, step, pictures=2, states=1).total

Peak memory is not what the backward pass keeps: gradients of wide layers and copies come on top while most of it is
still alive. So every storage that an operation makes is followed from its making to its end, through forward and
backward pass. Storages of a weight's shape, gradients and their parts, are there once, whatever the batch; all others
are there per picture. The peak of a batch of B is the largest, over time, of the first plus B times the second. What a
kernel takes inside itself, and the allocator's gaps, are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WatchedStep(NamedTuple):
    """Bytes alive after each event, int64 [E]."""

    gradients: NDArray[np.int64]  # storages of a trained weight's shape: its gradient, of a shared one also the parts
    pictures: NDArray[np.int64]  # all others that the step made


class TrainingMemory(NamedTuple):
    """Bytes at the peak of a training step."""

    held: int  # weights, buffers, gradients, optimiser states
    activations: int  # what the micro-batch adds at the peak

    @property
    def total(self) -> int:
        return self.held + self.activations


def watched_step(model: nn.Module, image: Tensor, target: Mapping[str, Tensor]) -> WatchedStep:
    """Forward and backward of one picture (float32 [3, H, W] or uint8, and its target); leaves no gradients."""
    model.train().zero_grad(set_to_none=True)
    watch = _Watch({tuple(p.shape) for p in model.parameters() if p.requires_grad})
    with watch:
        losses = model([image], [dict(target)])
        total = torch.stack(list(losses.values())).sum()
        del losses
        if total.requires_grad:
            total.backward()
    model.zero_grad(set_to_none=True)
    sizes, events = np.array(watch.sizes, dtype=np.int64), np.array(watch.events, dtype=np.int64)
    numbers = np.where(events >= 0, events, ~events)
    change = np.where(events >= 0, sizes[numbers], -sizes[numbers])
    gradient = np.isin(numbers, watch.weightlike)
    return WatchedStep(np.cumsum(np.where(gradient, change, 0)), np.cumsum(np.where(gradient, 0, change)))


def training_memory(model: nn.Module, step: WatchedStep, pictures: int, states: int) -> TrainingMemory:
    """Peak of a step on so many pictures, float32; `states` is the optimiser's numbers per weight (SGD 1, AdamW 2)."""
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    alive = step.gradients + pictures * step.pictures
    peak = max(int(alive.max(initial=0)), trained)
    return TrainingMemory(weights + trained * (1 + states), max(0, peak - trained))


class _Watch(TorchDispatchMode):
    """Follows storages: `events` has the number of each when it is made, and ~number when it is freed."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes  # of weights
        self.weightlike: list[int] = []  # numbers of storages that were made with one of them
        self.alive: dict[int, int] = {}  # address of a storage -> its number
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.given: set[int] = set()  # storages that were there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in self.given:
                    self.given.add(storage._cdata)
                    weakref.finalize(storage, self.given.discard, storage._cdata)
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self._see(value.untyped_storage(), tuple(value.shape))
        return found

    def _see(self, storage: torch.UntypedStorage, shape: tuple[int, ...]) -> None:
        key = storage._cdata
        if key in self.alive or key in self.given:
            return
        number = len(self.sizes)
        self.alive[key] = number
        self.sizes.append(storage.nbytes())
        self.events.append(number)
        if shape in self.shapes:
            self.weightlike.append(number)
        weakref.finalize(storage, self._end, key, number)

    def _end(self, key: int, number: int) -> None:
        if self.alive.get(key) == number:
            del self.alive[key]
        self.events.append(~number)
