"""2DRCL's dual reconstruction (III.3): the picture from its deepest features, and the features from that picture.

    x^ = g(f(x))                                AR = mean (x - x^)^2 over real pixels            (eq. 5)
    z^ = f(mask(x^)), part of a box masked      SR = sum over layers of mean (f(x) - z^)^2       (eq. 6)

The generator's four transposed convolutions are the paper's; how they reach the backbone's stride, where exactly the
mask lies and how the layers' differences are reduced it leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Generator(nn.Module):
    """Deepest features [B, C, h, w] to pictures [B, 3, stride h, stride w], normalised as the detector's input.

    Four transposed convolutions of kernel 4 with ReLU between them; each doubles the size.

    Args:
        channels: of the features; 2048 for ResNet-50, 512 for ResNet-18.
        stride: of the features, 16 or 32. For 32 `bridge` makes up the missing factor of 2:
        bridge: "first_stride4" (the first convolution quadruples), "bilinear" (the result is enlarged), or
            "half_target" (the result stays half as large as the input; the caller compares it with a smaller one).
        widths: channels between the convolutions.
    """

    def __init__(
        self,
        channels: int,
        *,
        stride: int = 32,
        bridge: str = "first_stride4",
        widths: Sequence[int] = (512, 256, 64),
    ) -> None:
        super().__init__()
        if stride not in (16, 32):
            raise ValueError(f"the generator reaches strides of 16 and 32, not {stride}")
        quadruple = stride == 32 and bridge == "first_stride4"
        self.enlarge = 2 if stride == 32 and bridge == "bilinear" else 1
        self.scale = 0.5 if stride == 32 and bridge == "half_target" else 1.0  # of the result to the input
        sizes = [channels, *widths, 3]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
            first = quadruple and number == 0
            layers += [
                nn.ConvTranspose2d(before, after, 4, 4 if first else 2, 0 if first else 1),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        pictures = self.layers(features)
        if self.enlarge > 1:
            pictures = F.interpolate(pictures, scale_factor=self.enlarge, mode="bilinear", align_corners=False)
        return pictures


def valid_pixels(sizes: Sequence[tuple[int, int]], height: int, width: int, device: torch.device) -> Tensor | None:
    """bool [B, 1, height, width], true within each picture's own (H, W); none where nothing is padded."""
    if all(tuple(size) == (height, width) for size in sizes):
        return None
    limits = torch.tensor(sizes, device=device)
    down = torch.arange(height, device=device) < limits[:, :1]
    across = torch.arange(width, device=device) < limits[:, 1:]
    return (down[:, :, None] & across[:, None, :])[:, None]


def appearance_loss(pictures: Tensor, made: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared difference over valid pixels and channels; [B, 3, H, W] both, 0 where not `valid` [B, 1, H, W]."""
    if valid is None:
        return F.mse_loss(made.float(), pictures)
    return F.mse_loss(made.float(), pictures, reduction="sum") / (valid.sum() * pictures.shape[1])


def semantic_loss(features: Sequence[Tensor], again: Sequence[Tensor], *, stop_gradient: bool = False) -> Tensor:
    """Sum over layers of the mean squared difference; `stop_gradient` makes `features` a fixed target."""
    terms = [
        _MeanSquare.apply(found, wanted.detach() if stop_gradient else wanted)
        for wanted, found in zip(features, again, strict=True)
    ]
    return torch.stack(terms).sum()


def mask_rectangles(
    boxes: Sequence[Tensor], fraction: float, *, which: str = "one", generator: torch.Generator | None = None
) -> Tensor:
    """Rectangles to mask, int64 [B, R, 4] (xyxy, whole pixels, empty where there is none), one inside each box taken.

    A rectangle has the box's sides times sqrt(fraction), rounded to pixels, at a place drawn evenly inside the box.

    Args:
        boxes: per picture [P_i, 4] (xyxy, pixels).
        which: "one" random box per picture, or "all" of them.
    """
    device = boxes[0].device
    taken = [_one_of(own, generator) for own in boxes] if which == "one" else [own.float() for own in boxes]
    counts = torch.tensor([len(own) for own in taken])
    most = int(counts.max())
    padded = torch.stack([F.pad(own, (0, 0, 0, most - len(own))) for own in taken])
    filled = (torch.arange(most) < counts[:, None]).to(device)
    low, high = padded[..., :2].ceil(), padded[..., 2:].floor()  # whole pixels inside the box
    room = (high - low).clamp(min=0)
    side = ((padded[..., 2:] - padded[..., :2]) * math.sqrt(fraction)).round().clamp(min=0).minimum(room)
    draw = torch.rand(side.shape, generator=generator).to(device)
    start = low + (draw * (room - side + 1)).floor().minimum(room - side)
    end = start + side * filled[..., None]
    return torch.cat([start, end], dim=-1).long()


def mask_pictures(pictures: Tensor, rectangles: Tensor, *, fill: str = "zero") -> Tensor:
    """`pictures` [B, 3, H, W] with the rectangles [B, R, 4] filled with 0 or with noise of unit deviation."""
    _, _, height, width = pictures.shape
    left, top, right, bottom = rectangles[..., None].unbind(-2)  # [B, R, 1]
    rows = torch.arange(height, device=pictures.device)
    columns = torch.arange(width, device=pictures.device)
    down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = torch.einsum("brh,brw->bhw", down.float(), across.float())[:, None] > 0
    if fill == "zero":
        return pictures.masked_fill(inside, 0)
    return torch.where(inside, torch.randn_like(pictures), pictures)


def _one_of(boxes: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of the boxes [P, 4] at random, float32 [1, 4], or none of none."""
    first = int(torch.randint(max(len(boxes), 1), (), generator=generator))
    return boxes[first : first + 1].float()


class _MeanSquare(torch.autograd.Function):
    """Mean squared difference in float32 of features in any precision, of which nothing but themselves is kept."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        exact = torch.promote_types(first.dtype, torch.float32)
        sums = [(one.to(exact) - two.to(exact)).square_().sum() for one, two in zip(first, second, strict=True)]
        return torch.stack(sums).sum() / first.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        first, second = ctx.saved_tensors
        slope = (first - second).mul_((2 / first.numel() * gradient).to(first.dtype))
        return slope if ctx.needs_input_grad[0] else None, -slope if ctx.needs_input_grad[1] else None
