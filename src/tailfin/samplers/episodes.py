"""Bi-level sampling (SimCal, Wang et al., ECCV'20): a class, all alike, then one of its pictures; the class is told.

An epoch has as many pictures as a plain one. Each sample's target names its class as `sampled_class`, so that a box
head can train on the rows of that class alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailfin.data.dataset import TrainingDataset
from tailfin.samplers.plan import BatchPlan


@dataclass(frozen=True)
class EpisodePlan(BatchPlan):
    """A `BatchPlan` of episodes: a batch is one; its keys have the class after epoch, image row and repeat."""

    def order(self, epoch: int) -> EpisodeOrder:
        """Batches of (image row, place in the epoch, class); the place tells the samples of a picture apart."""
        episodes = -(-len(self.rows) // self.batch)
        rng = np.random.default_rng([self.seed, 1, epoch])
        classes, rows = draw_episodes(*self._labels, episodes, rng, classes_per_episode=self.batch)
        return EpisodeOrder(np.stack([rows, np.arange(rows.size).reshape(rows.shape), classes], axis=2))


@dataclass(frozen=True)
class EpisodeOrder:
    """Batches of a table int64 [batches, batch, 3]."""

    table: NDArray[np.int64]

    def read(self, batches: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.table[batches[:, None], columns]

    def all(self) -> NDArray[np.int64]:
        return self.table


class EpisodeDataset(TrainingDataset):
    """Training samples for the keys of an `EpisodePlan`."""

    def sample(self, epoch: int, row: int, copy: int, label: int = -1) -> tuple[Tensor, dict[str, Tensor]]:
        """As the plain one, with `sampled_class` in the target, int64."""
        image, target = super().sample(epoch, row, copy)
        return image, {**target, "sampled_class": torch.tensor(label)}


def draw_episodes(
    image_of: NDArray[np.integer],
    labels: NDArray[np.integer],
    episodes: int,
    rng: np.random.Generator,
    classes_per_episode: int = 16,
    images_per_class: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bi-level sampling: (classes, image rows), each int64 [episodes, classes_per_episode * images_per_class].

    Every class with an annotation is equally likely, with replacement; then every image that shows it, likewise. An
    episode's entries stand class by class. (`image_of`, `labels`) list every annotation.
    """
    pairs = np.unique(np.stack([labels, image_of], axis=1), axis=0)
    if len(pairs) == 0:
        raise ValueError("bi-level sampling needs at least one annotation")
    present, first, sizes = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    drawn = np.repeat(rng.integers(len(present), size=(episodes, classes_per_episode)), images_per_class, axis=1)
    place = first[drawn] + rng.integers(sizes[drawn])
    return present[drawn], pairs[place, 1]
