"""Masks through the whole line, before there is a mask head: from detections to results, numbers, drawings and report.

Two stand-ins give masks: one that knows the truth (perfect masks must score 1.0), and a box detector that puts an
ellipse into each of its boxes, which trains like any other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

import tailfin as package
from tailfin import api, evaluation, models
from tailfin.config import load_recipe
from tailfin.data.dataset import EvaluationDataset, Source
from tailfin.errors import UserError
from tailfin.evaluation import ResultWriter, merge_shards
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.report.matching import read_detections
from tailfin.run import Run
from tailfin.schema.data import Data

BOTH = {"evaluation.iou": ["bbox", "segm"]}


# ---- a set with masks of every kind ----------------------------------------------------------------------------------


def ellipse(box: list[int], height: int, width: int) -> np.ndarray:
    left, top, wide, tall = box
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - left - wide / 2) / (wide / 2)) ** 2 + ((y - top - tall / 2) / (tall / 2)) ** 2 <= 1
    return inside.astype(np.uint8)


def masked(document: dict[str, Any]) -> None:
    """Give every annotation an ellipse in its box: as compressed RLE, as counts, and as a polygon with 60 corners."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    for number, annotation in enumerate(document["annotations"]):
        height, width = sizes[annotation["image_id"]]
        mask = ellipse(annotation["bbox"], height, width)
        rle = coco_mask.encode(np.asfortranarray(mask))
        if number % 3 == 0:
            annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        elif number % 3 == 1:
            runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0)).tolist()
            annotation["segmentation"] = {"size": rle["size"], "counts": np.diff([0, *runs, mask.size]).tolist()}
        else:
            left, top, wide, tall = annotation["bbox"]
            angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
            corners = [left + wide / 2 * (1 + np.cos(angle)), top + tall / 2 * (1 + np.sin(angle))]
            annotation["segmentation"] = [np.stack(corners, axis=1).ravel().round(2).tolist()]
        annotation["area"] = float(mask.sum())


@pytest.fixture(scope="module")
def masked_set(tmp_path_factory: pytest.TempPathFactory, tiny_set: tuple[Path, Path]) -> tuple[Path, Path]:
    """The tiny set with masks."""
    folder = tmp_path_factory.mktemp("masked")
    for path in tiny_set:
        document = json.loads(path.read_text())
        masked(document)
        (folder / path.name).write_text(json.dumps(document))
        (folder / path.stem).symlink_to(path.with_suffix(""))
    return folder / "train.json", folder / "val.json"


