"""`tailfin calibrate MODEL`: what is chosen is what was measured; undone; thresholds stored and used; refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tailfin
from tailfin import api
from tailfin.calibrate.candidates import GRIDS, PLAIN
from tailfin.calibrate.choice import Goal, best_of_each, choose, crossed
from tailfin.calibrate.model import calibrate
from tailfin.calibrate.pictures import make_folds
from tailfin.checkpoint import load_model_file
from tailfin.cli.main import app
from tailfin.errors import UserError
from tailfin.schema.calibration import NorCal

pytestmark = pytest.mark.usefixtures("quick_training")


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        calibrate(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_by_hand_and_undone(softmax_run, tmp_path):
    out, back = tmp_path / "calibrated.safetensors", tmp_path / "back.safetensors"
    choice = calibrate(softmax_run, out, method="norcal", strength=0.4)
    assert choice.label == "norcal gamma 0.4" and choice.tried == {} and choice.config == NorCal(gamma=0.4)
    assert tailfin.load(out).recipe.calibration == NorCal(gamma=0.4)
    weights, before = load_file(out), load_file(softmax_run / "model.safetensors")
    assert all(torch.equal(weights[key], before[key]) for key in before)
    # twice over: what is undone is all of it
    calibrate(out, out, method="temperature", strength="2", overwrite=True)
    calibrate(out, back, undo=True)
    assert load_model_file(back).recipe == load_model_file(softmax_run / "model.safetensors").recipe
    calibrate(out, back, method="power", strength="0.5,0.75,1", overwrite=True)
    assert load_model_file(back).recipe.calibration.model_dump() == {
        "name": "power", "rare": 0.5, "common": 0.75, "frequent": 1.0,
    }  # fmt: skip


def test_what_was_measured_is_what_the_model_gives(softmax_run, tmp_path, tiny_set):
    out = tmp_path / "calibrated.safetensors"
    choice = calibrate(softmax_run, out, train=tiny_set[0], test=tiny_set[1], folds=1, device="cpu")
    assert len(choice.tried) == 1 + sum(map(len, GRIDS.values())) and choice.crossed is None
    assert choice.tried[choice.label]["AP"] == max(own["AP"] for own in choice.tried.values()) > 0
    assert len({own["AP"] for own in choice.tried.values()}) > 3
    assert set(choice.tested) >= {PLAIN, choice.label} and len(choice.tested) >= 6
    for method, strength in (("norcal", 0.5), ("fracal", 2.0), ("temperature", 2.0)):
        calibrate(softmax_run, out, method=method, strength=strength, train=tiny_set[0], overwrite=True)
        results = api.predict_to_results(out, tiny_set[0], None, tmp_path / "found", device="cpu")
        counts = api.train_counts(out, tiny_set[0])
        metrics = tailfin.evaluate(tiny_set[0], results["bbox"], "lvis", max_dets=20, train_counts=counts)
        name = next(name for name in choice.tried if name.startswith(method) and name.endswith(f" {strength:g}"))
        assert metrics["bbox"]["AP"] == pytest.approx(choice.tried[name]["AP"], abs=1e-4)


def test_folds_and_few_pictures(softmax_run, tmp_path, tiny_set):
    out = tmp_path / "calibrated.safetensors"
    options = {"method": "norcal", "folds": 3, "max_images": 12, "device": "cpu"}
    choice = calibrate(softmax_run, out, train=tiny_set[0], by="APr", f_loss=0.02, **options)
    plain, chosen = choice.crossed
    assert set(plain) == set(chosen) == {"AP", "APr", "APc", "APf"}
    folds = make_folds(tiny_set[0], tmp_path / "folds", folds=3, most=12)
    documents = [json.loads(file.read_text()) for file in folds.files]
    assert [len(document["images"]) for document in documents] == [4, 4, 4]
    assert sorted(folds.of_image) == sorted(image["id"] for document in documents for image in document["images"])
    rare = [sum(entry["category_id"] == 9 for entry in document["annotations"]) for document in documents]
    assert sum(rare) > 1 and max(rare) - min(rare) <= 1  # the rare class is dealt out


def test_the_choice():
    none = {"AP": 0.2, "APr": 0.1, "APc": -1.0, "APf": 0.3}
    folds = {
        PLAIN: [none, none],
        "norcal gamma 0.5": [{**none, "AP": 0.3, "APf": 0.25}, {**none, "AP": 0.21}],
        "norcal gamma 1": [{**none, "AP": 0.2}, {**none, "AP": 0.4, "APf": 0.1}],
    }
    label, means = choose(folds, Goal())
    assert label == "norcal gamma 1" and means[label]["AP"] == pytest.approx(0.3) and means[label]["APc"] == -1
    assert choose(folds, Goal(f_loss=0.05))[0] == "norcal gamma 0.5"
    assert choose(folds, Goal(f_loss=0.01))[0] == PLAIN
    plain, chosen = crossed(folds, Goal())
    # on the first fold what the second chooses (gamma 1: 0.2), on the second what the first does (0.5: 0.21)
    assert plain["AP"] == 0.2 and chosen["AP"] == pytest.approx(0.205)
    assert best_of_each(means, Goal()) == [PLAIN, "norcal gamma 1"]
    with pytest.raises(UserError, match="no class of this group"):
        choose(folds, Goal("APc"))
    with pytest.raises(UserError, match='did you mean "APr"'):
        Goal("AP_r")


def test_thresholds_are_stored_used_and_dropped(softmax_run, tmp_path, tiny_set):
    out, again = tmp_path / "points.safetensors", tmp_path / "again.safetensors"
    choice = calibrate(
        softmax_run, out, method="norcal", strength=0.4, holdout=tiny_set[1], thresholds="f1", device="cpu"
    )
    detector = tailfin.load(out, "cpu")
    assert detector.points.aim == "f1" and set(detector.points.points) == {"red", "green", "blue"}
    pictures = sorted(tiny_set[1].with_suffix("").glob("*.png"))
    everything, kept = detector.predict(pictures, score_threshold=0.0), detector.predict(pictures)
    for all_of_it, own in zip(everything, kept, strict=True):
        enough = all_of_it["scores"] >= detector.thresholds[all_of_it["labels"]]
        assert torch.equal(own["scores"], all_of_it["scores"][enough])
    assert 0 < sum(len(own["scores"]) for own in kept) < sum(len(own["scores"]) for own in everything)
    changed = calibrate(out, again, method="norcal", strength=0.2)
    assert "left out" in changed.dropped and tailfin.load(again).points is None and not choice.dropped
    calibrate(out, again, method="keep", thresholds="recall=0.5", holdout=tiny_set[1], overwrite=True, device="cpu")
    loaded = tailfin.load(again)
    assert loaded.recipe.calibration == NorCal(gamma=0.4) and loaded.points.aim == "recall=0.5"


def test_command(softmax_run, tmp_path, tiny_set):
    out = tmp_path / "calibrated.safetensors"
    words = ["calibrate", str(softmax_run), "--out", str(out), "--device", "cpu"]
    picked = ["--method", "norcal,temperature", "--thresholds", "f1", "--max-images", "8"]
    shown = CliRunner().invoke(app, [*words, "--train", str(tiny_set[0]), "--test", str(tiny_set[1]), *picked])
    assert shown.exit_code == 0, shown.output
    for text in ("cross-validated", "on the test pictures", "temperature value 0.5", "norcal gamma 0.1"):
        assert text in shown.output
    assert tailfin.load(out).points is not None
    assert "the choice was made on" not in shown.output
    same = ["--holdout", str(tiny_set[1]), "--test", str(tiny_set[1]), "--method", "norcal", "--overwrite"]
    assert (
        "test pictures are among those that the choice was made on" in CliRunner().invoke(app, [*words, *same]).output
    )
    again = CliRunner().invoke(app, [*words, "--gamma", "0.3", "--overwrite"])
    assert again.exit_code == 0 and tailfin.load(out).recipe.calibration == NorCal(gamma=0.3)
    undone = CliRunner().invoke(app, [*words[:1], str(out), *words[2:], "--undo", "--overwrite"])
    assert undone.exit_code == 0 and tailfin.load(out).recipe.calibration is None


def test_refusals(softmax_run, tmp_path, tiny_set):
    out = tmp_path / "calibrated.safetensors"
    by_hand = {"method": "norcal", "strength": 1}
    assert "--holdout" in refusal(softmax_run, out)
    assert "none of them negative" in refusal(softmax_run, out, method="norcal", strength=-1)
    assert "power needs rare, common, frequent" in refusal(softmax_run, out, method="power", strength="1,2")
    assert 'did you mean "norcal"' in refusal(softmax_run, out, method="norcall", strength=1)
    assert "one --method" in refusal(softmax_run, out, strength=1)
    assert "needs the training file" in refusal(softmax_run, out, method="fracal", strength=1)
    assert "ends in .safetensors" in refusal(softmax_run, tmp_path / "x.json", **by_hand)
    assert "does not exist" in refusal(tmp_path / "no.safetensors", out, **by_hand)
    assert "there is no aim" in refusal(softmax_run, out, train=tiny_set[0], thresholds="best")
    assert "a number above 0" in refusal(softmax_run, out, train=tiny_set[0], thresholds="recall=2")
    assert "--folds 99" in refusal(softmax_run, out, train=tiny_set[0], folds=99)
    assert not out.exists()
    out.write_text("mine")
    assert "add --overwrite" in refusal(softmax_run, out, **by_hand)
    assert out.read_text() == "mine"
