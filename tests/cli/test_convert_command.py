"""`tailfin convert` and `tailfin merge` as commands: what they print, and their mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

CLASSES = "red\ngreen\nblue\n"


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A checkpoint by mmdetection's names of a pyramid on nothing: enough to be known as one."""
    path = tmp_path / "theirs.pth"
    torch.save({"meta": {}, "state_dict": {"neck.lateral_convs.0.conv.weight": torch.ones(1)}}, path)
    return path


def test_mistakes_are_one_line(tailfin, tiny_recipe, tiny_set, theirs, tmp_path):
    (tmp_path / "classes.txt").write_text(CLASSES)
    given = ("--recipe", "coco/faster_rcnn_r50_softmax", "--classes", tmp_path / "classes.txt", "--out")
    out = tmp_path / "m.safetensors"
    for arguments, why in (
        ((theirs, *given, out), "it has no ResNet with a stem of one convolution"),
        ((theirs,), "give --recipe"),
        ((tmp_path / "none.pth", *given, out), "none.pth"),
        ((theirs, *given, tmp_path / "m.pth"), "a model file is a .safetensors file"),
        ((theirs, *given, out, "--style", "cafe"), "is none of caffe, pytorch"),
    ):
        outcome = tailfin("convert", *arguments)
        assert outcome.code == 2 and why in outcome.error, outcome.err
        assert not out.exists()
    outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], "--weights", theirs, "--out", tmp_path / "run")
    assert outcome.code == 2 and "a detector of mmdetection: convert it first, `tailfin convert" in outcome.error


def test_merge(tailfin, trained, tmp_path):
    out = tmp_path / "both.safetensors"
    outcome = tailfin("merge", trained, trained / "model.safetensors", "--out", out)
    assert outcome.code == 2 and "all of its 3 classes are in" in outcome.error
    (tmp_path / "map.json").write_text(json.dumps({"yellow": "red"}))
    outcome = tailfin("merge", trained, trained, "--out", out, "--map", tmp_path / "map.json")
    assert outcome.code == 2 and '"yellow" is no class of the data' in outcome.error and not out.exists()
