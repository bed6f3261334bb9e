"""D-FINE, RT-DETR v2 and RF-DETR against transformers' own, with the same weights and the same noise."""

from __future__ import annotations

import pytest
import torch
from realtime_twins import CLASSES, TWINS, backbone_settings, detector, section, stats_of, twins
from safetensors.torch import load_file
from torchvision.ops import box_convert, box_iou

from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import RELEASED, coco_weights
from tailfin.models.detr_convert import coco_names, convert_hub
from tailfin.models.realtime_detr import transformers_settings
from tailfin.weights import load_weights

SIDE = 96


def batch(side: int = SIDE, seed: int = 3) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two pictures of one size, with three objects and one."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, side, side, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[8.0, 8, 60, 40], [30, 20, 90, 90], [50, 4, 70, 30], [10, 30, 50, 80]])
    labels = torch.tensor([0, CLASSES - 1, 3, 2])
    return images, [
        {"boxes": boxes[:3], "labels": labels[:3]},
        {"boxes": boxes[3:], "labels": labels[3:]},
    ]


def for_transformers(targets, side: int = SIDE):
    return [
        {"class_labels": target["labels"], "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / side}
        for target in targets
    ]


@pytest.mark.parametrize("name", TWINS)
def test_outputs_equal_transformers(name):
    model, twin = twins(name)
    model.eval()
    twin.eval()
    images, _ = batch()
    with torch.no_grad():
        outputs = model.outputs(images)
        theirs = twin(pixel_values=model.batch(images).tensors)
    torch.testing.assert_close(outputs.logits[-1], theirs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.boxes[-1], theirs.pred_boxes, rtol=0, atol=1e-4)
    assert theirs.logits.std() > 0.05 and theirs.pred_boxes.std() > 0.05


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("noise", [True, False])
def test_the_loss_equals_transformers(name, noise):
    """With the loss that each is published with, in train mode, with gradients.

    A place that is read at the border of two cells has another slope on either side, and rounding decides which: of
    three batches two must agree in every gradient.
    """
    changes = {} if name == "rf_detr" else {"denoising": 10 if noise else 0}
    agreed = 0
    for seed in (3, 4, 5):
        model, twin = twins(name, **changes)
        model.train()
        twin.train()
        images, targets = batch(seed=seed)
        torch.manual_seed(seed)
        losses = model(images, targets)
        torch.manual_seed(seed)
        theirs = twin(pixel_values=model.batch(images).tensors, labels=for_transformers(targets))
        total = torch.stack(list(losses.values())).sum()
        torch.testing.assert_close(total, theirs.loss, rtol=1e-5, atol=1e-4)
        total.backward()
        theirs.loss.backward()
        ours = {key: value.grad for key, value in model.network.decoder.layers.named_parameters()}
        slopes = {key: value.grad for key, value in twin.model.decoder.layers.named_parameters()}
        assert ours.keys() == slopes.keys()
        agreed += all(torch.allclose(ours[key], value, rtol=1e-3, atol=1e-4) for key, value in slopes.items())
    assert agreed >= 2


@pytest.mark.parametrize("name", TWINS)
def test_every_loss_and_an_empty_picture(name):
    """A step of each loss, also of those with columns behind the classes, on a batch with a picture without objects."""
    images, targets = batch(64)
    nothing = {"boxes": torch.zeros((0, 4)), "labels": torch.zeros(0, dtype=torch.int64)}
    more = ("seesaw", "efl", "bags", "fedloss", "varifocal") if name == "d_fine" else ()
    for loss in ("softmax", "eqfl", "fcbl", *more):
        torch.manual_seed(0)
        model = detector(name, loss).train()
        for given in ([targets[0], nothing], [nothing, nothing]):
            losses = model(images, given)
            total = torch.stack(list(losses.values())).sum()
            assert torch.isfinite(total), (loss, losses)
            total.backward()
            lacking = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
            assert not lacking, "several processes would wait for each other"
            model.zero_grad()
        found = model.eval()(images)
        assert len(found) == 2 and all(len(own["scores"]) for own in found)


def test_quality_is_the_iou_of_the_pair(monkeypatch):
    """What a loss that asks for it is given: 0 on background, the IoU of the box with its object elsewhere."""
    model = detector("d_fine", "eqfl").train()
    seen = []
    plain = model.loss.loss
    monkeypatch.setattr(model.loss, "loss", lambda *rows, **facts: seen.append((rows, facts)) or plain(*rows, **facts))
    images, targets = batch(64)
    outputs = model.outputs(images, targets)
    model.losses(outputs, targets)
    rows, facts = seen[2]  # of the auxiliary layers, the proposals, the last one
    objects = model.objects(outputs, targets)
    pairs = model.criterion.match(outputs.logits[-1:], outputs.boxes[-1:].clamp(0, 1), objects)
    wanted = torch.zeros(2, 12)
    own = box_convert(outputs.boxes[-1].clamp(0, 1), "cxcywh", "xyxy")[pairs.picture, pairs.query]
    other = box_convert(objects.boxes, "cxcywh", "xyxy")[pairs.picture, pairs.object]
    wanted[pairs.picture, pairs.query] = torch.stack(
        [box_iou(a[None], b[None])[0, 0] for a, b in zip(own, other, strict=True)]
    )
    torch.testing.assert_close(facts["quality"].view(2, 12), wanted.detach())
    assert (rows[1] < CLASSES).sum() == 4 and len(pairs.query) == 4


def test_statistics_move_once_per_step():
    """By the last layer: the auxiliary ones, the proposals and the queries with noise see them and leave them alone."""
    model = detector("rt_detr_v2", "efl").train()
    images, targets = batch(64)
    seen = []
    plain = model.loss.loss
    model.loss.loss = lambda *rows, **facts: seen.append(model.loss.training) or plain(*rows, **facts)
    model(images, targets)
    assert seen == [False, False, True, False] and model.loss.pos_grad.sum() > 0


@pytest.mark.parametrize("name", TWINS)
def test_padding(name):
    """Boxes are pixels of the picture, whatever it is padded with; those of RF-DETR do not depend on it."""
    model, _ = twins(name)
    model.eval()
    images, _ = batch(96)
    small = images[0][:, :64, :80]
    with torch.no_grad():
        alone = model([small])[0]
        beside = model([small, images[1]])[0]
    for found in (alone, beside):
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([80.0, 64, 80, 64])).all()
        assert (found["scores"][:-1] >= found["scores"][1:]).all()


