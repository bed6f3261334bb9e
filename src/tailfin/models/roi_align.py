"""RoIAlign on a feature pyramid: torchvision's on accelerators, the same sums in another order on CPUs.

An output bin is the mean of some bilinear samples, so a weighted sum of a few feature vectors (16 for 2 x 2 samples).
That is what `embedding_bag` computes, for all channels of a vector at once, forward and backward; torchvision's CPU
kernels walk through the channels one by one and take 4 to 8 times as long (measured: R18 at 160 px, R50 at 800 px).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper


class PyramidRoIAlign(MultiScaleRoIAlign):
    """Pool every box from the pyramid level that its size asks for: `pool(features, boxes, image_sizes)`.

    Takes {name: [B, C, H, W]} and boxes [K_i, 4] (xyxy, pixels) per image; returns [sum K_i, C, size, size], images one
    after another. The levels' strides are given rather than guessed from the first batch.

    Args:
        names: the levels' names in the features, finest first.
        strides: pixels per cell of each level, powers of two.
        output_size: bins per side.
        sampling_ratio: samples per bin and side; 0 = as many as the box has cells, left to torchvision.
        aligned: boxes are shifted by half a cell, so that a cell's value stands at its centre, and none is widened to
            one cell (detectron2, mmdetection); false: torchvision's detectors.
    """

    def __init__(
        self, names: list[str], strides: list[int], output_size: int, sampling_ratio: int, *, aligned: bool = False
    ) -> None:
        super().__init__(names, output_size, sampling_ratio)
        self.aligned = aligned
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        features = [x[name] for name in self.featmap_names]
        exporting = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if self.aligned:
            return self._aligned(features, boxes)
        if features[0].device.type != "cpu" or self.sampling_ratio < 1 or exporting:
            return super().forward(x, boxes, image_shapes)
        every = torch.cat(boxes).detach()
        images = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(own) for own in boxes]))
        levels = self.map_levels(boxes) if len(features) > 1 else torch.zeros_like(images)
        pooled, order = [], []
        for level, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
            rows = torch.where(levels == level)[0]
            if len(rows):
                pooled.append(
                    _pool(feature, every[rows] * scale, images[rows], self.output_size[0], self.sampling_ratio)
                )
                order.append(rows)
        if not pooled:
            return features[0].new_zeros((0, features[0].shape[1], *self.output_size))
        if len(pooled) == 1:
            return pooled[0]
        return torch.cat(pooled).index_select(0, torch.cat(order).argsort())

    def _aligned(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """torchvision's kernel with half a cell's shift, level by level."""
        every = torch.cat(boxes).detach()
        counts = torch.tensor([len(own) for own in boxes], device=every.device)
        images = torch.arange(len(boxes), device=every.device).repeat_interleave(counts)
        rois = torch.cat([images[:, None].to(every.dtype), every], dim=1)
        levels = self.map_levels(boxes) if len(features) > 1 else torch.zeros_like(images)
        size, ratio = self.output_size, max(self.sampling_ratio, 0)
        result = features[0].new_zeros((len(rois), features[0].shape[1], *size))
        for level, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
            rows = torch.where(levels == level)[0]
            own = rois[rows].to(feature.dtype)
            pooled = roi_align(feature, own, size, scale, ratio, aligned=True)
            result = result.index_put((rows,), pooled.to(result.dtype))
        return result


def _pool(feature: Tensor, boxes: Tensor, images: Tensor, bins: int, samples: int) -> Tensor:
    """Boxes [K, 4] in cells of one level [B, C, H, W] and their images [K] to [K, C, bins, bins]."""
    _, channels, height, width = feature.shape
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    column, across = _bilinear(boxes[:, 0], sizes[:, 0], width, bins, samples)
    row, down = _bilinear(boxes[:, 1], sizes[:, 1], height, bins, samples)
    # [K, bins down, bins across, 2 samples down, 2 samples across]
    row = row + height * images.to(row.dtype)[:, None, None]
    cells = row[:, :, None, :, None] * width + column[:, None, :, None, :]
    weights = down[:, :, None, :, None] * across[:, None, :, None, :]
    vectors = feature.permute(0, 2, 3, 1).reshape(-1, channels)  # a view where memory is channels-last
    vectors = vectors.to(torch.promote_types(feature.dtype, torch.float32))
    bags = (len(boxes) * bins**2, (2 * samples) ** 2)
    sums = F.embedding_bag(
        cells.view(bags), vectors, per_sample_weights=weights.to(vectors.dtype).view(bags), mode="sum"
    )
    return sums.to(feature.dtype).view(len(boxes), bins, bins, channels).permute(0, 3, 1, 2)


def _bilinear(start: Tensor, length: Tensor, cells: int, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the two neighbours of every sample, int32 [K, bins, 2 samples], and their shares of the mean.

    A sample more than one cell outside counts as 0, one nearer than that as the border's value.
    """
    steps = (torch.arange(bins * samples, dtype=start.dtype) + 0.5) / samples
    place = start[:, None] + steps * (length / bins)[:, None]
    weight = ((place >= -1) & (place <= cells)).to(place.dtype) / samples
    place = place.clamp(0, cells - 1)
    low = place.floor()
    upper = (place - low) * weight
    neighbours = torch.stack([low, (low + 1).clamp(max=cells - 1)], 2).to(torch.int32)
    shares = torch.stack([weight - upper, upper], 2)
    return neighbours.view(len(start), bins, -1), shares.view(len(start), bins, -1)
