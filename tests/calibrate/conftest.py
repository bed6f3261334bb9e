"""A model whose scores can be calibrated, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

import tailfin


@pytest.fixture(scope="session")
def softmax_run(tmp_path_factory, tiny_set, tiny_recipe) -> Path:
    """A run of the plain softmax baseline on the tiny set."""
    changes = ["schedule.optimizer=adamw", "schedule.lr=0.004", "schedule.epochs=3", "detector.roi_batch=64"]
    out = tmp_path_factory.mktemp("softmax") / "run"
    return tailfin.train(tiny_recipe, train=tiny_set[0], out=out, overrides=changes)