def test_parts_are_the_whole():
    """Every weight that trains belongs to one part; parts can be frozen."""
    for name in TWINS:
        model = detector(name)
        every = [id(value) for part in model.parts().values() for value in part.parameters() if value.requires_grad]
        assert len(every) == len(set(every))
        assert set(every) == {id(value) for value in model.parameters() if value.requires_grad}
        model.freeze_but(["classifier"])
        trained = {key.split(".")[-3] for key, value in model.named_parameters() if value.requires_grad}
        assert len(trained) > 0 and not any(value.requires_grad for value in model.backbone.parameters())


def test_annotations_and_a_teacher():
    """Exemplar scores come with their places; a student is compared with its teacher on the same queries."""
    for name in TWINS:
        model, _ = twins(name)
        images, targets = batch(64)
        with torch.no_grad():
            scores, places = model.eval().annotation_scores(images, targets)
        assert sorted(places.tolist()) == [0, 1, 2, 3] and scores.shape == (4, CLASSES)
        teacher, _ = twins(name)
        for parameter in teacher.eval().parameters():
            parameter.requires_grad_(False)
        seen = model.compared(teacher, images, targets, shared=True)  # in evaluation mode both are the same
        torch.testing.assert_close(seen.logits, seen.taught_logits)
        assert all(torch.equal(a, b) for a, b in zip(seen.maps, seen.taught_maps, strict=True))
        seen = model.train().compared(teacher, images, targets, shared=False)  # its own queries, one group of them
        assert seen.logits.shape == seen.taught_logits.shape and seen.logits.requires_grad
        losses = model.compared(teacher, images, targets, shared=True).losses
        assert torch.isfinite(torch.stack(list(losses.values())).sum())


# ---- weights ---------------------------------------------------------------------------------------------------------

COCO = [name for name in coco_names() if name != "N/A"]


def published(tmp_path, name, classes):
    """A tiny checkpoint as transformers saves it, and the loader with it in the place of the hub."""
    from transformers import AutoModelForObjectDetection

    torch.manual_seed(0)
    settings = transformers_settings(section(name), classes, backbone_settings(name))
    settings.backbone_config = backbone_settings(name)
    if name != "rf_detr":
        settings.encoder_in_channels = [16, 24, 32]
    twin = TWINS[name](settings)
    twin.save_pretrained(tmp_path / name)
    return AutoModelForObjectDetection.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(("name", "classes"), [("d_fine", 80), ("rf_detr", 91)])
