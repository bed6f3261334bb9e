"""Plain forward passes of detectron2's and mmdetection's detectors, on random checkpoints in their formats.

Written from the conventions that both projects document: names of weights, BGR or RGB, where a block has its stride,
anchors that are not rounded, RoIAlign with half a cell's shift and adaptive samples, order of anchors and classes. They
share no code with tailfin; convolutions, norms and RoIAlign are torch's and torchvision's operations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

State = dict[str, Tensor]
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
WIDTH, HIDDEN = 32, 48  # of the pyramid and of the box head
MEAN_RGB, STD_RGB = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Names(NamedTuple):
    """How a project calls the parts of a ResNet and a pyramid."""

    stem: str
    stem_norm: str
    conv: str
    norm: str
    short: str
    short_norm: str
    lateral: str
    output: str


DETECTRON2 = Names(
    "backbone.bottom_up.stem.conv1",
    "backbone.bottom_up.stem.conv1.norm",
    "backbone.bottom_up.res{layer}.{block}.conv{n}",
    "backbone.bottom_up.res{layer}.{block}.conv{n}.norm",
    "backbone.bottom_up.res{layer}.{block}.shortcut",
    "backbone.bottom_up.res{layer}.{block}.shortcut.norm",
    "backbone.fpn_lateral{layer}",
    "backbone.fpn_output{layer}",
)
MMDETECTION = Names(
    "backbone.conv1",
    "backbone.bn1",
    "backbone.layer{less}.{block}.conv{n}",
    "backbone.layer{less}.{block}.bn{n}",
    "backbone.layer{less}.{block}.downsample.0",
    "backbone.layer{less}.{block}.downsample.1",
    "neck.lateral_convs.{place}.conv",
    "neck.fpn_convs.{place}.conv",
)


# ---- random checkpoints ----------------------------------------------------------------------------------------------


class Maker:
    """Random weights by name."""

    def __init__(self, seed: int = 0) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=self.generator)

    def layer(self, name: str, *shape: int, std: float | None = None, bias: bool = True) -> None:
        gain = math.sqrt(2 / math.prod(shape[1:])) if std is None else std
        self.state[f"{name}.weight"] = self.normal(*shape, std=gain)
        if bias:
            self.state[f"{name}.bias"] = self.normal(shape[0], std=0.1)

    def norm(self, name: str, width: int, statistics: bool = True) -> None:
        self.state[f"{name}.weight"] = 0.7 + 0.3 * torch.rand(width, generator=self.generator)
        self.state[f"{name}.bias"] = self.normal(width, std=0.1)
        if statistics:
            self.state[f"{name}.running_mean"] = self.normal(width, std=0.1)
            self.state[f"{name}.running_var"] = 1 + torch.rand(width, generator=self.generator)

    def body(self, names: Names, depth: str, statistics: bool = True, bgr: bool = False) -> None:
        wide = 4 if depth == "resnet50" else 1
        self.layer(names.stem, 64, 3, 7, 7, bias=False, std=0.1 / (60 if bgr else 1))
        self.norm(names.stem_norm, 64, statistics)
        before = 64
        for place, count in enumerate(BLOCKS[depth]):
            width = 64 * 2**place
            for block in range(count):
                at = {"layer": place + 2, "less": place + 1, "block": block}
                shapes = [(width, before, 1), (width, width, 3), (4 * width, width, 1)]
                if wide == 1:
                    shapes = [(width, before, 3), (width, width, 3)]
                for n, (out, into, side) in enumerate(shapes, start=1):
                    self.layer(names.conv.format(n=n, **at), out, into, side, side, bias=False)
                    self.norm(names.norm.format(n=n, **at), out, statistics)
                    if n == len(shapes):  # the sum of a block must not grow from block to block
                        self.state[names.norm.format(n=n, **at) + ".weight"] *= 0.3
                if before != wide * width:
                    self.layer(names.short.format(**at), wide * width, before, 1, 1, bias=False)
                    self.norm(names.short_norm.format(**at), wide * width, statistics)
                before = wide * width

    def pyramid(self, names: Names, depth: str, first: int, extra: tuple[str, str] | None = None, on: str = "") -> None:
        """Levels from layer `first` (2..5) to 5; `extra` are the names of P6 and P7, `on` "body" or "pyramid"."""
        wide = 4 if depth == "resnet50" else 1
        for place, layer in enumerate(range(first, 6)):
            self.layer(names.lateral.format(layer=layer, place=place), WIDTH, wide * 64 * 2 ** (layer - 2), 1, 1)
            self.layer(names.output.format(layer=layer, place=place), WIDTH, WIDTH, 3, 3)
        if extra is not None:
            self.layer(extra[0], WIDTH, wide * 512 if on == "body" else WIDTH, 3, 3)
            self.layer(extra[1], WIDTH, WIDTH, 3, 3)


# ---- the forward passes ----------------------------------------------------------------------------------------------


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean = state.get(f"{name}.running_mean", torch.zeros(x.shape[1]))
    var = state.get(f"{name}.running_var", torch.ones(x.shape[1]) - 1e-5)
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], False, 0.1, 1e-5)


def normalised(images: list[Tensor], bgr: bool) -> Tensor:
    """uint8 RGB pictures to a batch that is padded with zeros to multiples of 32."""
    height = -(-max(image.shape[1] for image in images) // 32) * 32
    width = -(-max(image.shape[2] for image in images) // 32) * 32
    batch = torch.zeros(len(images), 3, height, width)
    for row, image in zip(batch, images, strict=True):
        mean = torch.tensor(MEAN_RGB)[:, None, None]
        std = torch.ones(3, 1, 1) if bgr else torch.tensor(STD_RGB)[:, None, None]
        own = (image.float() - mean) / std
        row[:, : image.shape[1], : image.shape[2]] = own.flip(0) if bgr else own
    return batch


def body(state: State, names: Names, depth: str, x: Tensor, first_stride: bool) -> list[Tensor]:
    """C2 to C5; `first_stride`: a bottleneck has its stride in the first convolution."""
    x = F.max_pool2d(norm(state, names.stem_norm, conv(state, names.stem, x, 2)).relu(), 3, 2, 1)
    found = []
    for place, count in enumerate(BLOCKS[depth]):
        for block in range(count):
            at = {"layer": place + 2, "less": place + 1, "block": block}
            stride = 2 if place and not block else 1
            own = x
            layers = 3 if depth == "resnet50" else 2
            where = 1 if first_stride or layers == 2 else 2
            for n in range(1, layers + 1):
                own = conv(state, names.conv.format(n=n, **at), own, stride if n == where else 1)
                own = norm(state, names.norm.format(n=n, **at), own)
                own = own.relu() if n < layers else own
            short = names.short.format(**at)
            if f"{short}.weight" in state:
                x = norm(state, names.short_norm.format(**at), conv(state, short, x, stride))
            x = (x + own).relu()
        found.append(x)
    return found


def pyramid(state: State, names: Names, layers: list[Tensor], first: int) -> list[Tensor]:
    """The levels of layers `first`..5."""
    number = list(range(first, 6))
    lateral = [
        conv(state, names.lateral.format(layer=layer, place=place), layers[layer - 2])
        for place, layer in enumerate(number)
    ]
    for place in range(len(lateral) - 2, -1, -1):
        lateral[place] = lateral[place] + F.interpolate(lateral[place + 1], scale_factor=2.0, mode="nearest")
    return [
        conv(state, names.output.format(layer=layer, place=place), lateral[place]) for place, layer in enumerate(number)
    ]


def anchors(shape: tuple[int, int], stride: int, sizes: list[float], ratios: list[float], size_outside: bool) -> Tensor:
    """[h * w * A, 4], cells in reading order, centres on multiples of the stride."""
    pairs = [(size, ratio) for size in sizes for ratio in ratios]
    if not size_outside:
        pairs = [(size, ratio) for ratio in ratios for size in sizes]
    rows = []
    for y in range(shape[0]):
        for x in range(shape[1]):
            for size, ratio in pairs:
                width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                at = (x * stride, y * stride)
                rows.append((at[0] - width / 2, at[1] - height / 2, at[0] + width / 2, at[1] + height / 2))
    return torch.tensor(rows)


def decoded(boxes: Tensor, deltas: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Boxes [N, 4] moved by deltas [N, 4 k], which are divided by the weights of centre and side."""
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + sides / 2
    deltas = deltas.view(len(boxes), -1, 4)
    moved = centres[:, None] + deltas[..., :2] / weights[0] * sides[:, None]
    grown = sides[:, None] * (deltas[..., 2:] / weights[1]).clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([moved - grown / 2, moved + grown / 2], dim=2)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    limit = torch.tensor([size[1], size[0]] * 2)
    return torch.minimum(boxes.clamp(min=0), limit)


def pooled(levels: list[Tensor], boxes: Tensor, side: int) -> Tensor:
    """Boxes [N, 4] of a single picture from the levels of strides 4, 8, 16, 32 that their sizes ask for."""
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = (torch.floor(4 + torch.log2(area / 224 + 1e-8)) - 2).clamp(0, 3).long()
    result = torch.zeros(len(boxes), levels[0].shape[1], side, side)
    for number, own in enumerate(levels[:4]):
        rows = torch.where(level == number)[0]
        rois = torch.cat([torch.zeros(len(rows), 1), boxes[rows]], 1)
        result[rows] = roi_align(own, rois, side, 1 / (4 * 2**number), 0, aligned=True)
    return result
