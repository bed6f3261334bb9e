"""Released checkpoints: every key of the published two-stage R50 detector finds its place."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig, TimmBackboneConfig

from tailfin.checkpoint import save_model
from tailfin.cli.evaluate import evaluate
from tailfin.config import check_recipe
from tailfin.data.transforms import resize
from tailfin.errors import UserError
from tailfin.models import build_detector, coco_weights
from tailfin.models.deformable_detr import FOCAL_BIAS, DeformableDETR
from tailfin.models.detr_convert import coco_names, convert_released, convert_transformers, is_released
from tailfin.models.images import batch_images
from tailfin.schema.detectors import DeformableDETRConfig
from tailfin.stats import ClassStats

CLASSES = 5
IDS = list(range(1, CLASSES + 1))
NAMES = [f"class {number}" for number in IDS]
STATS = ClassStats(
    image_count=[3] * CLASSES, instance_count=[3] * CLASSES, num_images=9, names=NAMES, category_ids=np.array(IDS)
)


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
    ours = convert_released(state, NAMES, IDS).state
    own = model_of(two_stage=two_stage, refine=refine, encoder_head="classes").state_dict()
    own = {key: value for key, value in own.items() if not key.startswith("criterion.")}
    assert set(ours) == set(own)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in own.items()}


def test_values():
    state = released()
    ours = convert_released(state, NAMES, IDS).state
    query, key, value = (ours[f"decoder.2.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(torch.cat([query, key, value]), state["transformer.decoder.layers.2.self_attn.in_proj_weight"])
    assert torch.equal(
        ours["decoder.1.self_attn_layer_norm.weight"], state["transformer.decoder.layers.1.norm2.weight"]
    )
    assert torch.equal(
        ours["decoder.1.encoder_attn_layer_norm.weight"], state["transformer.decoder.layers.1.norm1.weight"]
    )
    assert torch.equal(ours["class_embed.0.weight"], state["class_embed.0.weight"][1:])  # ids 1..C there, 0..C-1 here
    # proposals are row 0 there, and the last one here
    assert torch.equal(ours["class_embed.6.weight"], state["class_embed.6.weight"][[1, 2, 3, 4, 5, 0]])
    assert torch.equal(ours["encoder.3.mlp.fc2.bias"], state["transformer.encoder.layers.3.linear2.bias"])


def heads(count: int) -> dict[str, Tensor]:
    return {"decoder.0.x": torch.zeros(1), "class_embed.0.bias": torch.arange(float(count))}


def test_class_heads_of_coco_go_by_name():
    """Rows are COCO's category ids, whatever ids and order the training file has."""
    found = convert_released(heads(91), ["Dog", "unicorn", "person"], [7, 8, 9])
    rows = dict(zip(found.names, found.state["class_embed.0.bias"].tolist(), strict=True))
    assert len(rows) == 80 and (rows["person"], rows["Dog"], rows["toothbrush"]) == (1, 18, 90)
    # 90 classes of one's own have as many rows as COCO needs, and are none of COCO's
    own = [f"part {number}" for number in range(90)]
    assert len(convert_released(heads(91), own, list(range(1, 91))).names) == 80


@pytest.mark.parametrize(
    ("count", "ids", "rows"),
    [
        (6, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        (5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (10, [1, 3, 4, 8, 9], [1, 3, 4, 8, 9]),
        (5, [1, 2, 3, 4, 5], None),  # the last class would have no row
        (6, [0, 1, 2, 3, 4], None),  # every class would have the row of the next
        (6, [2, 4, 6, 8, 10], None),
        (12, [1, 2, 3, 4, 5], []),  # of other classes: they start anew
    ],
)
def test_other_class_heads_go_by_id_or_are_refused(count, ids, rows):
    if rows is None:
        with pytest.raises(UserError, match=rf"{count} rows by category id .* 5 classes .* would go to other classes"):
            convert_released(heads(count), NAMES, ids, "FILE")
    else:
        found = convert_released(heads(count), NAMES, ids, "FILE")
        assert found.state["class_embed.0.bias"].tolist() == rows and found.notes[0].startswith("FILE: ")


def test_class_heads_of_transformers():
    labels = ["N/A", "class 3", "other", "class 1"]
    found = convert_transformers(heads(4), NAMES, labels)
    assert found.names == labels[1:] and found.state["class_embed.0.bias"].tolist() == [1, 2, 3]
    assert len(convert_transformers(heads(91), NAMES).names) == 80
    assert convert_transformers(heads(5), NAMES, [f"LABEL_{i}" for i in range(5)]).names == NAMES
    assert convert_transformers(heads(12), NAMES).names == []
    with pytest.raises(UserError, match="6 rows and no names"):
        convert_transformers(heads(6), NAMES)
    with pytest.raises(UserError, match="4 rows, its configuration has 3 classes"):
        convert_transformers(heads(4), NAMES, labels[1:])


# ---- outputs ---------------------------------------------------------------------------------------------------------

KINDS = {
    "two-stage": {"two_stage": True, "refine": True},
    "one-stage": {"two_stage": False, "refine": True},
    "no refinement": {"two_stage": False, "refine": False},
}
SIZES = {"channels": 32, "encoder_layers": 1, "decoder_layers": 2, "heads": 4, "feedforward": 64, "queries": 12}
BACKBONES = {
    "transformers": ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ),
    "timm": TimmBackboneConfig(backbone="resnet18", out_indices=(2, 3, 4), use_pretrained_backbone=False),
}  # fmt: skip


def transformers_detector(
    kind: str, backbone: str = "transformers", rows: int = 91
) -> DeformableDetrForObjectDetection:
    """transformers' own detector with random weights, none of them at a published start."""
    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone_config=BACKBONES[backbone], num_labels=rows, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=12,
        two_stage_num_proposals=12, two_stage=KINDS[kind]["two_stage"], with_box_refine=KINDS[kind]["refine"],
    )  # fmt: skip
    model = DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "num_batches" not in name:
                if "running_var" in name:
                    value.uniform_(0.5, 1.5)
                else:
                    value.add_(0.05 * torch.randn_like(value))
    return model


