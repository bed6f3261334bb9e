"""The commands from end to end on a tiny set: what they write, and that their numbers agree with one another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import tailfin as package
from tailfin.cli.demo import DEMO_RECIPES
from tailfin.cli.doctor import EXTRAS
from tailfin.config import recipe_from_file
from tailfin.errors import UserError

LVIS_KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300", "ARs@300", "ARm@300", "ARl@300"]
COCO_KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
COCO_KEYS += ["AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl"]
SHORT = "schedule.epochs=0.2"  # two iterations


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def numbers(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


# ---- train -----------------------------------------------------------------------------------------------------------


def test_run_folder(trained):
    assert files(trained) == {
        "recipe.yaml",
        "environment.json",
        "model.safetensors",
        "results.bbox.json",
        "metrics.json",
        "report.html",
        "stages/1-train/model.safetensors",
        "stages/1-train/metrics.jsonl",
        "stages/1-train/last/state.pt",
        "stages/1-train/last/complete.json",
    }
    readable = 0o666 & ~_umask()
    assert {path.stat().st_mode & 0o777 for path in trained.rglob("*") if path.is_file()} == {readable}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_environment(trained, tiny_set):
    facts = json.loads((trained / "environment.json").read_text())
    assert {"command", "started", "seed", "commit", "versions", "platform", "devices", "data"} <= facts.keys()
    assert {"python", "tailfin", "torch", "torchvision", "accelerate", "numpy"} <= facts["versions"].keys()
    assert facts["devices"]["processes"] == 1
    assert facts["data"]["train_file"] == str(tiny_set[0])
    assert facts["data"]["train"] and facts["data"]["train"] != facts["data"]["val"]


def test_metrics_have_the_documented_shape(trained, tiny_set):
    metrics = numbers(trained)
    assert list(metrics) == ["protocol", "bbox", "per_category"]
    assert metrics["protocol"] == "lvis"
    assert list(metrics["bbox"]) == LVIS_KEYS
    assert all(value == -1 or 0 <= value <= 1 for value in metrics["bbox"].values())
    # the run has found something, so that equal numbers below mean something; 5 seeds gave 0.010 to 0.093
    assert metrics["bbox"]["AP"] > 0.001
    train = json.loads(tiny_set[0].read_text())
    for entry, category in zip(metrics["per_category"], train["categories"], strict=True):
        assert list(entry) == ["id", "name", "frequency", "image_count", "instance_count", "bbox"]
        assert (entry["id"], entry["name"]) == (category["id"], category["name"])
        own = [a for a in train["annotations"] if a["category_id"] == category["id"]]
        assert entry["instance_count"] == len(own)
        assert entry["image_count"] == len({a["image_id"] for a in own})
        assert entry["frequency"] == ("r" if entry["image_count"] <= 10 else "c")
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= entry["bbox"].keys()


def test_results_are_coco_results(trained, tiny_set):
    val = json.loads(tiny_set[1].read_text())
    results = json.loads((trained / "results.bbox.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in val["images"]}
    assert results
    assert {entry["category_id"] for entry in results} <= {3, 5, 9}
    for entry in results:
        assert entry.keys() == {"image_id", "category_id", "bbox", "score"}
        width, height = sizes[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width + 1e-2 and y + h <= height + 1e-2
        assert 1e-4 < entry["score"] <= 1
    pycocotools = pytest.importorskip("pycocotools.coco")
    assert len(pycocotools.COCO(str(tiny_set[1])).loadRes(results).getAnnIds()) == len(results)


def test_log_lines(trained):
    lines = [json.loads(line) for line in (trained / "stages/1-train/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    parts = ["loss_classifier", "loss_box_reg", "loss_rpn_objectness", "loss_rpn_box_reg"]
    assert all({"epoch", "lr", "loss", "images_per_second", "seconds", *parts} <= line.keys() for line in lines)
    assert all(line["loss"] == pytest.approx(sum(line[part] for part in parts)) for line in lines)
    assert lines[-1]["epoch"] == 5.0
    assert np.mean([line["loss"] for line in lines[-8:]]) < 0.8 * np.mean([line["loss"] for line in lines[:8]])


def test_model_file_says_what_it_is(trained):
    with safe_open(trained / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    recipe = recipe_from_file(trained / "recipe.yaml")
    from tailfin.config import check_recipe, parse_yaml

    assert check_recipe(parse_yaml(metadata["recipe"], "metadata"), "metadata") == recipe
    categories = json.loads(metadata["categories"])
    assert categories["names"] == ["red", "green", "blue"] and categories["category_ids"] == [3, 5, 9]
    assert len(json.loads(metadata["parents"])) == 1 and metadata["torch"] == str(torch.__version__)


def test_report_is_one_file(trained):
    page = (trained / "report.html").read_text()
    assert "green" in page and "APr" in page
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1", page))
    assert tags and not [tag for tag in tags if re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", tag)]


def test_recipe_reruns_as_it_is(tailfin, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the files in it are found from anywhere
    assert tailfin("train", trained / "recipe.yaml", "--out", "again").code == 0
    assert numbers(Path("again")) == numbers(trained)
    assert recipe_from_file("again/recipe.yaml") == recipe_from_file(trained / "recipe.yaml")
    before, after = load_file(trained / "model.safetensors"), load_file("again/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_train_names_a_run_folder(tailfin, tiny_recipe, tiny_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], SHORT)
        assert outcome.code == 0, outcome.err
        assert f"runs/tiny-{number}/model.safetensors" in outcome.out
    assert {path.name for path in Path("runs").iterdir()} == {"tiny-1", "tiny-2"}


def test_train_without_validation(tailfin, tiny_recipe, tiny_set, tmp_path):
    out = tmp_path / "run"
    outcome = tailfin("train", tiny_recipe, "--train", tiny_set[0], "--out", out, SHORT)
    assert outcome.code == 0, outcome.err
    assert {"model.safetensors", "report.html", "recipe.yaml", "environment.json"} <= files(out)
    assert not {"metrics.json", "results.bbox.json"} & files(out)
    outcome = tailfin("evaluate", out)
    assert outcome.code == 2 and "no validation set" in outcome.error


def test_overwrite(tailfin, tiny_recipe, tiny_set, tmp_path):
    out = tmp_path / "run"
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--out", out]
    assert tailfin(*train, SHORT).code == 0
    first = (out / "model.safetensors").read_bytes()
    assert tailfin(*train, SHORT, "seed=1", "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() != first
    assert recipe_from_file(out / "recipe.yaml").seed == 1


def test_weights_of_an_earlier_model(tailfin, trained, tiny_recipe, tiny_set, tmp_path, monkeypatch):
    """A learning rate of nearly 0 keeps what was loaded; another loss's classifier starts anew and the lines say so."""
    out = tmp_path / "run"
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--weights", trained / "model.safetensors", SHORT]
    outcome = tailfin(*train, "--out", out, "schedule.lr=1e-12", "schedule.weight_decay=0")
    assert outcome.code == 0, outcome.err
    assert "weights loaded" in outcome.err
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    trainable = [key for key in before if key.endswith(("weight", "bias"))]
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in trainable)
    monkeypatch.chdir(trained)
    train = ["train", tiny_recipe, "--train", tiny_set[0], "weights=model.safetensors", SHORT]
    outcome = tailfin(*train, "--out", tmp_path / "other", "loss=sigmoid")
    assert recipe_from_file(tmp_path / "other/recipe.yaml").weights == str(trained / "model.safetensors")
    assert "another shape: 2 (roi_heads.predictor.cls_score.bias" in outcome.err