# ---- a detector that knows the truth ---------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Recognises the pictures of a source by their pixels and gives their objects: boxes around the masks, and each
    mask as probabilities [n, cells, cells] within its box."""

    kinds = ("bbox", "segm")

    def __init__(self, source: Source, config: Data, cells: int) -> None:
        super().__init__()
        self.source, self.cells = source, cells
        pictures = EvaluationDataset(source, config)
        self.rows = {self.key(pictures[row][0]): row for row in range(len(pictures))}

    @staticmethod
    def key(image: torch.Tensor) -> str:
        return hashlib.sha1(image.contiguous().numpy().tobytes()).hexdigest()

    def forward(self, images: list[torch.Tensor], *_: object, **__: object) -> list[dict[str, torch.Tensor]]:
        return [self.truth(self.rows[self.key(image)], image.shape[-2:]) for image in images]

    def truth(self, row: int, size: torch.Size) -> dict[str, torch.Tensor]:
        index = self.source.index
        own = np.arange(index.offsets[row], index.offsets[row + 1])
        own = own[~index.crowd[own]]
        whole = index.segmentations().masks(own, row)
        boxes, probs = np.zeros((len(own), 4)), np.zeros((len(own), self.cells, self.cells))
        share = (np.arange(self.cells) + 0.5) / self.cells
        for place, mask in enumerate(whole):
            y, x = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            left, top, right, bottom = boxes[place] = x[0], y[0], x[-1] + 1, y[-1] + 1
            rows, columns = (top + share * (bottom - top)).astype(int), (left + share * (right - left)).astype(int)
            probs[place] = mask[rows][:, columns]
        scale = np.array([size[1] / whole.shape[2], size[0] / whole.shape[1]] * 2)
        labels = torch.from_numpy(index.labels[own].astype(np.int64))
        scores = torch.linspace(0.9, 0.5, len(own))
        found = {"boxes": torch.from_numpy(boxes * scale).float(), "scores": scores, "labels": labels}
        return {**found, "masks": torch.from_numpy(probs).float()}


def run_of(recipe: str | Path, files: tuple[Path, Path], out: Path, **changes: Any) -> Run:
    values = {"data.train.annotations": str(files[0]), "data.val.annotations": str(files[1]), **BOTH, **changes}
    return Run(load_recipe(recipe, values), out)


def perfect(metrics: dict[str, Any], *names: str) -> bool:
    return all(metrics["segm"][name] == pytest.approx(1.0) for name in ("AP", "AP50", "AP75", *names))


def test_perfect_masks_score_one(masked_set, tiny_recipe, tmp_path) -> None:
    """At another test size than the file's, in every protocol, for every kind of segmentation."""
    run = run_of(tiny_recipe, masked_set, tmp_path / "run", **{"data.sizes": [112], "data.max_size": 200})
    assert run.val is not None
    metrics = run.measure(Oracle(run.val, run.recipe.data, 256), keep=True)
    assert perfect(metrics, "AR@20") and metrics["bbox"]["AP50"] == pytest.approx(1.0)
    assert all(row["segm"]["AP"] in (-1, pytest.approx(1.0)) for row in metrics["per_category"])
    assert not (run.out / "results.shards").exists()
    for protocol in ("coco", "lvis-fixed"):
        again = package.evaluate(masked_set[1], run.out, protocol=protocol, iou_type="segm")
        assert perfect(again) and "bbox" not in again
    results = json.loads((run.out / "results.segm.json").read_text())
    boxes = json.loads((run.out / "results.bbox.json").read_text())
    assert [(e["image_id"], e["category_id"], e["score"]) for e in results] == [
        (e["image_id"], e["category_id"], e["score"]) for e in boxes
    ]
    run.measure(Oracle(run.val, run.recipe.data, 28))
    assert not list(run.out.glob("results.last.*"))


def test_perfect_masks_of_real_photographs(data_dir, tiny_recipe, tmp_path) -> None:
    folder = data_dir / "road12-masks-lt"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    document = json.loads((folder / "val.json").read_text())
    document["images"] = document["images"][:60]
    ids = {image["id"] for image in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in ids]
    (tmp_path / "val").symlink_to(folder / "val")
    (tmp_path / "val.json").write_text(json.dumps(document))
    files = (folder / "train.json", tmp_path / "val.json")
    run = run_of(tiny_recipe, files, tmp_path / "run", **{"data.sizes": [256], "data.max_size": 400})
    assert run.val is not None
    metrics = run.measure(Oracle(run.val, run.recipe.data, 320), keep=True)
    assert perfect(metrics)
    assert run.measure(Oracle(run.val, run.recipe.data, 28))["segm"]["AP"] > 0.85  # what 28 cells can show


