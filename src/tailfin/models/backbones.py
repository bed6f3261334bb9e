"""Backbones: a body that says what it is made of, and the feature pyramid on it.

    body = resnet_body("resnet50", norm="frozen_bn")      or small_body(widths, blocks, norm="bn")
    body.layer_names, body.channels, body.strides         what a pyramid, a transformer or pre-training builds on
    body.mean, body.std                                   of the pictures that it expects
    backbone = pyramid_backbone(body, layers=(1, 2, 3, 4), channels=256)
    backbone(pictures)                                    {"0": [B, 256, H / 4, W / 4], ...}
    backbone.layers(pictures)                             every layer of the body, {"layer1": ...}

A new kind of body is a function that returns a `Body`. `weights: imagenet` loads torchvision's published classification
weights through torchvision's own loader; a random start switches the norm to "bn" or "gn", since frozen statistics of
nothing cannot train.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from tailfin.errors import UserError
from tailfin.models.frozen_norms import FixedStatistics, FrozenNorm, join_norms
from tailfin.models.images import MEAN, STD
from tailfin.models.precision import depthwise_in_float32
from tailfin.schema.backbones import CAFFE

IMAGENET_WEIGHTS = {
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet34": "ResNet34_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
}


NORMS: dict[str, Callable[..., nn.Module]] = {
    "frozen_bn": FrozenNorm,
    "frozen_stats": FixedStatistics,
    "bn": nn.BatchNorm2d,
    "gn": functools.partial(nn.GroupNorm, 32),
}


class Body(nn.ModuleDict):
    """A classification network without its classifier, as a row of named modules; `body(pictures)` gives the layers
    that `take` has chosen.

    Args:
        modules: in the order in which a picture passes them; those named in `channels` are layers, all before the first
            one are the stem.
        channels: of each layer's output, finest first.
        strides: pixels per cell of each layer's output.
        mean, std: of the pictures that the network expects, RGB in 0..1.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        channels: Mapping[str, int],
        strides: Mapping[str, int],
        *,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__(dict(modules))
        self.channels, self.strides = dict(channels), dict(strides)
        self.mean, self.std = tuple(mean), tuple(std)
        self.taken = {name: name for name in self.channels}

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers, finest first."""
        return list(self.channels)

    def take(self, names: Mapping[str, str]) -> Body:
        """Give the layers `names` (layer to name in the output) in `forward`, and drop what comes after the last."""
        order = list(self.keys())
        for name in order[1 + max(order.index(layer) for layer in names) :]:
            del self[name]
            self.channels.pop(name, None)
            self.strides.pop(name, None)
        self.taken = dict(names)
        return self

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """The layers taken, by the names that `take` gave them."""
        layers = self.layers(pictures)
        return {name: layers[layer] for layer, name in self.taken.items()}

    def layers(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures float [B, 3, H, W], normalised, to the output of every layer by its name."""
        found = {}
        for name, module in self.items():
            pictures = module(pictures)
            if name in self.channels:
                found[name] = pictures
        return found

    def freeze(self, count: int) -> None:
        """Switch off the gradients of the first `count` of (stem, first layer, second layer, ...)."""
        layer = 0  # the stem; then 1, 2, ...
        for name, module in self.items():
            layer += name in self.channels
            if layer < count:
                module.requires_grad_(False)


