"""Pictures that break while a run trains: `data.on_bad_image`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tailfin
from tailfin import engine
from tailfin.checkpoint import save_resume_point
from tailfin.config import load_recipe
from tailfin.data import dataset as datasets
from tailfin.data.dataset import TrainingDataset, open_source, training_loader
from tailfin.errors import UserError
from tailfin.run import batch_plan
from tailfin.schema.data import DataFiles
from tailfin.stats import ClassStats

pytestmark = pytest.mark.usefixtures("quick_training")
SHORT = ("schedule.epochs=2", "logging.checkpoint_every=100")
BREAKS = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:600]),
    "another size": lambda path: Image.new("RGB", (33, 44)).save(path),
    "text": lambda path: path.write_text("no picture"),
}


@pytest.fixture
def own_set(tiny_set, tmp_path) -> Path:
    """A copy of the training set that may be broken."""
    shutil.copytree(tiny_set[0].with_suffix(""), tmp_path / "train")
    return Path(shutil.copy(tiny_set[0], tmp_path / "train.json"))


def picture(own_set: Path, number: int) -> Path:
    return own_set.with_suffix("") / f"{number}.png"


def loaded(own_set: Path, recipe: Path, *more: str, rank: int = 0, processes: int = 1):
    """(image ids and first pixels of the batches of one process, its data set)."""
    settings = load_recipe(recipe, (*SHORT, *more))
    source = open_source(DataFiles(annotations=str(own_set)), "", "train")
    dataset = TrainingDataset(source, settings.data, settings.seed)
    plan = batch_plan(settings, dataset, ClassStats.from_index(source.index))
    found = []
    for images, targets in training_loader(dataset, plan, start=0, rank=rank, processes=processes, accumulation=1):
        found.append([(int(t["image_id"]), i.shape, i.sum().item()) for i, t in zip(images, targets, strict=True)])
    return found, dataset


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", BREAKS)
def test_error_names_the_picture(own_set, tiny_recipe, how, workers):
    BREAKS[how](picture(own_set, 7))
    with pytest.raises(UserError, match=f"{picture(own_set, 7)}"):
        loaded(own_set, tiny_recipe, f"data.workers={workers}")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", BREAKS)
def test_skip_replaces_this_sample_and_no_other(own_set, tiny_recipe, how, workers, capsys):
    options = ("data.on_bad_image=skip", f"data.workers={workers}")
    before, whole = loaded(own_set, tiny_recipe, *options)
    assert whole.skipped == {}
    BREAKS[how](picture(own_set, 7))
    after, dataset = loaded(own_set, tiny_recipe, *options)
    row, following = 7, 8  # of the same aspect (`tiny_set`: every third picture is upright)
    changed = [(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True) if a != b]
    assert changed and all(a[0] == row and b[0] == following for a, b in changed)
    assert list(dataset.skipped.values()) == [len(changed)]
    assert str(picture(own_set, 7)) in next(iter(dataset.skipped))
    assert capsys.readouterr().err.count("skipped: ") == 1


def test_ranks_together_see_what_one_process_sees(own_set, tiny_recipe):
    for number in (3, 7, 8):
        picture(own_set, number).unlink()
    alone, _ = loaded(own_set, tiny_recipe, "data.on_bad_image=skip")
    first, second = (loaded(own_set, tiny_recipe, "data.on_bad_image=skip", rank=r, processes=2)[0] for r in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_a_folder_that_is_gone_ends_training(own_set, tiny_recipe):
    shutil.rmtree(own_set.with_suffix(""))
    own_set.with_suffix("").mkdir()
    with pytest.raises(UserError, match="training pictures one after another cannot be used; first: image"):
        loaded(own_set, tiny_recipe, "data.on_bad_image=skip")


def test_not_more_than_a_hundred_are_tried(own_set, tiny_recipe, monkeypatch):
    monkeypatch.setattr(datasets, "PATIENCE", 2)
    _, dataset = loaded(own_set, tiny_recipe, "data.on_bad_image=skip")
    first, *others = (7, *dataset._after(7).tolist())
    for number in (first, others[0]):
        picture(own_set, number).unlink()
    assert isinstance(dataset[(0, first, 0)], UserError)
    assert isinstance(dataset[(0, others[0], 0)], datasets.Skipped)


def test_a_run_counts_and_lists_them_and_is_the_same_again(own_set, tiny_recipe, tmp_path, capsys):
    weights = []
    for name, workers in (("first", 0), ("second", 2)):
        picture(own_set, 7).write_bytes(b"")
        options = [*SHORT, "data.on_bad_image=skip", f"data.workers={workers}"]
        out = tailfin.train(tiny_recipe, train=own_set, out=tmp_path / name, overrides=options)
        weights.append(tailfin.load(out).model.state_dict())
        listed = json.loads((out / "stages/1-train/skipped.json").read_text())
        assert len(listed) == 1 and str(picture(own_set, 7)) in listed[0]["picture"] and listed[0]["samples"] > 0
        words = capsys.readouterr().err
        assert f"1 picture skipped in {listed[0]['samples']} samples" in words
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_counts_go_on_after_a_stop(own_set, tiny_recipe, tmp_path, monkeypatch):
    """Killed after a resume point and resumed, a run lists what the straight one lists."""
    picture(own_set, 7).unlink()
    options = ["schedule.epochs=3", "logging.checkpoint_every=4", "data.on_bad_image=skip"]
    straight = tailfin.train(tiny_recipe, train=own_set, out=tmp_path / "straight", overrides=options)
    points = []

    def stop(folder, state, iteration):
        save_resume_point(folder, state, iteration)
        points.append(state["skipped"])
        if len(points) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "save_resume_point", stop)
        tailfin.train(tiny_recipe, train=own_set, out=tmp_path / "stopped", overrides=options)
    assert points[-1] and points[-1] != points[0]
    stopped = tailfin.train("", out=tmp_path / "stopped", resume=True)
    lists = [json.loads((run / "stages/1-train/skipped.json").read_text()) for run in (straight, stopped)]
    assert lists[0] == lists[1] and lists[0][0]["samples"] > next(iter(points[-1].values())) > 0


def test_ranks_count_together(own_set, tiny_recipe, tmp_path, train_on_ranks):
    picture(own_set, 7).unlink()
    options = [*SHORT, "data.on_bad_image=skip"]
    alone = tailfin.train(tiny_recipe, train=own_set, out=tmp_path / "one", overrides=options)

    def train(rank):
        tailfin.train(tiny_recipe, train=own_set, out=tmp_path / "two", overrides=options)

    train_on_ranks(train)
    lists = [json.loads((run / "stages/1-train/skipped.json").read_text()) for run in (alone, tmp_path / "two")]
    assert lists[0] == lists[1] and np.sum([entry["samples"] for entry in lists[0]]) > 0
