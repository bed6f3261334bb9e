"""Deformable DETR as a function: transformers' own outputs, gradients, padding, precision, training, command line."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeformableDetrForObjectDetection, ResNetConfig

import tailfin
from tailfin import api
from tailfin.config import check_recipe
from tailfin.dry_run import show_plan
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models.deformable_attention import sample
from tailfin.models.deformable_detr import FOCAL_BIAS, transformers_config
from tailfin.models.detector import Limits
from tailfin.models.detr_criterion import SetCriterion
from tailfin.models.detr_geometry import cells_of, grid, levels_of, position_code, valid_mask
from tailfin.models.images import batch_images
from tailfin.models.transfer import Transfer
from tailfin.schedule import build_optimizer
from tailfin.schema.recipe import Recipe
from tailfin.schema.stepwise import Distillation
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
KINDS: dict[str, dict[str, Any]] = {
    "two-stage": {},
    "one-stage": {"two_stage": False},
    "no refinement": {"two_stage": False, "refine": False},
}
DETECTOR = {
    "name": "deformable_detr", "norm": "bn", "frozen_layers": 0, "widths": [16, 16, 32, 32, 64], "blocks": [1, 1, 1, 1],
    "channels": 32, "heads": 4, "points": 2, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 64,
    "queries": 12, "dropout": 0.0,
}  # fmt: skip


def tiny_recipe(loss: str = "focal", **detector: Any) -> Recipe:
    values = {"weights": "none", "loss": loss, "detector": {**DETECTOR, **detector}}
    return check_recipe(values, "tiny")


def tiny_model(loss: str = "focal", spread: float = 0.0, **detector: Any) -> Any:
    torch.manual_seed(0)
    model, _ = build_detector(tiny_recipe(loss, **detector), STATS)
    for name, parameter in model.named_parameters():
        if spread and not name.startswith("backbone"):
            parameter.data += spread * torch.randn_like(parameter)
    return model


def picture(seed: int, size: tuple[int, int] = (64, 64), objects: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Rectangles in the colours of their classes on noise."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(90, 160, (3, *size), dtype=np.uint8))
    boxes, labels = [], []
    for _ in range(objects):
        height, width = (int(side) for side in rng.integers(16, 34, 2))
        top, left = int(rng.integers(0, size[0] - height)), int(rng.integers(0, size[1] - width))
        label = int(rng.integers(3))
        image[:, top : top + height, left : left + width] = 40
        image[label, top : top + height, left : left + width] = 230
        boxes.append([left, top, left + width, top + height])
        labels.append(label)
    return image, {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


IMAGES, TARGETS = (list(part) for part in zip(*[picture(i, (64, 48 + 16 * (i % 2)), i) for i in range(4)], strict=True))


# ---- against transformers --------------------------------------------------------------------------------------------


class _Backbone(nn.Module):
    """Our body in the place of transformers' backbone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        maps = self.body(pixels).values()
        return [(m, nn.functional.interpolate(mask[None].float(), size=m.shape[-2:])[0].bool()) for m in maps]


