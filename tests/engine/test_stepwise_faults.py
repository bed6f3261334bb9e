"""Damage to what step-wise learning and pre-training keep in a run, and disks that fail when they write it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from small_detr import DETR

import tailfin
from tailfin import exemplar_scores
from tailfin.checkpoint import content_hash
from tailfin.errors import UserError
from tailfin.report import build_report

pytestmark = pytest.mark.usefixtures("quick_training")
STEPWISE = (
    DETR
    + """\
method: stepwise
schedule: {epochs: 0.3, batch: 4, optimizer: adamw, lr: 1e-3, warmup: 0, milestones: [], clip: 0.1}
stepwise:
  division: [10]
  exemplars: {shard: 8}
  head: {per_head_class: 4, per_tail_class: 2, lr: 1e-3}
  tail: null
logging: {every: 1}
"""
)
PRETRAINING = """\
pretraining:
  views: {resize: square, sizes: [64], min_side: 4}
  proposals: {source: gt_jitter}
  image: {queue: 24, hidden: 32, dim: 16}
  box: {queue: 50, hidden: 32, dim: 16}
  reconstruction: {widths: [16, 16, 8]}
  schedule: {epochs: 0.3, batch: 4, lr: 0.01, warmup: 0, milestones: []}
"""
MUTATIONS = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "list": lambda data: b"[1, 2]",
    "null": lambda data: b"null",
    "empty object": lambda data: b"{}",
    "binary": lambda data: random.Random(0).randbytes(200),
    "nested": lambda data: b"[" * 100_000,
    "zeros": lambda data: bytes(len(data)),
}
VALUES = (None, True, [], {}, "", -1, 2**63, 2**70, 1e308, [[]], "x" * 5000)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_set) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    (folder / "steps.yaml").write_text(STEPWISE)
    return tailfin.train(folder / "steps.yaml", train=tiny_set[0], val=tiny_set[1], out=folder / "run")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy whose last step is to be trained again."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "stages/2-head/model.safetensors").unlink()
    shutil.rmtree(copy / "stages/2-head/last", ignore_errors=True)
    (copy / "model.safetensors").unlink()
    return copy


def same(run: Path, other: Path) -> bool:
    return content_hash(run / "model.safetensors") == content_hash(other / "model.safetensors")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_damaged_exemplars_are_one_line_and_are_chosen_again(finished, run, mutation):
    path = run / "exemplars.json"
    whole = path.read_bytes()
    path.write_bytes(MUTATIONS[mutation](whole))
    with pytest.raises(UserError, match="exemplars.json") as error:
        tailfin.train("", out=run, resume=True)
    assert "\n" not in str(error.value)
    path.unlink()
    tailfin.train("", out=run, resume=True)
    assert path.read_bytes() == whole and same(run, finished)


def test_hostile_values_in_exemplars(finished, tiny_set, tmp_path):
    from tailfin.data.index import open_index
    from tailfin.data.smooth_tail import read_exemplars

    index, text = open_index(tiny_set[0]), (finished / "exemplars.json").read_text()
    path = tmp_path / "exemplars.json"
    for key in ("id", "exemplars", "annotation", "score", "classes", "fingerprint"):
        for value in VALUES:
            document = json.loads(text)
            entry = document["classes"][0]
            owner = document if key in document else entry if key in entry else entry["exemplars"][0]
            owner[key] = value
            path.write_text(json.dumps(document))
            try:
                read = read_exemplars(path, index)
            except UserError as error:
                assert str(path) in str(error)
            else:  # only what still means something
                assert len(read.rows) == read.offsets[-1] == len(read.scores) and np.isfinite(read.scores).all()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_damaged_numbers_of_a_step_are_made_anew(finished, run, mutation):
    path = run / "stages/1-base/metrics.json"
    whole = path.read_bytes()
    path.write_bytes(MUTATIONS[mutation](whole))
    tailfin.train("", out=run, resume=True)
    assert path.read_bytes() == whole and same(run, finished)


def test_a_disk_that_fails_at_a_shard_of_exemplars(finished, run, monkeypatch):
    whole = (run / "exemplars.json").read_bytes()
    (run / "exemplars.json").unlink()
    for good, broken in ((0, "open"), (2, "open"), (1, "replace")):
        kept = len(list((run / "exemplars.shards").glob("*.npz"))) if (run / "exemplars.shards").exists() else 0
        count, plain = 0, getattr(Path, broken)

        def fail(self, *rest, plain=plain, good=good, **more):
            nonlocal count
            if self.parent.name == "exemplars.shards" and self.name.startswith(".0"):
                count += 1
                if count > good:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(self, *rest, **more)

        with monkeypatch.context() as patch, pytest.raises(UserError, match="exemplars.shards.* cannot be written"):
            patch.setattr(Path, broken, fail)
            tailfin.train("", out=run, resume=True)
        names = [path.name for path in (run / "exemplars.shards").iterdir()]
        assert len(names) == kept + good and not [name for name in names if name.startswith(".")]
    tailfin.train("", out=run, resume=True)
    assert (run / "exemplars.json").read_bytes() == whole and same(run, finished)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_damaged_shard_of_exemplars_is_one_line(tmp_path, mutation):
    path = tmp_path / "000000.npz"
    exemplar_scores._write(path, [(np.arange(3), np.ones(3, np.float32))])
    assert exemplar_scores.read_scores(tmp_path, 3)[0].tolist() == [0, 1, 2]
    path.write_bytes(MUTATIONS[mutation](path.read_bytes()))
    with pytest.raises(UserError, match="000000.npz"):
        exemplar_scores.read_scores(tmp_path, 3)


# ---- pictures of pre-training ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tiny_set, tiny_recipe) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "pre.yaml").write_text(tiny_recipe.read_text() + PRETRAINING)
    more = ["schedule.epochs=0.3", "schedule.milestones=[]", "schedule.warmup=0"]
    return tailfin.train(folder / "pre.yaml", train=tiny_set[0], val=tiny_set[1], out=folder / "run", overrides=more)


@pytest.mark.parametrize("name", ["pictures.npz", "pretrained.safetensors"])
def test_a_disk_that_fails_at_the_pictures_of_pretraining(pretrained, tiny_set, tmp_path, monkeypatch, name):
    import safetensors.torch

    mkstemp, save_file = tempfile.mkstemp, safetensors.torch.save_file

    def temporary(*rest, **more):
        if name in str(more.get("prefix")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return mkstemp(*rest, **more)

    def save(tensors, path, *rest, **more):
        if name in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save_file(tensors, path, *rest, **more)

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{name} cannot be written"):
        patch.setattr(tempfile, "mkstemp", temporary)
        patch.setattr(safetensors.torch, "save_file", save)
        tailfin.train(pretrained / "recipe.yaml", out=run)
    assert not [path for path in run.rglob(".*") if path.is_file()]
    tailfin.train("", out=run, resume=True)
    assert same(run, pretrained)
    assert (run / "pretrained.safetensors").exists()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_damaged_pictures_leave_the_rest_of_the_report(pretrained, tmp_path, mutation):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    (path,) = run.glob("stages/*/pictures.npz")
    assert "reconstruction of view 1" in build_report([run])
    path.write_bytes(MUTATIONS[mutation](path.read_bytes()))
    page = build_report([run])
    assert "reconstruction of view 1" not in page and "pictures.npz" in page


@pytest.mark.parametrize("key", ["view1", "boxes1", "boxes2", "size1", "reconstruction"])
@pytest.mark.parametrize("how", ["missing", "text", "flat", "huge size", "nothing"])
def test_arrays_of_another_kind_leave_the_rest_of_the_report(pretrained, tmp_path, key, how):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    (path,) = run.glob("stages/*/pictures.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if key not in arrays:
        pytest.skip(f"this pre-training has no {key}")
    value = arrays.pop(key)
    made = {"text": np.array(["x"]), "flat": np.zeros(3), "huge size": np.full(value.shape, 2**31 - 1),
            "nothing": np.zeros((0, *value.shape[1:]), value.dtype)}  # fmt: skip
    np.savez(path, **arrays, **({} if how == "missing" else {key: made[how]}))
    page = build_report([run])
    assert 'id="summary"' in page and "</html>" in page
