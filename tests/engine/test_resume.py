"""A run that was killed and resumed ends with the very bits of the run that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tailfin import checkpoint
from tailfin.errors import UserError


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same(run: Path, other: Path) -> None:
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, different


def iterations(run: Path) -> list[int]:
    path = run / "stages" / "1-train" / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines() if line.endswith("}")]


def kill_at(process, run: Path, iteration: int, how: signal.Signals) -> None:
    """Send a signal once `iteration` is logged."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (done := iterations(run)) and done[-1] >= iteration:
            break
        time.sleep(0.02)
    assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, how)
    process.wait()


@pytest.fixture(scope="module", params=[0, 2], ids=["no workers", "2 workers"])
def straight(request, tmp_path_factory, run_tailfin, tiny_set, tiny_recipe):
    """An uninterrupted run and the arguments that made it."""
    out = tmp_path_factory.mktemp("straight") / "run"
    arguments = [
        tiny_recipe,
        "--train",
        tiny_set[0],
        "--val",
        tiny_set[1],
        f"data.workers={request.param}",
        "schedule.ema=0.9",
    ]
    done = run_tailfin("train", *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, arguments


def test_kill_9_three_times(straight, tmp_path, start_tailfin, run_tailfin):
    reference, arguments = straight
    total = iterations(reference)[-1]
    out = tmp_path / "run"
    # at least one of the points lies inside an epoch (7 or 8 iterations), none on a resume point (every 5)
    points = sorted(random.Random(0).sample([i for i in range(6, total - 4) if i % 5], 3))
    for number, point in enumerate(points):
        more = ["--resume", out] if number else [*arguments, "--out", out]
        kill_at(start_tailfin("train", *more), out, point, signal.SIGKILL)
        assert not (out / "model.safetensors").exists()
    done = run_tailfin("train", "--resume", out)
    assert done.returncode == 0, done.stderr
    assert_same(reference, out)
    assert iterations(out) == iterations(reference)
    assert (
        json.loads((out / "metrics.json").read_text())["bbox"]
        == json.loads((reference / "metrics.json").read_text())["bbox"]
    )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_a_run_that_resumes(straight, how, tmp_path, start_tailfin, run_tailfin):
    reference, arguments = straight
    out = tmp_path / "run"
    process = start_tailfin("train", *arguments, "--out", out)
    kill_at(process, out, 8, how)
    output = process.stdout.read()
    assert process.returncode == 128 + how, output
    assert f"--resume {out}" in output
    assert "Traceback" not in output
    assert run_tailfin("train", "--resume", out).returncode == 0
    assert_same(reference, out)


def test_an_uncaught_stop_ends_the_workers_too(tmp_path, tiny_set, tiny_recipe):
    """A script that lets the exception through: its traceback holds the loop's frame, yet the loader must end."""
    out = tmp_path / "run"
    script = f"import tailfin; tailfin.train({str(tiny_recipe)!r}, train={str(tiny_set[0])!r}, out={str(out)!r}, "
    script += "overrides=['data.workers=2', 'schedule.epochs=500'])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not iterations(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to the main process alone, as a scheduler may do
    _, errors = process.communicate(timeout=60)
    assert "Interrupted: stopped by SIGTERM" in errors


def test_resume_of_a_finished_run_measures_again_and_keeps_the_weights(straight, run_tailfin):
    reference, _ = straight
    before = weights(reference)
    done = run_tailfin("train", "--resume", reference)
    assert done.returncode == 0, done.stderr
    after = weights(reference)
    assert all(torch.equal(before[key], after[key]) for key in before)


class TestResumePoints:
    def test_newest_complete_one_counts(self, tmp_path):
        checkpoint.save_resume_point(tmp_path, {"iteration": 5, "x": torch.ones(3)}, 5)
        checkpoint.save_resume_point(tmp_path, {"iteration": 9, "x": torch.ones(3)}, 9)
        assert checkpoint.load_resume_point(tmp_path)["iteration"] == 9
        # a kill while the next one is written: no mark, or fewer bytes than the mark says
        (tmp_path / "last.new").mkdir()
        (tmp_path / "last.new" / "state.pt").write_bytes(b"half")
        assert checkpoint.load_resume_point(tmp_path)["iteration"] == 9
        (tmp_path / "last.new" / "complete.json").write_text('{"iteration": 12, "bytes": 400}')
        assert checkpoint.load_resume_point(tmp_path)["iteration"] == 9
        # a kill between the two renames: last is gone, last.old and last.new are there
        (tmp_path / "last").rename(tmp_path / "last.old")
        assert checkpoint.load_resume_point(tmp_path)["iteration"] == 9

    def test_none(self, tmp_path):
        assert checkpoint.load_resume_point(tmp_path) is None

    @pytest.mark.parametrize("text", ["", "[]", "[1, 2]", "5", '{"bytes": 4}', '{"bytes": "x", "iteration": 1}', "{"])
    def test_a_damaged_mark_is_one_message(self, tmp_path, text):
        checkpoint.save_resume_point(tmp_path, {"iteration": 5}, 5)
        (tmp_path / "last" / "complete.json").write_text(text)
        with pytest.raises(UserError, match=r"complete.json is damaged: remove the folder"):
            checkpoint.load_resume_point(tmp_path)

    def test_code_in_a_resume_point_is_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return print, ("executed",)

        checkpoint.save_resume_point(tmp_path, {"iteration": 1, "x": Evil()}, 1)
        with pytest.raises(UserError, match="resume point .* is damaged"):
            checkpoint.load_resume_point(tmp_path)
