"""Losses and methods from outside: entry points of an installed package, and files that --import names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tailfin import ClassStats, losses, plugins
from tailfin.cli.main import imports_first
from tailfin.config import load_recipe
from tailfin.errors import UserError

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_loss.py"
STATS = ClassStats(image_count=[9, 3], instance_count=[9, 3], num_images=12)
PACKAGE = """
from tailfin.losses import ClassificationLoss
from tailfin.losses.softmax import Softmax
from tailfin.methods import baseline
from tailfin.schema.stages import METHODS

class Doubled(Softmax):
    def __init__(self, stats, *, factor: float = 2.0):
        super().__init__(stats)
        self.factor = factor
    def loss(self, logits, labels):
        return self.factor * super().loss(logits, labels)

METHOD = METHODS["baseline"]
train = baseline.train
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that gives a loss and a method, and one entry that cannot be loaded."""
    (tmp_path / "outside_tailfin.py").write_text(PACKAGE)
    about = tmp_path / "outside_tailfin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside_tailfin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[tailfin.losses]\ndoubled = outside_tailfin:Doubled\nbroken = outside_tailfin:Nothing\n"
        "wrong = outside_tailfin:train\n[tailfin.methods]\noutside = outside_tailfin\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    from tailfin.schema import stages

    losses.LOSSES.pop("doubled", None)
    stages.METHODS.pop("outside", None)
    sys.modules.pop("outside_tailfin", None)


def test_a_package_gives_a_loss_by_being_installed(package):
    loss, plain = losses.build("doubled", STATS, factor=3), losses.build("softmax", STATS)
    logits, labels = torch.randn((4, 3)), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(loss(logits, labels), 3 * plain(logits, labels))
    with pytest.raises(UserError, match='no option "facto" .did you mean "factor"'):
        losses.build("doubled", STATS, facto=3)
    with pytest.raises(UserError, match='did you mean "doubled"'):
        losses.build("dubled", STATS)
    with pytest.raises(UserError, match="cannot be loaded: AttributeError"):
        losses.build("broken", STATS)
    with pytest.raises(UserError, match="is no ClassificationLoss"):
        losses.build("wrong", STATS)


def test_a_package_gives_a_method(package, tiny_recipe):
    from tailfin.methods import baseline, method

    recipe = load_recipe(tiny_recipe, ["method=outside", "loss={name: doubled, factor: 3}"])
    assert recipe.method == "outside" and method("outside") is baseline.train is method("baseline")
    with pytest.raises(UserError, match='did you mean "outside"'):
        load_recipe(tiny_recipe, ["method=outsid"])


def test_files_of_ones_own(tmp_path):
    plugins.import_file(EXAMPLE)
    try:
        assert losses.build("weighted_softmax", STATS, power=1).num_logits == 3
        loss = losses.LOSSES["weighted_softmax"]
        plugins.import_file(EXAMPLE)  # once per process
        assert losses.LOSSES["weighted_softmax"] is loss
    finally:
        losses.LOSSES.pop("weighted_softmax", None)
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(UserError, match="broken.py: ZeroDivisionError"):
        plugins.import_file(broken)
    with pytest.raises(UserError, match='did you mean "broken.py"'):
        plugins.import_file(tmp_path / "brokn.py")


def test_at_any_place_of_a_command():
    assert imports_first(["train", "r", "--import", "a.py", "--import=b.py", "x=1"]) == [
        "--import", "a.py", "--import=b.py", "train", "r", "x=1",
    ]  # fmt: skip
    assert imports_first(["train", "--import"]) == ["--import", "train"]


@pytest.mark.usefixtures("quick_training")
def test_a_run_with_an_own_loss_is_used_from_the_command_line(tmp_path, tiny_set, tiny_recipe):
    """Trained, resumed, evaluated and predicted with, each in a process of its own."""
    run = tmp_path / "run"

    def tailfin(*words):
        command = [sys.executable, "-m", "tailfin", *map(str, words), "--import", str(EXAMPLE)]
        return subprocess.run(command, capture_output=True, text=True, timeout=250)

    given = ["--train", tiny_set[0], "--val", tiny_set[1], "--out", run, "schedule.epochs=0.5"]
    for words in (
        ["train", tiny_recipe, *given, "loss=weighted_softmax"],
        ["train", "--resume", run],
        ["evaluate", run],
        ["predict", run, tiny_set[1].with_suffix("") / "0.png", "--out", tmp_path / "found.json"],
    ):
        done = tailfin(*words)
        assert done.returncode == 0, done.stderr[-1500:]
    without = subprocess.run(
        [sys.executable, "-m", "tailfin", "evaluate", str(run)], capture_output=True, text=True, timeout=100
    )
    assert without.returncode == 2 and 'there is no loss "weighted_softmax"' in without.stderr
