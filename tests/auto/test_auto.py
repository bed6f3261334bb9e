"""`tailfin train auto` on small real and drawn sets: YOLO and VOC folders, halves of val, steps that are done once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tailfin
from tailfin.auto import steps
from tailfin.auto.plan import make_plan
from tailfin.calibrate import candidates
from tailfin.cli.data import app as data_app
from tailfin.cli.main import app
from tailfin.data.convert import convert
from tailfin.data.index import open_index
from tailfin.errors import UserError

QUICK = ["size=64", "epochs=0.5", "batch=8", "start=none", "detector=faster_rcnn", "detector.fpn_channels=16",
         "detector.head_channels=32", "schedule.precision=no", "data.workers=0"]  # fmt: skip


def run(*words: object) -> str:
    shown = CliRunner().invoke(app, [str(word) for word in words])
    assert shown.exit_code == 0, f"{shown.output}{shown.exception!r}"
    return shown.output


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, tiny_set: tuple[Path, Path]) -> dict[str, Path]:
    """The tiny set as a YOLO and as a VOC folder, with its two splits."""
    folder = tmp_path_factory.mktemp("layouts")
    for layout in ("yolo", "voc"):
        convert(tiny_set[0].parent, folder / layout, origin="coco", target=layout, placing="link")
    return {"coco": tiny_set[0], "yolo": folder / "yolo", "voc": folder / "voc"}


@pytest.mark.parametrize("layout", ["yolo", "voc"])
def test_a_plan_for_a_folder(layouts: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """The annotations are converted into the folder given, and say the same; the pictures stay."""
    plan = make_plan(layouts[layout], None, tmp_path)
    own, wanted = open_index(plan.files.train), open_index(layouts["coco"])
    assert len(own) == len(wanted) and own.names == wanted.names
    assert sorted(own.clean().boxes[:, 0].round(2)) == pytest.approx(sorted(wanted.clean().boxes[:, 0].round(2)), abs=1)
    assert plan.files.train.parent == tmp_path and (plan.files.train_images / own.file_name(0)).is_file()
    assert not plan.facts.masks and plan.value("detector") == "faster_rcnn"
    assert "annotations converted to COCO form" in plan.files.notes or plan.files.notes


def test_halves_of_val_hold_every_class(data_dir: Path, tmp_path: Path) -> None:
    road = data_dir / "road12-masks-lt"
    plan = make_plan(road / "train.json", road / "val.json", tmp_path)
    holdout, test, val = (open_index(path) for path in (plan.files.holdout, plan.files.test, road / "val.json"))
    ids = [set(index.image_ids.tolist()) for index in (holdout, test, val)]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == ids[2] and abs(len(ids[0]) - len(ids[1])) < 12
    assert set(holdout.labels) == set(test.labels) == set(val.labels)
    assert [c.frequency for c in holdout.categories] == [c.frequency for c in val.categories]
    assert plan.facts.masks and plan.facts.rare == 3 and plan.facts.pictures == 671


def test_from_a_yolo_folder_to_a_calibrated_model(
    layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after training, given again, then with --resume: each step is done once."""
    out = tmp_path / "run"
    words = ["train", "auto", "--train", layouts["yolo"], "--out", out, *QUICK]
    shown = run(*words, "--dry-run")
    assert "sampler " in shown and "given" in shown and not out.exists()

    monkeypatch.setattr(candidates, "GRIDS", {name: rows[:1] for name, rows in candidates.GRIDS.items()})
    trainings = []
    train, calibrate = tailfin.api.train, steps._calibrate
    monkeypatch.setattr(tailfin.api, "train", lambda *a, **k: (trainings.append(k), train(*a, **k))[1])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "_calibrate", killed)
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code != 0
    assert (out / "metrics.json").exists() and not (out / "calibrated.safetensors").exists()
    monkeypatch.setattr(steps, "_calibrate", calibrate)
    shown = run(*words)
    assert len(trainings) == 1 and "training pictures" in shown and "thresholds: " in shown
    assert f"wrote {out / 'calibrated.safetensors'}" in shown.replace("\n", "")
    stamp = (out / "calibrated.safetensors").stat().st_mtime_ns
    assert "thresholds: " in run("train", "--resume", out)
    assert (out / "calibrated.safetensors").stat().st_mtime_ns == stamp and len(trainings) == 1
    model = tailfin.load(out / "calibrated.safetensors", "cpu")
    assert model.points is not None and model.recipe.name == "auto"
    stored = json.loads((out / "auto.json").read_text())
    assert {choice["name"]: choice["value"] for choice in stored["choices"]}["size"] == 64

    # another call in the same folder is refused, --overwrite begins anew and leaves what is not of a run
    assert CliRunner().invoke(app, [*map(str, words), "seed=1"]).exit_code != 0
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(tailfin.api, "train", killed)
    CliRunner().invoke(app, [*map(str, words), "seed=1", "--overwrite"])
    assert not (out / "calibrated.safetensors").exists() and (out / "notes.txt").exists()
    assert "seed: 1" in (out / "recipe.yaml").read_text() and (out / "data" / "train.json").exists()


def test_a_plain_recipe_takes_a_yolo_folder(layouts: dict[str, Path], tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("train", tiny_recipe, "--train", layouts["yolo"], "--out", out, "schedule.epochs=0.2")
    assert (out / "data" / "val.json").exists() and (out / "metrics.json").exists()
    assert str(out / "data" / "train.json") in (out / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="is empty"):
        tailfin.train(tiny_recipe, train=layouts["yolo"], val=_without_pictures(tmp_path), out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("layout", ["yolo", "voc"])
def test_data_check_takes_folders(layouts: dict[str, Path], tmp_path: Path, layout: str) -> None:
    shown = CliRunner().invoke(data_app, ["check", str(layouts[layout])])
    assert shown.exit_code == 0, shown.output
    assert "train: usable" in shown.output and "val: usable" in shown.output
    broken = tmp_path / "broken"
    convert(layouts["coco"].parent, broken, origin="coco", target="yolo", placing="copy")
    label = sorted((broken / "labels" / "train").glob("*.txt"))[0]
    label.write_text("99 0.5 0.5 0.1 0.1\n")
    shown = CliRunner().invoke(app, ["data", "check", str(broken)])
    assert shown.exit_code != 0


def test_refusals(layouts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--export: there is no form"):
        steps.Wanted(str(layouts["yolo"]), export="tflite")
    with pytest.raises(UserError, match="--thresholds"):
        steps.Wanted(str(layouts["yolo"]), thresholds="best")
    with pytest.raises(UserError, match='holdout="vall"'):
        make_plan(layouts["yolo"], None, tmp_path, overrides=["holdout=vall"])
    result = CliRunner().invoke(app, ["train", "fod/packaged", "--export", "onnx"])
    assert isinstance(result.exception, UserError) and "goes with `tailfin train auto`" in str(result.exception)


def _without_pictures(folder: Path) -> Path:
    path = folder / "other.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    return path
