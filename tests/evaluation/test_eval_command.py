"""`tailfin evaluate`: results files, runs and models, what is printed, what is written, and mistakes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from tailfin.cli.evaluate import evaluate as command
from tailfin.errors import UserError
from tailfin.evaluation import ResultWriter, TrainCounts, evaluate

BOX = [10, 10, 40, 40]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """val.json (two classes), good.json (both found), half.json (one found)."""
    document = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 100, "height": 100} for k in range(2)],
        "categories": [{"id": 1, "name": "bolt", "image_count": 5}, {"id": 2, "name": "nut", "image_count": 50}],
        "annotations": [{"id": k, "image_id": k, "category_id": k + 1, "bbox": BOX} for k in range(2)],
    }
    found = [{"image_id": k, "category_id": k + 1, "bbox": BOX, "score": 0.5} for k in range(2)]
    for name, value in (("val", document), ("good", found), ("half", found[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


@pytest.fixture
def api(files: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the model side: it notes how it is called and "detects" what good.json holds."""
    calls: dict[str, Any] = {}

    def predict_to_results(
        model: Path, annotations: Path, images: Any, out: Path, *, max_dets: int, kinds: tuple[str, ...]
    ) -> dict[str, Path]:
        calls.update(model=model, annotations=annotations, images=images, out=out, max_dets=max_dets, kinds=kinds)
        out.mkdir(parents=True, exist_ok=True)
        path = out / "results.bbox.json"
        path.write_bytes((files / "good.json").read_bytes())
        return {"bbox": path}

    module = types.ModuleType("tailfin.api")
    vars(module).update(
        predict_to_results=predict_to_results,
        validation_files=lambda run: (files / "val.json", run / "pictures"),
        train_counts=lambda model, annotations: TrainCounts({1: 1, 2: 1000}, {1: 1, 2: 2000}),
    )
    monkeypatch.setitem(sys.modules, "tailfin.api", module)
    (files / "run").mkdir()
    (files / "run" / "model.safetensors").write_bytes(b"weights")
    return calls


