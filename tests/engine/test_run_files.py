"""A run folder after kills, damage and a second run: leftovers, state files, the lock, `--overwrite`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tailfin
from tailfin import checkpoint
from tailfin.errors import UserError
from tailfin.files import write_atomic
from tailfin.report import build_report
from tailfin.run_files import empty_run, is_leftover, lock, remove_leftovers, unlock

pytestmark = pytest.mark.usefixtures("quick_training")
SHORT = ("schedule.epochs=1", "logging.checkpoint_every=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_set, tiny_recipe) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    return tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=out, overrides=SHORT)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy that may be broken, before its stage was finished."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "stages/1-train/model.safetensors").unlink()
    (copy / "model.safetensors").unlink()
    return copy


def names(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


# ---- leftovers -------------------------------------------------------------------------------------------------------

LEFT = (
    ".recipe.yaml.a1b2c3d_",
    ".metrics.json.12345678",
    ".model.safetensors.4711",
    ".results.bbox.json.4711.part",
    "results.shards/rank-00001.shard.part",
    "exemplars.shards/.000003.npz.99",
    "stages/1-train/.best.safetensors.5",
    "stages/1-train/.metrics.jsonl.abcdefgh",
    "stages/1-train/.tmpu6TN5i",
    ".tmpAbc123",
)
FOREIGN = (
    ".recipe.yaml.bak",
    ".notes.txt.12345678",
    "notes.part",
    "recipe.yaml.12345678",
    "stages/1-train/.mine.4711",
    "deeper/.recipe.yaml.a1b2c3d_",
    "deeper/.tmpu6TN5i",
    ".git/config",
)


def put(folder: Path, names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")


def test_leftovers_of_killed_writes_are_removed_at_the_next_start(run):
    before = names(run)
    put(run, LEFT + FOREIGN)
    (run / "results.last.bbox.json").write_text("[")
    (run / "stages/1-train/last.new").mkdir()
    (run / "stages/1-train/last.new/state.pt").write_text("half")
    tailfin.train("", out=run, resume=True)
    # the models are there again; everything else is as it was, foreign files too
    assert names(run) == before | set(FOREIGN) | {"stages/1-train/model.safetensors", "model.safetensors"}


def test_a_whole_resume_point_under_another_name_is_no_leftover(tmp_path):
    stage = tmp_path / "stages" / "1-train"
    checkpoint.save_resume_point(stage, {"iteration": 5}, 5)
    (stage / "last").rename(stage / "last.old")  # a kill between two renames
    assert remove_leftovers(tmp_path) == []
    assert checkpoint.load_resume_point(stage) == {"iteration": 5}


def test_the_temporary_names_that_are_made_are_known(tmp_path, monkeypatch):
    made = []
    replace = Path.replace

    def watch(self, target):
        made.append(self.relative_to(tmp_path).as_posix())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    for name in ("recipe.yaml", "stages/1-train/metrics.json"):
        write_atomic(tmp_path / name, "x")
    assert len(made) == 2 and all(is_leftover(name) for name in made)
    assert not any(is_leftover(name) for name in FOREIGN)
    assert all(is_leftover(name) for name in LEFT)


# ---- hashes ----------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_model_is_of_its_weights(tmp_path):
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.int64)}
    hashes, files = set(), set()
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        save_file(weights, path, {"number": str(number), "k": "1", "l": "2"})
        hashes.add(checkpoint.content_hash(path))
        files.add(checkpoint.file_hash(path))
    assert len(hashes) == 1 and len(files) == 12
    changed = {**weights, "b": weights["b"] + 1}
    reshaped = {**weights, "b": weights["b"].reshape(3, 2)}
    renamed = {"c": weights["b"], "a": weights["a"]}
    for other in (changed, reshaped, renamed, {"b": weights["b"]}):
        save_file(other, tmp_path / "other.safetensors")
        assert checkpoint.content_hash(tmp_path / "other.safetensors") not in hashes


def test_equal_trainings_have_equal_hashes_written_at_other_times(finished, run):
    tailfin.train("", out=run, resume=True)  # its stage is written anew, from its resume point
    with safe_open(run / "model.safetensors", "pt") as again, safe_open(finished / "model.safetensors", "pt") as first:
        assert again.metadata()["parents"] == first.metadata()["parents"]


# ---- state files -----------------------------------------------------------------------------------------------------

MUTATIONS = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte": lambda data: data[:1],
    "list": lambda data: b"[1, 2]",
    "null": lambda data: b"null",
    "number": lambda data: b"7",
    "empty object": lambda data: b"{}",
    "binary": lambda data: random.Random(0).randbytes(200),
    "nested": lambda data: b"[" * 100_000,
    "zeros": lambda data: bytes(len(data)),
}
STATE = (
    "recipe.yaml",
    "environment.json",
    "metrics.json",
    "results.bbox.json",
    "stages/1-train/metrics.jsonl",
    "stages/1-train/last/complete.json",
    "stages/1-train/last/state.pt",
)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", STATE)
def test_a_damaged_state_file_is_one_line_or_does_not_matter(finished, run, name, mutation):
    path = run / name
    path.write_bytes(MUTATIONS[mutation](path.read_bytes()))
    with contextlib.suppress(UserError):
        build_report([run])
    try:
        tailfin.train("", out=run, resume=True)
    except UserError as error:
        assert name in ("recipe.yaml", "environment.json", "stages/1-train/last/complete.json", STATE[-1])
        assert path.name in str(error) or (name == "recipe.yaml" and "annotations" in str(error))
        assert name == "recipe.yaml" or "\n" not in str(error)
    else:  # what was lost is made anew, to the same weights
        assert name not in ("recipe.yaml", "environment.json", "stages/1-train/last/complete.json")
        first, again = (checkpoint.content_hash(folder / "model.safetensors") for folder in (finished, run))
        assert first == again
        assert json.loads((run / "metrics.json").read_text()).keys() >= {"bbox"}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_damaged_mark_falls_back_to_the_older_resume_point(tmp_path, mutation):
    two_resume_points(tmp_path)
    mark = tmp_path / "last" / "complete.json"
    mark.write_bytes(MUTATIONS[mutation](mark.read_bytes()))
    with pytest.warns(UserWarning, match="an older resume point is used"):
        assert checkpoint.load_resume_point(tmp_path)["iteration"] == 5


def test_a_damaged_state_falls_back_to_the_older_resume_point(tmp_path):
    two_resume_points(tmp_path)
    state = tmp_path / "last" / "state.pt"
    state.write_bytes(bytes(state.stat().st_size))  # as a file system does after a power cut
    assert checkpoint.load_resume_point(tmp_path)["iteration"] == 5
    shutil.rmtree(tmp_path / "last.old")
    with pytest.raises(UserError, match="is damaged.*train this stage again"):
        checkpoint.load_resume_point(tmp_path)


def two_resume_points(stage: Path) -> None:
    for iteration in (5, 9):
        checkpoint.save_resume_point(stage, {"iteration": iteration, "x": torch.ones(500)}, iteration)
        if iteration == 5:
            shutil.copytree(stage / "last", stage / "kept")
    (stage / "kept").rename(stage / "last.old")


# ---- the lock --------------------------------------------------------------------------------------------------------

HOLD = "import sys, time\nfrom pathlib import Path\nfrom tailfin.run_files import lock\nlock(Path(sys.argv[1]))\n"
HOLD += "print('held', flush=True)\n"


@pytest.fixture
def other_process():
    """Starts a process that holds the lock of a folder."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD + "time.sleep(100)\n", str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_on_the_folder_refuses_until_the_first_is_dead(run, other_process, tiny_recipe, tiny_set):
    process = other_process(run)
    before = {name: (run / name).read_bytes() for name in names(run)}
    message = f"{run} is being written by another process \\(process {process.pid} on .*\\)"
    with pytest.raises(UserError, match=message):
        tailfin.train("", out=run, resume=True)
    with pytest.raises(UserError, match=message):
        tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=run, overrides=SHORT, overwrite=True)
    assert {name: (run / name).read_bytes() for name in names(run)} == before
    process.kill()  # kill -9: the lock's file stays, the lock does not
    process.wait()
    assert (run / ".lock").exists()
    tailfin.train("", out=run, resume=True)
    assert not (run / ".lock").exists() and (run / "stages/1-train/model.safetensors").exists()


