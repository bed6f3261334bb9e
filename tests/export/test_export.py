"""Exported files find what the models find: every detector as a graph, ONNX on real photos, torch.export, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tailfin
from tailfin import ClassStats
from tailfin.checkpoint import save_model
from tailfin.cli.main import app
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.evaluation.operating import OperatingPoints, Point
from tailfin.export.check import compare
from tailfin.export.graph import Graph, Settings
from tailfin.export.model import export
from tailfin.models import build_detector

ROOT = Path(__file__).parents[2]
NAMES = ["a", "b", "c", "d"]
STATS = ClassStats(image_count=[90, 40, 12, 3], instance_count=[90, 40, 12, 3], num_images=99, names=NAMES)
SMALL = "{norm: bn, frozen_layers: 0, fpn_channels: 16, anchor_sizes: [16, 32, 64, 128, 256], rpn_pre_nms: [200, 200],"
SMALL += " rpn_post_nms: [100, 100], head_channels: 32, %s}"
DENSE = "{norm: bn, frozen_layers: 0, fpn_channels: 64, head_convs: 1, %s}"
DETR = "{name: deformable_detr, norm: bn, frozen_layers: 0, widths: [32, 32, 32, 32, 32], blocks: [1, 1, 1, 1],"
DETR += " levels: 3, channels: 32, encoder_layers: 1, decoder_layers: 2, heads: 4, points: 2, feedforward: 32, %s}"
DETECTORS = {
    "faster_rcnn": (SMALL % "name: faster_rcnn", "softmax"),
    "faster_rcnn_mmdetection": (SMALL % "name: faster_rcnn, style: mmdetection, init: torchvision", "softmax"),
    "faster_rcnn_own_boxes": (SMALL % "name: faster_rcnn, box_regression: class_specific", "objectness"),
    "mask_rcnn": (SMALL % "name: mask_rcnn, mask_channels: 8, mask_layers: 1", "softmax"),
    "cascade_rcnn": (SMALL % "name: cascade_rcnn", "softmax"),
    "cascade_own_boxes": (SMALL % "name: cascade_rcnn, box_regression: class_specific, stage_mean: scores", "softmax"),
    "cascade_mask_rcnn": (SMALL % "name: cascade_rcnn, masks: true, mask_channels: 8, mask_layers: 1", "objectness"),
    "retinanet": (DENSE % "name: retinanet", "focal"),
    "atss": (DENSE % "name: atss", "focal"),
    "deformable_detr": (DETR % "queries: 40, two_stage: true, refine: true", "focal"),
    "deformable_detr_plain": (DETR % "queries: 40, two_stage: false, refine: false", "focal"),
}


def made(folder: Path, name: str, *overrides: str) -> Path:
    """A model file of random weights whose scores are spread out."""
    detector, loss = DETECTORS[name]
    recipe = folder / f"{name}.yaml"
    recipe.write_text(
        f"weights: none\nbackbone: resnet18\ndetector: {detector}\nloss: {loss}\n"
        "data: {resize: multiscale, sizes: [128], max_size: 200, workers: 0}\n"
    )
    resolved = load_recipe(recipe, list(overrides))
    torch.manual_seed(3)
    model, _ = build_detector(resolved, STATS, start=False)
    with torch.no_grad():
        for part, value in model.named_parameters():
            if part.endswith("cls_score.weight") or "head.classifier.weight" in part:
                value.normal_(0, 2.0 if part.endswith("cls_score.weight") else 0.3)
            elif part.endswith("cls_score.bias"):
                value.zero_()
            elif part.endswith("head.classifier.bias") or part.startswith("class_embed") and value.ndim == 1:
                value.fill_(-1.0)
            elif part.startswith("class_embed"):
                value.normal_(0, 0.3)
    path = folder / f"{name}.safetensors"
    save_model(path, model.eval(), resolved, STATS)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Structured pictures of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(160, 120), (120, 160), (90, 90)]):
        cells = rng.integers(0, 256, (height // 15, width // 15, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def tensors(folder: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("name", DETECTORS)
def test_the_graph_is_the_detector(tmp_path, photos, name):
    """In PyTorch, alone and as a batch of different sizes; with a threshold per class."""
    detector = tailfin.load(made(tmp_path, name), "cpu")
    thresholds = torch.tensor([0.05, 0.3, 0.02, 0.1])
    graph = Graph(detector.model, Settings(thresholds, 60, detector.model.limits.nms)).eval()
    with torch.inference_mode():
        agreement = compare(detector, thresholds, 60, graph, tensors(photos))
    assert agreement.detections >= 30 and agreement.missing == 0, str(agreement)
    assert agreement.scores < 1e-5 and agreement.pixels < 1e-2 and agreement.masks < 1e-4


def test_a_wrong_file_is_seen(tmp_path, photos):
    detector = tailfin.load(made(tmp_path, "retinanet"), "cpu")
    graph = Graph(detector.model, Settings(torch.full((4,), 0.05), 60, 0.5)).eval()

    def shifted(images, sizes):
        boxes, scores, labels = graph(images, sizes)
        return boxes, scores * 0.9, labels

    with torch.inference_mode():
        assert not compare(detector, torch.full((4,), 0.05), 60, shifted, tensors(photos)).good
        without = compare(detector, torch.full((4,), 0.05), 30, graph, tensors(photos))
    assert without.missing > 0 and not without.good


@pytest.mark.parametrize("name", ["faster_rcnn", "deformable_detr"])
def test_onnx_on_real_photos(tmp_path, data_dir, name):
    """Ten photos, calibration and thresholds inside, names in the metadata; and without torch."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    model = made(tmp_path, name, "calibration={name: norcal, gamma: 0.3}")
    point = Point(0.1, 9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.9, True)
    points = OperatingPoints("f1", dict.fromkeys(NAMES, point) | {"b": Point(0.2, *list(vars(point).values())[1:])})
    detector = tailfin.load(model, "cpu")
    save_model(model, detector.model, detector.recipe, STATS, thresholds=json.dumps(points.to_dict()))
    out = tmp_path / "model.onnx"
    folder = data_dir / "coco-sample" / "val"
    agreement = export(model, out, photos=[folder])
    assert agreement.photos == 10 and agreement.good and agreement.detections > 20
    described = json.loads(onnxruntime.InferenceSession(str(out)).get_modelmeta().custom_metadata_map["tailfin"])
    assert described["names"] == NAMES and described["calibration"] == {"name": "norcal", "gamma": 0.3}
    assert described["thresholds"] == {"a": 0.1, "b": 0.2, "c": 0.1, "d": 0.1}
    # the example, in a process that never sees torch, finds what the model finds
    photo = sorted(folder.iterdir())[0]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); import json, onnx_without_torch as e; "
        f"print(json.dumps(e.detect({str(out)!r}, {str(photo)!r}))); assert 'torch' not in sys.modules"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    wanted = tailfin.load(model, "cpu").predict(photo)[0]
    assert abs(len(found) - min(len(wanted["scores"]), 100)) <= 5  # resizing by Pillow differs by a grey level
    assert found[0][0] in NAMES and found[0][1] == pytest.approx(float(wanted["scores"][0]), abs=0.06)