def test_processes_write_what_one_writes(masked_set, tiny_recipe, tmp_path, train_on_ranks, monkeypatch) -> None:
    def measured(name: str) -> dict[str, Any]:
        run = run_of(tiny_recipe, masked_set, tmp_path / name)
        assert run.val is not None
        return run.measure(Oracle(run.val, run.recipe.data, 28), keep=True)

    # the scoring has threads of its own, which a forked process does not have; it reads the files that are compared
    monkeypatch.setattr(evaluation, "evaluate", lambda path, results, *_, **__: sorted(results))
    assert [measured("one"), *train_on_ranks(lambda rank: measured("two"))] == [["bbox", "segm"]] * 3
    for name in ("results.bbox.json", "results.segm.json"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes() and len(content) > 500


def test_results_without_detections(masked_set, tiny_recipe, tmp_path) -> None:
    class Blind(Oracle):
        def truth(self, row: int, size: torch.Size) -> dict[str, torch.Tensor]:
            return {key: value[:0] for key, value in super().truth(row, size).items()}

    run = run_of(tiny_recipe, masked_set, tmp_path / "run")
    assert run.val is not None
    metrics = run.measure(Blind(run.val, run.recipe.data, 28), keep=True)
    assert metrics["segm"]["AP"] == metrics["bbox"]["AP"] == 0
    assert json.loads((run.out / "results.segm.json").read_text()) == []


# ---- a box detector with ellipses ------------------------------------------------------------------------------------


class Ellipses(FasterRCNN):
    """A Faster R-CNN whose detections carry an ellipse; it learns no masks, but looks at what it is given to learn."""

    kinds = ("bbox", "segm")

    def forward(self, images: Any, targets: Any = None, *rest: Any, **options: Any) -> Any:
        if self.training:
            for image, target in zip(images, targets, strict=True):
                assert target["masks"].shape == (len(target["boxes"]), *image.shape[-2:])
                assert target["mask_valid"].dtype == torch.bool and target["mask_valid"].all()
            return super().forward(images, targets, *rest, **options)
        found: Any = super().forward(images, targets, *rest, **options)
        mask = torch.from_numpy(ellipse([0, 0, 28, 28], 28, 28)).float()
        return [{**each, "masks": mask.expand(len(each["boxes"]), 28, 28)} for each in found]


@pytest.fixture(scope="module", autouse=True)
def with_ellipses() -> Iterator[None]:
    """Every Faster R-CNN that is built here has them, unless a test says otherwise."""
    build = models.BUILDERS["faster_rcnn"]

    def ellipses(*arguments: Any) -> nn.Module:
        model = build(*arguments)
        model.__class__ = Ellipses
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BUILDERS, "faster_rcnn", ellipses)
        yield


@pytest.fixture
def boxes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ellipses, "kinds", ("bbox",))
    monkeypatch.setattr(Ellipses, "forward", FasterRCNN.forward)


CHANGES: dict[str, Any] = {
    **BOTH,
    "schedule.epochs": 4,
    "schedule.optimizer": "adamw",
    "schedule.lr": 0.004,
    "schedule.milestones": [3],
    "detector.roi_batch": 64,
    "evaluation.max_dets": 60,
    "evaluation.every": 2,
    "data.copy_paste": True,
}


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory, masked_set, tiny_recipe, with_ellipses) -> Path:
    """A finished run of the box detector with ellipses; read-only."""
    out = tmp_path_factory.mktemp("masked-run") / "run"
    return package.train(tiny_recipe, train=masked_set[0], val=masked_set[1], out=out, overrides=CHANGES)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_has_numbers_of_both_kinds(masked_run) -> None:
    metrics = read(masked_run / "metrics.json")
    assert metrics["bbox"]["AP50"] > 0.01 and metrics["segm"]["AP50"] > 0.01  # a seed gave 0.16
    assert {"bbox", "segm"} <= set(metrics["per_category"][0])
    lines = [json.loads(line) for line in (masked_run / "stages/1-train/metrics.jsonl").read_text().splitlines()]
    assert [set(line["eval"]) for line in lines if "eval" in line] == [{"bbox", "segm"}]
    assert not list(masked_run.glob("results.last.*"))
    entry = read(masked_run / "results.segm.json")[0]
    assert set(entry) == {"image_id", "category_id", "segmentation", "score"}


