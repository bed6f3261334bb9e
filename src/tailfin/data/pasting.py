"""What is pasted more often than published: objects of rare classes, and objects out of a folder.

    weights = class_weights(counts, power=0.5)   a class with few objects is drawn as often as one with many, or nearly
    partner = ObjectsByClass(labels, pictures, weights)
    label, picture = partner.draw(rng)           a training picture with an object of a drawn class
    selected = partner.selected(labels, label, rng)

    crops = CropFolder("crops", names)           crops/CLASS NAME/*.png, or any picture
    source, objects = crops.sample(rng, image, weights, most=3, scale=(0.5, 1.5))
    image, target = box_paste(image, target, source, objects, rng, selected=range(len(objects["labels"])))

A crop with an alpha channel is cut out along it (alpha above one half), any other is pasted as a whole rectangle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tailfin.data.images import is_hidden, is_picture, read_image
from tailfin.data.transforms import Sample, resize
from tailfin.errors import UserError, nearest
from tailfin.schema.data import Data

LARGEST = 0.8  # of a picture's height and width that a crop may have


def class_weights(counts: np.ndarray, power: float) -> np.ndarray:
    """Weights [C] of classes by their objects in training: counts^-power, a class without any as one with one."""
    return np.maximum(counts, 1).astype(np.float64) ** -power


class ObjectsByClass:
    """Training objects to draw by class.

    Args:
        labels, pictures: int64 [A] of every object.
        power: of the weights of the classes.
    """

    def __init__(self, labels: np.ndarray, pictures: np.ndarray, classes: int, power: float) -> None:
        self.counts = np.bincount(labels, minlength=classes)
        self.weights = class_weights(self.counts, power)
        self.order = np.argsort(labels, kind="stable")
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.pictures = pictures
        chances = np.where(self.counts > 0, self.weights, 0.0)
        self.chances = chances / max(chances.sum(), 1e-300)

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """A class, by weight, and the picture of one of its objects, all alike."""
        label = int(rng.choice(len(self.chances), p=self.chances))
        return label, int(self.pictures[self.order[self.first[label] + int(rng.integers(self.counts[label]))]])

    def selected(self, labels: np.ndarray, drawn: int, rng: np.random.Generator) -> np.ndarray:
        """Which objects of a picture that was drawn for a class are pasted: those of the class and of rarer ones all,
        of a more frequent one each with the ratio of the weights."""
        return np.flatnonzero(rng.random(len(labels)) < self.weights[labels] / self.weights[drawn])


class Pasting:
    """What is pasted onto a training picture, where a recipe's `data` says so.

    Args:
        labels, pictures: int64 [A] of every training object.
        names: of the classes, in label order.
    """

    def __init__(self, config: Data, labels: np.ndarray, pictures: np.ndarray, names: Sequence[str]) -> None:
        self.most, self.scale = config.paste_most, config.paste_scale
        self.objects = ObjectsByClass(labels, pictures, len(names), config.paste_power)
        folder = Path(config.root) / config.paste_crops
        self.crops = CropFolder(folder, names, config.max_pixels) if config.paste_crops else None

    def partner(
        self, image: Tensor, target: Sample, rng: np.random.Generator, read: Callable[[int], tuple[Tensor, Sample]]
    ) -> tuple[tuple[Tensor, Sample], Tensor]:
        """The picture to paste from, its target, and which of its objects; `read` gives a training picture's."""
        if self.crops is not None:
            found = self.crops.sample(rng, image, self.objects.weights, self.most, self.scale, list(target))
            return found, torch.arange(len(found[1]["labels"]))
        label, picture = self.objects.draw(rng)
        found = read(picture)
        return found, torch.from_numpy(self.objects.selected(found[1]["labels"].numpy(), label, rng))


