"""Classification forest of Forest R-CNN (Wu et al., ACM MM'20): parent classes vote on the classes below them.

Each tree groups the C classes under some parents (clusters by looks, by geometry, by name, ...); background is a parent
of its own. Every tree has a classifier of its parents, on features that pass no gradient back, beside the classifier of
all C + 1 classes; each is trained by softmax cross-entropy, mean over the rows, added with weight 1. At test time

    score_c ~ exp(z_c) * mean over trees of softmax(parents)[parent of c],  normalised over the C + 1 classes

`Forest` is the loss of all classifiers' logits side by side, `ForestPredictor` the layers that make them::

    tree = cluster_classes(class_geometry(open_index("train.json")), parents=50)     # one of the trees
    loss = Forest(stats, [tree, ...])
    predictor = ForestPredictor(1024, loss)          # on one shared layer (`SharedLayer`), the rest is in it
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn import functional as F

from tailfin.data.index import AnnotationIndex
from tailfin.errors import UserError, nearest
from tailfin.files import read_json
from tailfin.losses.base import ClassificationLoss, at_least_float32
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.models.heads.spec import HeadSpec
from tailfin.models.precision import in_float32
from tailfin.stats import ClassStats

RUNS = 10  # of k-means
SHARES = {"geometry": 50 / 1230, "company": 25 / 1230, "names": 108 / 1230}  # parents per class of each tree
DIRECTIONS = 32  # of a class description that is kept for clustering


class Forest(ClassificationLoss):
    """Cross-entropies of T trees' parents and of the classes; each divided by the number of rows.

    Args:
        trees: T arrays int [C]: the parent of each class, numbered from 0.

    Logits: the parents of tree 0 and its background, those of tree 1, ..., then the C classes and the background.
    `parts`: "tree0", ..., "classes". State: `parents` int64 [T, C + 1], so that a stored model knows its trees.
    """

    classes_first = False  # they are last
    parents: Tensor

    def __init__(self, stats: ClassStats, trees: Sequence[ArrayLike]) -> None:
        super().__init__(stats)
        if len(trees) == 0:
            raise ValueError("a forest needs at least one tree")
        numbers = [_parents(tree, self.num_classes, f"trees[{place}]") for place, tree in enumerate(trees)]
        self.widths = [int(tree.max()) + 2 for tree in numbers] + [self.num_classes + 1]
        self.num_logits = sum(self.widths)
        with_background = [np.append(tree, tree.max() + 1) for tree in numbers]
        self.register_buffer("parents", torch.from_numpy(np.stack(with_background)))  # [T, C + 1]

    def plant(self, trees: Sequence[ArrayLike]) -> None:
        """Other trees in the place of the first ones; each may have as many parents, or fewer."""
        numbers = [_parents(tree, self.num_classes, f"trees[{place}]") for place, tree in enumerate(trees)]
        if len(numbers) != len(self.parents):
            raise ValueError(f"there are {len(numbers)} trees, the forest has {len(self.parents)}")
        for place, (tree, width) in enumerate(zip(numbers, self.widths, strict=False)):
            if tree.max() + 2 > width:
                raise ValueError(f"trees[{place}] has {tree.max() + 1} parents, there is room for {width - 1}")
            self.parents[place, :-1] = torch.from_numpy(tree)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        *trees, classes = logits.split(self.widths, dim=1)
        terms = {
            f"tree{place}": (tree, parent[labels])
            for place, (tree, parent) in enumerate(zip(trees, self.parents, strict=True))
        }
        terms["classes"] = (classes, labels)
        values = {
            name: F.cross_entropy(own, target, reduction="sum") / max(len(labels), 1)
            for name, (own, target) in terms.items()
        }
        self.parts = {name: value.detach() for name, value in values.items()}
        return torch.stack(list(values.values())).sum()

    def scores(self, logits: Tensor) -> Tensor:
        *trees, classes = at_least_float32(logits).split(self.widths, dim=1)
        # in logarithms: a class that its parents rule out must not make 0 / 0
        votes = torch.stack([tree.log_softmax(1)[:, parent] for tree, parent in zip(trees, self.parents, strict=True)])
        return (classes + votes.logsumexp(0)).softmax(dim=1)[:, :-1]


class SharedLayer(nn.Sequential):
    """Pooled features [N, channels, size, size] to [N, width]: the one layer shared by all branches."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(channels * size * size, width), nn.ReLU())


class ForestClassifier(nn.Module):
    """Shared features [N, width] to all logits [N, loss.num_logits]; every classifier has a hidden layer of its own."""

    def __init__(self, width: int, loss: Forest) -> None:
        super().__init__()
        self.in_features = width
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in loss.widths)
        self.classifiers = nn.ModuleList(nn.Linear(width, outputs) for outputs in loss.widths)
        _start(self.hidden, nn.init.xavier_uniform_)
        _start(self.classifiers, partial(nn.init.normal_, std=0.01))

    def forward(self, features: Tensor) -> Tensor:
        detached = features.detach()
        last = len(self.hidden) - 1
        return torch.cat(
            [
                classifier(hidden(features if place == last else detached).relu())
                for place, (hidden, classifier) in enumerate(zip(self.hidden, self.classifiers, strict=True))
            ],
            dim=1,
        )