def test_the_module_is_the_same_command(trained, tiny_set, tmp_path):
    results = tmp_path / "found.json"
    picture = tiny_set[1].with_suffix("") / "1.png"
    words = ["predict", str(trained), str(picture), "--out", str(results), "--score", "0"]
    done = subprocess.run([sys.executable, "-m", "tailfin", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(results.read_text())


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_numbers_of_the_run(tailfin, trained, tmp_path):
    outcome = tailfin("evaluate", trained, "--json", tmp_path / "numbers.json")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers(trained)
    model = ["evaluate", "--model", trained / "model.safetensors"]
    val = recipe_from_file(trained / "recipe.yaml").data.val.annotations
    assert tailfin(*model, "--annotations", val, "--json", tmp_path / "model.json").code == 0
    assert json.loads((tmp_path / "model.json").read_text()) == numbers(trained)
    results = ["evaluate", "--results", trained / "results.bbox.json", "--annotations", val]
    train = recipe_from_file(trained / "recipe.yaml").data.train.annotations
    assert tailfin(*results, "--train", train, "--json", tmp_path / "results.json").code == 0
    assert json.loads((tmp_path / "results.json").read_text()) == numbers(trained)


@pytest.mark.parametrize(
    "protocol, keys",
    [("coco", COCO_KEYS), ("lvis-fixed", None), ("groups", None)],
    ids=["coco", "lvis-fixed", "groups"],
)
def test_protocols(tailfin, trained, tmp_path, protocol, keys):
    outcome = tailfin("evaluate", trained, "--protocol", protocol, "--json", tmp_path / "numbers.json")
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "numbers.json").read_text())
    assert metrics["protocol"] == protocol
    if keys:
        assert list(metrics["bbox"]) == keys
    if protocol == "groups":
        assert {"AP1", "AP2", "AP3", "AP4"} <= metrics["bbox"].keys()
    if protocol == "lvis-fixed":
        assert "AR" in metrics["bbox"]


