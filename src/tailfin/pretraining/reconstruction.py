"""2DRCL's dual reconstruction (III.3): the picture from its deepest features, and the features from that picture.

    x^ = g(f(x))                                AR = mean (x - x^)^2 over real pixels            (eq. 5)
    z^ = f(mask(x^)), part of a box masked      SR = sum over layers of mean (f(x) - z^)^2       (eq. 6)
                                                     divided by the layer's mean f(x)^2, over real cells

The generator's four transposed convolutions are the paper's; how they reach the backbone's stride, where exactly the
mask lies and how the layers' differences are reduced it leaves open. Without the division SR is as large as the
backbone's features happen to be: 98 with ImageNet weights of an EfficientNet-Lite0, where the detector's losses are 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tailfin.pretraining.term import Iteration, Term, View
from tailfin.schema.pretraining import Reconstruction

BATCH_NORM = nn.modules.batchnorm._BatchNorm
LEAST = 1e-6  # of a layer's energy: a layer that is all zero has no unit


class DualReconstruction(Term):
    """`loss_ar` and `loss_sr`, each where its weight is not 0.

    Args:
        appearance, semantic: weights.
        config: the generator, the mask and what is compared.
        channels, stride: of the backbone's last layer.
    """

    def __init__(
        self, appearance: float, semantic: float, config: Reconstruction, *, channels: int, stride: int
    ) -> None:
        super().__init__()
        self.appearance, self.semantic, self.config = appearance, semantic, config
        self.generator = Generator(channels, stride=stride, bridge=config.bridge, widths=config.widths)

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        view = seen.view(0)
        pictures = view.batch.tensors
        made = self.generator(seen.features(0).deepest)
        height, width = pictures.shape[-2:]
        valid = valid_pixels(view.batch.image_sizes, height, width, pictures.device)
        if self.generator.scale == 1 and valid is not None:
            made = made * valid  # padding is 0 in both
        losses = {}
        if seen.diagnosed is not None:
            seen.diagnosed["unexplained_pictures"] = unexplained(*self._compared(pictures, made, valid))
        if self.appearance:
            losses["loss_ar"] = self.appearance * appearance_loss(*self._compared(pictures, made, valid))
        if self.semantic:
            losses["loss_sr"] = self.semantic * self._semantic(seen, made, valid)
        return losses

    def shown(self, seen: Iteration) -> dict[str, Tensor]:
        """The reconstructions of view 1 at its size, float32 [B, 3, H, W], and a masked rectangle of each [B, 4]."""
        view = seen.view(0)
        made = self.generator(seen.features(0).deepest).float()
        if made.shape != view.batch.tensors.shape:
            made = F.interpolate(made, size=view.batch.tensors.shape[-2:], mode="bilinear", align_corners=False)
        generator = torch.Generator().manual_seed(0)
        rectangles = mask_rectangles(view.boxes, self.config.mask_fraction, generator=generator)
        return {"reconstruction": made, "masks": rectangles[:, 0]}

    def _compared(self, pictures: Tensor, made: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pictures and reconstructions of one size, and the pixels that count."""
        if self.generator.scale == 1:
            return pictures, made, valid
        small = F.interpolate(pictures, size=made.shape[-2:], mode="area")
        if valid is None:
            return small, made, None
        inside = F.interpolate(valid.float(), size=made.shape[-2:], mode="area") == 1
        return small * inside, made * inside, inside

    def _semantic(self, seen: Iteration, made: Tensor, valid: Tensor | None) -> Tensor:
        """SR on a share of the pictures: a batch is in random order, any will do."""
        config, view, layers = self.config, seen.view(0), seen.features(0).layers
        taken = slice(math.ceil(config.share * len(made)))
        made = made[taken]
        if self.generator.scale != 1:
            made = F.interpolate(made, size=view.batch.tensors.shape[-2:], mode="bilinear", align_corners=False)
            made = made if valid is None else made * valid[taken]
        rectangles = mask_rectangles(view.boxes[taken], config.mask_fraction, which=config.mask_proposals)
        masked = mask_pictures(made, rectangles, fill=config.mask_fill)
        body = seen.detector.backbone.body
        with running_statistics_kept(body):
            again = body.layers(masked)
        names = [body.layer_names[layer - 1] for layer in config.layers if layer <= len(body.layer_names)]
        return semantic_loss(
            [layers[name][taken] for name in names],
            [again[name] for name in names],
            stop_gradient=config.stop_gradient,
            unit=config.sr_unit,
            valid=None if valid is None else [real_cells(view, layers[name])[taken] for name in names],
        )


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms go on normalising by the batch, but what passes leaves no trace in their running statistics."""
    norms = [own for own in module.modules() if isinstance(own, BATCH_NORM) and own.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


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
        bridge: str = "bilinear",
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


@torch.no_grad()
def unexplained(pictures: Tensor, made: Tensor, valid: Tensor | None) -> Tensor:
    """Share of the pictures' variance that the reconstructions leave, 0-dim: 0 is a copy, 1 no more than each channel's
    mean over the batch. At 1 SR compares with the features of an empty picture. Arguments as of `appearance_loss`."""
    pictures = pictures.float()
    inside = torch.ones_like(pictures[:, :1]) if valid is None else valid.float()
    total = inside.sum().clamp(min=1)
    apart = (pictures - (pictures * inside).sum((0, 2, 3), keepdim=True) / total) * inside
    variance = apart.square().sum() / (total * pictures.shape[1])
    return appearance_loss(pictures, made, valid) / variance.clamp(min=LEAST)


def semantic_loss(
    features: Sequence[Tensor],
    again: Sequence[Tensor],
    *,
    stop_gradient: bool = False,
    unit: str = "raw",
    valid: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sum over layers of the mean squared difference of features [B, C, h, w]; `stop_gradient` makes the first ones a
    fixed target.

    Args:
        unit: "energy" divides a layer's mean by that of `features` squared, without a gradient: 1 is as far as nothing
            at all is; "raw" does not.
        valid: per layer bool [B, 1, h, w], the cells that count; all if not given.
    """
    terms = []
    for number, (wanted, found) in enumerate(zip(features, again, strict=True)):
        cells = None if valid is None else valid[number]
        term = _MeanSquare.apply(found, wanted.detach() if stop_gradient else wanted, cells)
        if unit == "energy":
            with torch.no_grad():
                energy = _MeanSquare.apply(wanted, torch.zeros_like(wanted), cells)
            term = term / energy.clamp(min=LEAST)
        terms.append(term)
    return torch.stack(terms).sum()