class ForestPredictor(nn.Module):
    """Shared features [N, width] to (all logits [N, loss.num_logits], box deltas).

    The box regression too has a hidden layer of its own; the trees see detached features, so that only the class loss
    and the box loss shape the shared ones.
    """

    def __init__(self, width: int, loss: Forest, class_agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = ForestClassifier(width, loss)
        last = nn.Linear(width, 4 if class_agnostic else 4 * loss.num_classes)
        self.bbox_pred = nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
        _start([self.bbox_pred[0]], nn.init.xavier_uniform_)
        _start([last], partial(nn.init.normal_, std=0.001))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return in_float32(self.cls_score, features), in_float32(self.bbox_pred, features)


class GrownForest(Forest):
    """A forest that is described before its trees are known: they are grown from the training annotations.

    Args:
        trees: where the trees come from, "geometry" (`class_geometry`), "company" (`class_company`) and "names"
            (`class_name_parts`); or a JSON file as for `read_trees`.
        parents: room for parents in each tree, within 1..C. Without it trees have as many parents per class as the
            published ones (50, 25 and 108 for 1230 classes), at least 4 where there are so many classes; a file needs
            it, one number per tree.

    Until `see_annotations`, or a stored state, the trees are of no meaning.
    """

    def __init__(
        self,
        stats: ClassStats,
        *,
        trees: str | Sequence[str] = tuple(SHARES),
        parents: Sequence[int] | None = None,
    ) -> None:
        file = trees if isinstance(trees, str) and trees.endswith(".json") else None
        sources = [] if file is not None else [trees] if isinstance(trees, str) else list(trees)
        for source in sources:
            if source not in SHARES:
                raise ValueError(f'trees: "{source}" is no source of trees{nearest(source, SHARES)} nor a .json file')
        if parents is None:
            if file is not None:
                raise ValueError("trees from a file need `parents`, the number of parents of each tree: [25, 50]")
            least = min(4, stats.num_classes)
            parents = [max(least, round(SHARES[source] * stats.num_classes)) for source in sources]
        if not file and len(parents) != len(sources):
            raise ValueError(f"parents has {len(parents)} entries for {len(sources)} trees")
        for number in parents:
            if not isinstance(number, int) or not 1 <= number <= stats.num_classes:
                raise ValueError(f"parents must lie in 1..{stats.num_classes}, the number of classes (given: {number})")
        super().__init__(stats, [np.arange(stats.num_classes) % number for number in parents])
        self.sources, self.file, self.room = sources, file, list(parents)

    def see_annotations(self, index: AnnotationIndex) -> None:
        """Grow the trees; the same annotations give the same trees."""
        if self.file is not None:
            try:
                self.plant(read_trees(self.file, list(index.names)))
            except ValueError as error:
                raise UserError(f"{self.file}: {error}: change `parents`") from None
            return
        features = {"geometry": class_geometry, "company": class_company, "names": class_name_parts}
        self.plant(
            [
                cluster_classes(features[source](index), number, scale=source == "geometry")
                for source, number in zip(self.sources, self.room, strict=True)
            ]
        )


def box_head(spec: HeadSpec) -> RoIHeads:
    """The box head of a recipe, with its forest as the loss."""
    forest = GrownForest(spec.stats, **spec.keywords)
    shared = SharedLayer(spec.channels, spec.config.roi_size, spec.width)
    predictor = ForestPredictor(spec.width, forest, spec.class_agnostic)
    return RoIHeads(spec.pool, shared, predictor, forest, **spec.options)


# ---- trees -----------------------------------------------------------------------------------------------------------


def cluster_classes(features: ArrayLike, parents: int, seed: int = 0, *, scale: bool = True) -> NDArray[np.int64]:
    """A tree by k-means of one feature vector per class: [C, D] to int64 [C], numbered in order of appearance.

    With `scale` columns have unit variance; the best of several runs counts. At most `parents` clusters: empty ones are
    left out. The published forest has a visual tree of 25 parents, a geometrical one of 50 and a lexical one of 108: of
    mean features (`class_means`), of shapes (`class_geometry` is such a description) and of word vectors of the names.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError("clustering needs one vector of finite numbers per class")
    if not 1 <= parents <= len(values):
        raise ValueError(f"parents must lie in 1..{len(values)}, the number of classes (given: {parents})")
    if scale:
        spread = values.std(axis=0)
        values = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)
    rng = np.random.default_rng([seed, parents])
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):  # fewer different vectors than parents
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster
        runs = [kmeans2(values, parents, iter=100, minit="++", seed=rng) for _ in range(RUNS)]
    cluster = min(runs, key=lambda run: float(((values - run[0][run[1]]) ** 2).sum()))[1]
    _, first, number = np.unique(cluster, return_index=True, return_inverse=True)
    return first.argsort().argsort()[number].astype(np.int64)


def class_geometry(index: AnnotationIndex) -> NDArray[np.float64]:
    """Shape and size of each class's boxes, [C, 4]: mean and spread of log aspect ratio and of log relative area.

    A class without usable boxes has the mean of the others.
    """
    clean = index.clean()
    labels = index.labels[clean.rows]
    sides = (clean.boxes[:, 2:] - clean.boxes[:, :2]).astype(np.float64)
    image = index.image_of[clean.rows]
    picture = index.widths[image].astype(np.float64) * index.heights[image]
    values = np.stack([np.log(sides[:, 0] / sides[:, 1]), np.log(sides[:, 0] * sides[:, 1] / picture)], axis=1)
    mean = class_means(values, labels, len(index.categories))
    square = class_means(values**2, labels, len(index.categories))
    return np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0))], axis=1)


def class_company(index: AnnotationIndex) -> NDArray[np.float64]:
    """Which classes a class is seen with, [C, D]: scenes sort classes much as their looks do, and need no network.

    The main directions of the logarithm of how many pictures two classes share.
    """
    classes = len(index.categories)
    pairs = np.unique(index.image_of.astype(np.int64) * classes + index.labels)
    shape = (len(index), classes)
    shown = csr_array((np.ones(len(pairs)), (pairs // classes, pairs % classes)), shape=shape)
    together = np.log1p((shown.T @ shown).toarray())
    np.fill_diagonal(together, 0)  # how frequent a class is says nothing about its company
    return _main_directions(together)


def class_name_parts(index: AnnotationIndex) -> NDArray[np.float64]:
    """Parts of the names, [C, D]: the main directions of which three letters occur; "alarm_clock" is near "clock"."""
    parts = []
    for name in index.names:
        words = re.findall(r"[^\W_]+", name.lower())
        spaced = f" {' '.join(words)} "
        parts.append({spaced[place : place + 3] for place in range(max(1, len(spaced) - 2))})
    number = {part: place for place, part in enumerate(sorted(set().union(*parts)))}
    occurs = np.zeros((len(parts), len(number)))
    for row, own in enumerate(parts):
        occurs[row, [number[part] for part in own]] = 1
    return _main_directions(occurs * np.log(len(parts) / occurs.sum(axis=0)))


def class_means(features: ArrayLike, labels: ArrayLike, num_classes: int) -> NDArray[np.float64]:
    """Mean of the rows [N, D] of each class, float64 [C, D]; a class without rows has the mean of the other classes."""
    rows = np.asarray(features, dtype=np.float64)
    of_class = np.asarray(labels)
    counts = np.bincount(of_class, minlength=num_classes)
    sums = np.zeros((num_classes, rows.shape[1]))
    np.add.at(sums, of_class, rows)
    means = sums / np.maximum(counts, 1)[:, None]
    if (counts > 0).any():
        means[counts == 0] = means[counts > 0].mean(axis=0)
    return means


def read_trees(path: str | Path, names: Sequence[str]) -> list[NDArray[np.int64]]:
    """Trees for the classes `names` from a JSON file {"tree": {"class": "parent", ...}, ...}, parents in any words."""
    document = read_json(path, "tree file")
    if not isinstance(document, dict) or not document or not all(isinstance(t, dict) for t in document.values()):
        raise UserError(f'{path}: trees are written {{"tree": {{"class": "parent", ...}}, ...}}')
    trees = []
    for tree, parent_of in document.items():
        for name in names:
            if name not in parent_of:
                raise UserError(f'{path}: tree "{tree}" has no parent for the class "{name}"{nearest(name, parent_of)}')
        label = [json.dumps(parent_of[name]) for name in names]
        _, first, number = np.unique(label, return_index=True, return_inverse=True)
        trees.append(first.argsort().argsort()[number].astype(np.int64))
    return trees


def _main_directions(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """[C, D] descriptions, each of length 1, to their coordinates along the strongest directions."""
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    values, vectors = np.linalg.eigh(rows @ rows.T)  # C is far below D
    kept = slice(max(0, len(values) - DIRECTIONS), None)
    return vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0))


def _start(layers: Iterable[nn.Module], initialise: Callable[[Tensor], Tensor]) -> None:
    for layer in layers:
        initialise(layer.get_parameter("weight"))
        nn.init.zeros_(layer.get_parameter("bias"))


def _parents(tree: ArrayLike, classes: int, name: str) -> NDArray[np.int64]:
    numbers = np.asarray(tree.cpu() if isinstance(tree, Tensor) else tree)
    if numbers.shape != (classes,) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        raise ValueError(f"{name} must be one parent number (0, 1, ...) for each of the {classes} classes")
    return numbers.astype(np.int64)