def test_other_ids_for_the_same_classes(tailfin, trained, tiny_set, edited, tmp_path):
    """Classes are matched by name: other ids in another order give the same numbers, under the file's ids."""
    other = {3: 70, 5: 20, 9: 40}

    def change(document):
        for entry in document["annotations"]:
            entry["category_id"] = other[entry["category_id"]]
        for entry in document["categories"]:
            entry["id"] = other[entry["id"]]
        document["categories"].reverse()

    val, images = edited(tiny_set[1], change), tiny_set[1].with_suffix("")
    outcome = tailfin("evaluate", trained, "--annotations", val, "--images", images, "--json", tmp_path / "other.json")
    assert outcome.code == 0, outcome.err
    found, expected = json.loads((tmp_path / "other.json").read_text()), numbers(trained)
    assert found["bbox"] == pytest.approx(expected["bbox"], abs=1e-9)  # classes are summed in another order
    assert {entry["name"]: {**entry, "id": 0} for entry in found["per_category"]} == {
        entry["name"]: {**entry, "id": 0} for entry in expected["per_category"]
    }
    assert {entry["name"]: entry["id"] for entry in found["per_category"]} == {"red": 70, "green": 20, "blue": 40}


def test_training_with_other_ids_in_the_validation_file(tailfin, tiny_recipe, tiny_set, edited, tmp_path):
    def change(document):
        for entry in document["annotations"] + document["categories"]:
            key = "category_id" if "category_id" in entry else "id"
            entry[key] = 10 - entry[key]

    train = ["train", tiny_recipe, "--train", tiny_set[0], "schedule.epochs=2", "schedule.lr=0.03"]
    val, images = edited(tiny_set[1], change), tiny_set[1].with_suffix("")
    assert tailfin(*train, "--val", tiny_set[1], "--out", tmp_path / "same").code == 0
    assert tailfin(*train, "--val", val, "--val-images", images, "--out", tmp_path / "other").code == 0
    assert numbers(tmp_path / "same")["bbox"] == numbers(tmp_path / "other")["bbox"]
    same, other = (json.loads((tmp_path / name / "results.bbox.json").read_text()) for name in ("same", "other"))
    assert [10 - entry["category_id"] for entry in same] == [entry["category_id"] for entry in other]


def test_python_evaluate(trained, tiny_set):
    metrics = package.evaluate(
        tiny_set[1], trained / "results.bbox.json", protocol="lvis", iou_type="bbox", train_counts=tiny_set[0]
    )
    assert metrics["bbox"] == numbers(trained)["bbox"]


# ---- predict ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tiny_set):
    return tiny_set[1].with_suffix("")


def test_predict_files_folders_and_globs(tailfin, trained, pictures, tmp_path):
    def found(*paths):
        outcome = tailfin("predict", trained, *paths, "--out", tmp_path / "found.json", "--overwrite", "--score", 0)
        assert outcome.code == 0, outcome.err
        return json.loads((tmp_path / "found.json").read_text())

    folder = found(pictures)
    assert folder == found(pictures / "*.png") == found(*sorted(pictures.iterdir()))
    assert folder == found(pictures / "0.png", pictures, pictures / "0.png")  # each picture once
    assert [entry["image_id"] for entry in folder] == sorted(entry["image_id"] for entry in folder)
    names = sorted(str(path) for path in pictures.iterdir())
    for entry in folder:
        assert entry.keys() == {"image_id", "category_id", "bbox", "score", "file_name", "category_name"}
        assert entry["file_name"] == names[entry["image_id"] - 1]
        assert {3: "red", 5: "green", 9: "blue"}[entry["category_id"]] == entry["category_name"]
    one = found(pictures / "1.png")
    assert [entry["score"] for entry in one] == pytest.approx(
        [entry["score"] for entry in folder if entry["image_id"] == 2], abs=1e-5
    )


