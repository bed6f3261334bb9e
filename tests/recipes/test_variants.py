"""Variants of a recipe's file, former names, and what a file must not repeat."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from tailfin import recipes
from tailfin.config import check_recipe, load_recipe
from tailfin.errors import UserError
from tailfin.recipe_values import Variant, parse_recipe, with_variant

# of 100 recipes, those whose name is what it was before files had variants
KEPT = (
    *(
        "coco/faster_rcnn_r50_drcl",
        "coco/faster_rcnn_r50_softmax",
        "coco/localizer_r50",
        "coco_lt/faster_rcnn_r50_bacl",
    ),
    *("demo/bacl", "demo/drcl", "demo/faster_rcnn_r18_rfs", "demo/faster_rcnn_r18_softmax"),
    *("fod/bacl_r18", "fod/deformable_detr_tiny", "fod/drcl_r18", "fod/faster_rcnn_r18_rfs"),
    *("fod/faster_rcnn_r18_softmax", "fod/localizer_r18", "fod/stepwise_faster_rcnn_r18", "fod/stepwise_tiny"),
    *("lvis_v0.5/faster_rcnn_r50_bacl", "lvis_v1/faster_rcnn_r50_bacl", "lvis_v1/localizer_r50"),
    *("road12/bacl_r18", "road12/faster_rcnn_r18_softmax"),
)
MINE = """\
about:
  title: plain
  paper: P
  table: T
  published: {AP: 1.0}
  hours: 2
  command: tailfin train mine.yaml
  notes: Of all.
detector: {norm: bn, frozen_layers: 0}
loss: {name: focal, focal_gamma: 3}
schedule: {epochs: 4, lr: 0.01}
variants:
  short:
    about: {title: short one, notes: Its own.}
    overrides: {schedule.epochs: 1, loss: seesaw, detector.classifier: cosine}
  other: {about: {published: {AP: 2.0}}, overrides: {loss.focal_gamma: 1, features: null}}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


def refusal(name: object) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- a file of one's own ---------------------------------------------------------------------------------------------


def test_a_variant_is_the_base_with_its_overrides(mine):
    base, short, other = (load_recipe(f"mine.yaml{variant}") for variant in ("", ":short", ":other"))
    assert (base.name, short.name, other.name) == ("mine", "mine:short", "mine:other")
    assert (base.loss.options, other.loss.options) == ({"focal_gamma": 3}, {"focal_gamma": 1})
    assert (short.loss.name, short.loss.options) == ("seesaw", {})
    assert (short.detector.classifier.name, short.detector.norm) == ("cosine", "bn")
    assert (short.schedule.epochs, short.schedule.lr, base.schedule.epochs) == (1, 0.01, 4)
    assert load_recipe(Path(f"{mine}:short"), ["schedule.epochs=2"]).schedule.epochs == 2
    assert load_recipe(f"{mine}:short") == short


def test_what_about_inherits(mine):
    """Facts of the base's own run are not a variant's."""
    base, short, other = (load_recipe(f"mine.yaml{variant}").about for variant in ("", ":short", ":other"))
    assert (base.title, base.table, base.published, base.hours) == ("plain", "T", {"AP": 1.0}, 2)
    assert (short.title, short.table, short.published, short.hours) == ("short one", "", {}, None)
    assert (short.paper, short.notes, other.notes) == ("P", "Its own. Of all.", "Of all.")
    assert (other.title, other.published, other.command) == ("", {"AP": 2.0}, "tailfin train mine.yaml")


def test_a_stated_name_stays(mine):
    mine.write_text("name: given\n" + MINE)
    assert (load_recipe(mine).name, load_recipe(f"{mine}:short").name) == ("given", "given:short")


def test_only_the_last_colon_behind_a_file_is_one(mine, monkeypatch):
    """A colon is part of a path (`C:\\mine.yaml`), unless a recipe or file stands before it."""
    odd = mine.with_name("odd:short.yaml")
    odd.write_text("seed: 5\ndetector: {norm: bn, frozen_layers: 0}\nvariants: {a: {overrides: {seed: 6}}}\n")
    assert load_recipe("odd:short.yaml").seed == 5
    assert load_recipe("odd:short.yaml:a").seed == 6
    assert refusal("C:\\mine.yaml").startswith("recipe C:\\mine.yaml does not exist")
    assert refusal("C:\\mine.yaml:short").startswith("recipe C:\\mine.yaml does not exist")
    assert refusal("C:mine").startswith('there is no recipe, file or published row "C:mine"')
    Path("plain").write_text(MINE)
    assert load_recipe("plain:short").name == "plain:short"