def test_coco_rows_go_to_the_classes_of_their_name(tmp_path, name, classes):
    """From a saved checkpoint by the loading code of `weights: coco`: rows by name, new classes by the prior."""
    twin = published(tmp_path, name, classes)
    names = ["unicorn", "truck", "person"]
    state = coco_weights.load_published(str(tmp_path / name), "0" * 40)  # a folder in the place of a name of the hub
    released = convert_hub(state, names, None, "coco")
    assert len(released.names) == 80
    file = tmp_path / name / "model.safetensors"  # and as a file that `weights` names, by its own loader
    same = RELEASED[name](load_file(file), stats_of(3, names), None, str(file))
    assert all(torch.equal(value, same.state[key]) for key, value in released.state.items())
    torch.manual_seed(1)
    model = detector(name, stats=stats_of(3, names))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    said = " ".join(load_weights(model, released.state, "coco", names, old=released.names))
    assert '2 kept, 1 new ("unicorn"), 78 of the file left out' in said
    rows = [coco_names().index(own) if classes == 91 else COCO.index(own) for own in ("truck", "person")]
    if name == "rf_detr":
        pairs = [("network.class_embed", twin.class_embed)]
        pairs += [(f"network.enc_out_class_embed.{n}", twin.model.enc_out_class_embed[n]) for n in range(3)]
    else:
        pairs = [(f"network.decoder.class_embed.{n}", twin.model.decoder.class_embed[n]) for n in range(3)]
        pairs.append(("network.enc_score_head", twin.model.enc_score_head))
    for key, theirs in pairs:
        own = model.get_submodule(key)
        assert torch.equal(own.weight[1:], theirs.weight[rows]) and torch.equal(own.bias[1:], theirs.bias[rows])
        assert torch.equal(own.weight[0], start[f"{key}.weight"][0])
    if name == "d_fine":
        noisy = model.network.denoising_class_embed.weight
        assert torch.equal(noisy[1:], twin.model.denoising_class_embed.weight[[*rows, 80]])
    for key, value in twin.model.decoder.layers.state_dict().items():
        assert torch.equal(model.network.decoder.layers.state_dict()[key], value)
    # with all 80 classes in another order both say the same
    order = list(reversed(COCO))
    whole = detector(name, stats=stats_of(80, order))
    load_weights(whole, released.state, "coco", order, old=released.names)
    images, _ = batch(64)
    with torch.no_grad():
        ours = whole.eval().outputs(images).logits[-1]
        theirs = twin.eval()(pixel_values=whole.batch(images).tensors).logits
    kept = [coco_names().index(own) if classes == 91 else COCO.index(own) for own in order]
    torch.testing.assert_close(ours, theirs[..., kept], rtol=0, atol=1e-5)


def test_recipes_of_coco_weights(monkeypatch):
    """A size says which backbone and checkpoint; a size without a checkpoint is told."""
    wanted = []
    monkeypatch.setattr(coco_weights, "load_published", lambda *given: wanted.append(given) or {})
    for name, size, backbone in [
        ("d_fine", "n", "transformers/hgnet_v2_b0"),
        ("rt_detr_v2", "r18", "transformers/resnet18_vd"),
        ("rf_detr", "medium", "transformers/rf_detr_dinov2_576"),
    ]:
        values = {"weights": "coco", "backbone": backbone, "detector": {"name": name, "size": size}, "loss": "efl"}
        recipe = check_recipe(values, "test")
        coco_weights.coco_state(recipe.detector)
        assert len(wanted[-1][1]) == 40
    values |= {"backbone": "transformers/hgnet_v2_b2"}
    with pytest.raises(UserError, match="weights: coco is for backbone transformers/hgnet_v2_b0, not"):
        check_recipe({**values, "detector": {"name": "d_fine", "size": "n"}}, "test")
    with pytest.raises(UserError, match="weights: coco has no d_fine"):
        check_recipe({**values, "detector": {"name": "d_fine", "size": "x"}}, "test")
    with pytest.raises(UserError, match='size: "q" is not a choice'):
        check_recipe({**values, "detector": {"name": "d_fine", "size": "q"}}, "test")