def coco_stats(names: list[str]) -> ClassStats:
    """Some of COCO's classes with ids and an order of their own."""
    count = [3] * len(names)
    return ClassStats(image_count=count, instance_count=count, num_images=9, names=names)


def loaded(path: Path, kind: str, stats: ClassStats, **detector: object) -> tuple[DeformableDETR, list[str]]:
    detector = {"name": "deformable_detr", "norm": "frozen_bn", **SIZES, **KINDS[kind], **detector}
    values = {"detector": detector, "backbone": "resnet18", "weights": str(path), "loss": "focal"}
    model, notes = build_detector(check_recipe(values, "test"), stats)
    return model.eval(), notes


SHOWN = ["toothbrush", "person", "bicycle", "parking meter"]
ROWS = [90, 1, 2, 14]


@torch.no_grad()
def assert_same_outputs(model: DeformableDETR, theirs: DeformableDetrForObjectDetection, rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand((3, *size), generator=generator) for size in ((96, 128), (128, 80))]
    batch = batch_images(images, divisor=1)
    mask = torch.zeros((2, *batch.tensors.shape[-2:]), dtype=torch.int64)
    for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
        row[:height, :width] = 1
    own, other = model.outputs(images), theirs(batch.tensors, pixel_mask=mask)
    torch.testing.assert_close(own.logits[-1], other.logits[..., rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own.boxes[-1], other.pred_boxes, atol=1e-5, rtol=1e-5)
    if own.encoder_logits is not None:
        torch.testing.assert_close(own.encoder_logits[..., -1], other.enc_outputs_class[..., 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_coco_are_those_of_the_hub(kind, monkeypatch):
    """`weights: coco` takes the kind's own model at a fixed revision; its 91 rows go by COCO's names."""
    theirs = transformers_detector(kind, "timm")
    wanted = []

    def load(name: str, revision: str) -> dict[str, Tensor]:
        wanted.append((name, revision))
        return theirs.state_dict()

    monkeypatch.setattr(coco_weights, "load_published", load)
    monkeypatch.setattr(DeformableDETRConfig, "COCO", "resnet18")  # the published ones have a ResNet-50
    values = {
        "detector": {"name": "deformable_detr", "norm": "frozen_bn", **SIZES, **KINDS[kind]},
        "backbone": "resnet18", "weights": "coco", "loss": "focal",
    }  # fmt: skip
    model, notes = build_detector(check_recipe(values, "test"), coco_stats(SHOWN))
    assert_same_outputs(model.eval(), theirs, ROWS)
    assert "  classes joined by name: 4 kept, 0 new, 76 of the file left out" in " ".join(notes)
    (name, revision) = wanted[0]
    assert ("two-stage" in name, "box-refine" in name) == tuple(KINDS[kind].values()) and len(revision) == 40


@pytest.mark.parametrize(
    ("kind", "backbone"), [("two-stage", "transformers"), ("one-stage", "timm"), ("no refinement", "timm")]
)
def test_outputs_of_a_file_of_the_hub(tmp_path, kind, backbone):
    theirs = transformers_detector(kind, backbone)
    theirs.config.id2label = {row: name for row, name in enumerate(coco_names())}
    theirs.save_pretrained(tmp_path)
    model, notes = loaded(tmp_path / "model.safetensors", kind, coco_stats(SHOWN))
    assert_same_outputs(model, theirs, ROWS)
    assert "  classes joined by name: 4 kept, 0 new, 76 of the file left out" in " ".join(notes)
    assert not any("start anew" in note or "not in this" in note for note in notes)
    # the weights as they are in memory, and without the names of its classes
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    (tmp_path / "config.json").unlink()
    model, notes = loaded(tmp_path / "memory.pth", kind, coco_stats(SHOWN))
    assert_same_outputs(model, theirs, ROWS)
    assert any("taken for COCO's" in note for note in notes)


def test_a_file_of_the_hub_is_evaluated(tmp_path, make_set, capsys):
    """`tailfin evaluate --model FILE --recipe RECIPE`: the numbers of transformers' own detections."""
    annotations = make_set(tmp_path / "set", 4, 0)
    document = json.loads(annotations.read_text())
    for category, name in zip(document["categories"], ("Dog", "person", "cat"), strict=True):
        category["name"] = name
    annotations.write_text(json.dumps(document))
    theirs = transformers_detector("two-stage", "timm")
    theirs.config.id2label = dict(enumerate(coco_names()))
    theirs.save_pretrained(tmp_path / "hub")
    detector = {**SIZES, **KINDS["two-stage"], "name": "deformable_detr"}
    recipe = tmp_path / "small.yaml"
    data = {"resize": "square", "sizes": [96], "workers": 0}
    values = {"detector": detector, "backbone": "resnet18", "loss": "focal", "weights": "imagenet", "data": data}
    recipe.write_text(json.dumps({**values, "evaluation": {"score_threshold": 0.0, "batch": 1}}))
    model = tmp_path / "hub" / "model.safetensors"
    evaluate(model=model, recipe=str(recipe), annotations=annotations, protocol="coco", save=tmp_path)
    assert "3 kept, 0 new, 77 of the file left out" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.bbox.json").read_text())
    picture = torch.from_numpy(np.asarray(Image.open(tmp_path / "set" / "1.png")).copy()).permute(2, 0, 1)
    shown = batch_images([resize(picture, {"boxes": torch.zeros(0, 4)}, (72, 96))[0]], divisor=1).tensors
    with torch.no_grad():
        scores = theirs(shown).logits[0, :, [18, 1, 17]].sigmoid().flatten()
    own = sorted((entry["score"] for entry in results if entry["image_id"] == 101), reverse=True)
    assert own == pytest.approx(scores.sort(descending=True).values[:100].tolist(), abs=1e-4)
    # what would be random is refused
    with pytest.raises(UserError, match="weights of this detector are not in it"):
        recipe.write_text(json.dumps({**values, "detector": {**detector, "decoder_layers": 3}}))
        evaluate(model=model, recipe=str(recipe), annotations=annotations, protocol="coco")
    document["categories"][2]["name"] = "unicorn"
    annotations.write_text(json.dumps(document))
    with pytest.raises(UserError, match='no class "unicorn"'):
        recipe.write_text(json.dumps(values))
        evaluate(model=model, recipe=str(recipe), annotations=annotations, protocol="coco")
    with pytest.raises(UserError, match="--recipe goes with --model"):
        evaluate(run=tmp_path, recipe=str(recipe))


def released_names(theirs: DeformableDetrForObjectDetection, kind: str) -> dict[str, Tensor]:
    """The weights of transformers' detector as the released code of Deformable DETR keeps them."""
    state = {}
    inner = theirs.state_dict()
    for name, value in inner.items():
        name = name.removeprefix("model.").replace("backbone.model.", "backbone.0.body.").replace("_backbone.", "")
        if re.match(r"(encoder|decoder)\.layers|enc_output|pos_trans|reference_points|level_embed", name):
            name = f"transformer.{name}"
        name = name.replace("query_position_embeddings", "query_embed")
        cross = {"self_attn_layer_norm": "norm2", "encoder_attn_layer_norm": "norm1", "final_layer_norm": "norm3"}
        alone = {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"}
        for ours, released_name in (cross if "decoder" in name else alone).items():
            name = name.replace(f".{ours}.", f".{released_name}.")
        name = name.replace(".encoder_attn.", ".cross_attn.").replace(".o_proj.", ".out_proj.")
        name = re.sub(r"\.mlp\.fc([12])\.", r".linear\1.", name)
        if found := re.match(r"(.*self_attn)\.([qkv])_proj\.(weight|bias)$", name):
            if found[2] == "q":
                packed = [
                    value,
                    *(inner[f"model.{found[1].removeprefix('transformer.')}.{k}_proj.{found[3]}"] for k in "kv"),
                ]
                state[f"{found[1]}.in_proj_{found[3]}"] = torch.cat(packed)
            continue
        state[
            name.replace("decoder.class_embed", "transformer.decoder.class_embed").replace(
                "decoder.bbox_embed", "transformer.decoder.bbox_embed"
            )
        ] = value
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_a_released_file(tmp_path, kind):
    theirs = transformers_detector(kind, "timm")
    state = released_names(theirs, kind)
    assert is_released(state)
    torch.save({"model": state, "epoch": 49, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "r50.pth")
    model, notes = loaded(tmp_path / "r50.pth", kind, coco_stats(SHOWN))
    assert_same_outputs(model, theirs, ROWS)
    assert any("COCO's, by category id" in note for note in notes)
    # classes that COCO lacks start as the loss asks, the others keep their rows; so does the encoder's wide head
    model, notes = loaded(tmp_path / "r50.pth", kind, coco_stats(["unicorn", *SHOWN]), encoder_head="classes")
    assert '  classes joined by name: 4 kept, 1 new ("unicorn")' in " ".join(notes)
    assert (model.class_embed[0].bias[0] == FOCAL_BIAS).all()
    torch.testing.assert_close(model.class_embed[0].bias[1:], theirs.class_embed[0].bias[ROWS])
    if kind == "two-stage":
        torch.testing.assert_close(model.class_embed[-1].bias[1:], theirs.class_embed[-1].bias[[*ROWS, 0]])


def test_a_model_of_step_wise_learning(tmp_path):
    """Expert and student lie in one file; class rows go by the ids of LVIS."""
    expert, student = (transformers_detector("two-stage", "timm", rows=6) for _ in range(2))
    student.class_embed[0].bias.data += 1
    states = {f"model_l{number}": released_names(one, "two-stage") for number, one in enumerate((expert, student))}
    torch.save({**states, "epoch": 1}, tmp_path / "last.pth")
    with pytest.warns(UserWarning, match="model_l1, the student"):
        model, notes = loaded(tmp_path / "last.pth", "two-stage", STATS)
    assert_same_outputs(model, student, IDS)
    assert any("6 class rows go by category id" in note for note in notes)
    model, _ = loaded(Path(f"{tmp_path / 'last.pth'}#model_l0"), "two-stage", STATS)
    assert_same_outputs(model, expert, IDS)
    with pytest.raises(UserError, match='no "model_l2" in it.*model_l'):
        loaded(Path(f"{tmp_path / 'last.pth'}#model_l2"), "two-stage", STATS)
    parallel = {f"module.{key}": value for key, value in states["model_l0"].items()}
    torch.save({"model": parallel}, tmp_path / "parallel.pth")
    model, _ = loaded(tmp_path / "parallel.pth", "two-stage", STATS)
    assert_same_outputs(model, expert, IDS)


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


@pytest.mark.parametrize("heads_of", [("one", "one"), ("classes", "classes"), ("classes", "one"), ("one", "classes")])
def test_a_model_of_other_classes_keeps_its_proposals(tmp_path, heads_of):
    """The logit that ranks proposals belongs to no class: it goes along, whatever classes stand beside it."""
    detector = {"name": "deformable_detr", "norm": "bn", "frozen_layers": 0, **SIZES}
    stats = [coco_stats(names) for names in (["cat", "dog"], ["dog", "cow", "eel"])]
    values = {"backbone": "resnet18", "weights": "none", "loss": "focal"}
    recipes = [check_recipe({**values, "detector": {**detector, "encoder_head": kind}}, "t") for kind in heads_of]
    first, _ = build_detector(recipes[0], stats[0], start=False)
    for head in first.class_embed:
        torch.nn.init.normal_(head.bias)
    save_model(tmp_path / "model.safetensors", first, recipes[0], stats[0])
    second = recipes[1].model_copy(update={"weights": str(tmp_path / "model.safetensors")})
    model, notes = build_detector(second, stats[1])
    assert torch.equal(model.class_embed[-1].weight[-1], first.class_embed[-1].weight[-1])
    assert torch.equal(model.class_embed[-1].bias[-1], first.class_embed[-1].bias[-1])
    assert torch.equal(model.class_embed[0].bias[0], first.class_embed[0].bias[1])
    assert (model.class_embed[0].bias[1:] == FOCAL_BIAS).all()
    if heads_of == ("classes", "classes"):
        assert torch.equal(model.class_embed[-1].bias[0], first.class_embed[-1].bias[1])
    assert any("1 kept, 2 new" in note for note in notes)
