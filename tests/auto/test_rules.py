"""The table of `train auto`: cases of facts and what is chosen, overrides, and docs/choosing.md, which shows it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tailfin.auto.facts import Facts
from tailfin.auto.plan import BASES, Files, recipe_of, wishes
from tailfin.auto.rules import EVIDENCE, NAMES, NOT_MEASURED, ROWS, choose, markdown
from tailfin.config import load_recipe
from tailfin.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs"
FACTS = Facts(
    pictures=671, val_pictures=275, classes=12, imbalance=68.0, rare=3, threshold=0.059, sided=(), long_side=320.0,
    sides=(0.16, 0.35, 0.65), crowd=5, masks=True, device="cpu", memory=16 * 2**30, processes=1, packaged=True, coco=(),
)  # fmt: skip
SMALL_OBJECTS = (0.03, 0.1, 0.3)
CASES = [
    ({}, {"detector": "mask_rcnn", "start": "packaged", "sampler": "rfs", "size": 128, "epochs": 24, "batch": 16}),
    ({}, {"holdout": "half_of_val", "flip": 0.5, "proposals": 100, "classifier": "linear", "loss": "softmax"}),
    ({"masks": False}, {"detector": "faster_rcnn"}),
    ({"packaged": False}, {"start": "none", "classifier": "cosine", "epochs": 42}),
    ({"packaged": False, "rare": 0}, {"start": "none", "classifier": "linear"}),
    ({"imbalance": 10.0}, {"sampler": "plain"}),
    ({"imbalance": 10.1}, {"sampler": "rfs"}),
    ({"pictures": 100}, {"epochs": 36}),
    ({"pictures": 118_000}, {"epochs": 8}),
    ({"sided": ("turn left",)}, {"flip": 0.0}),
    ({"val_pictures": 99}, {"holdout": "train"}),
    ({"crowd": 9}, {"proposals": 300}),
    ({"sides": SMALL_OBJECTS}, {"size": 320}),
    ({"sides": SMALL_OBJECTS, "long_side": 200}, {"size": 192}),
    ({"sides": SMALL_OBJECTS, "long_side": 1920, "device": "cuda"}, {"size": 416}),
    ({"device": "cuda", "coco": ("mask_rcnn",)}, {"start": "coco", "size": 800, "epochs": 12}),
    ({"device": "cuda", "coco": ("faster_rcnn",)}, {"start": "packaged"}),
    ({"coco": ("mask_rcnn",)}, {"start": "packaged"}),  # on a CPU a ResNet-50 of 800 px is no choice
    ({"memory": 2**28}, {"batch": 8}),
    ({"memory": 1}, {"batch": 2}),
    ({"processes": 4}, {"batch": 16}),
    ({"processes": 4, "memory": 1}, {"batch": 8}),
]
FILES = Files(Path("/t.json"), Path("/v.json"), Path("/t"), Path("/v"))


@pytest.mark.parametrize(("changes", "wanted"), CASES)
def test_what_is_chosen(changes: dict, wanted: dict) -> None:
    chosen = choose(replace(FACTS, **changes))
    assert tuple(choice.name for choice in chosen) == NAMES
    taken = {choice.name: choice.value for choice in chosen}
    assert {name: taken[name] for name in wanted} == wanted
    assert all(choice.why and (choice.measured == NOT_MEASURED or ".md: " in choice.measured) for choice in chosen)
    recipe = recipe_of(replace(FACTS, **changes), taken, FILES)
    assert recipe.detector.name == taken["detector"] and recipe.schedule.epochs == taken["epochs"]
    assert recipe.sampler.name == taken["sampler"] and recipe.data.flip == taken["flip"]
    assert recipe.schedule.warmup <= max(1, taken["epochs"] * replace(FACTS, **changes).pictures / 10)


def test_what_the_user_gives_is_taken_and_seen_by_later_rows() -> None:
    given, rest = wishes(["start=none", "data.sizes=[256]", "seed=3", "loss.name=seesaw", "detector.roi_size=7"])
    assert given == {"start": "none", "size": 256, "loss": "seesaw"}
    assert rest == ["data.sizes=[256]", "seed=3", "loss.name=seesaw", "detector.roi_size=7"]
    taken = {choice.name: choice.value for choice in choose(FACTS, given)}
    assert taken["classifier"] == "cosine" and taken["epochs"] == 42  # of a random start
    recipe = recipe_of(FACTS, taken, FILES, rest)
    assert recipe.data.sizes == (256,) and recipe.seed == 3 and recipe.loss.name == "seesaw"
    assert recipe.detector.roi_size == 7 and recipe.detector.anchor_sizes == (41, 90, 166)
    assert recipe.schedule.lr_batch == 16
    assert recipe_of(FACTS, {**taken, "batch": 4}, FILES).schedule.rate == pytest.approx(0.02 / 4)


def test_mistakes() -> None:
    with pytest.raises(UserError, match='there is no choice or key "szie".*"size"'):
        wishes(["szie=3"])
    taken = {choice.name: choice.value for choice in choose(FACTS, {"detector": "yolo"})}
    with pytest.raises(UserError, match="train auto has no yolo that starts from packaged .faster_rcnn"):
        recipe_of(FACTS, taken, FILES)


@pytest.mark.parametrize(("detector", "start"), BASES)
def test_every_base_makes_a_recipe(detector: str, start: str) -> None:
    taken = {choice.name: choice.value for choice in choose(FACTS, {"detector": detector, "start": start})}
    recipe = recipe_of(FACTS, taken, FILES)
    assert recipe.detector.name == detector and recipe.weights == start
    assert recipe.evaluation.iou == (("bbox", "segm") if "mask" in detector or "cascade" in detector else ("bbox",))
    assert load_recipe(BASES[detector, start]).detector.name == detector


def test_the_page_shows_the_table() -> None:
    assert markdown() in (DOCS / "choosing.md").read_text(encoding="utf-8"), markdown()
    assert {row.evidence for row in ROWS if row.evidence} == set(EVIDENCE)
    for choice in NAMES:  # the last row of every choice always holds
        assert [row for row in ROWS if row.choice == choice][-1].when in ("else", "always")


@pytest.mark.parametrize("name", EVIDENCE)
def test_what_is_cited_is_written_down(name: str) -> None:
    place, text = EVIDENCE[name]
    file, _, heading = place.partition(": ")
    page = (DOCS / file).read_text(encoding="utf-8")
    section = re.search(rf"\n#+ {re.escape(heading)}\n(.*?)(?=\n## |\Z)", page, re.S)
    assert section is not None, place
    assert [number for number in re.findall(r"\d+\.\d+", text) if number not in section[1]] == []