def transformers_twin(model: Any, recipe: Recipe) -> DeformableDetrForObjectDetection:
    """transformers' detector with the same weights, by name; heads are copied one by one."""
    config = transformers_config(recipe.detector)
    config.num_labels, config.two_stage_num_proposals = 3, recipe.detector.queries
    config.backbone_config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    twin = DeformableDetrForObjectDetection(config)
    twin.model.backbone = _Backbone(model.backbone)
    for number in range(len(twin.class_embed)):
        own = min(number, len(model.class_embed) - 1)
        for heads in (twin, twin.model.decoder):
            for kind in ("class_embed", "bbox_embed"):
                if getattr(heads, kind, None) is not None:
                    getattr(heads, kind)[number] = getattr(model, kind)[own]
    renamed = {}
    for name, value in model.state_dict().items():
        if not name.startswith(("backbone", "criterion", "class_embed", "bbox_embed")):
            name = re.sub(r"^(encoder|decoder)\.", r"\1.layers.", name)
            renamed["model." + name.replace("query_embed", "query_position_embeddings")] = value
    result = twin.load_state_dict(renamed, strict=False)
    assert not result.unexpected_keys
    assert all("_embed." in key or "backbone" in key for key in result.missing_keys)
    return twin.train(model.training)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_transformers(kind):
    recipe = tiny_recipe(**KINDS[kind])
    model = tiny_model(spread=0.05, **KINDS[kind]).eval()
    twin = transformers_twin(model, recipe)
    batch = batch_images(IMAGES, divisor=1)
    mask = torch.zeros((4, *batch.tensors.shape[-2:]), dtype=torch.int64)
    for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
        row[:height, :width] = 1
    with torch.no_grad():
        own, theirs = model.outputs(IMAGES), twin(batch.tensors, pixel_mask=mask)
    tolerance: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(own.logits[-1], theirs.logits, **tolerance)
    torch.testing.assert_close(own.boxes[-1], theirs.pred_boxes, **tolerance)
    torch.testing.assert_close(own.hidden.transpose(0, 1), theirs.intermediate_hidden_states, **tolerance)
    if own.encoder_logits is not None:
        torch.testing.assert_close(own.encoder_logits, theirs.enc_outputs_class, **tolerance)
        torch.testing.assert_close(own.encoder_boxes, theirs.enc_outputs_coord_logits.sigmoid(), **tolerance)


@pytest.mark.parametrize("shapes", [[(9, 7), (4, 3)], [(1, 1)], [(5, 4), (3, 2), (2, 1), (1, 1)]])
def test_both_ways_of_sampling_agree(shapes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn((2, tokens, 3, 5), generator=generator, requires_grad=True)
    places = (torch.rand((2, 11, 3, len(shapes), 4, 2), generator=generator) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand((2, 11, 3, len(shapes), 4), generator=generator, requires_grad=True)
    upstream = torch.randn((2, 11, 15), generator=generator)
    results = []
    for limit in (10**6, 0):
        monkeypatch.setattr("tailfin.models.deformable_attention.DENSE_TOKENS", limit)
        found = sample(value, shapes, places, weights)
        results.append((found, *torch.autograd.grad((found * upstream).sum(), (value, places, weights))))
    for dense, read in zip(*results, strict=True):
        torch.testing.assert_close(dense, read, atol=2e-4, rtol=1e-4)


def test_sampling_keeps_its_inputs_alone(monkeypatch):
    """Formula by gradcheck; for backward nothing is kept but value, places and weights."""
    monkeypatch.setattr("tailfin.models.deformable_attention.DENSE_TOKENS", 0)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    shapes = [(5, 4), (3, 2)]
    value = torch.randn((2, 26, 2, 2), **options).requires_grad_()
    places = (torch.rand((2, 3, 2, 2, 2, 2), **options) * 1.2 - 0.1).requires_grad_()
    weights = torch.rand((2, 3, 2, 2, 2), **options).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: sample(given[0], shapes, *given[1:]), (value, places, weights))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda tensor: tensor):
        sample(value, shapes, places, weights)
    assert set(kept) <= {tensor.data_ptr() for tensor in (value, places, weights)}


