"""Two independently augmented views of one picture, and where every box of the picture lies in both.

    picture -> crop, size and mirroring of each view (`Geometry`) -> boxes in both -> pixels of both -> photometric

The geometry is drawn first and the pixels come last, so a draw that leaves too few boxes in both views costs nothing.
A picture is decoded once for all its views; colours change before or after the resize, whichever picture is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from tailfin.data.dataset import Source, TrainingDataset, seen_masks
from tailfin.data.photometric import photometric
from tailfin.data.proposals import INSTANCE_IOU, ProposalSource
from tailfin.data.transforms import augment, shortest_edge_size
from tailfin.schema.data import Data
from tailfin.schema.pretraining import Views

Boxes = NDArray[np.float32]  # [N, 4] xyxy
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Geometry:
    """Where a view comes from: a window of the picture, resized, perhaps mirrored. All in whole pixels."""

    left: int
    top: int
    width: int  # of the window in the picture
    height: int
    out_width: int  # of the view
    out_height: int
    flip: bool = False

    def to_view(self, boxes: Boxes) -> Boxes:
        """Boxes of the picture in pixels of the view, not clipped to it."""
        moved = (boxes - self._offset) * self._scale
        return self._mirrored(moved).astype(np.float32)

    def to_picture(self, boxes: Boxes) -> Boxes:
        """Boxes of the view in pixels of the picture: the inverse of `to_view`."""
        return (self._mirrored(boxes.astype(np.float64)) / self._scale + self._offset).astype(np.float32)

    def clip(self, boxes: Boxes) -> Boxes:
        """Boxes of the view, cut at its border."""
        return np.clip(boxes, 0, np.array([self.out_width, self.out_height] * 2, dtype=np.float32))

    def valid(self, boxes: Boxes, min_kept: float, min_side: float) -> NDArray[np.bool_]:
        """Which boxes of the picture the view shows: enough of their area, and sides of enough pixels."""
        whole = self.to_view(boxes)
        shown = self.clip(whole)
        sides = shown[:, 2:] - shown[:, :2]
        area = (whole[:, 2:] - whole[:, :2]).prod(axis=1)
        enough = sides.prod(axis=1) >= min_kept * area - 1e-3 * area
        return enough & (sides >= max(min_side, 1e-3)).all(axis=1)

    def pixels(self, image: Tensor) -> Tensor:
        """The view of a picture [C, H, W]: its window, antialiased to the size of the view, mirrored."""
        window = image[..., self.top : self.top + self.height, self.left : self.left + self.width]
        size = [self.out_height, self.out_width]
        view = window if list(window.shape[-2:]) == size else F.resize_image(window, size, antialias=True)
        return view.flip(-1) if self.flip else view

    def mask_pixels(self, masks: Tensor) -> Tensor:
        """The same for masks [M, H, W], by the nearest pixel."""
        window = masks[..., self.top : self.top + self.height, self.left : self.left + self.width]
        view = F.resize_mask(window, [self.out_height, self.out_width])
        return view.flip(-1) if self.flip else view

    @property
    def window(self) -> Boxes:
        """What it shows of the picture, float32 [1, 4]."""
        corners = (self.left, self.top, self.left + self.width, self.top + self.height)
        return np.array([corners], dtype=np.float32)

    @property
    def _offset(self) -> NDArray[np.float64]:
        return np.array([self.left, self.top] * 2, dtype=np.float64)

    @property
    def _scale(self) -> NDArray[np.float64]:
        return np.array([self.out_width / self.width, self.out_height / self.height] * 2)

    def _mirrored(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self.flip:
            return boxes
        return np.stack([self.out_width - boxes[:, 2], boxes[:, 1], self.out_width - boxes[:, 0], boxes[:, 3]], axis=1)


class View(NamedTuple):
    """One view: its picture, the paired boxes in it, and its geometry."""

    image: Tensor  # uint8 [3, H, W]
    boxes: Boxes  # float32 [P, 4], clipped to the view; row p is the same box in every view
    geometry: Geometry
    rows: NDArray[np.int64]  # [P], which of the given boxes they are


def two_views(
    image: Tensor,
    boxes: Boxes,
    config: Views,
    rng: np.random.Generator,
    *,
    sizes: tuple[int, ...],
    bound: int,
    most: int = 0,
    rarest: Boxes | None = None,
) -> tuple[View, View]:
    """Two views of a picture uint8 [3, H, W] with those of its boxes [N, 4] that are valid in both.

    Args:
        sizes: short sides (or squares) to draw from.
        bound: of a view's long side.
        most: boxes, drawn at random from those that both views show; 0: all.
        rarest: see `paired_geometries`.
    """
    size = (image.shape[-2], image.shape[-1])
    geometries, rows = paired_geometries(size, boxes, config, rng, sizes, bound, rarest)
    if 0 < most < len(rows):
        rows = rows[rng.choice(len(rows), most, replace=False)]
    first, second = (
        View(
            view_pixels(image, geometry, config, number, rng),
            _jittered(geometry.clip(geometry.to_view(boxes[rows])), geometry, config, rng),
            geometry,
            rows,
        )
        for number, geometry in enumerate(geometries)
    )
    return first, second


def paired_geometries(
    size: tuple[int, int],
    boxes: Boxes,
    config: Views,
    rng: np.random.Generator,
    sizes: tuple[int, ...],
    bound: int,
    rarest: Boxes | None = None,
) -> tuple[tuple[Geometry, Geometry], NDArray[np.int64]]:
    """Geometries of two views of a picture of `size` (height, width), and the rows of the boxes valid in both.

    `rarest` are the objects [M, 4] of the picture's rarest class; the first view keeps enough of one of them.
    """
    wanted = min(config.min_valid, len(boxes))
    for attempt in range(config.redraws + 2):
        area = config.crop_area if attempt <= config.redraws else (1.0, 1.0)
        first, second = (_draw(size, area, config, rng, sizes, bound) for _ in range(2))
        rules = (config.min_kept, config.min_side)
        rows = np.flatnonzero(first.valid(boxes, *rules) & second.valid(boxes, *rules))
        shared = common_window(first, second)
        apart = area_of(shared) < config.min_overlap * second.width * second.height
        lost = rarest is not None and len(rarest) and not first.valid(rarest, config.min_kept, 0.0).any()
        if len(rows) >= wanted and not lost and not apart:
            break
    return (first, second), rows


def common_window(first: Geometry, second: Geometry) -> Boxes:
    """What both views show of the picture, float32 [1, 4]; without area where they show nothing in common."""
    corners = np.maximum(first.window[:, :2], second.window[:, :2])
    return np.concatenate([corners, np.maximum(np.minimum(first.window[:, 2:], second.window[:, 2:]), corners)], axis=1)


def area_of(boxes: Boxes) -> float:
    """Of all boxes together, square pixels."""
    return float((boxes[:, 2:] - boxes[:, :2]).prod(axis=1).sum())


def view_pixels(image: Tensor, geometry: Geometry, config: Views, number: int, rng: np.random.Generator) -> Tensor:
    """Picture uint8 [3, H, W] of view `number` (0 or 1): geometry and photometric changes."""
    shrinks = geometry.out_width * geometry.out_height < geometry.width * geometry.height
    sigma = np.array(config.blur_sigma)
    if shrinks:
        image = geometry.pixels(image)
    else:  # colours first, on the window; a blur there is as wide as one of `sigma` will be in the view
        image = image[
            ..., geometry.top : geometry.top + geometry.height, geometry.left : geometry.left + geometry.width
        ]
        sigma = sigma * geometry.width / geometry.out_width
    image = photometric(
        image,
        rng,
        jitter=config.jitter,
        jitter_p=config.jitter_p,
        gray_p=config.gray_p,
        blur_p=config.blur_p[number],
        blur_sigma=(float(sigma[0]), float(sigma[1])),
        solarise_p=config.solarise_p[number],
    )
    return image if shrinks else replace(geometry, left=0, top=0).pixels(image)


class PretrainingDataset(TrainingDataset):
    """Pairs of views by key: the first view's picture, and a target with all that belongs to both.

    Target: `boxes` [M, 4] and `labels` [M] (and `masks`, `mask_valid`) of the annotated objects in the first view, and
    `ignored` [I, 4], what is seen there of the others; or, with `weak`, all objects of the picture `weak`, which is
    augmented as `data` says, as in fine-tuning under the same key; `view`, the second view's picture uint8 [3, H2, W2];
    `proposals` [P, 4] in the first and `view_proposals` [P, 4] in the second view, row for row the same box, and
    `proposal_labels` int64 [P], the class of the object it lies on or -1; `rarest`, the class of the picture that the
    fewest training pictures show, or -1; `image_id`. With `third`: `third` and `third_proposals`, the second view's
    window at half its size with colours of its own. With `overlap`: `overlap` [2, 4], what both views show, in pixels
    of the first and of the second (without area where that is nothing), and `flipped` bool [2]. With
    `unchecked_classes: ignore` in `data`: `known`, as of `TrainingDataset`. All boxes are xyxy, float32, pixels of
    their view. P may be 0.

    Args:
        proposals: what gives a picture's boxes (`tailfin.data.proposals.open_proposals`).
        third: a third view.
        weak: a picture for the detector's own losses.
        overlap: where the views show the same.
        masks: masks of the annotated objects, too.
    """

    def __init__(
        self,
        source: Source,
        config: Data,
        seed: int,
        views: Views,
        proposals: ProposalSource,
        *,
        third: bool = False,
        weak: bool = False,
        overlap: bool = False,
        masks: bool = False,
    ) -> None:
        plain = {"copy_paste": False, "paste_power": 0.0, "paste_crops": "", "mosaic": 0.0, "mixup": 0.0}
        super().__init__(source, config.model_copy(update=plain), seed, masks=masks)
        self.views, self.proposals, self.third, self.weak = views, proposals, third, weak
        self.overlap = overlap
        index = source.index
        shown = np.unique(index.image_of.astype(np.int64) * len(index.categories) + index.labels)
        self.image_count = np.bincount(shown % len(index.categories), minlength=len(index.categories))
        self.sizes = views.sizes or config.used_sizes
        short = config.resize in ("multiscale", "detr")  # one of the sizes is the short side
        self.bound = views.max_size or (config.max_size if short else max(self.sizes))
        if views.sizes and not views.max_size:
            self.bound = max(config.max_size, *self.sizes)

    def sample(self, epoch: int, row: int, copy: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The first view uint8 [3, H, W] and the target of a key."""
        rng = np.random.default_rng([self.seed, 5, epoch, row, copy])
        image = self.source.read(row, self.config.max_pixels, self.config.value_range)
        own = slice(int(self.clean.offsets[row]), int(self.clean.offsets[row + 1]))
        truth = np.array(self.clean.boxes[own], dtype=np.float32)
        labels = self.source.index.labels[self.clean.rows[own]].astype(np.int64)
        boxes = self.proposals.candidates(row, truth, image, rng)
        counts = self.image_count[labels]
        first, second = two_views(
            image,
            boxes,
            self.views,
            rng,
            sizes=self.sizes,
            bound=self.bound,
            most=self.proposals.config.per_image,
            rarest=truth[counts == counts.min(initial=counts.max(initial=0))] if self.views.keep_rarest else None,
        )
        target = {
            **(
                self._weak(row, image, truth, labels, epoch, copy)
                if self.weak
                else self._seen(row, first, truth, labels)
            ),
            "view": second.image.contiguous(),
            "proposals": torch.from_numpy(first.boxes),
            "view_proposals": torch.from_numpy(second.boxes),
            "proposal_labels": torch.from_numpy(classes_of(boxes[first.rows], truth, labels)),
            "rarest": torch.tensor(labels[counts.argmin()] if len(labels) else -1),
            "image_id": torch.tensor(row),
        }
        if self.config.unchecked_classes == "ignore":  # as in fine-tuning
            target["known"] = torch.from_numpy(self.source.index.known(row))
        if self.overlap:
            shared = common_window(first.geometry, second.geometry)
            both = [view.geometry.to_view(shared)[0] for view in (first, second)]
            target["overlap"] = torch.from_numpy(np.stack(both))
            target["flipped"] = torch.tensor([view.geometry.flip for view in (first, second)])
        if self.third:
            half = replace(
                second.geometry,
                out_width=max(1, second.geometry.out_width // 2),
                out_height=max(1, second.geometry.out_height // 2),
            )
            target["third"] = view_pixels(image, half, self.views, 1, rng).contiguous()
            inside = half.clip(half.to_view(boxes[first.rows]))
            target["third_proposals"] = torch.from_numpy(_jittered(inside, half, self.views, rng))
        return first.image.contiguous(), target

    def _seen(self, row: int, first: View, truth: Boxes, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """The objects that the first view shows enough of, and what it shows of the others."""
        geometry = first.geometry
        kept = geometry.valid(truth, self.views.min_kept, self.views.min_side)
        shown = geometry.clip(geometry.to_view(truth))
        cut = ~kept & (shown[:, 2:] > shown[:, :2]).all(axis=1)
        target = {
            "boxes": torch.from_numpy(shown[kept]),
            "labels": torch.from_numpy(labels[kept]),
            "ignored": torch.from_numpy(shown[cut]),
        }
        if self.masks:
            whole, rows = self.mask_targets(row), torch.from_numpy(np.flatnonzero(kept))
            target["masks"] = geometry.mask_pixels(whole["masks"][rows])
            target["mask_valid"] = whole["mask_valid"][rows] & seen_masks(target["masks"])
        return target

    def _weak(
        self, row: int, image: Tensor, truth: Boxes, labels: NDArray[np.int64], epoch: int, copy: int
    ) -> dict[str, Tensor]:
        """The picture and the objects that fine-tuning would have under this key."""
        target = {"boxes": torch.from_numpy(truth), "labels": torch.from_numpy(labels)}
        if self.masks:
            target |= self.mask_targets(row)
        weak, target = augment(image, target, self.config, np.random.default_rng([self.seed, 3, epoch, row, copy]))
        if self.masks:
            target["masks"] = target["masks"].contiguous()
            target["mask_valid"] = target["mask_valid"] & seen_masks(target["masks"])
        return {**target, "weak": weak.contiguous()}


def classes_of(boxes: Boxes, truth: Boxes, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [N]: the class of the object that each box overlaps most, by an IoU of `INSTANCE_IOU` or more; else -1."""
    if not len(truth) or not len(boxes):
        return np.full(len(boxes), -1, dtype=np.int64)
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(truth)).numpy()
    return np.where(overlaps.max(axis=1) >= INSTANCE_IOU, labels[overlaps.argmax(axis=1)], -1)


# ---- details ---------------------------------------------------------------------------------------------------------


def _draw(
    size: tuple[int, int],
    area: tuple[float, float],
    config: Views,
    rng: np.random.Generator,
    sizes: tuple[int, ...],
    bound: int,
) -> Geometry:
    left, top, width, height = _window(size, area, config.crop_ratio, rng)
    side = int(rng.choice(sizes))
    shape = (side, side) if config.resize == "square" else shortest_edge_size((height, width), side, bound)
    return Geometry(left, top, width, height, shape[1], shape[0], bool(rng.random() < config.flip))


def _window(
    size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop: area uniform, ratio log-uniform; the whole picture where no draw
    fits it or nothing is to be cropped."""
    picture_height, picture_width = size
    if area[0] < 1:
        for _ in range(CROP_ATTEMPTS):
            wanted = rng.uniform(*area) * picture_height * picture_width
            aspect = np.exp(rng.uniform(*np.log(ratio)))
            width, height = round(float(np.sqrt(wanted * aspect))), round(float(np.sqrt(wanted / aspect)))
            if 0 < width <= picture_width and 0 < height <= picture_height:
                left = int(rng.integers(picture_width - width + 1))
                return left, int(rng.integers(picture_height - height + 1)), width, height
    return 0, 0, picture_width, picture_height


def _jittered(boxes: Boxes, geometry: Geometry, config: Views, rng: np.random.Generator) -> Boxes:
    """Boxes of a view, each shifted and scaled with probability `box_jitter_p`, and cut at the border again."""
    if not config.box_jitter:
        return boxes
    change = rng.uniform(-config.box_jitter, config.box_jitter, (len(boxes), 4))
    change[rng.random(len(boxes)) >= config.box_jitter_p] = 0
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + sides / 2 + change[:, :2] * sides
    half = sides * (1 + change[:, 2:]) / 2
    moved = geometry.clip(np.concatenate([centres - half, centres + half], axis=1).astype(np.float32))
    thin = (moved[:, 2:] - moved[:, :2]).min(axis=1, initial=np.inf) < 1
    return np.where(thin.reshape(-1, 1), boxes, moved)
