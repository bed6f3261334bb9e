"""The examples run as they are written, for a step or two."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    """An example as a module."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
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
