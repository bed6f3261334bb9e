"""Rows of every kind of classifier go to the class of the same name, through the detectors' own states."""

from __future__ import annotations

import pytest
import torch

from tailfin.class_rows import read_aliases
from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.stats import ClassStats
from tailfin.weights import load_weights

OLD, NEW = ["ape", "bee", "cat", "dog"], ["dog", "eel", "bee"]
SAME = ["dog", "cat", "bee", "ape"]  # as many as OLD, in another order
SMALL = {"fpn_channels": 32, "norm": "bn", "frozen_layers": 0}
TWO = {**SMALL, "head_channels": 16, "roi_size": 3}
MASKS = {**TWO, "mask_channels": 8, "mask_layers": 1}
CASES = {
    "faster_rcnn": (TWO, "softmax"),
    "mask_rcnn": (MASKS, "seesaw"),
    "cascade_rcnn": ({**MASKS, "masks": True, "box_regression": "class_specific"}, "softmax"),
    "retinanet": ({**SMALL, "head_convs": 0}, "focal"),
    "atss": ({**SMALL, "head_convs": 0, "anchor_scales": [6, 8]}, "eqlv2"),
}


def model(name: str, names: list[str], seed: int):
    torch.manual_seed(seed)
    detector, loss = CASES[name]
    count = [9] * len(names)
    stats = ClassStats(image_count=count, instance_count=count, num_images=20, names=names)
    recipe = check_recipe({"backbone": "resnet18", "detector": {"name": name, **detector}, "loss": loss}, "test")
    return build_detector(recipe, stats, start=False)[0]


def by_class(model, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What belongs to each class, and to "" what lies behind the classes, by the name of the weight."""
    state, found = model.state_dict(), {name: {} for name in [*names, ""]}
    for key, value in state.items():
        groups = 1
        if key.startswith("head.classifier."):
            groups = len(state["head.box.bias"]) // 4
        elif key.startswith("rpn.") or not any(word in key for word in ("cls_score", "bbox_pred", "predictor.conv")):
            continue
        if "bbox_pred" in key and len(value) == 4:
            found[""][key] = value
            continue
        per_class = 4 if "bbox_pred" in key else 1
        rows = value.unflatten(0, (groups, -1))
        for place, name in enumerate(names):
            found[name][key] = rows[:, place * per_class : (place + 1) * per_class]
        found[""][key] = rows[:, len(names) * per_class :]
    return found


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("new", [NEW, SAME], ids=["other classes", "another order"])
def test_every_class_keeps_what_is_its_own(name, new):
    trained, fresh = model(name, OLD, 1), model(name, new, 2)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    before = {key: {inner: value.clone() for inner, value in own.items()} for key, own in by_class(fresh, new).items()}
    lines = load_weights(fresh, trained.state_dict(), "FILE", new, old=OLD)
    was, now = by_class(trained, OLD), by_class(fresh, new)
    assert now["dog"]
    for own in [*new, ""]:
        wanted = was[own] if own in was else before[own]
        assert wanted.keys() == now[own].keys()
        assert all(torch.equal(now[own][key], value) for key, value in wanted.items()), own
    shared = [key for key in fresh.state_dict() if key.startswith(("backbone.", "rpn.", "roi_heads.head"))]
    assert all(torch.equal(fresh.state_dict()[key], trained.state_dict()[key]) for key in shared)
    numbers = "2 kept, 1 new" if new is NEW else "4 kept, 0 new, 0 of the file left out"
    assert numbers in " ".join(lines)


def test_what_a_loss_has_counted_starts_anew():
    trained, fresh = model("atss", OLD, 1), model("atss", SAME, 2)
    trained.class_loss.pos_grad.fill_(7.0)
    lines = load_weights(fresh, trained.state_dict(), "FILE", SAME, old=OLD)
    assert not bool((fresh.class_loss.pos_grad == 7).any())
    assert "ordered by the file's classes, start anew" in " ".join(lines)
    load_weights(fresh, trained.state_dict(), "FILE", OLD, old=OLD)
    assert bool((fresh.class_loss.pos_grad == 7).all())


def test_aliases(tmp_path):
    trained, fresh = model("faster_rcnn", OLD, 1), model("faster_rcnn", ["hound", "wasp", "fly"], 2)
    file = tmp_path / "map.yaml"
    file.write_text("hound: dog\nwasp: [hornet, bee]\nfly: bee\n")
    aliases = read_aliases(file)
    lines = load_weights(fresh, trained.state_dict(), "FILE", ["hound", "wasp", "fly"], old=OLD, aliases=aliases)
    rows = fresh.roi_heads.predictor.cls_score.weight
    theirs = trained.roi_heads.predictor.cls_score.weight
    assert torch.equal(rows, theirs[[3, 1, 1, 4]])
    assert '3 kept, 0 new, 2 of the file left out ("ape", "cat")' in " ".join(lines)
    for text, why in (
        ("hond: dog", '"hond" is no class of the data.*hound'),
        ("hound: doge", '"hound" is "doge", no class of the weights.*dog'),
        ("[hound]", "a mapping of class names is needed"),
        ("hound: {a: b}", '"hound" needs the name'),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=why):
            names = ["hound", "wasp", "fly"]
            load_weights(fresh, trained.state_dict(), "FILE", names, old=OLD, aliases=read_aliases(file))
    with pytest.raises(UserError, match="does not say which classes"):
        load_weights(fresh, trained.state_dict(), "FILE", ["hound"], aliases={"hound": ["dog"]})
