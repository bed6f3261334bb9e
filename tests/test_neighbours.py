"""Other libraries' forms, and models to and from a hub: by stand-ins that hold what they are given, and for real."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tailfin
from tailfin import ClassStats, hub
from tailfin.checkpoint import save_model
from tailfin.cli.main import app
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.neighbours import to_fiftyone, to_supervision

NAMES = ["bolt", "nut|<b>"]
FOUND = {
    "boxes": torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.5, 0.0, 4.0, 8.0]]),
    "scores": torch.tensor([0.9, 0.25]),
    "labels": torch.tensor([1, 0]),
}
MASKS = torch.zeros((2, 80, 100), dtype=torch.bool)
MASKS[0, 20:60, 10:30] = True
NONE = {"boxes": torch.zeros((0, 4)), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.fixture
def stand_in(monkeypatch):
    """A module whose classes keep their keywords as attributes."""

    def make(name, *classes):
        made = {one: type(one, (types.SimpleNamespace,), {}) for one in classes}
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**made))

    return make


def test_supervision(stand_in):
    stand_in("supervision", "Detections")
    found = to_supervision({**FOUND, "masks": MASKS}, NAMES)
    assert found.xyxy.shape == (2, 4) and found.xyxy.dtype == np.float32 and found.confidence[0] == np.float32(0.9)
    assert found.class_id.tolist() == [1, 0] and found.data["class_name"].tolist() == ["nut|<b>", "bolt"]
    assert found.mask.dtype == bool and found.mask.shape == (2, 80, 100)
    assert to_supervision(NONE, NAMES).xyxy.shape == (0, 4) and to_supervision(FOUND, NAMES).mask is None


def test_supervision_for_real():
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = to_supervision({**FOUND, "masks": MASKS}, NAMES)
    assert isinstance(found, supervision.Detections) and len(found[found.confidence > 0.5]) == 1
    assert len(to_supervision(NONE, NAMES)) == 0


def test_fiftyone(stand_in):
    stand_in("fiftyone", "Detection", "Detections")
    first, second = to_fiftyone({**FOUND, "masks": MASKS}, NAMES, (80, 100)).detections
    assert first.label == "nut|<b>" and first.bounding_box == pytest.approx([0.1, 0.25, 0.2, 0.5])
    assert first.mask.shape == (40, 20) and first.mask.all() and second.mask.shape == (8, 4)
    assert to_fiftyone(NONE, NAMES, (80, 100)).detections == []


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(UserError, match="pip install fiftyone"):
        to_fiftyone(FOUND, NAMES, (80, 100))


# ---- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, tiny_recipe) -> Path:
    recipe = load_recipe(tiny_recipe, ["calibration={name: norcal, gamma: 0.3}"])
    stats = ClassStats(image_count=[90, 3], instance_count=[90, 3], num_images=93, names=NAMES)
    folder = tmp_path / "run"
    folder.mkdir()
    save_model(folder / "model.safetensors", build_detector(recipe, stats, start=False)[0], recipe, stats)
    numbers = {"AP": 0.123, "AP50": 0.3, "APr": -1.0}
    (folder / "metrics.json").write_text(json.dumps({"protocol": "lvis", "bbox": numbers}))
    return folder


def test_a_folder_there_and_back(run, tmp_path):
    shared, out = tmp_path / "shared", tmp_path / "pulled"
    pushed = CliRunner().invoke(app, ["push", str(run), str(shared)])
    assert pushed.exit_code == 0, pushed.output
    card = (shared / "README.md").read_text()
    assert "| AP | AP50 |" in card and "| 12.3 | 30.0 |" in card and "calibrated (norcal)" in card
    assert card.startswith("---\nlibrary_name: tailfin\n") and "| nut\\|&lt;b> | 3 |" in card
    pulled = CliRunner().invoke(app, ["pull", str(shared), "--out", str(out)])
    assert pulled.exit_code == 0, pulled.output
    one, other = tailfin.load(run, "cpu"), tailfin.load(out, "cpu")
    assert other.recipe == one.recipe and other.names == NAMES
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in shared.iterdir())
    for call in (lambda: hub.push(run, str(shared)), lambda: hub.pull(str(shared), out)):
        with pytest.raises(UserError, match="add --overwrite"):
            call()
    hub.push(run, str(shared), overwrite=True)


def test_what_is_no_model_is_not_pulled(run, tmp_path):
    shared = tmp_path / "shared"
    hub.push(run, str(shared))
    (shared / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        hub.pull(str(shared), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not exist"):
        hub.pull(str(tmp_path / "nowhere"), tmp_path / "out")


def test_the_hub(run, tmp_path, monkeypatch):
    """Through a stand-in for huggingface_hub that keeps repositories in a folder."""
    store = tmp_path / "store"

    class HfApi:
        def create_repo(self, name, exist_ok, private):
            (store / name).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, store / repo_id, dirs_exist_ok=True)

    def snapshot_download(name, revision, local_dir, allow_patterns):
        if not (store / name).is_dir():
            raise FileNotFoundError(f"404 {name}")
        for pattern in allow_patterns:
            shutil.copyfile(store / name / pattern, Path(local_dir) / pattern)
        return local_dir

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    )
    assert hub.push(run, "someone/bolts") == "someone/bolts"
    assert hub.pull("someone/bolts", tmp_path / "out").is_file()
    with pytest.raises(UserError, match="someone/nuts: the hub says: FileNotFoundError: 404"):
        hub.pull("someone/nuts", tmp_path / "other")
