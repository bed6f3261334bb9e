"""Classes that come and go: added to a trained detector by name, and two detectors merged into one."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import tailfin
from tailfin.checkpoint import load_model_file, save_model
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.merging import merge_models
from tailfin.methods.stepwise import _given, class_parts
from tailfin.models import build_detector
from tailfin.run import Run
from tailfin.stats import ClassStats
from tailfin.weights import load_weights

pytestmark = pytest.mark.usefixtures("quick_training")
ADD = [
    "method=stepwise", "stepwise.parts=known", "stepwise.base=given", "stepwise.head=null", "schedule.epochs=1",
    "stepwise.tail.epochs=1", "stepwise.tail.lr=0.01", "stepwise.tail.photometric=false", "stepwise.tail.milestones=[]",
    "sampler=plain",
]  # fmt: skip


@pytest.fixture(scope="module")
def known(tiny_set, tiny_recipe, tmp_path_factory):
    """A detector of two of the set's three classes, in another order of ids."""
    folder = tmp_path_factory.mktemp("known")
    files = []
    for path in tiny_set:
        document = json.loads(path.read_text())
        document["categories"] = [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
        document["annotations"] = [one for one in document["annotations"] if one["category_id"] != 5]
        for annotation in document["annotations"]:
            annotation["category_id"] = {9: 1, 3: 2}[annotation["category_id"]]
        files.append(folder / path.name)
        files[-1].write_text(json.dumps(document))
    pictures = {f"{part}_images": path.with_suffix("") for part, path in zip(("train", "val"), tiny_set, strict=True)}
    tailfin.train(tiny_recipe, train=files[0], val=files[1], out=folder / "run", **pictures)
    return folder / "run"


@pytest.mark.parametrize("replay", [0, 3])
def test_classes_are_added_by_name(replay, known, tiny_set, tiny_recipe, tmp_path, capfd):
    """Known rows start as they were, frozen parts stay, known classes are replayed or not, new ones all shown."""
    out = tmp_path / "run"
    more = [f"stepwise.tail.per_head_class={replay}"]
    tailfin.train(
        tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=out, weights=known / "model.safetensors",
        overrides=[*ADD, *more],
    )  # fmt: skip
    said = capfd.readouterr().err
    assert '2 kept, 1 new ("green"), 0 of the file left out' in said
    old = load_file(known / "model.safetensors")
    base, last = (load_file(out / "stages" / name / "model.safetensors") for name in ("0-base", "1-tail"))
    rows = "roi_heads.predictor.cls_score.weight"
    assert torch.equal(base[rows][[0, 2, 3]], old[rows][[1, 0, 2]])  # red, blue, background
    boxes = "roi_heads.predictor.bbox_pred.weight"
    assert torch.equal(base[boxes][8:], old[boxes][:4])
    assert torch.equal(base["backbone.body.conv1.weight"], last["backbone.body.conv1.weight"])
    assert not torch.equal(base[rows], last[rows])
    torch.manual_seed(17)  # the new rows are the recipe's seed's
    model = _given(Run(load_recipe(out / "recipe.yaml"), tmp_path / "again"), [])
    assert torch.equal(model.state_dict()[rows], base[rows])
    annotations = json.loads(tiny_set[0].read_text())["annotations"]
    green = sum(one["category_id"] == 5 for one in annotations)
    others = [min(replay, sum(one["category_id"] == key for one in annotations)) for key in (3, 9)]
    assert f"step tail: {green + sum(others)} annotations" in said
    log = [json.loads(line) for line in (out / "stages/1-tail/metrics.jsonl").read_text().splitlines()]
    assert "loss_class_distillation" in log[0]
    recipe = load_recipe(out / "recipe.yaml", ["weights=gone.safetensors"])  # a resumed run knows the parts without it
    base_file = out / "stages/0-base/model.safetensors"
    assert class_parts(recipe, load_model_file(base_file).stats, base_file).tolist() == [0, 1, 0]
    before = json.loads((out / "stages/0-base/metrics.json").read_text())["per_category"]
    assert {one["name"] for one in before} == {"red", "green", "blue"}


def test_what_cannot_be_added(known, tiny_set, tiny_recipe, tmp_path):
    data = {"train": tiny_set[0], "val": tiny_set[1], "out": tmp_path / "run"}
    whole = tmp_path / "map.yaml"
    whole.write_text("green: red")
    with pytest.raises(UserError, match="knows all of the data's 3 classes"):
        tailfin.train(
            tiny_recipe, weights=known / "model.safetensors", overrides=[*ADD, f"classes.map={whole}"], **data
        )
    with pytest.raises(UserError, match="parts known is for classes added to a trained detector"):
        tailfin.train(tiny_recipe, overrides=[*ADD, "stepwise.base=whole"], **data)
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no model file, which says its classes"):
        tailfin.train(tiny_recipe, weights=tmp_path / "x.pth", overrides=ADD, **data)


# ---- merging ---------------------------------------------------------------------------------------------------------


def model_of(
    known, names: list[str], path, seed: int, loss: str = "softmax", body: bool = False, box: str = ""
) -> None:
    """A model file with the features of `known` and a random classifier for other classes."""
    file = load_model_file(known / "model.safetensors")
    recipe = file.recipe.model_copy(update={"loss": type(file.recipe.loss)(name=loss)})
    if box:
        recipe = recipe.model_copy(update={"detector": recipe.detector.model_copy(update={"box_regression": box})})
    counts = list(range(1, len(names) + 1))
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=20, names=names, category_ids=counts)
    torch.manual_seed(seed)
    model, _ = build_detector(recipe, stats, start=False)
    shared = {key: value for key, value in file.weights.items() if "predictor" not in key}
    load_weights(model, shared, "known")
    with torch.no_grad():
        for name, parameter in model.roi_heads.predictor.named_parameters():
            if box == "class_agnostic" and "bbox_pred" in name:
                parameter.fill_(0.5)  # boxes of all classes in one are no class's own
            else:
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
        if body:
            model.backbone.body.conv1.weight.add_(1)
    save_model(path, model, recipe, stats)