def test_a_forked_worker_neither_keeps_the_lock_nor_gives_it_away(tmp_path):
    handle = lock(tmp_path / "run")
    child = os.fork()
    if not child:  # as a loader's worker that ends
        os.close(handle)
        os._exit(0)
    os.waitpid(child, 0)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    assert "is being written by another process" in subprocess.run(command, capture_output=True, text=True).stderr
    unlock(tmp_path / "run", handle)
    assert subprocess.run(command, capture_output=True, text=True).stdout == "held\n"


def test_ranks_of_one_run_share_it(train_on_ranks, tmp_path, tiny_set, tiny_recipe):
    def train(rank):
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=SHORT)
        return (tmp_path / "run" / "model.safetensors").exists()

    assert train_on_ranks(train) == [True, True]


# ---- --overwrite -----------------------------------------------------------------------------------------------------


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    put(run, LEFT + FOREIGN)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "recipe.yaml").write_text("x")
    (run / "link").symlink_to(tmp_path / "elsewhere")
    assert empty_run(run) == sorted([*FOREIGN, "link"])
    assert (tmp_path / "elsewhere" / "recipe.yaml").exists()


def test_overwrite_leaves_no_folder_of_a_run(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert empty_run(run) == [] and list(run.iterdir()) == []


def test_overwrite_names_foreign_files(run, tiny_recipe, tiny_set, capsys):
    put(run, ["my notes.txt"])
    tailfin.train(tiny_recipe, train=tiny_set[0], out=run, overrides=SHORT, overwrite=True)
    written = capsys.readouterr()
    assert "not of a run, they stay: my notes.txt" in written.out + written.err
    assert (run / "my notes.txt").read_text() == "half"
    assert not (run / "metrics.json").exists()  # of the run before, which had a validation set


@pytest.mark.parametrize("linked", ["stages", "stages/1-train"])
def test_overwrite_refuses_stages_behind_a_link(run, tmp_path, linked):
    (run / linked).rename(tmp_path / "moved")
    (run / linked).symlink_to(tmp_path / "moved")
    before = names(tmp_path)
    with pytest.raises(UserError, match="is a link to another folder"):
        empty_run(run)
    assert names(tmp_path) == before


def test_overwrite_never_touches_a_folder_that_is_no_run(tmp_path):
    put(tmp_path, ["model.safetensors", "metrics.json"])
    with pytest.raises(UserError, match="is not a run folder"):
        empty_run(tmp_path)
    assert names(tmp_path) == {"model.safetensors", "metrics.json"}
