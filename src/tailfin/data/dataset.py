"""Training and evaluation data sets over an annotation index, and the loaders that feed them.

A training sample's key is (epoch, image row, repeat); its augmentation is drawn from a generator seeded by that key
alone. A broken picture stops training with a message that names the file. With `data.on_bad_image: skip` the next
training picture of the annotation file (of the same aspect where batches are grouped by it, round from the last to the
first) takes its place under the same epoch and repeat: no other sample changes, on any number of processes and workers.

Where a detector learns masks (`TrainingDataset(..., masks=True)`), targets have `masks` uint8 [M, H, W] of the
augmented picture and `mask_valid` bool [M]. An object whose mask is missing, cannot be read or has no pixel left counts
for its box alone: its row of `masks` is its box, or empty, and `mask_valid` is false.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from copy import copy as shallow_copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tailfin.data.check import crowd_note
from tailfin.data.copy_paste import box_paste, copy_paste
from tailfin.data.images import read_image
from tailfin.data.index import AnnotationIndex, image_folder, image_path, open_index
from tailfin.data.masks import BROKEN
from tailfin.data.mixing import mixup, mosaic
from tailfin.data.odd_annotations import mask_note
from tailfin.data.pasting import Pasting
from tailfin.data.transforms import augment, resize, shortest_edge_size
from tailfin.errors import UserError, printable
from tailfin.samplers.plan import BatchPlan, Key
from tailfin.schema.data import Data, DataFiles

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


PATIENCE = 100  # broken pictures one after another: then the folder is gone, not a picture


@dataclass(frozen=True)
class Skipped:
    """A sample in the place of one whose picture cannot be used."""

    sample: tuple[Tensor, dict[str, Tensor]]
    messages: list[str]  # of the pictures that were tried before, in order


@dataclass(frozen=True)
class Source:
    """An annotation index with the folder of its pictures."""

    index: AnnotationIndex
    images: Path

    def read(self, row: int, max_pixels: int, value_range: tuple[int, int] | None = None) -> Tensor:
        """Picture of an image row, uint8 [3, H, W]; the bounds as in `read_image`."""
        path = image_path(self.images, self.index.file_name(row))
        width, height = int(self.index.widths[row]), int(self.index.heights[row])
        picture = read_image(path, width=width, height=height, max_pixels=max_pixels, value_range=value_range)
        return torch.from_numpy(picture).permute(2, 0, 1)


def open_source(files: DataFiles, root: str, what: str) -> Source:
    """The index and image folder of a recipe's `data.train` or `data.val`."""
    if not files.annotations:
        raise UserError(f"no {what} annotations: give --{what} FILE or data.{what}.annotations")
    annotations = Path(root) / files.annotations
    images = Path(root) / files.images if files.images else None
    index = open_index(annotations)
    if what == "train" and (crowds := crowd_note(index)):
        if index.crowd.all():
            raise UserError(f"{annotations}: {crowds}: there is nothing to train on")
        warnings.warn(f"{annotations}: {crowds}", UserWarning, stacklevel=2)
    return Source(index, image_folder(annotations, images))


def unchecked_note(source: Source, config: Data) -> str:
    """What `unchecked_classes: ignore` leaves out; empty where it is not asked for."""
    if config.unchecked_classes != "ignore":
        return ""
    index = source.index
    if not index.federated and not len(index.not_exhaustive_labels):
        return f"{index.path} has no neg_category_ids: every class counts as looked for, nothing is ignored"
    return f"{1 - index.known_share():.0%} of pictures times classes were not looked for"


