"""Released checkpoints: every key of the published two-stage R50 detector finds its place."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor

from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models.deformable_detr import DeformableDETR
from tailfin.models.detr_convert import convert_released, is_released
from tailfin.stats import ClassStats

CLASSES = 5
STATS = ClassStats(image_count=[3] * CLASSES, instance_count=[3] * CLASSES, num_images=9)


def linear(name: str, outs: int, ins: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outs, ins), f"{name}.bias": (outs,)}


def norm(name: str, width: int = 256) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def frozen(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")}


def released_resnet50() -> dict[str, tuple[int, ...]]:
    body = "backbone.0.body"
    keys: dict[str, tuple[int, ...]] = {f"{body}.conv1.weight": (64, 3, 7, 7), **frozen(f"{body}.bn1", 64)}
    before = 64
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        width = 32 * 2**layer
        for block in range(blocks):
            at = f"{body}.layer{layer}.{block}"
            keys |= {f"{at}.conv1.weight": (width, before, 1, 1), **frozen(f"{at}.bn1", width)}
            keys |= {f"{at}.conv2.weight": (width, width, 3, 3), **frozen(f"{at}.bn2", width)}
            keys |= {f"{at}.conv3.weight": (4 * width, width, 1, 1), **frozen(f"{at}.bn3", 4 * width)}
            if block == 0:
                keys |= {
                    f"{at}.downsample.0.weight": (4 * width, before, 1, 1),
                    **frozen(f"{at}.downsample.1", 4 * width),
                }
            before = 4 * width
    return keys


def released(rows: int = CLASSES + 1, *, two_stage: bool = True, refine: bool = True) -> dict[str, Tensor]:
    """Random weights under the names and shapes of the released R50 detector (6 + 6 layers, 4 levels, 300 queries)."""
    keys = released_resnet50()
    keys["transformer.level_embed"] = (4, 256)
    for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        for layer in range(6):
            at = f"transformer.{part}.layers.{layer}"
            keys |= linear(f"{at}.{attention}.sampling_offsets", 8 * 4 * 4 * 2, 256)
            keys |= linear(f"{at}.{attention}.attention_weights", 8 * 4 * 4, 256)
            keys |= linear(f"{at}.{attention}.value_proj", 256, 256) | linear(f"{at}.{attention}.output_proj", 256, 256)
            keys |= linear(f"{at}.linear1", 1024, 256) | linear(f"{at}.linear2", 256, 1024)
            keys |= norm(f"{at}.norm1") | norm(f"{at}.norm2")
            if part == "decoder":
                keys |= {f"{at}.self_attn.in_proj_weight": (768, 256), f"{at}.self_attn.in_proj_bias": (768,)}
                keys |= linear(f"{at}.self_attn.out_proj", 256, 256) | norm(f"{at}.norm3")
    if two_stage:
        keys |= linear("transformer.enc_output", 256, 256) | norm("transformer.enc_output_norm")
        keys |= linear("transformer.pos_trans", 512, 512) | norm("transformer.pos_trans_norm", 512)
    else:
        keys |= linear("transformer.reference_points", 2, 256) | {"query_embed.weight": (300, 512)}
    for level, width in enumerate((512, 1024, 2048, 2048)):
        side = 3 if level == 3 else 1
        keys |= {f"input_proj.{level}.0.weight": (256, width, side, side), f"input_proj.{level}.0.bias": (256,)}
        keys |= norm(f"input_proj.{level}.1")
    for head in range(7 if two_stage else 6):
        keys |= linear(f"class_embed.{head}", rows, 256)
        for layer in range(3):
            keys |= linear(f"bbox_embed.{head}.layers.{layer}", 4 if layer == 2 else 256, 256)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.rand(shape, generator=generator) for key, shape in keys.items()}
    if not refine:  # one head under six names
        for key in [key for key in state if key.startswith(("class_embed.", "bbox_embed."))]:
            head, rest = key.split(".", 1)[0], key.split(".", 2)[2]
            state[key] = state[f"{head}.0.{rest}"]
    if refine:  # the decoder holds the same modules again
        for key in [
            key for key in state if key.startswith("bbox_embed.") or (two_stage and key.startswith("class_embed."))
        ]:
            state[f"transformer.decoder.{key}"] = state[key]
    return state


def model_of(**detector: object) -> DeformableDETR:
    values = {"detector": {"name": "deformable_detr", **detector}, "weights": "imagenet", "loss": "focal"}
    model, _ = build_detector(check_recipe(values, "test"), STATS, start=False)
    assert isinstance(model, DeformableDETR)
    return model


@pytest.mark.parametrize(("two_stage", "refine"), [(True, True), (False, True), (False, False)])
def test_every_key_has_its_place(two_stage, refine):
    state = released(two_stage=two_stage, refine=refine)
    assert is_released(state)
    ours = convert_released(state, CLASSES)
    own = model_of(two_stage=two_stage, refine=refine).state_dict()
    own = {key: value for key, value in own.items() if not key.startswith("criterion.")}
    assert set(ours) == set(own)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in own.items()}


def test_values():
    state = released()
    ours = convert_released(state, CLASSES)
    query, key, value = (ours[f"decoder.2.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(torch.cat([query, key, value]), state["transformer.decoder.layers.2.self_attn.in_proj_weight"])
    assert torch.equal(
        ours["decoder.1.self_attn_layer_norm.weight"], state["transformer.decoder.layers.1.norm2.weight"]
    )
    assert torch.equal(
        ours["decoder.1.encoder_attn_layer_norm.weight"], state["transformer.decoder.layers.1.norm1.weight"]
    )
    assert torch.equal(ours["class_embed.0.weight"], state["class_embed.0.weight"][1:])  # ids 1..C there, 0..C-1 here
    assert torch.equal(ours["class_embed.6.weight"], state["class_embed.6.weight"][:1])  # proposals are class 0 there
    assert torch.equal(ours["encoder.3.mlp.fc2.bias"], state["transformer.encoder.layers.3.linear2.bias"])


def test_class_heads_of_coco():
    heads = convert_released({"decoder.0.x": torch.zeros(1), "class_embed.0.bias": torch.arange(91.0)}, 80)
    ids = heads["class_embed.0.bias"].tolist()
    assert len(ids) == 80 and ids[0] == 1 and ids[-1] == 90 and 12 not in ids and 83 not in ids
    assert (
        len(
            convert_released({"decoder.0.x": torch.zeros(1), "class_embed.0.bias": torch.arange(91.0)}, 7)[
                "class_embed.0.bias"
            ]
        )
        == 91
    )


def test_weights_of_a_file(tmp_path):
    state = released()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 49}, path)
    values = {"detector": {"name": "deformable_detr"}, "weights": str(path), "loss": "focal"}
    model, notes = build_detector(check_recipe(values, "test"), STATS)
    assert torch.equal(model.enc_output.weight.detach(), state["transformer.enc_output.weight"])
    assert torch.equal(model.backbone.body.conv1.weight.detach(), state["backbone.0.body.conv1.weight"])
    assert str(path) in notes[0]

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        build_detector(check_recipe(values, "test"), STATS)