class Backbone(nn.Module):
    """A body and, where there is one, the feature pyramid on it: pictures [B, 3, H, W] to levels by name."""

    body: Body
    fpn: FeaturePyramidNetwork

    def __init__(self, body: Body, fpn: FeaturePyramidNetwork | None = None, out_channels: int = 0) -> None:
        super().__init__()
        self.body = body
        join_norms(body)
        depthwise_in_float32(body)
        if fpn is not None:
            self.fpn = fpn
        self.out_channels = out_channels  # of every level of the pyramid

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        found = self.body(pictures)
        return self.fpn(found) if hasattr(self, "fpn") else found

    def layers(self, pictures: Tensor) -> dict[str, Tensor]:
        """Every layer of the body, which `pyramid` continues from."""
        return self.body.layers(pictures)

    def pyramid(self, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The levels, from what `layers` gave."""
        found = {name: layers[layer] for layer, name in self.body.taken.items()}
        return self.fpn(found) if hasattr(self, "fpn") else found

    @property
    def strides(self) -> dict[str, int]:
        """Pixels per cell of the levels that come from a layer of the body, by the level's name, finest first."""
        return {name: self.body.strides[layer] for layer, name in self.body.taken.items()}

    @property
    def level_names(self) -> list[str]:
        """Names of the levels of `level_strides`."""
        further = {LastLevelMaxPool: ["pool"], LastLevelP6P7: ["p6", "p7"], PlainP6P7: ["p6", "p7"]}.get(
            type(self.fpn.extra_blocks), []
        )
        return [*self.strides, *further]

    @property
    def level_strides(self) -> list[int]:
        """Pixels per cell of every level of the pyramid, further ones too."""
        found = list(self.strides.values())
        return found + [found[-1] * 2**number for number in range(1, 1 + len(self.level_names) - len(found))]


def resnet_body(name: str, *, norm: str) -> Body:
    """torchvision's ResNet (resnet18, 34, 50, 101) with random weights and the norm of a key of `NORMS`.

    resnet50_caffe and resnet101_caffe have the stride of a block in its first 1x1 convolution, as the networks of He et
    al. that detectron2 and mmdetection's caffe style start from.
    """
    network = getattr(torchvision.models, CAFFE.get(name, name))(weights=None, norm_layer=NORMS[norm])
    for block in network.modules() if name in CAFFE else ():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    expansion = network.layer1[0].expansion
    widths = {f"layer{number}": expansion * 32 * 2**number for number in range(1, 5)}
    parts = {name: module for name, module in network.named_children() if name not in ("avgpool", "fc")}
    return Body(parts, widths, _strides(widths))


def small_body(widths: Sequence[int], blocks: Sequence[int], *, norm: str) -> Body:
    """A residual body of basic blocks by `widths` (stem, layer1..4) and `blocks`; torchvision's names and strides."""
    stem, *outputs = widths
    make = NORMS[norm]
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False),
        "bn1": make(stem),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    before = stem
    for number, (width, count) in enumerate(zip(outputs, blocks, strict=True)):
        layer = nn.Sequential()
        for block in range(count):
            stride = 2 if number and not block else 1
            skip = None
            if stride > 1 or before != width:
                skip = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), make(width))
            layer.append(BasicBlock(before, width, stride, skip, norm_layer=make))
            before = width
        parts[f"layer{number + 1}"] = layer
    channels = {f"layer{number}": width for number, width in enumerate(outputs, start=1)}
    body = Body(parts, channels, _strides(channels))
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def pyramid_backbone(
    body: Body,
    *,
    layers: Sequence[int],
    channels: int,
    pool: bool = False,
    convs: str = "none",
    relu: bool = True,
    init: str = "torchvision",
) -> Backbone:
    """A feature pyramid on a body.

    Args:
        layers: which of the body's layers, counted from 1; the levels are named "0", "1", ...
        channels: width of every level.
        pool: one more level, max-pooled from the last.
        convs: two more levels, "p6" and "p7", by 3x3 convolutions of stride 2, the first one on the "body"'s last layer
            or on the "pyramid"'s last level; "none" for none. In the place of `pool`.
        relu: before the second of them.
        init: of the first weights: "torchvision" (Kaiming, uniform, by the inputs alone) or "xavier" (uniform).
    """
    names = body.layer_names
    taken = {names[layer - 1]: str(level) for level, layer in enumerate(layers)}
    widths = [body.channels[layer] for layer in taken]
    extra: ExtraFPNBlock = LastLevelMaxPool() if pool else _NoExtraLevel()
    if convs != "none":
        kind = LastLevelP6P7 if relu else PlainP6P7
        extra = kind(widths[-1] if convs == "body" else channels, channels)
        extra.use_P5 = convs == "pyramid"  # torchvision guesses it from the widths
    pyramid = FeaturePyramidNetwork(widths, channels, extra_blocks=extra)
    if init == "xavier":
        start_xavier(pyramid)
    return Backbone(body.take(taken), pyramid, channels)


def start_xavier(layers: nn.Module) -> None:
    """First weights of convolutions and linear layers: Xavier's, uniform (Glorot and Bengio, 2010), without bias."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def load_body(body: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load classification weights into the body; a classifier `fc.*` is left out, all else must fit."""
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = body.state_dict()
    wrong = {
        "are missing": [key for key in own if key not in state and "num_batches_tracked" not in key],
        "are unknown": [key for key in state if key not in own and "num_batches_tracked" not in key],
        "have another shape": [key for key, value in state.items() if key in own and own[key].shape != value.shape],
    }
    if any(wrong.values()):
        told = (f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in wrong.items() if keys)
        raise UserError(f"{source}: the weights do not fit the backbone: {', '.join(told)}")
    body.load_state_dict(state, strict=False)


def imagenet_state(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of a ResNet; downloaded once, offline the message says what is missing."""
    weights = torchvision.models.get_weight(IMAGENET_WEIGHTS[name])
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"weights: imagenet needs {Path(weights.url).name}, which could not be downloaded ({error}); "
            f"place the file in {folder}, or start from random weights with weights=none detector.norm=bn "
            f"detector.frozen_layers=0"
        ) from None


def _strides(layers: Mapping[str, int]) -> dict[str, int]:
    """A residual network halves the picture twice before its first layer and once in every later one."""
    return {name: 4 * 2**number for number, name in enumerate(layers)}


class PlainP6P7(LastLevelP6P7):
    """torchvision's levels P6 and P7 without the ReLU before P7, as mmdetection has them."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class _NoExtraLevel(LastLevelMaxPool):
    """Stands for "no more levels": torchvision reads a missing block as the max-pooled level."""

    def forward(self, x: list[Tensor], y: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return x, names