def real_cells(view: View, feature: Tensor) -> Tensor:
    """bool [B, 1, h, w]: cells of a layer [B, C, h, w] that each picture reaches into; the others are padding's."""
    height, width = feature.shape[-2:]
    down = view.batch.tensors.shape[-2] // height
    cells = [(-(-h // down), -(-w // down)) for h, w in view.batch.image_sizes]
    found = valid_pixels(cells, height, width, feature.device)
    return torch.ones_like(feature[:, :1], dtype=torch.bool) if found is None else found


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
    """Mean squared difference in float32 of features in any precision, of which nothing but themselves is kept.

    `valid` bool [B, 1, h, w] or none: the cells that the mean is over.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(first, second, valid)
        exact = torch.promote_types(first.dtype, torch.float32)
        squares = (first.to(exact) - second.to(exact)).square_()
        if valid is not None:
            squares = squares.mul_(valid)
        return squares.sum() / _number(first, valid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        first, second, valid = ctx.saved_tensors
        slope = (first - second).mul_((2 / _number(first, valid) * gradient).to(first.dtype))
        if valid is not None:
            slope = slope.mul_(valid)
        wanted = ctx.needs_input_grad
        return slope if wanted[0] else None, -slope if wanted[1] else None, None


def _number(feature: Tensor, valid: Tensor | None) -> Tensor | int:
    """How many values of `feature` count, at least one."""
    return feature.numel() if valid is None else (valid.sum() * feature.shape[1]).clamp(min=1)