def test_predict_agrees_with_the_results_of_the_run(tailfin, trained, pictures, tiny_set, tmp_path):
    """Same pictures, same weights: the boxes that evaluation saw, for pictures whose ids are their order."""
    words = ("--out", tmp_path / "found.json", "--batch", 1, "--score", 0)
    assert tailfin("predict", trained, pictures, *words).code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    run = json.loads((trained / "results.bbox.json").read_text())
    compared = 0
    for picture in json.loads(tiny_set[1].read_text())["images"]:
        name = "/" + picture["file_name"]
        own = np.array([_row(e) for e in found if e["file_name"].endswith(name) and e["score"] > 0.05])
        theirs = np.array([_row(e) for e in run if e["image_id"] == picture["id"] and e["score"] > 0.05])
        compared += len(own)
        if not len(own):
            assert not len(theirs)
            continue
        nearest = np.abs(own[:, None] - theirs).max(axis=2).argmin(axis=1)
        assert sorted(nearest) == list(range(len(theirs)))  # one to one
        assert np.allclose(own, theirs[nearest], atol=0.05)
    assert compared > 10


def _row(entry: dict) -> list[float]:
    return [*entry["bbox"], 100 * entry["score"], 1000 * entry["category_id"]]


def test_predict_options(tailfin, trained, pictures, tmp_path):
    def found(*options):
        words = ("--out", tmp_path / "found.json", "--overwrite", "--score", 0)
        outcome = tailfin("predict", trained, pictures, *words, *options)
        assert outcome.code == 0, outcome.err
        return json.loads((tmp_path / "found.json").read_text())

    everything = found("--max-dets", -1)
    per_picture = np.bincount([entry["image_id"] for entry in everything])
    assert per_picture.max() > 5
    few = found("--max-dets", 5)
    assert np.bincount([entry["image_id"] for entry in few]).max() == 5
    best = [e["score"] for e in everything if e["image_id"] == 1][:5]
    assert [e["score"] for e in few if e["image_id"] == 1] == best == sorted(best, reverse=True)
    chosen = found("--classes", "red, blue", "--max-dets", -1)
    assert chosen == [entry for entry in everything if entry["category_name"] in ("red", "blue")]


