"""RoIAlign on a feature pyramid: torchvision's on accelerators, the same sums in another order on CPUs.

An output bin is the mean of some bilinear samples, so a weighted sum of a few feature vectors (16 for 2 x 2 samples).
That is what `embedding_bag` computes, for all channels of a vector at once, forward and backward; torchvision's CPU
kernels walk through the channels one by one and take 4 to 8 times as long (measured: R18 at 160 px, R50 at 800 px).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from tailfin.models.images import pictures_of


class Places(NamedTuple):
    """What the host knows of N boxes, so that pooling need not ask the device; see `row_sampling.chosen_rows`."""

    picture: Tensor  # int64 [N], of each box
    per_level: list[int]  # boxes of each pyramid level


class PyramidRoIAlign(MultiScaleRoIAlign):
    """Pool every box from the pyramid level that its size asks for: `pool(features, boxes, image_sizes)`.

    Takes {name: [B, C, H, W]} and boxes [K_i, 4] (xyxy, pixels) per image; returns [sum K_i, C, size, size], images one
    after another. The levels' strides are given rather than guessed from the first batch.

    Args:
        names: the levels' names in the features, finest first.
        strides: pixels per cell of each level, powers of two.
        output_size: bins per side.
        sampling_ratio: samples per bin and side; 0 = as many as the box has cells, left to torchvision.
        aligned: cells have their values in their middles, so that a box is shifted by half a cell, and boxes smaller
            than a cell keep their size (Mask R-CNN's "RoIAlign v2", mmdetection, detectron2); torchvision's detectors
            have neither.
    """

    def __init__(
        self, names: list[str], strides: list[int], output_size: int, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__(names, output_size, sampling_ratio)
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
        self.aligned = aligned

    def like(self, names: list[str], strides: list[int]) -> PyramidRoIAlign:
        """The same pooling of other levels."""
        return PyramidRoIAlign(names, strides, self.output_size[0], self.sampling_ratio, self.aligned)

    def levels(self, boxes: Tensor) -> Tensor:
        """int64 [..., K], the level (0 = finest) that boxes [..., K, 4] are pooled from: FPN, eq. 1, in the arithmetic
        of torchvision's `LevelMapper` without its constants made on the host."""
        if len(self.featmap_names) == 1:
            return torch.zeros_like(boxes[..., 0], dtype=torch.int64)
        rule: LevelMapper = self.map_levels
        width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
        found = (((width * height).sqrt() / rule.s0).log2() + rule.lvl0 + rule.eps).floor()
        found = found.clamp(rule.k_min, rule.k_max).to(torch.int64) - rule.k_min
        return found.clamp(0, len(self.featmap_names) - 1)  # of a box of NaN too

    def forward(
        self,
        x: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        places: Places | None = None,
    ) -> Tensor:
        """`places` are those of the boxes, where they are known: without them an accelerator is asked once."""
        features = [x[name] for name in self.featmap_names]
        exporting = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if exporting and not self.aligned:
            return super().forward(x, boxes, image_shapes)
        every = torch.cat(boxes).detach()
        levels = self.levels(every)
        if exporting:  # numbers of boxes must not become constants of the graph
            picture = torch.cat([torch.full_like(own[:, :1], number) for number, own in enumerate(boxes)])
            result = features[0].new_zeros((every.shape[0], features[0].shape[1], *self.output_size))
            for level, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
                rows = torch.where(levels == level)[0]
                rois = torch.cat([picture, every * scale], dim=1)[rows].to(feature.dtype)
                pooled = roi_align(feature, rois, self.output_size, 1.0, self.sampling_ratio, True)
                result = result.index_put((rows,), pooled)
            return result
        if places is None:
            places = Places(pictures_of([len(own) for own in boxes], every.device), _per_level(levels, len(features)))
        if not len(every):
            return features[0].new_zeros((0, features[0].shape[1], *self.output_size))
        if features[0].device.type == "cpu" and self.sampling_ratio > 0:
            where = (every, levels, places.picture)
            return _pool(features, self.scales, where, self.output_size[0], self.sampling_ratio, self.aligned)
        order = levels.argsort(stable=True) if len(features) > 1 else None
        sorted_boxes = every if order is None else every[order]
        pictures = places.picture if order is None else places.picture[order]
        pooled = [
            self._level(feature, own * scale, image)
            for feature, scale, own, image in zip(
                features,
                self.scales,
                sorted_boxes.split(places.per_level),
                pictures.split(places.per_level),
                strict=True,
            )
            if len(own)
        ]
        joined = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
        return joined if order is None else joined.index_select(0, order.argsort())

    def _level(self, feature: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
        """Boxes [K, 4] in cells of one level [B, C, H, W] and their images [K] to [K, C, bins, bins]."""
        rois = torch.cat([images.to(boxes.dtype)[:, None], boxes], dim=1)
        return roi_align(feature, rois.to(feature.dtype), self.output_size[0], 1.0, self.sampling_ratio, self.aligned)


def _per_level(levels: Tensor, count: int) -> list[int]:
    """Boxes of each level; a read back to the host where there are several."""
    if count == 1:
        return [len(levels)]
    found: list[int] = (levels == torch.arange(count, device=levels.device)[:, None]).sum(1).tolist()
    return found


def _pool(
    features: Sequence[Tensor],
    scales: Sequence[float],
    where: tuple[Tensor, Tensor, Tensor],
    bins: int,
    samples: int,
    aligned: bool,
) -> Tensor:
    """Boxes [K, 4] in pixels, their levels and images [K] to [K, C, bins, bins], channels last in memory.

    The cells of all levels are one table, so that the boxes stay in their order.
    """
    boxes, levels, images = where
    channels = features[0].shape[1]
    size = torch.tensor([feature.shape[-2:] for feature in features], dtype=torch.int32)
    counts = torch.tensor([len(feature) for feature in features]) * size.prod(1)
    first = (counts.cumsum(0) - counts).to(torch.int32)[levels, None, None]
    height, width = size[levels].unbind(1)
    own = boxes * torch.tensor(scales, dtype=boxes.dtype)[levels, None]
    start, sizes = own[:, :2], own[:, 2:] - own[:, :2]
    if aligned:
        start = start - 0.5
    else:
        sizes = sizes.clamp(min=1)
    column, across = _bilinear(start[:, 0], sizes[:, 0], width, bins, samples)
    row, down = _bilinear(start[:, 1], sizes[:, 1], height, bins, samples)
    # [K, bins down, bins across, 2 samples down, 2 samples across]
    row = (row + (height * images.to(height.dtype))[:, None, None]) * width[:, None, None] + first
    cells = row[:, :, None, :, None] + column[:, None, :, None, :]
    weights = down[:, :, None, :, None] * across[:, None, :, None, :]
    # a view of each level where memory is channels-last
    vectors = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features])
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    bags = (len(boxes) * bins**2, (2 * samples) ** 2)
    sums = F.embedding_bag(
        cells.view(bags), vectors, per_sample_weights=weights.to(vectors.dtype).view(bags), mode="sum"
    )
    return sums.to(features[0].dtype).view(len(boxes), bins, bins, channels).permute(0, 3, 1, 2)


def _bilinear(start: Tensor, length: Tensor, cells: Tensor, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Along one axis of `cells` int32 [K]: the two neighbours of every sample, int32 [K, bins, 2 samples], and their
    shares of the mean.

    A sample more than one cell outside counts as 0, one nearer than that as the border's value.
    """
    steps = (torch.arange(bins * samples, dtype=start.dtype) + 0.5) / samples
    place = start[:, None] + steps * (length / bins)[:, None]
    last = (cells - 1).to(place.dtype)[:, None]
    weight = ((place >= -1) & (place <= last + 1)).to(place.dtype) / samples
    place = torch.minimum(
        place.nan_to_num(0.0).clamp(min=0), last
    )  # a broken box counts as 0, its loss will tell of it
    low = place.floor()
    upper = (place - low) * weight
    neighbours = torch.stack([low, torch.minimum(low + 1, last)], 2).to(torch.int32)
    shares = torch.stack([weight - upper, upper], 2)
    return neighbours.view(len(start), bins, -1), shares.view(len(start), bins, -1)