@pytest.mark.parametrize(("loss", "box"), [("softmax", "class_specific"), ("sigmoid", "class_agnostic")])
def test_merged_classes_score_as_before(loss, box, known, tmp_path):
    """Sigmoids: the very scores; softmax: the odds against the background; boxes as they were."""
    one, two, out = (tmp_path / name for name in ("one.safetensors", "two.safetensors", "both.safetensors"))
    model_of(known, ["ant", "bee", "cat"], one, 1, loss, box=box)
    model_of(known, ["dog", "bee"], two, 2, loss, box=box)
    lines = " ".join(merge_models(one, two, out))
    assert "are the same in both" in lines and "4 classes: 3 of" in lines and "1 more" in lines and '("dog")' in lines
    first, second, both = (tailfin.load(path, device="cpu") for path in (one, two, out))
    assert list(both.names) == ["ant", "bee", "cat", "dog"]  # the id of dog is taken, it comes last
    assert both.stats.image_count.tolist() == [1, 4, 3, 1]
    features = torch.randn(7, 32)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        a, b, c = (detector.model.roi_heads.predictor(features) for detector in (first, second, both))
        if loss == "sigmoid":
            close(c[0], torch.cat([a[0], b[0][:, :1]], 1))
            close(c[1], a[1])
        else:
            close(c[0][:, [0, 1, 2, 4]], a[0])
            close(c[0][:, 3] - c[0][:, 4], b[0][:, 0] - b[0][:, 2])
            close(c[1], torch.cat([a[1], b[1][:, :4]], 1))


def test_other_features_are_refused(known, tmp_path):
    one, two, out = (tmp_path / name for name in ("one.safetensors", "two.safetensors", "both.safetensors"))
    model_of(known, ["ant", "bee"], one, 1)
    model_of(known, ["cat"], two, 2, body=True)
    with pytest.raises(UserError, match="into a detector: 1 of .*backbone.body.conv1.weight"):
        merge_models(one, two, out)
    assert not out.exists()
    assert "a start for training, no detector" in merge_models(one, two, out, as_start=True)[0]
    with pytest.raises(UserError, match="exists already"):
        merge_models(one, two, out, as_start=True)
    model_of(known, ["cat"], two, 2, loss="sigmoid")
    with pytest.raises(UserError, match="loss is sigmoid there, softmax here"):
        merge_models(one, two, out, overwrite=True)
    model_of(known, ["wasp"], two, 2)
    (tmp_path / "map.yaml").write_text("bee: wasp")
    with pytest.raises(UserError, match="all of its 1 classes are in .*, nothing is new"):
        merge_models(one, two, out, overwrite=True, aliases=tmp_path / "map.yaml")
