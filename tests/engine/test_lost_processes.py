"""Two processes of which one makes a mistake or dies: one message, no traceback, and nobody waits for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tailfin
from tailfin.checkpoint import content_hash

# is the command line; in the third step of the rank in BREAKS something happens to it
BREAKING = """
import os, signal, sys
from tailfin.cli.main import main
from tailfin.errors import UserError
from tailfin.models.faster_rcnn import FasterRCNN

steps, forward = [0], FasterRCNN.forward

def breaking(self, images, targets=None, limits=None):
    steps[0] += self.training
    if self.training and steps[0] == 3 and os.environ["RANK"] == os.environ["BREAKS"]:
        if os.environ["HOW"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("a picture cannot be read")
    return forward(self, images, targets, limits)

FasterRCNN.forward = breaking
main()
"""
OPTIONS = ("schedule.epochs=2", "logging.checkpoint_every=1")


def pair(*words: object, breaks: str = "", how: str = "") -> tuple[list[str], list[int], float]:
    """(output of both processes, exit codes, seconds from the first one's end to the last one's)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
              "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "BREAKS": breaks, "HOW": how}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BREAKING, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    deadline = time.monotonic() + 240
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return outputs, [process.returncode for process in processes], time.monotonic() - began


def errors(output: str) -> list[str]:
    assert "Traceback" not in output and "frame #" not in output, output
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("how", ["mistake", "killed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_message_and_nobody_waits(tiny_set, tiny_recipe, tmp_path, rank, how):
    out = tmp_path / "run"
    words = ("train", tiny_recipe, "--train", tiny_set[0], "--out", out, *OPTIONS)
    outputs, codes, seconds = pair(*words, breaks=str(rank), how=how)
    own, other = outputs[rank], outputs[1 - rank]
    assert seconds < 60
    assert codes[1 - rank] == 2 and codes[rank] == (2 if how == "mistake" else -9)
    assert errors(own) == (["error: a picture cannot be read"] if how == "mistake" else [])
    lost = f"error: process {1 - rank} stops: another process of the run has ended"
    found = errors(other)
    if how == "mistake" and rank == 1:  # the first process holds the store, and knows that the other has told
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith(lost)
    if how == "killed" and rank == 1:  # and the run goes on, on one process
        straight = tailfin.train("", out=out, resume=True)
        assert content_hash(straight / "model.safetensors")


def test_a_mistake_of_all_is_told_once(tiny_set, tiny_recipe, tmp_path):
    for mistake in (("--val", tmp_path / "none.json"), ("schedule.batch=3",), ("schedule.nothing=3",)):
        words = ("train", tiny_recipe, "--train", tiny_set[0], "--out", tmp_path / "run", *OPTIONS, *mistake)
        outputs, codes, _ = pair(*words)
        assert codes == [2, 2]
        assert len(errors(outputs[0]) + errors(outputs[1])) == 1, outputs
    assert not Path(tmp_path / "run").exists()
