"""The recipe's schema: what a YAML file and an override may say, and the message for everything else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailfin.config import check_recipe, dump_recipe, load_recipe, parse_yaml, recipe_from_file, split_override
from tailfin.errors import UserError
from tailfin.schema.recipe import Recipe

START = "detector: {norm: bn, frozen_layers: 0}\n"  # what a random start needs; else the defaults


@pytest.fixture
def recipe_file(tmp_path: Path):
    """Writes a recipe that is valid but for `text` and returns its path."""

    def write(text: str = "", start: str = START) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(start + text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# ---- what loads ------------------------------------------------------------------------------------------------------


def test_defaults_fill_what_a_file_leaves_out(recipe_file):
    recipe = load_recipe(recipe_file("schedule: {epochs: 3}\n"))
    assert recipe.name == "mine"
    assert recipe.schedule.epochs == 3
    assert recipe.schedule.lr == 0.02
    assert recipe.loss.name == "softmax" and recipe.loss.options == {}
    assert recipe.sampler.name == "plain"


def test_a_number_without_a_point_is_text_for_yaml_and_a_float_for_a_recipe(recipe_file):
    assert yaml.safe_load("1e-4") == "1e-4"  # the trap
    assert load_recipe(recipe_file("schedule: {lr: 1e-4}\n")).schedule.lr == 1e-4
    assert load_recipe(recipe_file("data: {jitter_scale: [1e-1, 2]}\n")).data.jitter_scale == (0.1, 2.0)
    recipe = load_recipe(recipe_file(), ["schedule.lr=1e-4", "loss=focal", "loss.focal_gamma=1e0"])
    assert recipe.schedule.lr == 1e-4
    assert recipe.loss.options == {"focal_gamma": 1.0}


def test_overrides_may_be_a_mapping(recipe_file):
    path = recipe_file()
    texts = load_recipe(path, ["schedule.epochs=4", "detector.anchor_sizes=[8, 16, 32, 64, 128]", "schedule.clip=5"])
    values = {"schedule.epochs": 4, "detector.anchor_sizes": [8, 16, 32, 64, 128], "schedule.clip": 5}
    assert load_recipe(path, values) == texts
    assert texts.detector.norm == "bn"  # the rest of the section stays


def test_a_section_chosen_by_name(recipe_file):
    assert load_recipe(recipe_file("loss: focal\nsampler: rfs\n")).loss.name == "focal"
    path = recipe_file("loss: {name: focal, focal_gamma: 3}\n")
    assert load_recipe(path).loss.options == {"focal_gamma": 3}
    assert load_recipe(path, ["loss=softmax"]).loss.options == {}, "a new name drops the old options"
    assert load_recipe(path, ["loss.focal_alpha=0.5"]).loss.options == {"focal_gamma": 3, "focal_alpha": 0.5}
    recipe = load_recipe(recipe_file("sampler: rfs\n"), ["sampler.threshold=1e-2"])
    assert (recipe.sampler.name, recipe.sampler.threshold) == ("rfs", 0.01)


def test_overrides_apply_in_order(recipe_file):
    assert load_recipe(recipe_file(), ["seed=1", "seed=2"]).seed == 2


def test_split_override():
    assert split_override("a.b=1e-4") == ("a.b", 1e-4)
    assert split_override("data.root=a=b") == ("data.root", "a=b")
    assert split_override("schedule.clip=null") == ("schedule.clip", None)
    assert split_override("data.root=") == ("data.root", "")
    assert split_override("x={a: 1, b: [2, 3]}") == ("x", {"a": 1, "b": [2, 3]})
    assert split_override("x=nan") == ("x", "nan"), "not a number that a recipe may hold"


def test_a_recipe_is_frozen(recipe_file):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file()).seed = 3


# ---- dump and load ---------------------------------------------------------------------------------------------------


def test_dump_loads_to_the_same_recipe(recipe_file, tmp_path):
    recipe = load_recipe(
        recipe_file('name: "1e-4"\nabout: {title: "a: \'b\' # é", table: "1", published: {AP: 1}}\n'),
        ["loss=focal", "loss.focal_gamma=1.5", "schedule.clip=35", "evaluation.group_bounds=[10, 100]"],
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert recipe_from_file(path) == recipe
    assert load_recipe(path) == recipe, "the name in the file wins over the file's own"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(1e-12, 1e6),
    epochs=st.floats(1e-3, 1e4),
    seed=st.integers(0, 2**32 - 1),
    alpha=st.floats(0, 1),
    root=st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12),
    milestones=st.lists(st.floats(0.1, 100), max_size=4).map(sorted),
)
def test_any_recipe_survives_dump_and_load(lr, epochs, seed, alpha, root, milestones):
    recipe = check_recipe(
        {
            "seed": seed,
            "detector": {"norm": "gn", "frozen_layers": 0},
            "loss": {"name": "focal", "focal_alpha": alpha},
            "schedule": {"lr": lr, "epochs": epochs, "milestones": milestones},
            "data": {"root": root},
        },
        "test",
    )
    assert check_recipe(parse_yaml(dump_recipe(recipe), "dump"), "dump") == recipe


# ---- what is refused, and how ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedul: {}\n", 'unknown key "schedul" (did you mean "schedule"?)'),
        ("schedule: {epoch: 3}\n", 'unknown key "schedule.epoch" (did you mean "epochs"?)'),
        ("data: {train: {anotations: a}}\n", 'unknown key "data.train.anotations" (did you mean "annotations"?)'),
        ("sampler: {name: rfs, treshold: 1}\n", 'unknown key "sampler.treshold" (did you mean "threshold"?)'),
        ("schedule: {epochs: many}\n", "schedule.epochs: "),
        ("schedule: {epochs: 0}\n", "schedule.epochs: Input should be greater than 0 (given: 0)"),
        ("schedule: {batch: 16.5}\n", "schedule.batch: "),
        ("schedule: {batch: 10, accumulation: 4}\n", "schedule: batch 10 is not a multiple of accumulation 4"),
        ("schedule: {milestones: [11, 8]}\n", "schedule: milestones must ascend"),
        ("schedule: {lr: .nan}\n", "schedule.lr: Input should be a finite number (given: nan)"),
        ("schedule: {lr: nan}\n", "schedule.lr: Input should be a finite number"),
        ("schedule: {lr: .inf}\n", "schedule.lr: Input should be a finite number"),
        ("backbone: resnet52\n", 'backbone: "resnet52" is not a choice (did you mean "resnet50"?)'),
        ("sampler: rfss\n", 'sampler.name: "rfss" is not a choice (did you mean "rfs"?)'),
        ("evaluation: {iou: [box]}\n", 'evaluation.iou.0: "box" is not a choice (did you mean "bbox"?)'),
        ("loss: foca\n", 'loss: there is no loss "foca" (did you mean "focal"?)'),
        ("loss: {name: focal, focal_gama: 2}\n", 'no option "focal_gama" (did you mean "focal_gamma"?)'),
        ("loss: {name: softmax, gamma: 2}\n", 'softmax has no option "gamma"'),
        ("data: {sizes: []}\n", "data: sizes must name at least one size"),
        ("data: {jitter_scale: [2, 1]}\n", "data: jitter_scale must be (smaller, larger)"),
        ("seed: -1\n", "seed: "),
        ("1: 2\n", "1: Keys should be strings"),
        ("seed: 1\nseed: 2\n", 'key "seed" is given twice'),
        ("schedule: {lr: 1, lr: 2}\n", 'key "lr" is given twice'),
        ("data: [1,\n", "is not valid YAML: "),
        ("name: !!python/object:os.system x\n", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_refused_file(recipe_file, text, message):
    path = recipe_file(text)
    told = refusal(path)
    assert message in told
    assert str(path) in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "empty"), ("# only a comment\n", "empty"), ("- loss\n- sampler\n", "a list"), ("hello\n", "text")],
)
def test_a_file_that_is_no_mapping(recipe_file, text, kind):
    path = recipe_file(text, start="")
    told = refusal(path)
    assert told == f"{path} is not a recipe: a mapping of keys is needed, this is {kind}"
    with pytest.raises(UserError, match="is not a recipe"):
        recipe_from_file(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.epoch=3", 'unknown key "schedule.epoch" (did you mean "epochs"?)'),
        ("schedul.epochs=3", 'unknown key "schedul"'),
        ("schedule.epochs=abc", "schedule.epochs: "),
        ("schedule.lr=nan", "schedule.lr: Input should be a finite number"),
        ("schedule=abc", "schedule: "),
        ("loss=foca", 'no loss "foca" (did you mean "focal"?)'),
        ("loss.focal_gamma=2", 'softmax has no option "focal_gamma"'),
        ("name.x=3", 'override name.x: "name" is a value, not a section'),
        ("detector.anchor_sizes=[8, 16]", "detector: anchor_sizes needs one size per level: 5 levels, 2 sizes"),
        ("detector.norm=frozen_bn", 'cannot train with detector.norm "frozen_bn"'),
        ("detector.frozen_layers=2", "cannot freeze layers"),
        ("epochs", '"epochs" is not an override: write key=value'),
        ("=3", '"=3" is not an override: write key=value'),
        ("data.sizes=[1,", 'the override "data.sizes=[1," is not valid YAML'),
    ],
)
def test_refused_override(recipe_file, override, message):
    told = refusal(recipe_file("name: here\n"), override)
    assert message in told
    assert "\n" not in told


def test_several_problems_are_counted(recipe_file):
    assert refusal(recipe_file("seed: -1\nbackbone: x\n")).endswith("; 1 more")


def test_a_missing_file_names_its_neighbour(recipe_file, tmp_path):
    recipe_file()
    assert 'did you mean "mine.yaml"?' in refusal(tmp_path / "mime.yaml")
    assert "there is no folder" in refusal(tmp_path / "nowhere" / "mine.yaml")
    with pytest.raises(UserError, match="does not exist"):
        recipe_from_file(tmp_path / "gone.yaml")


def test_every_default_is_valid_when_said_aloud():
    """A dump states every default, so the schema's own defaults pass through its checks."""
    recipe = check_recipe({"detector": {"norm": "bn", "frozen_layers": 0}}, "test")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_documentation_lists_every_key_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = {key: yaml.safe_load(default) for key, default in re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", page, re.M)}
    defaults = Recipe.model_construct().model_dump(mode="json")
    assert listed == flattened(defaults)


def flattened(values: dict, prefix: str = "") -> dict:
    """Nested sections as one level of dotted keys."""
    flat: dict = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