def call(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.exception
    return result


def fail(*arguments: object) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_results(files: Path) -> None:
    out = files / "metrics.json"
    result = succeed("--results", files / "half.json", "--annotations", files / "val.json", "--json", out)
    assert json.loads(out.read_text()) == evaluate(files / "val.json", files / "half.json")
    assert "AP50" in result.output
    assert "50.0" in result.output
    assert "nut" not in result.output
    result = succeed("--results", files / "half.json", "--annotations", files / "val.json", "--per-category")
    assert "nut" in result.output


def test_options_reach_the_evaluation(files: Path) -> None:
    out = files / "metrics.json"
    base = ("--results", files / "half.json", "--annotations", files / "val.json", "--json", out)
    succeed(*base, "--protocol", "coco", "--max-dets", "5", "--no-cats")
    options: dict[str, Any] = {"max_dets": 5, "use_cats": False}
    assert json.loads(out.read_text()) == evaluate(files / "val.json", files / "half.json", "coco", **options)
    succeed(*base, "--groups", "5,20")
    assert [row["frequency"] for row in json.loads(out.read_text())["per_category"]] == ["r", "f"]
    succeed(*base, "--protocol", "lvis-fixed", "--per-class", "20", "--train", files / "val.json")
    assert [row["image_count"] for row in json.loads(out.read_text())["per_category"]] == [1, 1]


def test_folder_of_shards_and_comparison(files: Path) -> None:
    with ResultWriter(files / "shards", 0) as writer:
        writer.add(0, np.array([[10, 10, 50, 50]]), [0.5], [1])
    out = files / "metrics.json"
    pair = ("--results", files / "shards", "--results", files / "good.json")
    result = succeed(*pair, "--annotations", files / "val.json", "--json", out)
    assert "bbox AP" in result.output
    found = json.loads(out.read_text())
    assert [found[str(files / name)]["bbox"]["AP"] for name in ("shards", "good.json")] == pytest.approx([0.5, 1])


def test_a_comparison_says_how_sure_it_is(files: Path) -> None:
    out = files / "metrics.json"
    pair = ("--results", files / "good.json", "--against", files / "half.json", "--annotations", files / "val.json")
    assert "this against" in succeed(*pair, "--json", out).output
    own = json.loads(out.read_text())["against"]["bbox"]["metrics"]["AP"]
    assert own["a"] == pytest.approx([0.5]) and own["b"] == pytest.approx([1]) and own["low"] <= 0.5 <= own["high"]
    assert "--no-cats" in fail(*pair, "--protocol", "coco", "--no-cats")


def test_warnings_are_plain_lines(files: Path) -> None:
    entry = {"category_id": 1, "bbox": BOX, "score": 0.5}
    cut = [{"image_id": k, **entry} for k in range(2) for _ in range(100)]
    (files / "cut.json").write_text(json.dumps(cut))
    base = ("--results", files / "cut.json", "--annotations", files / "val.json")
    result = succeed(*base, "--protocol", "lvis-fixed")
    assert result.output.count("warning: 2 of 2 images have exactly 100 detections") == 1


@pytest.mark.parametrize(("protocol", "limit"), [("lvis", 300), ("coco", 100), ("lvis-fixed", -1)])
def test_run_with_its_own_validation_files(api: dict[str, Any], files: Path, protocol: str, limit: int) -> None:
    out = files / "metrics.json"
    succeed(files / "run", "--protocol", protocol, "--json", out)
    assert api["model"] == files / "run" / "model.safetensors"
    assert (api["annotations"], api["images"]) == (files / "val.json", files / "run" / "pictures")
    assert api["max_dets"] == limit
    assert not api["out"].exists()
    metrics = json.loads(out.read_text())
    assert metrics["bbox"]["AP"] == pytest.approx(1)
    assert [row["frequency"] for row in metrics["per_category"]] == ["r", "f"]  # the model's training counts


def test_model_with_other_files(api: dict[str, Any], files: Path) -> None:
    model = files / "run" / "model.safetensors"
    arguments = ("--model", model, "--annotations", files / "val.json", "--images", files, "--max-dets", "50")
    out = files / "metrics.json"
    succeed(*arguments, "--save", files / "kept", "--train", files / "val.json", "--json", out)
    assert (api["images"], api["max_dets"], api["kinds"]) == (files, 50, ("bbox",))
    assert (files / "kept" / "results.bbox.json").is_file()
    assert [row["image_count"] for row in json.loads(out.read_text())["per_category"]] == [1, 1]


def test_mistakes(api: dict[str, Any], files: Path) -> None:
    good, val = files / "good.json", files / "val.json"
    assert "give one of RUN, --model and --results (none given)" in fail()
    assert "(RUN and --results given)" in fail(files / "run", "--results", good)
    assert "--results needs --annotations" in fail("--results", good)
    assert "a model file needs --annotations" in fail("--model", files / "run" / "model.safetensors")
    assert "a model file needs --annotations" in fail(files / "run" / "model.safetensors")
    assert 'unknown protocol "coc" (did you mean "coco"?)' in fail(files / "run", "--protocol", "coc")
    assert 'unknown IoU type "segment" (did you mean "segm"?)' in fail(files / "run", "--iou", "segment")
    assert 'rum is not a folder (did you mean "run"?)' in fail(files / "rum")
    assert "model.safetensors does not exist" in fail("--model", files / "model.safetensors", "--annotations", val)
    assert "vall.json does not exist" in fail(files / "run", "--annotations", files / "vall.json")
    assert "--groups 10-100: two whole numbers" in fail("--results", good, "--annotations", val, "--groups", "10-100")
    assert "two ascending image counts" in fail("--results", good, "--annotations", val, "--groups", "100,10")
    missing = files / "goood.json"
    assert 'goood.json does not exist (did you mean "good.json"?)' in fail("--results", missing, "--annotations", val)
    assert not (files / "metrics.json").exists()


def test_thresholds(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words = ("--results", files / "good.json", "--annotations", files / "val.json", "--thresholds")
    shown = succeed(*words, "recall=0.9").output
    assert "thresholds for recall=0.9" in shown and "90 % of recall" in shown
    line = next(line for line in shown.splitlines() if "bolt" in line)
    # one object: the threshold is that of both classes together, where everything is found
    assert line.strip("│ ").replace(" ", "").split("│") == [
        "bolt", "0.250", "1", "9%", "100.0", "100.0", "100.0", "100to100", "yes",
    ]  # fmt: skip
    assert "there is no aim" in fail(*words, "best")