def test_a_program_of_torch_export(tmp_path, photos):
    out = tmp_path / "model.pt2"
    few = ["detector.fpn_layers=[4]", "detector.fpn_convs=none"]  # levels: each makes the sizes harder to reason about
    model = made(tmp_path, "retinanet", "data.sizes=[288]", "data.max_size=400", *few)
    agreement = export(model, out, photos=[photos], score=0.1)
    assert agreement.good and agreement.detections > 10
    extra = {"tailfin.json": ""}
    torch.export.load(str(out), extra_files=extra)
    assert json.loads(extra["tailfin.json"])["names"] == NAMES


def test_a_detector_of_pictures_of_one_size(tmp_path, photos):
    """D-FINE knows no padding: its file takes one height and width, and pictures are stretched to it."""
    for package in ("onnx", "onnxruntime", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    small = "norm: own, frozen_layers: 0, channels: 32, heads: 4, feedforward: 32, queries: 10, encoder_channels: 32, "
    small += (
        "encoder_feedforward: 32, encoder_expansion: 0.5, decoder_layers: 2, levels: 2, encoder_depth: 0.34, bins: 8"
    )
    recipe = tmp_path / "d_fine.yaml"
    recipe.write_text(
        f"weights: none\nbackbone: timm/test_efficientnet\ndetector: {{name: d_fine, {small}, points: [2, 2]}}\n"
        "loss: eqfl\ndata: {resize: stretch, sizes: [64], workers: 0}\n"
    )
    for size in ([], ["data.resize=square"]):
        resolved = load_recipe(recipe, size)
        torch.manual_seed(3)
        model, _ = build_detector(resolved, STATS, start=False)
        with torch.no_grad():
            for part, value in model.named_parameters():
                if "class_embed" in part or "enc_score_head" in part:
                    value.normal_(0, 0.3)
        path = tmp_path / "model.safetensors"
        save_model(path, model.eval(), resolved, STATS)
        if size:
            with pytest.raises(UserError, match="pictures of one size, data.resize: stretch; its recipe has square"):
                export(path, tmp_path / "other.onnx", photos=[photos])
        else:
            agreement = export(path, tmp_path / "model.onnx", photos=[photos])
            assert agreement.good and agreement.detections > 20
            with pytest.raises(UserError, match="is written as .onnx or .xml"):
                export(path, tmp_path / "model.pt2", photos=[photos])


def test_openvino(tmp_path, photos):
    pytest.importorskip("openvino", reason="openvino is not installed")
    agreement = export(made(tmp_path, "retinanet"), tmp_path / "model.xml", photos=[photos])
    assert agreement.good and (tmp_path / "model.bin").is_file()


def test_command_and_refusals(tmp_path, photos):
    model, out = made(tmp_path, "retinanet"), tmp_path / "model.onnx"

    def refused(*arguments, **options):
        with pytest.raises(UserError) as caught:
            export(*arguments, **options)
        return str(caught.value)

    assert "the ending says" in refused(model, tmp_path / "model.onx")
    assert "are not there to check" in refused(model, out)
    assert "between 0 and 1" in refused(model, out, score=2)
    assert not out.exists()
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = made(tmp_path, "cascade_mask_rcnn")
    words = ["export", str(model), "--out", str(out), "--photos", str(photos), "--max-dets", "20"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "detections on 3 photos, 0 different" in shown.output, shown.output
    assert "add --overwrite" in refused(model, out, photos=[photos])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
