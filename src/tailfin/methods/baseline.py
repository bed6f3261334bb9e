"""The plain detector: one stage, any loss, any sampler. What every method is compared with."""

from __future__ import annotations

from tailfin.methods.drcl import start
from tailfin.methods.feature_stage import feature_stage
from tailfin.run import Run


def train(run: Run) -> None:
    """One stage from the recipe's starting weights."""
    model = feature_stage(run, "train", start(run))
    run.finish(model)
