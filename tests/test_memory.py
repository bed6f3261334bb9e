"""The memory of a training step: what is followed, how it grows with the batch, and beside a process that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tailfin.memory import training_memory, watched_step

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory_estimate.py"


class Wide(nn.Module):
    """Two layers, whose step is worked out by hand: N = 1000 rows per picture, widths 100 to 200 to 50."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(100, 200, bias=False), nn.Linear(200, 50, bias=False)

    def forward(self, images, targets):
        rows = torch.cat([image.flatten().view(-1, 100) for image in images])
        return {"loss": self.second(self.first(rows).relu()).square().mean()}


def test_a_step_by_hand():
    model, image = Wide(), torch.rand(1, 1000, 100)
    step = watched_step(model, image, {})
    assert all(weight.grad is None for weight in model.parameters())
    assert step.gradients.max() == 4 * (100 * 200 + 200 * 50)
    assert step.gradients[-1] == 0
    first, rest = 4 * 1000 * 200, 4 * 1000 * 50
    # the hidden row, cut and kept for the backward pass, its gradient, and the few narrow ones
    assert 2 * first <= step.pictures.max() <= 3 * first + 4 * rest + 4 * 1000 * 100
    weights = 4 * (100 * 200 + 200 * 50)
    one, ten = (training_memory(model, step, count, 1) for count in (1, 10))
    assert one.held == ten.held == 3 * weights
    assert ten.activations > 9.5 * one.activations
    assert training_memory(model, step, 1, 2).held == 4 * weights


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak is read as Linux counts it")
def test_beside_a_process_that_trains():
    """A short form of benchmarks/memory_estimate.py, with a wider margin than its 15 %."""
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT.name} comes with the source tree only")
    code = (
        f"import sys, json; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv = ['x', '--classes', '300'];"
        "import memory_estimate as m; o = m.parse(); m.torch.set_num_threads(1);"
        "print(json.dumps([m.estimated('retinanet', (128, 128), o)[1], m.run_child('retinanet', (128, 128))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    estimate, measured = json.loads(done.stdout)
    assert 0.75 < estimate / measured < 1.25, (estimate, measured)