def test_predict_draws(tailfin, trained, pictures, tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("1.png", "deeper/1.png", "deeper/2.JPG"):
        Image.open(pictures / Path(name).with_suffix(".png").name).save(tmp_path / "in" / name)
    drawn = tmp_path / "drawn"
    words = ["predict", trained, tmp_path / "in", "--draw", drawn, "--out", tmp_path / "found.json", "--overwrite"]
    assert tailfin(*words, "--score", 0, "--draw-score", 0).code == 0
    assert files(drawn) == {"1.jpg", "1_2.jpg", "2.jpg"}
    marked = np.asarray(Image.open(drawn / "1.jpg")).astype(int)
    assert marked.shape == (360, 480, 3)  # a small picture is enlarged, so that labels leave room for what they name
    assert tailfin(*words, "--draw-score", 1).code == 0
    plain = np.asarray(Image.open(drawn / "1.jpg")).astype(int)
    source = np.asarray(Image.open(pictures / "1.png").convert("RGB").resize((480, 360))).astype(int)
    assert np.abs(plain - source).mean() < 12  # nothing reaches a score of 1
    assert np.abs(marked - source).mean() > np.abs(plain - source).mean() + 3


def test_predict_video(tailfin, trained, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    outcome = tailfin("predict", trained, path, "--out", tmp_path / "found.json", "--draw", tmp_path / "drawn")
    assert outcome.code == 0, outcome.err
    assert files(tmp_path / "drawn") == {"clip_0.jpg", "clip_1.jpg", "clip_2.jpg"}


class TestDetector:
    @pytest.fixture(scope="class")
    def detector(self, trained):
        return package.load(trained / "model.safetensors", "cpu")

    def test_loads_from_a_run_folder_too(self, trained, detector):
        assert package.load(trained, "cpu").names == detector.names == ["red", "green", "blue"]

    def test_types_and_shapes(self, detector, pictures):
        found = detector.predict([pictures / "0.png", str(pictures / "1.png")], max_dets=7)
        assert len(found) == 2
        for each in found:
            count = len(each["scores"])
            assert 0 < count <= 7
            assert each["boxes"].shape == (count, 4) and each["boxes"].dtype == torch.float32
            assert each["scores"].dtype == torch.float32 and each["labels"].dtype == torch.int64
            assert (each["scores"].diff() <= 0).all() and each["labels"].max() < 3
            assert (each["boxes"][:, 2:] >= each["boxes"][:, :2]).all()

    def test_every_kind_of_picture_is_the_same_picture(self, detector, pictures):
        path = pictures / "3.png"
        image = Image.open(path)
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        expected = detector.predict(path)[0]
        for picture in (image, array, tensor, tensor.float() / 255):
            found = detector.predict(picture)[0]
            assert torch.allclose(found["scores"], expected["scores"], atol=1e-3)  # floats are not rounded when resized
            assert found["labels"][0] == expected["labels"][0]
            assert torch.allclose(found["boxes"][0], expected["boxes"][0], atol=0.05)

    def test_limits_last_for_one_call(self, detector, pictures):
        path = pictures / "3.png"
        before = len(detector.predict(path)[0]["scores"])
        high = detector.predict(path, score_threshold=0.2)[0]["scores"]
        assert len(high) < before and (high > 0.2).all()
        assert len(detector.predict(path)[0]["scores"]) == before

    def test_threads_do_not_disturb_each_other(self, detector, pictures):
        """Two callers with limits of their own, at the same time: each gets what it asked for."""
        path = pictures / "3.png"
        alone = {limit: len(detector.predict(path, max_dets=limit)[0]["scores"]) for limit in (1, 9)}
        assert alone[1] < alone[9]

        def counts(limit):
            return limit, {len(detector.predict(path, max_dets=limit)[0]["scores"]) for _ in range(20)}

        with ThreadPoolExecutor(2) as pool:
            for limit, seen in pool.map(counts, (1, 9)):
                assert seen == {alone[limit]}

    def test_nothing_in_nothing_out(self, detector):
        assert detector.predict([]) == []

    def test_wrong_pictures(self, detector):
        for picture in (np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.float32), torch.zeros(1, 4, 5)):
            with pytest.raises(UserError, match="picture must be"):
                detector.predict([picture])


# ---- demo, doctor, recipes -------------------------------------------------------------------------------------------


def test_demo(tailfin, tmp_path, monkeypatch):
    """The demo's own path with smaller settings: the embedded set, two runs, one report."""
    from tailfin.data import synth

    make = synth.make_synthetic

    def fewer(out, **options):
        return make(out, **{**options, "images_train": 60, "images_val": 12, "classes": 6, "imbalance": 10.0})

    monkeypatch.setattr(synth, "make_synthetic", fewer)
    small = ["schedule.epochs=0.3", "data.sizes=[64]", "schedule.batch=8", "data.workers=0"]
    small.append("second.schedule.epochs=0.2")  # BACL's alone
    outcome = tailfin("demo", "--out", tmp_path / "demo", "--seed", 1, *small)
    assert outcome.code == 0, outcome.err
    assert len(DEMO_RECIPES) == 2 and "baseline" in DEMO_RECIPES
    runs = {f"{name}/metrics.json" for name in DEMO_RECIPES}
    assert {"report.html", "data/train.json", *runs} <= files(tmp_path / "demo")
    assert str(tmp_path / "demo" / "report.html") in outcome.out.replace("\n", "")
    for name in DEMO_RECIPES:
        assert name in outcome.out
        assert recipe_from_file(tmp_path / "demo" / name / "recipe.yaml").seed == 1
    second = recipe_from_file(tmp_path / "demo" / "bacl" / "recipe.yaml").second
    assert second is not None and second.schedule.epochs == 0.2


def test_doctor(tailfin):
    outcome = tailfin("doctor")
    assert outcome.code == 0, outcome.err
    for part in ("torch", "torchvision", "precision", "threads", "all that training needs is here"):
        assert part in outcome.out


def test_doctor_knows_every_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) == set(project["optional-dependencies"]) - {"dev"}


def test_version_and_help(tailfin):
    assert tailfin("--version").out == f"tailfin {package.__version__}\n"
    outcome = tailfin("train", "--help")
    assert outcome.code == 0 and "--dry-run" in outcome.out and "--resume" in outcome.out
