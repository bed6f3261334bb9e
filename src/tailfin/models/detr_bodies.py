"""The backbones of D-FINE, RT-DETR v2 and RF-DETR, which are transformers', as bodies.

    body = hub_body("transformers/hgnet_v2_b0", norm="frozen_bn")     a `Body`: strides 4, 8, 16, 32
    body = hub_body("transformers/rf_detr_dinov2_384", norm="own")    four layers of stride 16

HGNet v2 and ResNet-vd take pictures in 0..1 as they are, without ImageNet's mean and deviation. RF-DETR's DINOv2 has
its position embeddings for the size that it is named after, and interpolates them for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tailfin.models.backbones import Body
from tailfin.models.frozen_norms import FrozenNorm
from tailfin.models.images import MEAN, STD
from tailfin.schema.backbones import HGNETS, HUB, RESNETS_VD

STRIDES = (4, 8, 16, 32)
# widths of the stem and of each stage: within a block, at its end; blocks and their layers; scales learnt per layer
HGNET_SIZES: dict[str, tuple[tuple[int, int], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool]] = {
    "b0": ((16, 16), (16, 32, 64, 128), (64, 256, 512, 1024), (1, 1, 2, 1), 3, True),
    "b2": ((24, 32), (32, 64, 128, 256), (96, 384, 768, 1536), (1, 1, 3, 1), 4, True),
    "b4": ((32, 48), (48, 96, 192, 384), (128, 512, 1024, 2048), (1, 1, 3, 1), 6, False),
    "b5": ((32, 64), (64, 128, 256, 512), (128, 512, 1024, 2048), (1, 2, 5, 2), 6, False),
}
VD_SIZES = {  # blocks and widths of the stages, kind of block
    "18": ((2, 2, 2, 2), (64, 128, 256, 512), "basic"),
    "34": ((3, 4, 6, 3), (64, 128, 256, 512), "basic"),
    "50": ((3, 4, 6, 3), (256, 512, 1024, 2048), "bottleneck"),
}


class HubBody(Body):
    """A backbone of transformers in the place of the row of modules; layers are named stage1, ... as they lie.

    Args:
        network: a backbone that gives every layer.
        blocks: per layer the modules behind the layer before it; what comes before the first is the stem.
    """

    def __init__(
        self,
        network: Any,
        channels: Mapping[str, int],
        strides: Mapping[str, int],
        stem: nn.Module,
        blocks: list[list[nn.Module]],
        **statistics: tuple[float, ...],
    ) -> None:
        super().__init__({"network": network}, channels, strides, **statistics)
        self._units = (stem, *(nn.ModuleList(own) for own in blocks))  # a tuple: no second names for the same weights

    def take(self, names: Mapping[str, str]) -> Body:
        """As `Body.take`; the network stays whole."""
        self.taken = dict(names)
        return self

    def layers(self, pictures: Tensor) -> dict[str, Tensor]:
        maps = self["network"](pictures).feature_maps
        return dict(zip(self.channels, maps, strict=True))

    def freeze(self, count: int) -> None:
        for unit in self._units[:count]:
            unit.requires_grad_(False)


def hub_body(backbone: str, *, norm: str) -> HubBody:
    """A body with random weights by its name.

    Args:
        norm: "frozen_bn" fixes statistics and weights of its batch norms, "bn" lets them train; "own" for DINOv2, whose
            layer norms train.
    """
    name = backbone.removeprefix(HUB)
    if backbone in HGNETS:
        return hgnet_body(_hgnet_config(name.removeprefix("hgnet_v2_")), norm=norm)
    if backbone in RESNETS_VD:
        return resnet_vd_body(_vd_config(name.removeprefix("resnet").removesuffix("_vd")), norm=norm)
    return dinov2_body(_dinov2_config(int(name.rpartition("_")[2])))


def hgnet_body(config: Any, *, norm: str) -> HubBody:
    """HGNet v2 of a configuration of transformers, all four stages given."""
    from transformers.models.hgnet_v2.modeling_hgnet_v2 import HGNetV2Backbone  # takes seconds to import

    return _staged(HGNetV2Backbone(config), config.stage_out_channels, norm)


def resnet_vd_body(config: Any, *, norm: str) -> HubBody:
    """RT-DETR's ResNet of a configuration of transformers, all four stages given."""
    from transformers.models.rt_detr.modeling_rt_detr_resnet import RTDetrResNetBackbone

    return _staged(RTDetrResNetBackbone(config), config.hidden_sizes, norm)


def dinov2_body(config: Any) -> HubBody:
    """RF-DETR's DINOv2 of a configuration of transformers; its layers are the stages that it gives."""
    from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone

    network = RfDetrDinov2Backbone(config)
    if network.embeddings.mask_token is not None:
        network.embeddings.mask_token.requires_grad_(False)  # of pre-training; nothing uses it
    ends = list(config.out_indices)
    names = [f"stage{end}" for end in ends]
    blocks = [list(network.encoder.layer[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return HubBody(
        network,
        dict.fromkeys(names, config.hidden_size),
        dict.fromkeys(names, config.patch_size),
        network.embeddings,
        blocks,
        mean=MEAN,
        std=STD,
    )


# ---- details ---------------------------------------------------------------------------------------------------------


def _staged(network: Any, widths: Any, norm: str) -> HubBody:
    if norm == "frozen_bn":
        _freeze_norms(network)
    names = [f"stage{number}" for number in range(1, 1 + len(STRIDES))]
    return HubBody(
        network,
        dict(zip(names, widths, strict=True)),
        dict(zip(names, STRIDES, strict=True)),
        network.embedder,
        [[stage] for stage in network.encoder.stages],
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _freeze_norms(network: nn.Module) -> None:
    """Batch norms to norms of fixed statistics, with the same weights."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, own = name.rpartition(".")
            frozen = FrozenNorm(module.num_features, module.eps)
            frozen.load_state_dict({key: module.state_dict()[key] for key in frozen.state_dict()})
            setattr(network.get_submodule(parent), own, frozen)


def _hgnet_config(size: str) -> Any:
    from transformers import HGNetV2Config

    stem, inner, outer, blocks, layers, scaled = HGNET_SIZES[size]
    return HGNetV2Config(
        stem_channels=[3, *stem],
        stage_in_channels=[stem[-1], *outer[:-1]],
        stage_mid_channels=list(inner),
        stage_out_channels=list(outer),
        hidden_sizes=list(outer),
        stage_num_blocks=list(blocks),
        stage_numb_of_layers=[layers] * 4,
        use_learnable_affine_block=scaled,
        out_indices=[1, 2, 3, 4],  # type: ignore[call-arg]
    )


def _vd_config(depth: str) -> Any:
    from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

    blocks, widths, kind = VD_SIZES[depth]
    settings: dict[str, Any] = {"depths": list(blocks), "hidden_sizes": list(widths), "layer_type": kind}
    return RTDetrResNetConfig(**settings, out_indices=[1, 2, 3, 4])  # type: ignore[call-arg]


def _dinov2_config(side: int) -> Any:
    from transformers import RfDetrDinov2Config

    return RfDetrDinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=side,
        patch_size=16,
        num_windows=2,
        out_features=["stage3", "stage6", "stage9", "stage12"],  # type: ignore[call-arg]
    )
