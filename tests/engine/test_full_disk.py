"""A disk that is full, read-only or out of quota at each write of a run: one line, exit code 2, nothing is lost."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tailfin
from tailfin import checkpoint
from tailfin.cli.main import main
from tailfin.data.index import open_index
from tailfin.data.proposal_files import write_proposals
from tailfin.errors import UserError
from tailfin.evaluation.results import JsonList, ResultWriter, merge_shards
from tailfin.files import write_json

SHORT = ("schedule.epochs=1", "logging.checkpoint_every=3", "evaluation.every=1", "evaluation.select=best")


class Disk:
    """Counts the writes below a folder and fails after the first `good` ones."""

    def __init__(self, folder: Path, good: int, number: int) -> None:
        self.folder, self.good, self.number, self.count = folder, good, number, 0
        self.failed: list[Path] = []

    def write(self, path) -> None:
        if isinstance(path, int) or not Path(path).is_relative_to(self.folder):
            return
        self.count += 1
        if self.count > self.good:
            self.failed.append(Path(path))
            raise OSError(self.number, os.strerror(self.number))


@pytest.fixture
def full_disk():
    """`full_disk(folder, good, number)`: a context in which opening for writing, temporary files, safetensors and
    renames fail below the folder."""

    @contextlib.contextmanager
    def install(folder: Path, good: int = 0, number: int = errno.ENOSPC):
        disk = Disk(folder, good, number)
        plain_open, mkstemp, save_file, replace = io.open, tempfile.mkstemp, safetensors.torch.save_file, Path.replace

        def open_(path, mode="r", *rest, **more):
            if set(mode) & set("wax+"):
                disk.write(path)
            return plain_open(path, mode, *rest, **more)

        def temporary(*rest, **more):
            disk.write(more.get("dir") or "/")
            return mkstemp(*rest, **more)

        def save(tensors, path, *rest, **more):
            disk.write(path)
            return save_file(tensors, path, *rest, **more)

        def rename(self, target):
            disk.write(target)
            return replace(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(io, "open", open_)
            patch.setattr(builtins, "open", open_)
            patch.setattr(tempfile, "mkstemp", temporary)
            patch.setattr(safetensors.torch, "save_file", save)
            patch.setattr(Path, "replace", rename)
            yield disk

    return install


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_set, tiny_recipe) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    return tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=out, overrides=SHORT)


def test_every_write_of_a_run_may_fail(full_disk, straight, tmp_path, tiny_set, tiny_recipe):
    """The run is cut at its 1st, 2nd, ... write; each time one line names a path of the run, and at the end it has
    the weights and numbers of the straight one."""
    out, good, failures = tmp_path / "run", 0, 0
    while True:
        begun = (out / "recipe.yaml").exists()
        try:
            with full_disk(out, good) as disk:
                if begun:
                    tailfin.train("", out=out, resume=True)
                else:
                    tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=out, overrides=SHORT)
        except UserError as error:
            assert str(out) in str(error) and "\n" not in str(error) and "No space left" in str(error)
        for path in out.rglob("*.safetensors"):
            assert checkpoint.read_safetensors(path)[0]  # whole
        failures += bool(disk.failed)
        if not disk.failed:
            break
        good += 1 if good < 10 else 3
        assert failures < 40
    assert failures > 10
    assert checkpoint.content_hash(out / "model.safetensors") == checkpoint.content_hash(straight / "model.safetensors")
    assert (out / "metrics.json").read_text() == (straight / "metrics.json").read_text()


KINDS = ("resume point", "model", "shard", "results", "proposals")


def write(kind: str, folder: Path, value: int, model: tailfin.Detector, shards: Path) -> Path:
    """Write a file of a kind below `folder`, its content a function of `value`; returns its path."""
    path = folder / {"model": "model.safetensors", "proposals": "p.json"}.get(kind, "results.bbox.json")
    match kind:
        case "resume point":
            checkpoint.save_resume_point(folder, {"iteration": value, "x": torch.zeros(100)}, value)
            return folder / "last" / "state.pt"
        case "model":
            checkpoint.save_model(path, model.model, model.recipe, model.stats, note=str(value))
        case "shard":
            with ResultWriter(folder) as writer:
                writer.add(value, [[0, 0, 1, 1]], [0.5], [1])
            return folder / "rank-00000.shard"
        case "results":
            merge_shards(shards, path)
        case "proposals":
            box = np.array([[0, 0, value, 1]], np.float32)
            found = (np.array([1]), np.array([0, 1]), box, np.array([0.5], np.float32))
            write_proposals(path, *found, "x")
    return path


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_good_state_stays(kind, number, full_disk, tmp_path, straight):
    model, folder = tailfin.load(straight), tmp_path / "folder"
    with ResultWriter(tmp_path / "shards") as writer:
        writer.add(1, [[0, 0, 1, 1]], [0.5], [1])
    path = write(kind, folder, 1, model, tmp_path / "shards")
    good = path.read_bytes()
    with pytest.raises(UserError, match="cannot be written") as error, full_disk(folder, 0, number) as disk:
        write(kind, folder, 2, model, tmp_path / "shards")
    assert disk.failed and str(folder) in str(error.value) and os.strerror(number) in str(error.value)
    if kind != "shard":  # a shard is begun anew by each inference
        assert path.read_bytes() == good
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(".") or entry.name.endswith(".new")]


@pytest.mark.parametrize("kind", ["model", "resume point", "results", "json"])
def test_a_real_limit_of_the_system(kind, tmp_path, straight):
    """Not simulated: the kernel refuses the write half-way (RLIMIT_FSIZE), as a quota does."""
    model = tailfin.load(straight)
    child = os.fork()
    if not child:
        code = 9
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            if kind == "model":
                checkpoint.save_model(tmp_path / "model.safetensors", model.model, model.recipe, model.stats)
            elif kind == "resume point":
                checkpoint.save_resume_point(tmp_path, {"iteration": 1, "x": torch.zeros(100_000)}, 1)
            elif kind == "json":
                write_json(tmp_path / "x.json", list(range(10_000)))
            else:
                with JsonList(tmp_path / "results.json") as found:
                    found.wanted = True
                    found.extend([{"image_id": number} for number in range(10_000)])
        except UserError as error:
            code = 0 if "cannot be written" in str(error) and str(tmp_path) in str(error) else 8
        except BaseException:
            code = 7
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("report", "RUN"), ("evaluate", "RUN", "--json", "RUN/out.json")])
def test_commands_end_with_one_line_and_code_2(arguments, straight, tmp_path, full_disk, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    report = (run / "report.html").read_bytes()
    monkeypatch.setattr("sys.argv", ["tailfin", *(word.replace("RUN", str(run)) for word in arguments)])
    with pytest.raises(SystemExit) as stop, full_disk(run, 0, errno.EROFS):
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert f"error: {run}" in err and "Read-only file system" in err and "Traceback" not in err
    assert (run / "report.html").read_bytes() == report


def test_an_index_cache_that_cannot_be_written_is_done_without(full_disk, monkeypatch, tiny_set, tmp_path):
    monkeypatch.setenv("TAILFIN_CACHE", str(tmp_path))
    with full_disk(tmp_path) as disk:
        assert len(open_index(tiny_set[0])) == 26
    assert disk.failed and not [path for path in tmp_path.rglob("*") if path.is_file()]