def test_evaluate_a_run_with_masks(tailfin, masked_run, masked_set, tmp_path) -> None:
    metrics = read(masked_run / "metrics.json")
    both = tailfin(
        "evaluate", masked_run, "--save", tmp_path / "kept", "--json", tmp_path / "both.json", "--max-dets", 60
    )
    assert both.code == 0, both.err
    assert read(tmp_path / "both.json") == metrics  # a run's own kinds
    assert tailfin("evaluate", masked_run, "--iou", "segm", "--json", tmp_path / "one.json").code == 0
    assert read(tmp_path / "one.json")["segm"] == metrics["segm"] and "bbox" not in read(tmp_path / "one.json")
    for name in ("results.bbox.json", "results.segm.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (masked_run / name).read_bytes()
    given = ("--results", tmp_path / "kept", "--annotations", masked_set[1], "--train", masked_set[0])
    outcome = tailfin(
        "evaluate", *given, "--iou", "bbox", "--iou", "segm", "--max-dets", 60, "--json", tmp_path / "f.json"
    )
    assert outcome.code == 0 and "segm" in outcome.out
    assert read(tmp_path / "f.json")["segm"] == metrics["segm"]


def test_predict_gives_masks(tailfin, masked_run, masked_set, tmp_path) -> None:
    picture = masked_set[1].with_suffix("") / "1.png"
    outcome = tailfin(
        "predict", masked_run, picture, "--out", tmp_path / "found.json", "--draw", tmp_path / "drawn", "--score", 0
    )
    assert outcome.code == 0, outcome.err
    entries = read(tmp_path / "found.json")
    assert entries
    detector = api.load(masked_run, "cpu")
    [found] = detector.predict([picture])
    masks = found["masks"]
    assert masks.dtype == torch.bool and masks.shape == (len(entries), 60, 80) == (len(found["boxes"]), 60, 80)
    for entry, mask in zip(entries, masks.numpy(), strict=True):
        assert np.array_equal(coco_mask.decode(entry["segmentation"]).astype(bool), mask)
        left, top, wide, tall = entry["bbox"]
        assert mask.sum() == pytest.approx(np.pi / 4 * wide * tall, rel=0.2, abs=8)
    assert detector.predict([picture], score_threshold=0.999)[0]["masks"].shape == (0, 60, 80)
    [rles] = detector.results([picture])
    assert [rle["counts"].decode() for rle in rles["rles"]] == [e["segmentation"]["counts"] for e in entries]
    in_file = [e for e in read(masked_run / "results.segm.json") if e["image_id"] == 101]
    assert [e["segmentation"]["counts"] for e in in_file] == [e["segmentation"]["counts"] for e in entries]
    assert (tmp_path / "drawn" / "1.jpg").is_file()


def test_drawn_masks_tint_the_picture(tailfin, masked_run, masked_set, tmp_path, monkeypatch) -> None:
    arguments = ("predict", masked_run, masked_set[1].with_suffix("") / "1.png", "--out", tmp_path / "found.json")

    words = ("--score", 0, "--draw-score", 0, "--max-dets", 1, "--overwrite")

    def drawn(name: str) -> np.ndarray:
        assert tailfin(*arguments, "--draw", tmp_path / name, *words).code == 0
        return np.asarray(Image.open(tmp_path / name / "1.jpg"), dtype=int)

    tinted = drawn("masks")
    monkeypatch.setattr(api.Detector, "results", without_masks(api.Detector.results))
    assert (np.abs(tinted - drawn("boxes")).max(axis=2) > 20).sum() > 100


def without_masks(results: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        return [
            {k: v for k, v in found.items() if k not in ("rles", "size")} for found in results(*arguments, **options)
        ]

    return call


def test_the_report_shows_masks(tailfin, masked_run, tmp_path) -> None:
    assert tailfin("report", masked_run, "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "Masks" in page and "mask AP" in page and "are not drawn" not in page
    copy = tmp_path / "run"
    shutil.copytree(masked_run, copy)
    (copy / "results.segm.json").write_text("[]")  # of other detections
    assert tailfin("report", copy, "--out", tmp_path / "other.html").code == 0
    other = (tmp_path / "other.html").read_text()
    assert "are not drawn" in other and "does not hold the masks of" in other
    sections = [text.partition('id="example-detections"')[2].partition("</section>")[0] for text in (page, other)]
    pictures = [set(re.findall(r"data:image/jpeg;base64,[^\"]+", text)) for text in sections]
    assert pictures[0] and not pictures[0] & pictures[1]


def test_report_reads_masks_beside_their_boxes(masked_run) -> None:
    found = read_detections(masked_run / "results.bbox.json", [101], masked_run / "results.segm.json")[101]
    assert found.masks is not None and len(found.masks) == len(found.boxes) > 0
    for box, mask in zip(found.boxes, coco_mask.decode(found.masks).transpose(2, 0, 1), strict=True):
        x = np.flatnonzero(mask.any(axis=0))
        assert not len(x) or (box[0] - 1 <= x[0] and x[-1] + 1 <= box[2] + 1)


def test_the_plan_asks_the_detector(tailfin, masked_set, tiny_recipe, tmp_path) -> None:
    arguments = ("train", tiny_recipe, "--train", masked_set[0], "--dry-run", "--out", tmp_path / "plan")
    assert tailfin(*arguments).code == 0
    assert (tmp_path / "plan-dry-run.jpg").is_file()


# ---- what is refused, and what is told -------------------------------------------------------------------------------


def test_boxes_only_is_refused_before_anything_runs(
    tailfin, boxes_only, masked_run, masked_set, tiny_recipe, tmp_path
) -> None:
    files = ("--train", masked_set[0], "--val", masked_set[1])
    for more in ((), ("--dry-run",)):
        outcome = tailfin("train", tiny_recipe, *files, "--out", tmp_path / "new", "evaluation.iou=[bbox,segm]", *more)
        assert outcome.code == 2 and "evaluation.iou: segm needs a detector with masks" in outcome.error
        assert not (tmp_path / "new").exists()
    outcome = tailfin("evaluate", masked_run, "--iou", "segm", "--save", tmp_path / "kept")
    assert outcome.code == 2 and "segm needs a detector with masks" in outcome.error
    assert not (tmp_path / "kept" / "results.bbox.json").exists()


def test_a_validation_file_without_masks_is_refused_before_training(
    tiny_set, masked_set, tiny_recipe, tmp_path
) -> None:
    with pytest.raises(
        UserError, match=r"val\.json: iou type segm needs the mask of every annotation: annotation 1 has"
    ):
        run_of(tiny_recipe, (masked_set[0], tiny_set[1]), tmp_path / "run")


def test_missing_masks_are_told_before_training(
    tailfin, masked_set, tiny_recipe, edited, tmp_path, monkeypatch
) -> None:
    def strip(document: dict[str, Any]) -> None:
        for annotation in document["annotations"][4:7]:
            del annotation["segmentation"]

    train = edited(masked_set[0], strip)
    images = ("--train-images", masked_set[0].with_suffix(""))
    monkeypatch.setattr(Ellipses, "forward", FasterRCNN.forward)
    outcome = tailfin("train", tiny_recipe, "--train", train, *images, "--out", tmp_path / "run", "schedule.epochs=1")
    assert outcome.code == 0, outcome.err
    assert "objects have none, first annotation 5, and count for their box alone" in outcome.out + outcome.err


def test_old_masks_do_not_stay_beside_new_boxes(tmp_path) -> None:
    rle = coco_mask.encode(np.asfortranarray(np.ones((4, 5), np.uint8)))
    for rles in ([rle], None):
        with ResultWriter(tmp_path / "shards") as writer:
            writer.add(1, [[0, 0, 4, 4]], [0.5], [1], rles)
        merge_shards(tmp_path / "shards", tmp_path / "results.bbox.json")
        assert (tmp_path / "results.segm.json").exists() == (rles is not None)
