"""`tailfin calibrate RESULTS.json`: rows of scores, what they are taken for, classes by name, what cannot change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tailfin
from tailfin.calibrate.results import calibrate_results
from tailfin.calibration import norcal_foreground
from tailfin.cli.main import app
from tailfin.errors import UserError

CLASSES = ("frequent", "common", "rare")
SCORES = {  # on objects of a class, and on background
    "frequent": (0.7, 0.05, 0.05),
    "common": (0.3, 0.4, 0.1),
    "rare": (0.6, 0.05, 0.2),
    "": (0.1, 0.05, 0.22),
}


def annotation(number, image, category, box):
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(training file, validation file, results of a softmax in which the rare class stands behind the frequent one).

    The files number the classes differently: they are joined by name.
    """
    folder = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    train = {
        "images": [{"id": n, "file_name": f"t{n}.jpg", "width": 100, "height": 100} for n in range(1, 201)],
        "categories": [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(CLASSES)],
        "annotations": [],
    }
    for image in range(1, 201):
        for k, share in enumerate((1.0, 0.15, 0.02)):
            if image <= 200 * share:
                box = [float(v) for v in (*rng.uniform(0, 70, 2), 20, 20)]
                train["annotations"].append(annotation(len(train["annotations"]) + 1, image, 10 * (k + 1), box))
    val = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k + 1, "name": n} for k, n in enumerate(CLASSES[::-1])],
    }
    ids = {"frequent": 3, "common": 2, "rare": 1}
    results = []
    for image in range(1, 41):
        val["images"].append({"id": image, "file_name": f"v{image}.jpg", "width": 100, "height": 100})
        name = CLASSES[image % 3]
        for spot, own in ((0, name), (50, "")):  # an object, and background that looks like the rare class a little
            box = [spot, spot, 20 + image % 7, 20]
            if own:
                val["annotations"].append(annotation(len(val["annotations"]) + 1, image, ids[own], box))
            scores = dict(zip(CLASSES, SCORES[own], strict=True))
            for one, score in scores.items():
                score = float(score * rng.uniform(0.9, 1.0))
                results.append(
                    {"image_id": image, "category_id": ids[one], "bbox": box, "score": score, "more": "kept"}
                )
    paths = [folder / f"{name}.json" for name in ("train", "val", "results")]
    for path, document in zip(paths, (train, val, results), strict=True):
        path.write_text(json.dumps(document))
    return paths


def test_by_hand_as_norcal_on_rows(files, tmp_path):
    train, val, results = files
    out = tmp_path / "new.json"
    choice, kind = calibrate_results(results, out, train=train, holdout=val, method="norcal", strength=0.5)
    assert kind == "softmax" and choice.label == "norcal gamma 0.5" and set(choice.tried) == {"none", choice.label}
    before, after = json.loads(results.read_text()), json.loads(out.read_text())
    assert [{**b, "score": 0} for b in before] == [{**a, "score": 0} for a in after]  # scores alone change
    # the first box: three entries, frequent, common, rare; their training images are 200, 30 and 4
    row = np.array([[entry["score"] for entry in before[:3]]])
    expected = norcal_foreground(torch.from_numpy(row), [200, 30, 4], 0.5)[0]
    np.testing.assert_allclose([entry["score"] for entry in after[:3]], expected, rtol=1e-5)


def test_the_search_lifts_the_rare_class(files, tmp_path):
    train, val, results = files
    out = tmp_path / "new.json"
    choice, kind = calibrate_results(results, out, train=train, holdout=val, by="APr", folds=2)
    plain, chosen = choice.crossed
    assert chosen["APr"] > plain["APr"] + 0.1
    before, after = (tailfin.evaluate(val, file, "lvis", train_counts=train)["bbox"] for file in (results, out))
    assert after["APr"] > before["APr"] + 0.1


def test_vectors_in_the_entries(files, tmp_path):
    train, val, results = files
    entries = json.loads(results.read_text())
    rows = [
        {**entries[k + 2], "scores": [entries[k + place]["score"] for place in (2, 1, 0)]}
        for k in range(0, len(entries), 3)
    ]
    file, out = tmp_path / "vectors.json", tmp_path / "new.json"
    file.write_text(json.dumps(rows))
    calibrate_results(file, out, train=train, holdout=val, method="norcal", strength=0.5)
    calibrate_results(results, tmp_path / "single.json", train=train, holdout=val, method="norcal", strength=0.5)
    single = json.loads((tmp_path / "single.json").read_text())
    np.testing.assert_allclose(
        [entry["score"] for entry in json.loads(out.read_text())], [entry["score"] for entry in single[2::3]], rtol=1e-5
    )