def test_unknown_names_get_the_nearest(mine):
    assert refusal("fod/losses:seesw") == 'recipe fod/losses has no variant "seesw" (did you mean "seesaw"?)'
    assert 'did you mean "fod/losses:seesaw"?' in refusal("fod/losse:seesaw")
    assert 'did you mean "fod/losses:seesaw"?' in refusal("fod/losses/seesaw")
    assert refusal("demo/bacl:rfs") == 'recipe demo/bacl has no variants, there is no "rfs" of it'
    assert refusal(f"{mine}:shrt") == f'{mine} has no variant "shrt" (did you mean "short"?)'
    assert 'did you mean "mine.yaml"?' in refusal("mime.yaml:short")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: []\n", "variants must be a mapping of names, this is a list"),
        ("variants: {}\n", "variants must be a mapping of names, this is empty"),
        ("variants:\n", "variants must be a mapping of names, this is empty"),
        ("variants: {a: seesaw}\n", "variants.a: a mapping with about and overrides is needed, this is text"),
        ("variants: {a: {override: {seed: 1}}}\n", 'variants.a: unknown key "override" (did you mean "overrides"?)'),
        ("variants: {a: {overrides: [seed=1]}}\n", "variants.a.overrides: a mapping of keys is needed, this is a list"),
        ("variants: {a:b: {overrides: {seed: 1}}}\n", "variants.a:b: a variant's name has letters, digits"),
        ("variants: {1: {overrides: {seed: 1}}}\n", "variants.1: a variant's name has letters, digits"),
    ],
)
def test_refused_variants(mine, text, message):
    mine.write_text("detector: {norm: bn, frozen_layers: 0}\n" + text)
    told = refusal(mine)
    assert told.startswith(f"{mine}: ") and message in told


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{schedule.epoch: 3}", 'unknown key "schedule.epoch" (did you mean "epochs"?)'),
        ("{seed.x: 3}", 'override seed.x: "seed" is a value, not a section'),
        ("{variants: {}}", 'unknown key "variants"'),
    ],
)
def test_refused_overrides_of_a_variant(mine, overrides, message):
    mine.write_text(f"detector: {{norm: bn, frozen_layers: 0}}\nseed: 1\nvariants: {{a: {{overrides: {overrides}}}}}\n")
    assert load_recipe(mine).seed == 1
    assert message in refusal(f"{mine}:a")


# ---- the package's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in recipes.names() if ":" in name])
def test_a_variant_says_what_it_is(name):
    about, base = load_recipe(name).about, load_recipe(name.partition(":")[0]).about
    assert about.title and about.title != base.title
    assert f"tailfin train {name} data.root=DATA" in about.command
    assert bool(about.published) == (about.table != "")


def test_the_families_start_from_the_plain_recipe():
    plain = load_recipe("fod/faster_rcnn_r18_softmax")
    for file in ("fod/losses", "fod/classifiers", "fod/features"):
        base = load_recipe(file)
        assert base.model_copy(update={"name": plain.name, "about": plain.about}) == plain


@pytest.mark.parametrize("file", recipes.files())
def test_nothing_repeats_a_default(file):
    """Without any one of its keys a base is another recipe or none, and so is a variant without any override."""
    found = recipes.find(file)
    base, variants = parse_recipe(found.text, file)
    base.pop("about")
    for name, overrides in {"": base, **{name: variant.overrides for name, variant in variants.items()}}.items():

        def resolved(values):
            return _resolved(with_variant(base, Variant({}, values)) if name else values)  # noqa: B023

        assert resolved(overrides) is not None
        for path in leaves(overrides):
            assert resolved(without(overrides, path)) != resolved(overrides), f"{file}:{name} repeats {'.'.join(path)}"


def _resolved(values):
    try:
        return check_recipe(values, "test").model_dump(exclude={"name", "about"})
    except UserError:
        return None


def leaves(values: dict, path: tuple[str, ...] = ()):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def without(values: dict, path: tuple[str, ...]) -> dict:
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return values


# ---- former names ----------------------------------------------------------------------------------------------------


def test_all_100_former_names_are_there():
    assert len(KEPT) + len(recipes.MOVED) == 100
    assert set(KEPT) <= set(recipes.files())
    assert not set(recipes.MOVED) & set(recipes.names())
    assert len(set(recipes.MOVED.values())) == len(recipes.MOVED)
    assert set(recipes.MOVED.values()) <= set(recipes.names())


@pytest.mark.parametrize("old", recipes.MOVED)
def test_a_former_name_is_its_new_address(old):
    recipe = load_recipe(old)
    assert recipe.name == recipes.MOVED[old]
    assert recipe == load_recipe(recipes.MOVED[old]) == load_recipe(f"{old}.yaml")


def test_a_former_name_is_said_once_on_stderr():
    code = "from tailfin.config import load_recipe as load; load('fod/seesaw_r18'); load('fod/seesaw_r18', ['seed=1'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert lines == ["note: recipe fod/seesaw_r18 is now fod/losses:seesaw; the old name works in this version alone"]


def test_recipes_import_nothing_that_imports_them():
    code = "import sys, tailfin.recipes as r; r.names(), r.resolve('bacl/XIII/rfs/lvis_v1/r101'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tailfin.recipes.published" in done.stdout.split()
    assert not {"tailfin.config", "tailfin.api", "tailfin.run"} & set(done.stdout.split())
