"""The section `pretraining`: presets, and what is refused or dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from tailfin.checkpoint import load_model_file, read_safetensors, save_model
from tailfin.config import check_recipe, load_recipe, recipe_from_file
from tailfin.errors import UserError
from tailfin.schema.presets import PRESETS, change_preset, terms
from tailfin.schema.pretraining import Pretraining
from tailfin.stats import ClassStats


def test_a_preset_fills_what_is_not_given():
    moco = Pretraining.model_validate({"preset": "moco_v2", "image": {"queue": 64}, "sampler": {"threshold": 0.1}})
    assert (moco.image.queue, moco.image.dim, moco.image.predictor) == (64, 128, False)
    assert (moco.weights.hcl, moco.weights.lcl, moco.det_loss) == (1, 0, "none")
    assert (moco.sampler.name, moco.sampler.threshold) == ("plain", 0.1)
    given = Pretraining.model_validate({"preset": "moco_v2", "weights": {"hcl": 0.5, "sr": 0}, "momentum": 0.9})
    assert (given.weights.hcl, given.weights.sr, given.momentum) == (0.5, 0, 0.9)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_section_loads_to_itself(preset):
    own = Pretraining.model_validate({"preset": preset})
    assert Pretraining.model_validate(own.model_dump(mode="json")) == own


def test_cells_keep_the_defaults_that_are_not_given():
    dense = Pretraining.model_validate({"preset": "densecl", "dense": {"queue": 64}}).dense
    assert (dense.queue, dense.hidden, dense.dim, dense.norm, dense.predictor) == (64, 2048, 128, "none", False)


FOREIGN = [  # what is given, the key and the preset that the message names
    ({"preset": "moco_v2", "weights": {"sr": 0.1}}, "weights.sr", "moco_v2"),
    ({"preset": "moco_v2", "reconstruction": {"share": 0.5}}, "reconstruction.share", "moco_v2"),
    ({"preset": "moco_v2", "box": {"queue": 9}}, "box.queue", "moco_v2"),
    ({"preset": "simclr", "proposals": {"source": "gt_jitter"}}, "proposals.source", "simclr"),
    ({"preset": "byol", "det_loss": "class_aware"}, "det_loss", "byol"),
    ({"preset": "byol", "third_view": True}, "third_view", "byol"),
    ({"preset": "soco", "loss": "seesaw"}, "loss", "soco"),
    ({"preset": "soco", "image": {"dim": 64}}, "image.dim", "soco"),
    ({"preset": "aligndet", "weights": {"hcl": 1}}, "weights.hcl", "aligndet"),
    ({"preset": "densecl", "keep_predictor": True}, "keep_predictor", "densecl"),
    ({"preset": "drcl", "dense": {"queue": 9}}, "dense.queue", "drcl"),
    ({"weights": {"dense": 1}}, "weights.dense", "drcl"),
]


@pytest.mark.parametrize(("values", "key", "preset"), FOREIGN, ids=[f"{preset}-{key}" for _, key, preset in FOREIGN])
def test_a_key_of_another_presets_term_is_refused_by_name(values, key, preset):
    with pytest.raises(UserError) as caught:
        check_recipe({"detector": {"norm": "bn", "frozen_layers": 0}, "pretraining": values}, "test")
    assert f"pretraining: {key} belongs to " in str(caught.value)
    assert f"which preset {preset} does not have (it has {', '.join(terms(preset))})" in str(caught.value)


def test_another_preset_drops_the_weights_and_what_its_terms_lack():
    drcl = {
        "preset": "drcl", "weights": {"hcl": 0.2, "sr": 0.1}, "image": {"queue": 9}, "box": {"queue": 8},
        "reconstruction": {"share": 0.5}, "momentum": 0.9, "loss": "seesaw",
    }  # fmt: skip
    moco, dropped = change_preset(drcl, "moco_v2")
    assert moco == {"preset": "moco_v2", "image": {"queue": 9}, "momentum": 0.9}
    assert set(dropped) == {"weights", "box", "reconstruction", "loss"}
    aligned, dropped = change_preset(drcl, "aligndet")
    assert aligned == {"preset": "aligndet", "box": {"queue": 8}, "momentum": 0.9, "loss": "seesaw"}
    assert set(dropped) == {"weights", "image", "reconstruction"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"hcl": 0, "lcl": 0, "ar": 0, "sr": 0, "det": 0}}, "every weight is 0"),
        ({"weights": {"hcl": 0, "lcl": 0, "ar": 0, "sr": 0}, "det_loss": "none"}, "every weight is 0"),
        ({"box": {"rois": "assigned"}}, "needs box.loss nt_xent"),
        ({"box": {"rois": "assigned", "loss": "nt_xent"}}, "det_loss class_agnostic"),
        ({"box": {"loss": "nt_xent"}}, 'needs box.rois "assigned"'),
        ({"preset": "aligndet", "symmetric": True}, "one way"),
        ({"keep_predictor": True, "det_loss": "class_agnostic"}, "keep_predictor needs det_loss class_aware"),
        ({"preset": "moco_v2", "freeze_backbone": True}, "leaves nothing to train"),
        ({"reconstruction": {"layers": [4, 3]}}, "must ascend"),
        ({"preset": "densecl", "dense": {"loss": "cosine"}}, "dense.loss cannot be cosine"),
    ],
)
def test_refused_sections(values, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check_recipe({"detector": {"norm": "bn", "frozen_layers": 0}, "pretraining": values}, "test")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pretraining": {"preset": "aligndet"}}, "cannot freeze the backbone"),
        ({"pretraining": {"schedule": {"precision": "bf16"}}}, "a run has one precision"),
        ({"pretraining": {"preset": "moco"}}, 'pretraining.preset: "moco" is not a choice'),
        ({"pretraining": {"wieghts": {}}}, 'did you mean "weights"'),
    ],
)
def test_refused_recipes(values, message):
    with pytest.raises(UserError) as caught:
        check_recipe({"detector": {"norm": "bn", "frozen_layers": 0}, **values}, "test")
    assert message in str(caught.value)


# ---- overrides and stored recipes ------------------------------------------------------------------------------------


def test_an_override_of_the_preset_drops_what_was_the_files_with_one_line(capsys):
    own = load_recipe("fod/drcl_r18", ["pretraining.preset=moco_v2"]).pretraining
    assert {term: weight for term, weight in own.weights.model_dump().items() if weight} == {"hcl": 1.0}
    assert (own.image.queue, own.image.dim, own.sampler.threshold, own.sampler.name) == (2048, 128, 0.03, "plain")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "preset moco_v2 in the place of drcl, without " in lines[0]
    for key in ("proposals", "box", "reconstruction", "weights"):
        assert f"pretraining.{key}" in lines[0]
    assert load_recipe("fod/drcl_r18", {"pretraining.preset": "moco_v2"}).pretraining == own


@pytest.mark.parametrize("overrides", [[], ["pretraining.preset=drcl"], ["pretraining.momentum=0.9"]])
def test_nothing_is_dropped_and_said_without_another_preset(overrides, capsys):
    own = load_recipe("fod/drcl_r18", overrides).pretraining
    assert own.weights.sr == 0.1 and own.reconstruction.share == 0.5
    assert not capsys.readouterr().err


@pytest.mark.parametrize("order", [1, -1])
def test_a_foreign_key_that_is_an_override_too_is_refused(order):
    overrides = ["pretraining.preset=moco_v2", "pretraining.weights.sr=0.1"][::order]
    with pytest.raises(UserError, match=r"weights\.sr belongs to sr, which preset moco_v2 does not have"):
        load_recipe("fod/drcl_r18", overrides)


def test_a_misspelt_preset_is_named_and_nothing_else_said(capsys):
    with pytest.raises(UserError, match='pretraining.preset: "moco" is not a choice'):
        load_recipe("fod/drcl_r18", ["pretraining.preset=moco"])
    assert not capsys.readouterr().err


@pytest.fixture
def stored_before(tmp_path) -> Path:
    """`recipe.yaml` as it was stored when a preset kept the options and the SR of a 2DRCL recipe."""
    recipe = load_recipe("fod/drcl_r18", ["pretraining.preset=moco_v2"])
    values = recipe.model_dump(mode="json")
    values["pretraining"]["reconstruction"]["share"] = 0.5
    values["pretraining"]["proposals"]["source"] = "gt_jitter"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_stored_recipes_of_before_load(stored_before, capsys):
    expected = load_recipe("fod/drcl_r18", ["pretraining.preset=moco_v2"])
    capsys.readouterr()
    assert recipe_from_file(stored_before) == expected
    assert not capsys.readouterr().err, "what did nothing is gone without a word"
    values = yaml.safe_load(stored_before.read_text())
    values["pretraining"]["weights"]["sr"] = 0.1
    stored_before.write_text(yaml.safe_dump(values))
    assert recipe_from_file(stored_before) == expected
    assert "it was pre-trained with sr too, which preset moco_v2 does not have" in capsys.readouterr().err


def test_model_files_of_before_load(stored_before, tmp_path):
    path = tmp_path / "model.safetensors"
    recipe = load_recipe("fod/drcl_r18", ["pretraining.preset=moco_v2"])
    stats = ClassStats(image_count=[3, 2], instance_count=[3, 2], num_images=4)
    save_model(path, torch.nn.Linear(2, 2), recipe, stats)
    tensors, metadata = read_safetensors(path)
    safetensors.torch.save_file(tensors, path, metadata={**metadata, "recipe": stored_before.read_text()})
    assert load_model_file(path).recipe == recipe
