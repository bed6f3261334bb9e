"""Former keys of recipes: files, overrides and model files of before mean what they meant."""

from __future__ import annotations

import pytest
import yaml

from tailfin.checkpoint import load_model_file, save_model
from tailfin.config import dump_recipe, load_recipe, recipe_from_file
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.schema.calibration import NorCal
from tailfin.schema.features import FASA, RIO, FeatureMemory, Hallucination, MetaReweighting
from tailfin.schema.upgrade import FEATURE_KEYS, upgraded
from tailfin.stats import ClassStats

SECOND = ["method=decoupled", "second.loss=fcbl", "second.schedule.epochs=1"]
NONE = dict.fromkeys(FEATURE_KEYS)


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ({"hallucination": {"beta": 0.5}}, {"features": {"name": "hallucination", "beta": 0.5}}),
        ({**NONE, "rio": {}}, {"features": {"name": "rio"}}),
        (NONE, {}),
        ({"second": {**NONE, "fasa": {"dynamic_up": 2}}}, {"second": {"features": {"name": "fasa", "dynamic_up": 2}}}),
        ({"evaluation": {"norcal": 0.4, "nms": 0.5}},
         {"evaluation": {"nms": 0.5}, "calibration": {"name": "norcal", "gamma": 0.4}}),
        ({"evaluation": {"norcal": 0.0}, "calibration": {"name": "norcal"}},
         {"evaluation": {}, "calibration": {"name": "norcal"}}),
        ({"features": "rio", "fasa": None}, {"features": "rio"}),
    ],
)  # fmt: skip
def test_values(former, today):
    given = repr(former)
    assert upgraded(former) == today
    assert repr(former) == given, "what was given is not changed"
    assert upgraded(today) == today


@pytest.mark.parametrize(
    ("stage", "overrides", "features"),
    [
        ("", ["loss=fcbl", "hallucination={}"], Hallucination()),
        ("", ["loss=fcbl", "hallucination.beta=0.5", "hallucination.spread=variance"],
         Hallucination(beta=0.5, spread="variance")),
        ("", ["rio.size=5", "features.cache=3"], RIO(size=5, cache=3)),
        ("", ["features={name: rio, size: 5}", "rio.cache=3"], RIO(size=5, cache=3)),
        ("", ["features={name: rio, size: 5}", "rio={cache: 3}"], RIO(cache=3)),
        ("", ["rio={size: 5}", "features=fasa"], FASA()),
        ("", ["rio={}", "rio=null"], None),
        ("", ["features=rio", "rio=null"], None),
        ("", ["features=rio", "fasa=null"], RIO()),
        ("", ["features=rio", "fasa={}", "rio=null"], FASA()),
        ("", ["loss=balanced_sigmoid", "meta_reweighting.lr=1e-2"], MetaReweighting(lr=0.01)),
        ("second", [*SECOND, "second.hallucination={beta: 0.5}"], Hallucination(beta=0.5)),
        ("second", [*SECOND, "second.features=hallucination", "second.hallucination=null"], None),
        ("second", [*SECOND, "second.loss=ebl", "second.feature_memory.size=20"], FeatureMemory(size=20)),
        ("second", [*SECOND, "second={loss: ebl, feature_memory: {size: 9}}"], FeatureMemory(size=9)),
    ],
)  # fmt: skip
def test_overrides(tiny_recipe, stage, overrides, features):
    recipe = load_recipe(tiny_recipe, overrides)
    assert (recipe.second if stage else recipe).features == features
    keys = dict(text.split("=", 1) for text in overrides)
    if len(keys) == len(overrides):  # as a mapping: the order is the same
        values = {key: yaml.safe_load(value) for key, value in keys.items()}
        assert load_recipe(tiny_recipe, values) == recipe


@pytest.mark.parametrize(
    ("overrides", "calibration"),
    [
        (["evaluation.norcal=0.4"], NorCal(gamma=0.4)),
        (["calibration=norcal"], NorCal()),
        (["calibration=norcal", "calibration.gamma=0.3"], NorCal(gamma=0.3)),
        (["calibration=norcal", "evaluation.norcal=0.4"], NorCal(gamma=0.4)),
        (["calibration=norcal", "evaluation.norcal=0"], None),
        (["evaluation={norcal: 0.2, nms: 0.5}"], NorCal(gamma=0.2)),
    ],
)
def test_calibration(tiny_recipe, overrides, calibration):
    assert load_recipe(tiny_recipe, overrides).calibration == calibration


def test_files_of_before(tmp_path, tiny_recipe):
    recipe = load_recipe(tiny_recipe, ["features={name: rio, size: 7}", "calibration={name: norcal, gamma: 0.5}"])
    former = yaml.safe_load(dump_recipe(recipe))
    options = former.pop("features")
    del options["name"], former["calibration"]
    former |= {**NONE, "rio": options, "second": None}
    former["evaluation"]["norcal"] = 0.5
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(former))
    assert recipe_from_file(tmp_path / "recipe.yaml") == recipe
    assert load_recipe(tmp_path / "recipe.yaml") == recipe

    stats = ClassStats(image_count=[20, 9, 3], instance_count=[20, 9, 3], num_images=30)
    model = build_detector(recipe, stats, start=False)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailfin.checkpoint.dump_recipe", lambda _: yaml.safe_dump(former))
        save_model(tmp_path / "model.safetensors", model, recipe, stats)
    assert load_model_file(tmp_path / "model.safetensors").recipe == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rio={}", "fasa={}"], "at most one feature module, these are set: fasa, rio"),
        (["features=rio", "fasa={}"], "at most one feature module, these are set: fasa, rio"),
        (["rio=5"], "rio: a section of keys is needed"),
        (["rio.sizes=5"], r'unknown key "features\.sizes" \(did you mean "size"'),
        (["evaluation.norcal=-1"], r"calibration\.gamma"),
    ],
)
def test_mistakes(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(tiny_recipe, overrides)


def test_both_keys_of_a_calibration_are_refused(tmp_path, tiny_recipe):
    values = yaml.safe_load(dump_recipe(load_recipe(tiny_recipe, ["calibration=norcal"])))
    values["evaluation"]["norcal"] = 0.2
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="which is set too"):
        load_recipe(tmp_path / "both.yaml")
