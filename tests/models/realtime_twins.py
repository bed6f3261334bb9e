"""Tiny detectors of transformers, and tailfin's with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DFineForObjectDetection,
    HGNetV2Config,
    RfDetrDinov2Config,
    RfDetrForObjectDetection,
    RTDetrV2ForObjectDetection,
)
from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

from tailfin import ClassStats, losses
from tailfin.models.backbones import Backbone
from tailfin.models.detr_bodies import dinov2_body, hgnet_body, resnet_vd_body
from tailfin.models.detr_convert import hub_state
from tailfin.models.realtime_detr import RealTimeDETR, transformers_settings
from tailfin.schema.detectors import DETECTORS

CLASSES = 7
TINY = {"channels": 32, "heads": 4, "feedforward": 32, "queries": 12}
HYBRID = {**TINY, "encoder_channels": 32, "encoder_feedforward": 32, "encoder_expansion": 0.5, "denoising": 10}
SECTIONS: dict[str, dict[str, Any]] = {
    "d_fine": {**HYBRID, "encoder_depth": 0.34, "points": [2, 3, 2], "bins": 8},
    "rt_detr_v2": {**HYBRID, "points": 2},
    "rf_detr": {**TINY, "queries": 4, "groups": 3, "cross_heads": 4, "points": 2, "decoder_layers": 2},
}
TWINS = {
    "d_fine": DFineForObjectDetection,
    "rt_detr_v2": RTDetrV2ForObjectDetection,
    "rf_detr": RfDetrForObjectDetection,
}
LOSS = {"d_fine": "varifocal", "rt_detr_v2": "varifocal", "rf_detr": "ia_bce"}


def backbone_settings(name: str) -> Any:
    """A tiny backbone of transformers."""
    if name == "d_fine":
        return HGNetV2Config(
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 8, 16, 24],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[8, 16, 24, 32],
            hidden_sizes=[8, 16, 24, 32],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[1, 1, 1, 1],
            use_learnable_affine_block=True,
            out_indices=[2, 3, 4],
        )
    if name == "rt_detr_v2":
        return RTDetrResNetConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 24, 32],
            embedding_size=8,
            layer_type="basic",
            out_indices=[2, 3, 4],
        )
    return RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_windows=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def section(name: str, **changes: Any) -> Any:
    return DETECTORS[name].model_validate({"name": name, **SECTIONS[name], **changes})


def stats_of(classes: int = CLASSES, names: list[str] | None = None) -> ClassStats:
    counts = list(range(2, 2 + classes))
    return ClassStats(image_count=counts, instance_count=counts, num_images=50, **({"names": names} if names else {}))


def detector(name: str, loss: str = "", stats: ClassStats | None = None, **changes: Any) -> RealTimeDETR:
    """A tiny one of tailfin's, on a tiny backbone of transformers'."""
    config, inner = section(name, **changes), backbone_settings(name)
    if name == "rf_detr":
        body = dinov2_body(inner)
        taken = body.layer_names
    else:
        inner.out_indices = [1, 2, 3, 4]
        body = (hgnet_body if name == "d_fine" else resnet_vd_body)(inner, norm="frozen_bn")
        taken = body.layer_names[-config.levels :]
    backbone = Backbone(body.take({layer: str(level) for level, layer in enumerate(taken)}))
    own = losses.build(loss or LOSS[name], stats or stats_of())
    return RealTimeDETR(backbone, own, config, transformers_settings(config, own.num_classes, inner))


def twins(name: str, **changes: Any) -> tuple[RealTimeDETR, Any]:
    """Both, with weights that are spread: fresh ones give boxes and scores that are nearly the same."""
    torch.manual_seed(0)
    config = section(name, **changes)
    settings = transformers_settings(config, CLASSES, backbone_settings(name))
    settings.backbone_config = backbone_settings(name)
    if name == "rf_detr":
        settings.dropout = 0.0
    else:
        settings.encoder_in_channels = [16, 24, 32][-config.levels :]
    twin = TWINS[name](settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in twin.named_parameters():
            if value.ndim == 1 and key.endswith("weight"):  # of norms
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.ndim > 1 and "embedding" not in key:
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
            elif not key.endswith(("reg_scale", "up")):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        for key, value in twin.named_buffers():
            if key.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            if key.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    model = detector(name, **changes)
    state = hub_state(twin.state_dict())
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and all("num_batches" in key for key in missing), (missing, unknown)
    return model, twin