class TrainingDataset(Dataset):
    """Augmented samples by key; `kept` (bool, a value per annotation of the index) hides all other annotations.

    `masks` adds `masks` and `mask_valid` to the targets; no mask is decoded where neither it nor copy-paste asks.
    """

    def __init__(
        self, source: Source, config: Data, seed: int, *, masks: bool = False, kept: np.ndarray | None = None
    ) -> None:
        self.source = source
        self.config = config
        self.seed = seed
        self.masks = masks
        self.clean = source.index.clean(kept)
        self.pasting: Pasting | None = None
        if config.paste_crops or config.paste_power:
            pictures = np.repeat(np.arange(len(source.index)), np.diff(self.clean.offsets))
            labels = source.index.labels[self.clean.rows]
            self.pasting = Pasting(config, labels, pictures, source.index.names)
        self.skipped: dict[str, int] = {}  # message of a picture that cannot be used -> samples without it so far

    @cached_property
    def paste_masks(self) -> bool:
        """Whether objects are cut out along their masks: where these are learnt, or all objects have one."""
        return self.masks or (self.config.copy_paste and self._segmented())

    def with_masks(self) -> Self:
        """The same samples, with masks in their targets; a file without any mask is a `UserError`."""
        index = self.source.index
        if len(self.clean.rows) and not index.readable_segmentations.drawable()[self.clean.rows].any():
            raise UserError(f"{index.path}: no object has a mask (segmentation), and the detector learns masks")
        other = shallow_copy(self)
        other.masks = other.paste_masks = True
        return other

    def missing_masks(self) -> str:
        """How many objects have no usable mask, and the first of them; empty where all have one or none is asked for.

        For copy-paste without masks to learn, one that cannot be read is a `UserError`.
        """
        if not (self.masks or self.paste_masks):
            return ""
        index = self.source.index
        parts, own = index.readable_segmentations, self.clean.rows
        without = own[~parts.drawable()[own]]
        if not len(without):
            return ""
        broken = int(np.count_nonzero(parts.kinds[without] == BROKEN))
        unread = f"; {broken} of them cannot be read: {parts.problem}" if broken else ""
        return (
            f"masks: {len(without)} of {len(own)} objects have none, first annotation "
            f"{index.annotation_ids[without].min()}, and count for their box alone{unread}"
        )

    def misplaced_masks(self) -> str:
        """How many masks lie elsewhere than their boxes; empty where none does or none is asked for."""
        return mask_note(self.source.index.readable_segmentations, self.clean.rows) if self.masks else ""

    def rows(self) -> np.ndarray:
        """Image rows that train: those with a usable annotation, and with `keep_empty` those that have none.

        An image whose annotations are all hidden (`kept`) is none of either: its objects would be background.
        """
        objects = np.diff(self.clean.offsets)
        if self.config.keep_empty:
            return np.flatnonzero((objects > 0) | (np.diff(self.source.index.clean().offsets) == 0))
        return np.flatnonzero(objects)

    def __getitem__(self, key: Key) -> tuple[Tensor, dict[str, Tensor]] | Skipped | UserError:
        try:
            return self.sample(*key)
        except UserError as error:  # handed over as a value: a loader's worker would bury it in its own traceback
            # a key with more parts asks for something of this very picture (`tailfin.samplers.episodes`)
            return self._instead(key, error) if self.config.on_bad_image == "skip" and len(key) == 3 else error

    def _instead(self, key: Key, error: UserError) -> Skipped | UserError:
        """The sample of the next training picture that can be used, see the top of the file."""
        epoch, row, copy = key
        messages = [str(error)]
        for other in self._after(row)[: PATIENCE - 1].tolist():
            try:
                return Skipped(self.sample(epoch, other, copy), messages)
            except UserError as another:
                messages.append(str(another))
        return UserError(f"{len(messages)} training pictures one after another cannot be used; first: {messages[0]}")

    def _after(self, row: int) -> np.ndarray:
        """Training rows after `row`, then those before it; where batches are grouped, those of its aspect."""
        rows, index = self.rows(), self.source.index
        if self.config.group_by_aspect:
            wide = index.widths[rows] >= index.heights[rows]
            rows = rows[wide == (index.widths[row] >= index.heights[row])]
        return np.concatenate([rows[rows > row], rows[rows < row]])

    def sample(self, epoch: int, row: int, copy: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Augmented picture uint8 [3, H, W] and target (boxes, labels, image_id; masks, mask_valid; known) of a key.

        `known`, bool [C], are the checked classes of the picture itself, and of all pictures of a mosaic or mixup; a
        pasted object has its label, no more.
        Where a crop has left no object and `empty_crop` is "next", those of the next training picture that keeps one.
        """
        image, target = self._drawn(epoch, row, copy)
        if len(target["labels"]) or self.config.empty_crop == "keep" or not np.diff(self.clean.offsets)[row]:
            return image, target
        for other in self._after(row)[:PATIENCE].tolist():
            image, target = self._drawn(epoch, other, copy)
            if len(target["labels"]):
                break
        return image, target

    def _drawn(self, epoch: int, row: int, copy: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng, config, pictures = np.random.default_rng([self.seed, 3, epoch, row, copy]), self.config, [row]
        image, target = self._augmented(row, rng)
        mixes = not config.mixed_epochs or epoch < config.mixed_epochs
        if mixes and config.mosaic and rng.random() < config.mosaic:
            pictures += [self._any_row(rng) for _ in range(3)]
            others = [self._augmented(other, rng) for other in pictures[1:]]
            image, target = mosaic([(image, target), *others], rng, config.mosaic_scale)
        if config.copy_paste:
            image, target = self._pasted(image, target, rng)
        if mixes and config.mixup and rng.random() < config.mixup:
            pictures.append(self._any_row(rng))
            image, target = mixup((image, target), self._augmented(pictures[-1], rng), rng, config.mixup_alpha)
        if self.masks:
            target["masks"] = target["masks"].contiguous()  # a crop would keep the whole picture's in memory
            target["mask_valid"] = target["mask_valid"] & seen_masks(target["masks"])
        else:
            target = {key: value for key, value in target.items() if key != "masks"}
        if self.config.unchecked_classes == "ignore":
            known = [self.source.index.known(own) for own in pictures]  # looked for in all that are in the picture
            target["known"] = torch.from_numpy(np.logical_and.reduce(known))
        return packed(image), {**target, "image_id": torch.tensor(row)}

    def _any_row(self, rng: np.random.Generator) -> int:
        rows = self.rows()
        return int(rows[rng.integers(len(rows))])

    def _pasted(
        self, image: Tensor, target: dict[str, Tensor], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The picture with objects of another one, or of the folder of crops, pasted onto it."""
        paste = copy_paste if self.paste_masks else box_paste
        if self.pasting is None:
            return paste(image, target, *self._augmented(self._any_row(rng), rng), rng)
        partner, selected = self.pasting.partner(image, target, rng, lambda row: self._augmented(row, rng))
        return paste(image, target, *partner, rng, selected=selected)

    def _augmented(self, row: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index, clean = self.source.index, self.clean
        image = self.source.read(row, self.config.max_pixels, self.config.value_range)
        own = slice(int(clean.offsets[row]), int(clean.offsets[row + 1]))
        target = {
            "boxes": torch.from_numpy(np.array(clean.boxes[own], dtype=np.float32)),
            "labels": torch.from_numpy(index.labels[clean.rows[own]].astype(np.int64)),
        }
        if self.masks:
            target |= self.mask_targets(row)
        elif self.paste_masks:
            target["masks"] = torch.from_numpy(index.segmentations().masks(clean.rows[own], row))
        return augment(image, target, self.config, rng)

    def mask_targets(self, row: int) -> dict[str, Tensor]:
        """Masks uint8 [M, H, W] of an image's objects in pixels of the file, and `mask_valid`: which are the object's.

        The others are filled boxes: transforms and copy-paste then treat the object as it is seen.
        """
        own = slice(int(self.clean.offsets[row]), int(self.clean.offsets[row + 1]))
        masks = self.source.index.readable_segmentations.masks(self.clean.rows[own], row)
        valid = masks.view(bool).any(axis=(1, 2))
        for place in np.flatnonzero(~valid):
            left, top, right, bottom = self.clean.boxes[own][place]
            masks[place, int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 1
        return {"masks": torch.from_numpy(masks), "mask_valid": torch.from_numpy(valid)}

    def _segmented(self) -> bool:
        """Whether every object that trains has a mask."""
        return bool((self.source.index.segmentations().kinds[self.clean.rows] > 0).all())


def packed(image: Tensor) -> Tensor:
    """The picture [3, H, W] in memory of its own size, channels first or last: a crop would keep that of the whole."""
    return image if image.permute(1, 2, 0).is_contiguous() else image.contiguous()


def seen_masks(masks: Tensor) -> Tensor:
    """bool [M]: masks [M, H, W] with a pixel."""
    return masks.view(torch.bool).flatten(1).any(dim=1)


class EvaluationDataset(Dataset):
    """Pictures at test size, with their rows."""

    def __init__(self, source: Source, config: Data) -> None:
        self.source = source
        self.config = config

    def __len__(self) -> int:
        return len(self.source.index)

    def __getitem__(self, row: int) -> tuple[Tensor, int] | UserError:
        try:
            return to_test_size(
                self.source.read(row, self.config.max_pixels, self.config.value_range), self.config
            ), row
        except UserError as error:
            return error


def to_test_size(image: Tensor, config: Data) -> Tensor:
    """A picture uint8 [3, H, W] resized for inference."""
    short, bound = config.inference_size
    size = (short, short) if config.resize == "stretch" else shortest_edge_size(image.shape[-2:], short, bound)
    return resize(image, {"boxes": torch.zeros((0, 4))}, size)[0]


def training_loader(
    dataset: TrainingDataset, plan: BatchPlan, *, start: int, rank: int, processes: int, accumulation: int
) -> Generator[Batch, None, None]:
    """Micro-batches of this process from iteration `start` to the end of the run, without a pause between epochs."""
    part = slice(rank * accumulation, (rank + 1) * accumulation)
    workers = dataset.config.workers
    loader = DataLoader(
        dataset,
        batch_sampler=_Keys(plan, start, part, processes * accumulation),
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(0),  # the loader's own: the global one stays untouched
        worker_init_fn=_init_worker,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return _counted(loader, dataset.skipped)


def by_aspect(index: AnnotationIndex) -> np.ndarray:
    """Image rows from the widest to the tallest: neighbours in a batch pad little."""
    return np.argsort(index.heights / np.maximum(index.widths, 1), kind="stable")


def evaluation_loader(
    source: Source, config: Data, *, batch: int, rank: int, processes: int, rows: np.ndarray | None = None
) -> Generator[tuple[list[Tensor], list[int]], None, None]:
    """(pictures, rows) of this process's share of the images; `rows` are all of them in their order, else by aspect."""
    rows = by_aspect(source.index) if rows is None else rows
    loader = DataLoader(
        EvaluationDataset(source, config),
        batch_size=batch,
        sampler=rows[rank::processes].tolist(),
        num_workers=config.workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
    )
    return _checked(loader)


class _Keys(Sampler[list[Key]]):
    def __init__(self, plan: BatchPlan, start: int, part: slice, parts: int) -> None:
        self.arguments = (start, part, parts)
        self.plan = plan

    def __iter__(self) -> Iterator[list[Key]]:
        return self.plan.keys(*self.arguments)


def _checked(loader: DataLoader) -> Generator[Any, None, None]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch[:2]


def _counted(loader: DataLoader, skipped: dict[str, int]) -> Generator[Batch, None, None]:
    """Batches; pictures that were skipped are counted here, in the main process, when their batch is used."""
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        images, targets, messages = batch
        for message in messages:
            if message not in skipped:
                print(f"skipped: {printable(message)}", file=sys.stderr)
            skipped[message] = skipped.get(message, 0) + 1
        yield images, targets


def _collate(samples: Sequence[Any]) -> tuple[list, list, list[str]] | UserError:
    messages: list[str] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        if isinstance(sample, Skipped):
            messages += sample.messages
    first, second = zip(*[s.sample if isinstance(s, Skipped) else s for s in samples], strict=True)
    return list(first), list(second), messages


def _init_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a terminal or a scheduler signals the whole group: the main process
        signal.signal(number, signal.SIG_IGN)  # finishes its iteration, saves, and ends its workers in order
