"""Every kind of broken input ends in one message and exit code 2, without a traceback and with nothing half-written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

SHORT = "schedule.epochs=0.2"  # two iterations


def assert_mistake(outcome, *fragments: object) -> None:
    """Exit code 2, one `error:` line that has every fragment, and no traceback."""
    assert outcome.code == 2, outcome.err
    for fragment in fragments:
        assert str(fragment) in outcome.error
    assert "Traceback" not in outcome.err + outcome.out


def assert_refused(outcome, out: Path, *fragments: object) -> None:
    """A mistake that was found before anything was written: nothing but the message, no run folder."""
    assert_mistake(outcome, *fragments)
    assert outcome.err == outcome.error + "\n", outcome.err
    assert not out.exists()


def assert_stopped(outcome, out: Path, *fragments: object) -> None:
    """A mistake that was met while training: the run can be resumed, and nothing in it looks finished."""
    assert_mistake(outcome, *fragments)
    assert (out / "recipe.yaml").exists()
    assert not list(out.rglob("*.safetensors"))
    assert not (out / "metrics.json").exists()
    assert not [
        path for path in out.rglob("*") if path.name.startswith(".") or path.suffix in (".tmp", ".part", ".new")
    ]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied_set(tmp_path, tiny_set):
    """(train.json, its image folder), free to be broken."""
    shutil.copy(tiny_set[0], tmp_path / "train.json")
    shutil.copytree(tiny_set[0].with_suffix(""), tmp_path / "train")
    return tmp_path / "train.json", tmp_path / "train"


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_picture(tailfin, tiny_recipe, copied_set, out, workers):
    annotations, images = copied_set
    for path in images.glob("1*.png"):
        path.unlink()
    outcome = tailfin(
        "train", tiny_recipe, "--train", annotations, "--out", out, "schedule.epochs=1", f"data.workers={workers}"
    )
    assert_stopped(outcome, out, f"image {images}/1", ".png does not exist")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_picture(tailfin, tiny_recipe, copied_set, out, kind):
    annotations, images = copied_set
    for path in images.glob("*.png"):
        Image.open(path).save(path, format=kind)
        path.write_bytes(path.read_bytes()[:-400])
    outcome = tailfin("train", tiny_recipe, "--train", annotations, "--out", out, SHORT)
    assert_stopped(outcome, out, f"image {images}/", ".png is damaged: ")


def test_picture_of_another_size(tailfin, tiny_recipe, copied_set, out):
    annotations, images = copied_set
    for path in images.glob("*.png"):
        Image.open(path).resize((70, 50)).save(path)
    outcome = tailfin("train", tiny_recipe, "--train", annotations, "--out", out, SHORT)
    assert_stopped(outcome, out, f"image {images}/", "its size is 70 x 50, the annotation file says")


def test_oversized_picture(tailfin, tiny_recipe, copied_set, out):
    annotations, images = copied_set
    outcome = tailfin("train", tiny_recipe, "--train", annotations, "--out", out, SHORT, "data.max_pixels=4000")
    assert_stopped(outcome, out, f"image {images}/", "larger than the bound of 4,000 pixels")


def test_no_picture_at_all(tailfin, tiny_recipe, copied_set, out):
    annotations, images = copied_set
    for path in images.glob("*.png"):
        path.write_text("not a picture")
    outcome = tailfin("train", tiny_recipe, "--train", annotations, "--out", out, SHORT)
    assert_stopped(outcome, out, f"image {images}/", "no picture that can be read")


def test_missing_validation_picture_keeps_the_trained_weights(tailfin, tiny_recipe, tiny_set, tmp_path, out):
    shutil.copy(tiny_set[1], tmp_path / "val.json")
    shutil.copytree(tiny_set[1].with_suffix(""), tmp_path / "val")
    (tmp_path / "val" / "4.png").unlink()
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--val", tmp_path / "val.json", "--out", out, SHORT]
    outcome = tailfin(*train)
    assert_mistake(outcome, f"image {tmp_path}/val/4.png does not exist")
    assert (out / "model.safetensors").exists()
    assert not (out / "metrics.json").exists()
    # once the picture is there, resuming measures the weights that were kept
    shutil.copy(tiny_set[1].with_suffix("") / "4.png", tmp_path / "val")
    assert tailfin("train", "--resume", out).code == 0
    assert (out / "metrics.json").exists()


# ---- annotation files ------------------------------------------------------------------------------------------------


def _annotation(number, **fields):
    def change(document):
        document["annotations"][number].update(fields)

    return change


def _image(number, **fields):
    def change(document):
        document["images"][number].update(fields)

    return change


BROKEN_FILES = {
    "NaN box": (_annotation(2, bbox=[1, float("nan"), 5, 5]), ["annotation 3: bbox is [1, nan, 5, 5]"]),
    "negative width": (
        _annotation(2, bbox=[1, 1, -5, 5]),
        ["annotation 3: bbox [1.0, 1.0, -5.0, 5.0] has a negative size"],
    ),
    "three numbers": (_annotation(0, bbox=[1, 1, 5]), ["annotation 1: bbox is [1, 1, 5]", "four finite numbers"]),
    "duplicate image id": (_image(4, id=101), ["image id 101 is given twice"]),
    "duplicate annotation id": (_annotation(5, id=1), ["annotation id 1 is given twice"]),
    "unknown category": (_annotation(1, category_id=4), ["annotation 2: category_id 4 does not exist", "nearest"]),
    "dangling image id": (_annotation(1, image_id=7), ["annotation 2: image_id 7 does not exist", "id: 100"]),
    "text as id": (_annotation(1, image_id="100"), ['annotation 2: image_id is the text "100"']),
    "file name goes up": (_image(3, file_name="../secret.png"), ['image 103: file_name "../secret.png" leaves']),
    "absolute file name": (_image(3, file_name="/etc/picture.png"), ['image 103: file_name "/etc/picture.png" is abs']),
    "zero width": (_image(3, width=0), ["image 103: its size is 0 x"]),
    "a list": (lambda document: document["annotations"], ["holds a list, an object with"]),
    "no categories": (lambda document: document.pop("categories") and None, ['has no "categories"']),
    "no images": (lambda document: document["images"].clear(), ['"images" is empty']),
}


@pytest.mark.parametrize("change, fragments", BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_broken_annotation_file(tailfin, tiny_recipe, tiny_set, edited, out, change, fragments):
    broken = edited(tiny_set[0], change)
    images = tiny_set[0].with_suffix("")
    outcome = tailfin("train", tiny_recipe, "--train", broken, "--train-images", images, "--out", out)
    assert_refused(outcome, out, broken, *fragments)


def test_nothing_to_train_on(tailfin, tiny_recipe, tiny_set, edited, out):
    empty = edited(tiny_set[0], lambda document: document["annotations"].clear())
    images = tiny_set[0].with_suffix("")
    outcome = tailfin("train", tiny_recipe, "--train", empty, "--train-images", images, "--out", out)
    assert_mistake(outcome, f"{empty} has no image to train on")
    assert not out.exists()


@pytest.mark.parametrize(
    "content, fragment",
    [
        ("", "is empty"),
        ("hello", "is not valid JSON: unexpected 'hello' at line 1"),
        ('{"images": [', "ends too early"),
    ],
)
def test_no_json(tailfin, tiny_recipe, tmp_path, out, content, fragment):
    path = tmp_path / "train.json"
    path.write_text(content)
    assert_refused(tailfin("train", tiny_recipe, "--train", path, "--out", out), out, path, fragment)


def test_missing_annotation_file(tailfin, tiny_recipe, tiny_set, out):
    path = tiny_set[0].with_name("trian.json")
    outcome = tailfin("train", tiny_recipe, "--train", path, "--out", out)
    assert_refused(outcome, out, f'{path} does not exist (did you mean "train.json"?)')


def test_missing_image_folder(tailfin, tiny_recipe, tiny_set, out, tmp_path):
    missing = tmp_path / "pictures"
    outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], "--train-images", missing, "--out", out)
    assert_refused(outcome, out, f"image folder {missing} does not exist")


def test_no_annotations_given(tailfin, tiny_recipe, out):
    outcome = tailfin("train", tiny_recipe, "--out", out)
    assert_refused(outcome, out, "no train annotations: give --train FILE or data.train.annotations")


def test_other_categories_in_the_validation_file(tailfin, tiny_recipe, tiny_set, edited, out):
    val = edited(tiny_set[1], lambda document: document["categories"][1].update(name="greeen"))
    images = tiny_set[1].with_suffix("")
    outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], "--val", val, "--val-images", images, "--out", out)
    assert_refused(outcome, out, val, 'class "green" is not in the file (did you mean "greeen"?)')


def test_other_categories_at_evaluation(tailfin, trained, tiny_set, edited, tmp_path):
    def without_blue(document):
        document["categories"].pop()
        document["annotations"] = [a for a in document["annotations"] if a["category_id"] != 9]

    val = edited(tiny_set[1], without_blue)
    images, numbers = tiny_set[1].with_suffix(""), tmp_path / "numbers.json"
    outcome = tailfin("evaluate", trained, "--annotations", val, "--images", images, "--json", numbers)
    assert_mistake(outcome, val, 'the model\'s class "blue" is not in the file')
    assert not numbers.exists()


# ---- recipes and options ---------------------------------------------------------------------------------------------

WRONG_RECIPES = {
    "unknown key": (["schedul.epochs=2"], ['unknown key "schedul"', 'did you mean "schedule"']),
    "unknown nested key": (["schedule.epoch=2"], ['unknown key "schedule.epoch"', 'did you mean "epochs"']),
    "wrong type": (["schedule.epochs=many"], ["schedule.epochs", "valid number", "'many'"]),
    "out of range": (["data.flip=2"], ["data.flip", "less than or equal to 1"]),
    "no choice": (["data.resize=squared"], ['data.resize: "squared"', 'did you mean "square"']),
    "unknown loss": (["loss=softmx"], ['there is no loss "softmx"', 'did you mean "softmax"']),
    "unknown loss option": (["loss=focal", "loss.focal_gama=1"], ['no option "focal_gama"', '"focal_gamma"']),
    "wrong loss option": (["loss=focal", "loss.focal_gamma=-1"], ["focal_gamma must not be negative"]),
    "unknown sampler": (["sampler=rsf"], ["sampler.name", '"rsf"', '"rfs"']),
    "unknown tracker": (["logging.trackers=[tensorbord]"], ['there is no tracker "tensorbord"', "tensorboard"]),
    "batch and accumulation": (["schedule.accumulation=3"], ["batch 4 is not a multiple of accumulation 3"]),
    "frozen random norm": (["detector.norm=frozen_bn"], ["weights: none", 'detector.norm "frozen_bn"', '"bn" or "gn"']),
    "frozen random layers": (["detector.frozen_layers=2"], ["weights: none", "detector.frozen_layers"]),
    "anchors and levels": (["detector.anchor_sizes=[8]"], ["anchor_sizes needs one size per level: 2 levels, 1 sizes"]),
    "no key=value": (["schedule.epochs"], ['"schedule.epochs" is not an override: write key=value']),
    "value as section": (["seed.epochs=1"], ["seed"]),
    "zero detections": (["evaluation.max_dets=0"], ["max_dets must be positive, or -1"]),
    "masks of a box detector": (["evaluation.iou=[segm]"], ["segm"]),
}


@pytest.mark.parametrize("overrides, fragments", WRONG_RECIPES.values(), ids=WRONG_RECIPES.keys())
def test_wrong_recipe(tailfin, tiny_recipe, tiny_set, out, overrides, fragments):
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--val", tiny_set[1], "--out", out]
    assert_refused(tailfin(*train, *overrides), out, *fragments)


def test_unknown_recipe(tailfin, out):
    outcome = tailfin("train", "fod/faster_rcnn_r18_softmx", "--out", out)
    assert_refused(outcome, out, '"fod/faster_rcnn_r18_softmx"', 'did you mean "fod/faster_rcnn_r18_softmax"')


def test_published_row_without_data(tailfin, out, monkeypatch, tmp_path):
    """A row that runs says which file is missing; one that does not says why."""
    monkeypatch.chdir(tmp_path)
    from tailfin import recipes

    runnable = next(row.id for row in recipes.rows() if isinstance(recipes.resolve(row), recipes.Runnable))
    blocked = next(row.id for row in recipes.rows() if isinstance(recipes.resolve(row), recipes.Blocked))
    assert_refused(tailfin("train", runnable, "--out", out), out, "no training data is named", "--train FILE")
    assert_refused(tailfin("train", blocked, "--out", out), out, f"the published row {blocked} cannot be run, ")


def test_recipe_that_is_no_recipe(tailfin, out, tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    assert_refused(tailfin("train", path, "--out", out), out, f"{path} is not a recipe", "a list")
    path.write_text("seed: [1\n")
    assert_refused(tailfin("train", path, "--out", out), out, f"{path} is not valid YAML")


def test_usage(tailfin):
    assert_mistake(tailfin("trian"), "trian", "train")
    assert_mistake(tailfin("train", "--epochs", 2), "--epochs", "tailfin train --help")
    assert_mistake(tailfin("train"), "give a recipe, or --resume RUN")
    assert_mistake(tailfin("predict"), "model")
    assert_mistake(tailfin("predict", "model", "picture.png", "--batch", "many"), "--batch", "valid integer")


# ---- run folders -----------------------------------------------------------------------------------------------------


def test_run_folder_exists(tailfin, tiny_recipe, tiny_set, tmp_path):
    run = tmp_path / "old"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--out", run, SHORT]
    assert_mistake(tailfin(*train), f"--out {run} exists already", "--overwrite", "--resume")
    assert_mistake(tailfin(*train, "--overwrite"), f"{run} is not a run folder", "left as it is")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert_mistake(tailfin(*train[:-3], "--out", run / "notes.txt", SHORT), "is a file, a folder is needed")


def test_resume_without_a_run(tailfin, tmp_path, tiny_recipe):
    assert_mistake(tailfin("train", "--resume", tmp_path), f"--resume {tmp_path}: there is no run")
    assert_mistake(tailfin("train", "--resume", tmp_path / "nothing"), f"--resume {tmp_path}/nothing: there is no run")
    assert_mistake(tailfin("train", tiny_recipe, "--resume", tmp_path), "not both")
    assert_mistake(tailfin("train", "--resume", tmp_path, "--train", "x.json"), "as it was begun")


def test_resume_with_other_annotations(tailfin, tiny_recipe, tiny_set, edited, out):
    train = edited(tiny_set[0], lambda document: None)
    images = tiny_set[0].with_suffix("")
    outcome = tailfin("train", tiny_recipe, "--train", train, "--train-images", images, "--out", out, SHORT)
    assert outcome.code == 0, outcome.err
    edited(tiny_set[0], lambda document: document["annotations"].pop() and None)
    assert_mistake(tailfin("train", "--resume", out), f"{out} was begun with other training annotations than {train}")


# ---- weights and models ----------------------------------------------------------------------------------------------


def test_missing_weights(tailfin, tiny_recipe, tiny_set, tmp_path, out):
    weights = tmp_path / "weights.safetensors"
    outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], "--weights", weights, "--out", out)
    assert_refused(outcome, out, f"weights {weights} does not exist")


def test_weights_that_want_code(tailfin, tiny_recipe, tiny_set, tmp_path, out):
    weights = tmp_path / "weights.pth"
    torch.save({"conv1.weight": np.zeros(3), "hook": Path("x")}, weights)
    outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], "--weights", weights, "--out", out)
    assert_refused(outcome, out, f"weights {weights} cannot be read as plain tensors")


def test_weights_of_something_else(tailfin, tiny_recipe, tiny_set, tmp_path, out):
    weights = tmp_path / "weights.pth"
    torch.save({"encoder.weight": torch.zeros(3)}, weights)
    outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], "--weights", weights, "--out", out)
    assert_refused(outcome, out, f"{weights}: the weights do not fit the backbone", "encoder.weight")


def test_imagenet_offline(tailfin, tiny_recipe, tiny_set, monkeypatch, tmp_path, out):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--weights", "imagenet", "--out", out]
    file = Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name
    assert_refused(tailfin(*train), out, file, "no route to host", tmp_path / "hub" / "checkpoints", "weights=none")


@pytest.fixture
def picture(tiny_set):
    return tiny_set[1].with_suffix("") / "0.png"


def test_truncated_model(tailfin, trained, tmp_path, picture):
    model = tmp_path / "model.safetensors"
    whole = (trained / "model.safetensors").read_bytes()
    for size in (0, 5, 1000, len(whole) - 10):
        model.write_bytes(whole[:size])
        results = tmp_path / "found.json"
        outcome = tailfin("predict", model, picture, "--out", results)
        assert_mistake(outcome, f"{model} is not a readable safetensors file")
        assert not results.exists()


def with_metadata(model: Path, path: Path, **changes: str) -> Path:
    """A copy of a model file whose metadata says something else."""
    data = model.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    "value", ["", "[]", "null", '{"names": ["a"]}', "[" * 50_000, '{"aim": "f1", "classes": {"a": 1}}']
)
def test_metadata_of_a_model_that_says_something_else(tailfin, trained, tmp_path, picture, value):
    model, name = trained / "model.safetensors", tmp_path / "odd.safetensors"
    for key in ("recipe", "categories", *(["thresholds"] if value != "null" else [])):
        odd = with_metadata(model, name, **{key: value})
        outcome = tailfin("predict", odd, picture, "--out", tmp_path / "p.json")
        assert outcome.code == 2 and ("damaged" in outcome.error or "recipe" in outcome.error), (key, outcome.err)
    odd = with_metadata(model, name, calibration_before=value)
    outcome = tailfin("calibrate", odd, "--undo", "--out", tmp_path / "undone.safetensors", "--overwrite")
    assert outcome.code == (0 if value == "null" else 2), outcome.err


def test_pickle_as_model(tailfin, tmp_path, picture):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    for name, fragment in (("model.safetensors", "not a readable safetensors file"), ("model.pt", "a pickle is not")):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        outcome = tailfin("predict", tmp_path / name, picture, "--out", tmp_path / "found.json")
        assert_mistake(outcome, tmp_path / name, fragment)
        assert "executed" not in outcome.out


def test_model_of_another_program(tailfin, tmp_path, picture):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    outcome = tailfin("predict", tmp_path / "model.safetensors", picture, "--out", tmp_path / "found.json")
    assert_mistake(outcome, tmp_path / "model.safetensors", "was not written by tailfin")


def test_missing_model(tailfin, trained, tmp_path, picture):
    outcome = tailfin("predict", trained / "modle.safetensors", picture, "--out", tmp_path / "found.json")
    assert_mistake(outcome, f'{trained}/modle.safetensors does not exist (did you mean "model.safetensors"?)')
    assert_mistake(
        tailfin("evaluate", trained.with_name("rnu")), f"{trained.with_name('rnu')} is not a folder", '"run"'
    )


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_predict_on_nothing(tailfin, trained, tmp_path, picture):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "fake.png").write_text("x")
    (tmp_path / "empty").mkdir()
    results, drawings = tmp_path / "found.json", tmp_path / "drawn"
    for path, fragment in (
        (picture.with_name("00.png"), f'{picture.with_name("00.png")}: no such file, folder or glob (did you mean "'),
        (tmp_path / "*.jpg", f"{tmp_path}/*.jpg: no such file, folder or glob"),
        (tmp_path / "notes.txt", f"{tmp_path}/notes.txt: neither a picture nor a video"),
        (tmp_path / "fake.png", f"image {tmp_path}/fake.png is no picture that can be read"),
        (tmp_path / "empty", f"{tmp_path}/empty: there is no picture or video in this folder"),
    ):
        assert_mistake(tailfin("predict", trained, path, "--out", results, "--draw", drawings), fragment)
        assert not results.exists()


def test_predict_options(tailfin, trained, tmp_path, picture):
    common = ["predict", trained, picture, "--out", tmp_path / "found.json"]
    assert_mistake(tailfin(*common, "--classes", "red,gren"), '--classes: the model has no class "gren"', '"green"')
    assert_mistake(tailfin(*common, "--max-dets", 0), "--max-dets must be positive, or -1 for no limit (given: 0)")
    assert_mistake(tailfin(*common, "--device", "gpu"), 'device "gpu" cannot be used here')
    assert_mistake(tailfin(*common, "--score", 3), "--score")
    assert not (tmp_path / "found.json").exists()


def test_broken_results(tailfin, tiny_set, tmp_path):
    results = tmp_path / "found.json"
    results.write_text(json.dumps([{"image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 4], "score": 0.5}]))
    outcome = tailfin("evaluate", "--results", results, "--annotations", tiny_set[1])
    assert_mistake(outcome, results, "image_id 1")


def test_outputs_below_a_file_are_one_message(tailfin, trained, tiny_recipe, tiny_set, tmp_path, picture):
    file = tmp_path / "file.txt"
    file.write_text("x")
    train = ("train", tiny_recipe, "--train", tiny_set[0])
    for words in (
        (*train, "--out", file / "run"),
        (*train, "--dry-run", "--out", file / "run"),
        ("data", "merge", tiny_set[0], "--out", file / "new.json"),
        ("data", "convert", tiny_set[0], file / "new", "--to", "yolo"),
        ("predict", trained, picture, "--out", file / "p.json"),
        ("predict", trained, picture, "--out", tmp_path / "p.json", "--draw", file / "drawn"),
        ("calibrate", trained, "--undo", "--out", file / "m.safetensors"),
        ("export", trained, "--out", file / "m.pt2"),
    ):
        assert str(file) in tailfin(*words).error, words
    assert file.read_text() == "x"
