"""`--stage1 RUN`: a second stage on the finished first stage of another run, and what keeps it from being taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tailfin
from tailfin.checkpoint import file_hash
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.schema.stages import differences, stages

pytestmark = pytest.mark.usefixtures("quick_training")

BACL = ["method=bacl", "loss=objectness", "schedule.epochs=0.5", "second.loss=fcbl", "second.features=hallucination"]
BACL += ["second.schedule={epochs: 0.5, batch: 4, lr: 0.01, warmup: 0, milestones: []}"]
STAGE = Path("stages", "1-representation", "model.safetensors")


def parents(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["parents"])


@pytest.fixture(scope="module")
def train(tiny_set, tiny_recipe):
    def run(out: Path, *changes: str, **options):
        files = {"train": tiny_set[0], **options}
        return tailfin.train(tiny_recipe, out=out, overrides=[*BACL, *changes], **files)

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory, train) -> Path:
    return train(tmp_path_factory.mktemp("base") / "run")


def test_the_same_second_stage_gives_the_same_bits(tmp_path, train, base):
    run = train(tmp_path / "again", stage1=base)
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (run / STAGE).read_bytes() == (base / STAGE).read_bytes()
    assert parents(run / "model.safetensors")[0] == parents(base / "model.safetensors")[0] == file_hash(base / STAGE)
    facts = json.loads((run / "environment.json").read_text())["reused"]
    assert facts == [
        {"stage": "representation", "run": str(base), "model": str(base / STAGE), "sha256": file_hash(base / STAGE)}
    ]
    log = Path("stages", "1-representation", "metrics.jsonl")
    assert (run / log).read_bytes() == (base / log).read_bytes()
    assert not list(run.glob("stages/1-*/.*"))


def test_arms_of_an_ablation_share_it(tmp_path, train, base):
    """The second stage may differ in everything; name, evaluation and logging too. A model file serves as well."""
    changes = ["second.loss.alpha=0", "second.features=null", "evaluation.max_dets=5", "logging.every=2"]
    margin = train(tmp_path / "margin", *changes, stage1=base / STAGE)
    weights = load_file(margin / "model.safetensors")
    assert parents(margin / "model.safetensors")[0] == file_hash(base / STAGE)
    assert not any("extra_rows" in key for key in weights)
    assert not torch.equal(weights["roi_heads.loss.num_gt"], torch.zeros(3, dtype=torch.float64))


def test_a_baseline_run_can_be_one(tmp_path, tiny_set, tiny_recipe, train):
    """One-stage training is a first stage where its recipe is the same: BACL after repeat factor sampling."""
    shared = ["loss=objectness", "schedule.epochs=0.5", "sampler.threshold=0.4"]
    base = tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "rfs", overrides=shared)
    with pytest.raises(UserError, match=r"sampler.threshold is 0.4 there, 0.5 here. To take it as it is: 'sampler"):
        train(tmp_path / "run", stage1=base)
    assert not (tmp_path / "run").exists()
    run = train(tmp_path / "run", "sampler.threshold=0.4", stage1=base)
    assert parents(run / "model.safetensors")[0] == file_hash(base / "stages" / "1-train" / "model.safetensors")


def test_starting_weights_are_not_needed(tmp_path, tiny_set, tiny_recipe, train, base):
    """The recipe's own start is behind the first stage; its file may be gone."""
    start = tmp_path / "start.safetensors"
    shutil.copy(base / STAGE, start)
    first = train(tmp_path / "first", weights=start)
    start.unlink()
    train(tmp_path / "second", stage1=first, weights=start)


def test_a_resumed_run_needs_the_first_one_no_more(tmp_path, train, base):
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    run = train(tmp_path / "run", stage1=moved)
    shutil.rmtree(moved)
    shutil.rmtree(run / "stages" / "2-classifier")
    (run / "model.safetensors").unlink()
    tailfin.train("", out=run, resume=True)
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_mistakes(tmp_path, tiny_set, tiny_recipe, train, base):
    cases = {
        r"seed is 0 there, 3 here; schedule.lr is 0.01 there, 0.02 here. To": (["schedule.lr=0.02", "seed=3"], base),
        "detector.head_channels is 32 there, 16 here": (["detector.head_channels=16"], base),
        "its first stage is not finished": ([], tmp_path / "begun"),
        "it is no run folder": ([], tmp_path),
        "nowhere does not exist": ([], tmp_path / "nowhere"),
    }
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("weights: none\n")
    for message, (changes, stage1) in cases.items():
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", *changes, stage1=stage1)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="has one stage only"):
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", stage1=base)
    with pytest.raises(UserError, match="other annotations"):
        train(tmp_path / "run", stage1=base, train=tiny_set[1])
    with pytest.raises(UserError, match="is inside --out"):
        train(base, stage1=base, overwrite=True)
    assert (base / "model.safetensors").exists()


def test_every_key_counts_but_those_that_cannot_matter(tiny_recipe):
    recipe = load_recipe(tiny_recipe, BACL)
    keys = stages(recipe)[0].inputs
    assert {"loss.name", "schedule.lr", "data.sizes", "data.flip", "detector.norm", "seed", "weights"} <= keys.keys()
    assert not {"method", "evaluation.nms", "data.workers", "data.root", "second.loss.name"} & keys.keys()
    other = stages(load_recipe(tiny_recipe, [*BACL, "loss.name=focal", "loss.focal_gamma=1"]))[0].inputs
    found = differences(other, keys)
    assert found == [("loss.name", "focal", "objectness"), ("loss.focal_gamma", 1.0, None)]