def test_layers_computed_again_give_the_same_gradients():
    """Dropout too: the second pass draws what the first one drew."""
    found = []
    for checkpointing in (False, True):
        model = tiny_model(checkpointing=checkpointing, dropout=0.1).train()
        torch.manual_seed(1)
        losses = model(IMAGES, TARGETS)
        sum(losses.values()).backward()
        found.append({name: own.grad for name, own in model.named_parameters() if own.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


# ---- the start -------------------------------------------------------------------------------------------------------


def test_start():
    model = tiny_model()
    assert [head.out_features for head in model.class_embed] == [3, 3, 1]
    assert all(torch.equal(head.bias, torch.full_like(head.bias, FOCAL_BIAS)) for head in model.class_embed)
    assert all(not head.layers[-1].weight.any() and not head.layers[-1].bias.any() for head in model.bbox_embed)
    assert torch.equal(model.class_embed[0].weight, model.class_embed[1].weight)
    assert model.class_embed[0].weight is not model.class_embed[1].weight
    learned = tiny_model(two_stage=False)
    assert learned.bbox_embed[0].layers[-1].bias.tolist() == [0, 0, -2, -2]
    assert learned.bbox_embed[1].layers[-1].bias.tolist() == [0, 0, 0, 0]
    other = tiny_model("objectness")
    assert [head.out_features for head in other.class_embed] == [4, 4, 1]
    torch.testing.assert_close(other.class_embed[1].bias.detach(), other.criterion.loss.prior_bias())
    first = sum(value.item() for value in model.train()(IMAGES, TARGETS).values())
    assert first < 60


def test_start_as_released():
    """Packed queries, keys and values start smaller by sqrt(2); the encoder's head has a logit for every class too."""
    separate, packed = (tiny_model(attention_init=kind).decoder[1].self_attn for kind in ("separate", "packed"))
    for name in ("q_proj", "k_proj", "v_proj"):
        bound = getattr(separate, name).weight.abs().max().item()
        assert bound == pytest.approx((6 / 64) ** 0.5, rel=0.02)
        assert getattr(packed, name).weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.02)
    assert packed.o_proj.weight.abs().max().item() == pytest.approx((6 / 64) ** 0.5, rel=0.02)
    model = tiny_model(encoder_head="classes")
    assert [len(head.weight) for head in model.class_embed] == [3, 3, 4]
    assert (model.class_embed[-1].bias == FOCAL_BIAS).all()
    outputs = model.eval().outputs(IMAGES)
    assert outputs.encoder_logits.shape[2] == 4
    best = outputs.encoder_logits[..., -1].topk(12, dim=1).indices
    raw = outputs.encoder_boxes.logit()
    reference = model._queries_of(outputs.encoder_logits, raw, None)[2]
    torch.testing.assert_close(reference, outputs.encoder_boxes.gather(1, best[..., None].expand(-1, -1, 4)))
    losses = model.train()(IMAGES, TARGETS)
    losses["loss_encoder"].backward()
    assert (model.class_embed[-1].weight.grad.abs().sum(1) > 0).all()


def test_refused_options():
    for wrong, message in (
        ({"channels": 48}, "multiple of 32"),
        ({"refine": False}, "two_stage needs refine"),
        ({"auxiliary": False}, "refine needs auxiliary"),
        ({"widths": [16, 16]}, "widths needs five"),
        ({"norm": "gn"}, "multiples of 32"),
        ({"heads": 5}, "not a multiple of heads"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_recipe(**wrong)


def test_learning_rates_by_name():
    model = tiny_model(two_stage=False)
    schedule = tiny_recipe().schedule.model_copy(
        update={"lr_scales": {"backbone": 0.1, "sampling_offsets": 0.1, "reference_points": 0.1}, "optimizer": "adamw"}
    )
    slow = {
        id(p)
        for group in build_optimizer(model, schedule).param_groups
        if group["lr_scale"] < 1
        for p in group["params"]
    }
    named = [n for n, p in model.named_parameters() if id(p) in slow]
    assert {
        "backbone.body.conv1.weight",
        "reference_points.weight",
        "encoder.0.self_attn.sampling_offsets.bias",
    } <= set(named)
    assert not any("class_embed" in n or "input_proj" in n for n in named)


# ---- gradients, padding, precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_everything_that_trains(kind):
    model = tiny_model(spread=0.05, **KINDS[kind]).train()
    torch.stack(list(model(IMAGES, TARGETS).values())).sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # biases in front of a norm over the very same values, and keys' biases under a softmax, cancel out
    without = [n for n in without if not n.endswith("k_proj.bias")]
    assert not without


def test_pictures_without_objects():
    empty = {"boxes": torch.zeros((0, 4)), "labels": torch.zeros(0, dtype=torch.int64)}
    model = tiny_model().train()
    found = model(IMAGES, [empty] * 4)
    assert all(torch.isfinite(value) for value in found.values())
    torch.stack(list(found.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_fewer_cells_than_queries():
    model = tiny_model(queries=300).train()
    image, target = picture(0, (96, 96))
    assert all(torch.isfinite(value) for value in model([image], [target]).values())
    assert model.outputs([image]).logits.shape == (2, 1, 144 + 36 + 9 + 4, 3)


def test_what_lies_in_the_padding_does_not_matter():
    """The transformer reads valid cells alone: garbage in the padding of the features changes nothing."""
    model = tiny_model(spread=0.05).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 128)]

    class Garbage(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            value = value.clone()
            value[0, :, :, value.shape[3] // 2 :] = 50.0
            return value

    with torch.no_grad():
        before = model.outputs(images)
        for projection in model.input_proj:
            projection.append(Garbage())
        after = model.outputs(images)
    assert torch.equal(before.masks[0][0].sum(1), torch.full((8,), 8))
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.boxes, before.boxes)


def test_a_padded_picture_gives_what_it_gives_alone():
    """With features that do not see the padding, that is without norms over the whole map or 3x3 borders."""
    model = tiny_model(spread=0.05).eval()
    for number, projection in enumerate(model.input_proj):
        model.input_proj[number] = projection[0]

    class Pooled(nn.Module):
        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            maps = [nn.functional.avg_pool2d(pixels, side).mean(1, keepdim=True) for side in (8, 16, 32)]
            return {str(n): m.expand(-1, w, -1, -1) for n, (m, w) in enumerate(zip(maps, (32, 32, 64), strict=True))}

    model.backbone = Pooled()
    model.input_proj[3] = nn.Conv2d(64, 32, 2, stride=2)
    small, large = torch.rand(3, 64, 64), torch.rand(3, 128, 192)
    with torch.no_grad():
        alone, together = model.outputs([small]), model.outputs([large, small])
        detected = model([large, small])[1], model([small])[0]
    torch.testing.assert_close(together.boxes[:, 1:], alone.boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.logits[:, 1:], alone.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(detected[0]["boxes"], detected[1]["boxes"], atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_keeps_boxes_logits_and_losses_in_float32(kind):
    model = tiny_model(**KINDS[kind]).train()
    exact = model(IMAGES, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.outputs(IMAGES)
        found = model.losses(outputs, TARGETS)
    assert {outputs.logits.dtype, outputs.boxes.dtype, *(v.dtype for v in found.values())} == {torch.float32}
    for name, value in found.items():
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1)
    torch.stack(list(found.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_cells_and_their_codes_are_those_of_masks():
    """Level by level from masks, as the paper's code has it, equals all levels at once from the sizes."""
    sizes = torch.tensor([[61.0, 47.0, 61.0, 47.0], [32.0, 64.0, 32.0, 64.0], [1.0, 1.0, 1.0, 1.0]])
    full, shapes = (64, 64), [(9, 8), (5, 4), (1, 1)]
    levels = levels_of(shapes, full, sizes.device)
    cells = cells_of(levels, sizes)
    masks = [valid_mask(shape, full, sizes) for shape in shapes]
    assert torch.equal(cells.valid.all(2), torch.cat([mask.flatten(1) for mask in masks], dim=1))
    ratios = [torch.stack([mask[:, 0].float().mean(1), mask[:, :, 0].float().mean(1)], dim=1) for mask in masks]
    assert torch.equal(cells.ratios, torch.stack(ratios, dim=1))
    centres = [grid(shape, ratio) for shape, ratio in zip(shapes, ratios, strict=True)]
    assert torch.equal(cells.centres, torch.cat(centres, dim=1))
    wanted = []
    for mask in masks:
        halves = []
        for axis in (1, 2):
            place = mask.cumsum(axis, dtype=torch.float32)
            place = (place - 0.5) / (place.narrow(axis, place.shape[axis] - 1, 1) + 1e-6) * (2 * math.pi)
            angle = place[..., None] / 10000 ** (torch.arange(0, 6, 2) / 6)
            halves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2))
        wanted.append(torch.cat(halves, dim=-1).flatten(1, 2))
    assert torch.equal(position_code(levels, cells, 6), torch.cat(wanted, dim=1))


# ---- detections ------------------------------------------------------------------------------------------------------


def test_detections_are_the_best_pairs():
    model = tiny_model(spread=0.1).eval()
    with torch.inference_mode():
        outputs, found = model.outputs(IMAGES), model(IMAGES)
        few = model(IMAGES, limits=Limits(0.001, 5))
        everything = model(IMAGES, limits=Limits(0.0, -1))
    for number, result in enumerate(found):
        scores = outputs.logits[-1, number].sigmoid()
        torch.testing.assert_close(result["scores"], scores.flatten().sort(descending=True).values)
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= outputs.sizes[number]).all()
        assert len(few[number]["scores"]) == 5 and len(everything[number]["scores"]) == 36
        assert result["labels"][0] == scores.amax(0).argmax()
    assert set(found[0]) == {"boxes", "scores", "labels"}
    with pytest.raises(ValueError, match="targets"):
        model.train()(IMAGES)


def test_parts_freeze():
    model = tiny_model()
    model.freeze_but(["classifier", "projection"])
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"class_embed", "input_proj"}
    model.train()
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_it_learns():
    """Sixteen pictures by heart, far enough in a few seconds; a longer run is `benchmarks/detr_speed.py --overfit`."""
    model = tiny_model(widths=[16, 16, 32, 64, 64]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    images, targets = (list(part) for part in zip(*[picture(seed) for seed in range(16)], strict=True))
    totals = []
    for _ in range(25):
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        totals.append(loss.item())
    assert np.mean(totals[-5:]) < 0.6 * totals[0]


# ---- the command line ------------------------------------------------------------------------------------------------

RECIPE = """\
weights: none
detector: {name: deformable_detr, norm: bn, frozen_layers: 0, widths: [16, 16, 32, 32, 32], blocks: [1, 1, 1, 1],
  channels: 32, heads: 4, points: 2, encoder_layers: 1, decoder_layers: 2, feedforward: 64, queries: 10}
loss: efl
schedule: {epochs: 2, batch: 4, optimizer: adamw, lr: 1e-3, warmup: 4, milestones: [1.5], clip: 0.1,
  lr_scales: {backbone: 0.5}}
data: {resize: detr, sizes: [48, 64], max_size: 96, crop_resize: [64], crop: [40, 60], workers: 0}
logging: {every: 1, checkpoint_every: 3}
evaluation: {max_dets: 20}
"""


class Killed(Exception):
    pass


def test_train_resume_and_predict(tmp_path, monkeypatch, tiny_set, quick_training):
    recipe = tmp_path / "detr.yaml"
    recipe.write_text(RECIPE)
    files: dict[str, Any] = {"train": tiny_set[0], "val": tiny_set[1]}
    show_plan(api.resolve_recipe(recipe, tiny_set[0], tiny_set[1]), tmp_path / "dry")
    assert (tmp_path / "dry-dry-run.jpg").exists()
    straight = tailfin.train(recipe, **files, out=tmp_path / "straight")

    calls, forward = [], SetCriterion.forward

    def killed(self: SetCriterion, *arguments: Any) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 6:  # two iterations after a resume point
            raise Killed
        return forward(self, *arguments)

    monkeypatch.setattr(SetCriterion, "forward", killed)
    with pytest.raises(Killed):
        tailfin.train(recipe, **files, out=tmp_path / "killed")
    monkeypatch.setattr(SetCriterion, "forward", forward)
    resumed = tailfin.train(recipe, out=tmp_path / "killed", resume=True)
    first, second = (load_file(run / "model.safetensors") for run in (straight, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (first["criterion.loss.pos_grad"] > 0).any()
    assert (straight / "metrics.json").exists()

    found = tailfin.load(straight, "cpu").predict(sorted(tiny_set[1].with_suffix("").iterdir())[:3])
    assert len(found) == 3 and all(len(result["scores"]) == 20 for result in found)


class _Reads(TorchDispatchMode):
    """Counts operations whose size or value the host has to know: on an accelerator it waits for each of them."""

    KINDS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        repeated = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.KINDS or masked or repeated:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("taught", [False, True])
def test_a_step_waits_for_the_matching_alone(taught):
    """Nothing but the costs of all matchings, in one copy, goes to the host, whatever the batch; not with a teacher."""
    model = tiny_model(encoder_head="classes")
    step: Any = model
    if taught:
        model.freeze_but(model.class_specific())
        step = Transfer(model, tiny_model(encoder_head="classes"), torch.tensor([True, True, False]), Distillation())
    step.train()(IMAGES, TARGETS)
    with _Reads() as reads:
        torch.stack(list(step(IMAGES * 2, TARGETS * 2).values())).sum().backward()
    assert reads.found == []