def test_without_annotations_and_with_one_class_per_box(files, tmp_path):
    train, val, results = files
    entries = [{**entry, "bbox": [row, 0, 20, 20]} for row, entry in enumerate(json.loads(results.read_text()))]
    ids = {1: 30, 2: 20, 3: 10}  # the training file's
    for entry in entries:
        entry["category_id"] = ids[entry["category_id"]]
    file, out = tmp_path / "own.json", tmp_path / "new.json"
    file.write_text(json.dumps(entries))
    choice, kind = calibrate_results(file, out, train=train, method="logit_adjustment", strength=1)
    assert kind == "sigmoid" and choice.tried == {}
    before, after = (np.array([e["score"] for e in json.loads(path.read_text())]) for path in (file, out))
    rare = np.array([entry["category_id"] == 30 for entry in entries])
    odds = (after / (1 - after)) / (before / (1 - before))
    np.testing.assert_allclose(odds[rare], 234 / 4, rtol=1e-4)
    # and the command says that AP cannot change
    single = [entry for entry in json.loads(results.read_text()) if entry["category_id"] == 1]
    file.write_text(json.dumps(single))
    words = ["calibrate", str(file), "--out", str(out), "--train", str(train), "--holdout", str(val), "--overwrite"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "AP is the same for all" in shown.output, shown.output


def test_refusals(files, tmp_path):
    train, val, results = files
    out = tmp_path / "new.json"

    def refused(source=results, target=out, **options):
        with pytest.raises(UserError) as caught:
            calibrate_results(source, target, **{"train": train, "holdout": val, **options})
        return str(caught.value)

    def changed(row=1, **values):
        entries = json.loads(results.read_text())
        entries[row] |= values
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(entries))
        return path

    assert "ends in .json" in refused(target=tmp_path / "x.pt")
    assert "--holdout" in refused(holdout=None)
    assert 'did you mean "softmax"' in refused(kind="sofmax")
    assert "entry 1: score is 3" in refused(changed(score=3))
    assert "entry 0 has no scores" in refused(changed(scores=[1]))
    assert 'has no class "rar" (did you mean "rare"?)' in refused(
        changed(0, category_name="rar"), holdout=None, method="norcal", strength=1
    )
    assert "category_id 3 is not in" in refused(holdout=None, method="norcal", strength=1)
    assert not out.exists()
    assert "name another file" in refused(target=results, overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": [1]}, "entry 0, image_id"),
        ({"category_id": {}}, "entry 0, category_id"),
        ({"bbox": [[1], 2, 3, 4]}, "entry 0, bbox"),
        ({"category_id": "lorry"}, 'has no class "lorry"'),
        ({"file_name": {"a": 1}, "category_name": [1]}, ""),
        ({"category_id": 30, "label": "common"}, ""),
    ],
)
def test_entries_of_other_kinds(files, tmp_path, change, message):
    results, out = tmp_path / "odd.json", tmp_path / "out.json"
    entry = {"image_id": 1, "category_id": 10, "bbox": [1, 2, 3, 4], "score": 0.5}
    results.write_text(json.dumps([{**entry, **change}]), "utf-16")
    if not message:
        calibrate_results(results, out, train=files[0], method="norcal", strength=0.5)
        assert json.loads(out.read_text())[0].keys() == {*entry, *change}
        return
    with pytest.raises(UserError, match=message):
        calibrate_results(results, out, train=files[0], method="norcal", strength=0.5)
    assert not out.exists()


def test_text_of_another_encoding_and_deep_nesting(files, tmp_path):
    results = tmp_path / "odd.json"
    for content, message in (
        ('["Straße"]'.encode("latin-1"), "is not UTF-8 text"),
        (b"[" * 200_000, "nested|recursion"),
    ):
        results.write_bytes(content)
        with pytest.raises(UserError, match=message):
            calibrate_results(results, tmp_path / "out.json", train=files[0], method="norcal", strength=0.5)
