"""Anchors of every cell of every level of a pyramid.

    anchors = LevelAnchors([cell_anchors(4.0 * stride, 3, (0.5, 1, 2)) for stride in strides], strides)
    per_level = anchors([(100, 152), (50, 76)], (800, 1216))          # [h * w * A, 4] each, xyxy in pixels

A cell's anchors are centred on (column * stride, row * stride), without half a stride: mmdetection's and torchvision's
convention. In a cell the ratio changes slowest, the size fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator


class LevelAnchors(nn.Module):
    """Anchors of the cells of all levels; no state that is saved.

    Args:
        cells: per level [A, 4], the anchors around a cell at the origin.
        strides: pixels per cell; none: the padded picture's sides divided by the level's, rounded down (torchvision).
    """

    def __init__(self, cells: Sequence[Tensor], strides: Sequence[int] | None) -> None:
        super().__init__()
        self.levels = len(cells)
        for level, own in enumerate(cells):
            self.register_buffer(f"level{level}", own.float(), persistent=False)
        self.strides = strides

    @property
    def per_cell(self) -> int:
        return len(self.get_buffer("level0"))

    def forward(self, shapes: Sequence[Sequence[int]], padded: Sequence[int]) -> list[Tensor]:
        """Per level [h * w * A, 4] for shapes (h, w) of a batch of `padded` (H, W) pixels."""
        if len(shapes) != self.levels:
            raise ValueError(f"anchors are for {self.levels} levels, these are {len(shapes)}")
        found = []
        for level, (height, width) in enumerate(shapes):
            cell = self.get_buffer(f"level{level}")
            down, across = (
                (padded[0] // height, padded[1] // width) if self.strides is None else (self.strides[level],) * 2
            )
            y = torch.arange(height, device=cell.device, dtype=cell.dtype) * down
            x = torch.arange(width, device=cell.device, dtype=cell.dtype) * across
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            shift = torch.stack([columns, rows, columns, rows], dim=2).view(-1, 1, 4)
            found.append((shift + cell).view(-1, 4))
        return found


def cell_anchors(side: float, octaves: int, ratios: Sequence[float]) -> Tensor:
    """[ratios * octaves, 4]: areas (side * 2^(k / octaves))^2, ratios of height to width."""
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()
    sides = side * 2 ** (torch.arange(octaves, dtype=torch.float64) / octaves)
    return _centred((sides / root[:, None]).flatten(), (sides * root[:, None]).flatten())


def whole_pixel_anchors(side: float, octaves: int, ratios: Sequence[float]) -> Tensor:
    """The same as torchvision makes them: sides cut and corners rounded to whole pixels."""
    sides = [int(side * 2 ** (k / octaves)) for k in range(octaves)]
    return AnchorGenerator.generate_anchors(None, sides, list(ratios))  # type: ignore[arg-type]


def square_anchors(sides: Sequence[float]) -> Tensor:
    """[S, 4] squares."""
    exact = torch.tensor(sides, dtype=torch.float64)
    return _centred(exact, exact)


def _centred(widths: Tensor, heights: Tensor) -> Tensor:
    return torch.stack([-widths, -heights, widths, heights], dim=1) / 2