class CropFolder:
    """The crops of a folder, by class.

    Args:
        folder: of folders that are named like classes.
        names: of the classes, in label order.

    Raises UserError for a folder of no class and where there is no picture.
    """

    def __init__(self, folder: str | Path, names: Sequence[str], max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.files: dict[int, list[Path]] = {}  # by label
        if not Path(folder).is_dir():
            raise UserError(f"data.paste_crops: {folder} is no folder")
        for own in sorted(path for path in Path(folder).iterdir() if path.is_dir() and not is_hidden(path)):
            if own.name not in names:
                raise UserError(f'data.paste_crops {folder}: "{own.name}" is no class{nearest(own.name, names)}')
            files = sorted(path for path in own.iterdir() if is_picture(path) and path.is_file())
            if files:
                self.files[list(names).index(own.name)] = files
        if not self.files:
            raise UserError(f"data.paste_crops {folder}: no pictures in folders named like classes")

    def sample(
        self,
        rng: np.random.Generator,
        background: Tensor,
        weights: np.ndarray,
        most: int,
        scale: tuple[float, float],
        fields: Sequence[str] = (),
    ) -> tuple[Tensor, Sample]:
        """One to `most` crops on a copy of `background` uint8 [3, H, W], as a source for `copy_paste` or `box_paste`.

        The class of each is drawn with `weights` [C], the file and the factor of its size in `scale` evenly; it is made
        smaller where it would fill more than `LARGEST` of a side. `fields` are those of the target it goes to: `masks`,
        and `mask_valid`, false for a crop without alpha.
        """
        labels = np.array(list(self.files))
        chances = weights[labels] / weights[labels].sum()
        image, size = background, (int(background.shape[-2]), int(background.shape[-1]))
        boxes: list[list[int]] = []
        masks: list[Tensor] = []
        valid: list[bool] = []
        chosen = labels[rng.choice(len(labels), int(rng.integers(1, most + 1)), p=chances)]
        for label in chosen.tolist():
            files = self.files[label]
            crop, mask, cut = self._read(files[int(rng.integers(len(files)))])
            factor = rng.uniform(*scale)
            factor = min(factor, *(LARGEST * side / own for side, own in zip(size, crop.shape[-2:], strict=True)))
            shape = (max(1, round(crop.shape[-2] * factor)), max(1, round(crop.shape[-1] * factor)))
            crop, resized = resize(crop, {"boxes": torch.zeros((0, 4)), "masks": mask[None]}, shape)
            top, left = (int(rng.integers(side - own + 1)) for side, own in zip(size, shape, strict=True))
            whole = torch.zeros(size, dtype=torch.uint8)
            whole[top : top + shape[0], left : left + shape[1]] = resized["masks"][0]
            image = torch.where(whole.bool(), _placed(crop, size, top, left), image)
            for earlier in masks:  # the later one lies above
                earlier &= ~whole.bool()
            boxes.append([left, top, left + shape[1], top + shape[0]])
            masks.append(whole)
            valid.append(cut)
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.from_numpy(chosen.astype(np.int64)),
        }
        more = {"masks": torch.stack(masks), "mask_valid": torch.tensor(valid)}
        keep = more["masks"].bool().flatten(1).any(dim=1)  # others lie below
        target |= {key: value for key, value in more.items() if key in fields}
        return image, {key: value[keep] for key, value in target.items()}

    def _read(self, path: Path) -> tuple[Tensor, Tensor, bool]:
        """Picture uint8 [3, h, w], mask uint8 [h, w], and whether it has one of its own."""
        image = torch.from_numpy(read_image(path, max_pixels=self.max_pixels)).permute(2, 0, 1)
        with Image.open(path) as opened:
            alpha = np.array(opened.convert("RGBA").getchannel("A")) if "A" in opened.getbands() else None
        if alpha is None or alpha.shape != tuple(image.shape[-2:]):
            return image, torch.ones(image.shape[-2:], dtype=torch.uint8), False
        mask = torch.from_numpy((alpha > 127).astype(np.uint8))
        if not mask.any():
            raise UserError(f"image {path} is transparent all over: there is nothing to paste")
        rows, columns = (torch.where(mask.bool().any(axis))[0] for axis in (1, 0))
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # boxes are tight
        return image[:, *window], mask[window], True


def _placed(crop: Tensor, size: tuple[int, int], top: int, left: int) -> Tensor:
    canvas = torch.zeros((3, *size), dtype=torch.uint8)
    canvas[:, top : top + crop.shape[-2], left : left + crop.shape[-1]] = crop
    return canvas
