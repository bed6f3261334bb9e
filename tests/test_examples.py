"""The examples run as they are written, for a step or two."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import tailfin
from tailfin import models
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.schema import detectors

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    """An example as a module."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where pydantic looks for the names in annotations
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("example", "loss"),
    [
        ("losses_outside_tailfin", "seesaw"),
        ("losses_inside_transformers", "ecm"),
        ("losses_inside_transformers", "eqlv2"),
    ],
)
def test_a_loss_works_inside_a_foreign_detector(example: str, loss: str, capsys: pytest.CaptureFixture[str]):
    load(example).main(loss, steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step") for line in lines) == 2
    assert lines[-1].startswith(f"{loss}: ")
    assert "nan" not in "".join(lines)


def test_a_detector_of_ones_own_goes_the_whole_line(tmp_path: Path):
    """Trained with seesaw and repeat factors, measured, reported, loaded, resumed; the package is untouched."""
    example = load("own_detector")
    try:
        run = example.main(tmp_path, epochs=0.3, images=40)
        metrics = json.loads((run / "metrics.json").read_text())
        assert 0 <= metrics["bbox"]["AP"] <= 1 and (run / "report.html").stat().st_size > 10_000
        detector = tailfin.load(run)
        assert type(detector.model).__name__ == "OwnFCOS" and detector.recipe.loss.name == "seesaw"
        assert tailfin.train(recipe="", out=run, resume=True) == run  # finished: nothing is trained again
        with pytest.raises(UserError, match=r'unknown key "detector\.convolution" \(did you mean "convolutions"'):
            load_recipe(tmp_path / "fcos.yaml", ["detector.convolution=1"])
        for method in ({"features": "rio"}, {"second": {"classifier": "cosine"}, "method": "decoupled"}):
            with pytest.raises(UserError, match="needs a box head on proposals"):
                load_recipe(tmp_path / "fcos.yaml", method)
    finally:
        del detectors.DETECTORS["fcos"], models.BUILDERS["fcos"]
    with pytest.raises(UserError, match='detector.name: "fcos" is not a choice'):
        load_recipe(tmp_path / "fcos.yaml")
