"""`tailfin export`: a trained model to a file for other programs, compared with the model on photos before it is there.

    export("RUN", "model.onnx")         ONNX; batch, height and width may be any; checked with onnxruntime
    export("RUN", "model.pt2")          a program of `torch.export`
    export("RUN", "model.xml")          OpenVINO, through its own converter from the ONNX file

The file says what it needs to be used (`facts`): names, test size, thresholds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailfin.api import Detector, load
from tailfin.data.dataset import to_test_size
from tailfin.data.images import read_image
from tailfin.data.index import image_folder, open_index
from tailfin.errors import UserError, nearest
from tailfin.export.check import Agreement, compare
from tailfin.export.graph import Graph, Settings, fixed_size
from tailfin.files import writing
from tailfin.pictures import find_pictures
from tailfin.version import __version__

SUFFIXES = (".onnx", ".pt2", ".xml")
OPSET = 17
SCORE = 0.05
PHOTOS = 10
KEY = "tailfin"  # of the facts, in ONNX's metadata and in a program's extra files
Run = Callable[[Tensor, Tensor], Sequence[Tensor]]


def export(
    model: str | Path,
    out: str | Path,
    *,
    score: float | None = None,
    max_dets: int = 100,
    photos: Sequence[str | Path] | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> Agreement | None:
    """Write the model to `out`, whose ending says how; returns how the file agrees with the model.

    Args:
        model: model file or run folder.
        score: detections count from this score on; without it the operating points of the model, where it has some,
            else 0.05.
        max_dets: detections per picture, a fixed number in the file.
        photos: pictures, folders or globs to compare on; by default those that the run was validated or trained on.
        check: compare on up to ten photos; a file that does not agree is not written.
        overwrite: replace an existing file.
    """
    target = Path(out)
    if target.suffix not in SUFFIXES:
        raise UserError(f"--out {target}: the ending says what is written{nearest(target.suffix, SUFFIXES)}")
    if target.exists() and not overwrite:
        raise UserError(f"--out {target} exists already; add --overwrite to replace it")
    if max_dets < 1:
        raise UserError(f"--max-dets must be positive (given: {max_dets})")
    if score is not None and not 0 < score < 1:
        raise UserError(f"--score must lie between 0 and 1 (given: {score})")
    _needed(target.suffix, check)
    detector = load(model, "cpu")
    detector.limits()  # a detector without classes is refused here
    pictures = _photos(detector, photos) if check else []
    own = detector.thresholds if score is None else None
    thresholds = own if own is not None else torch.full((len(detector.names),), SCORE if score is None else score)
    fixed = fixed_size(detector.model, detector.recipe.data)
    if fixed and target.suffix == ".pt2":
        raise UserError(f"--out {target}: a detector for pictures of one size is written as .onnx or .xml")
    graph = Graph(detector.model, Settings(thresholds, max_dets, detector.model.limits.nms)).eval()
    described = facts(detector, thresholds, max_dets)
    agreement = None
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent)
    with temporary as folder:
        made = Path(folder) / target.name
        if target.suffix == ".pt2":
            _program(graph, made, described)
            run = _run_program(made)
        else:
            onnx_file = made.with_suffix(".onnx")
            _onnx(graph, onnx_file, described, fixed)
            run = _run_onnx(onnx_file) if check else _unused
            if target.suffix == ".xml":
                _openvino(onnx_file, made, described)
                onnx_file.unlink()
                run = _run_openvino(made)
        if check:
            agreement = compare(detector, thresholds, max_dets, run, pictures)
            if not agreement.good:
                raise UserError(f"the exported file does not agree with the model, nothing is written: {agreement}")
        with writing(target):
            for file in sorted(Path(folder).iterdir()):
                shutil.move(file, target.parent / file.name) if file.is_dir() else os.replace(  # noqa: PTH105
                    file, target.parent / file.name
                )
    return agreement


def facts(detector: Detector, thresholds: Tensor, most: int) -> dict[str, Any]:
    """What a program needs beside the graph, as plain values."""
    short, bound = detector.recipe.data.inference_size
    calibration = detector.recipe.calibration
    return {
        "tailfin": __version__,
        "recipe": detector.recipe.name,
        "detector": detector.recipe.detector.name,
        "names": detector.names,
        "category_ids": detector.stats.category_ids.tolist(),
        "images": "uint8 [batch, 3, height, width], RGB, resized (short side, or less where the long side would pass "
        "its bound), padded right and below",
        "sizes": "int64 [batch, 2], height and width of each picture in the batch",
        "short_side": short,
        "long_side": bound,
        "stretched": detector.recipe.data.resize == "stretch",  # both sides become the short one
        "max_dets": most,
        "thresholds": dict(zip(detector.names, (round(value, 6) for value in thresholds.tolist()), strict=True)),
        "calibration": None if calibration is None else calibration.model_dump(mode="json"),
    }


# ---- the kinds of files ----------------------------------------------------------------------------------------------


def example(detector_size: tuple[int, int] = (320, 256)) -> tuple[Tensor, Tensor]:
    """A batch to trace with: two pictures of different sizes."""
    height, width = detector_size
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([[height, width - 16], [height - 32, width]])


def outputs_of(graph: Graph) -> list[str]:
    """Names of what the graph returns."""
    return ["boxes", "scores", "labels", *(["masks"] if "segm" in graph.detector.kinds else [])]


def _onnx(graph: Graph, path: Path, described: dict[str, Any], fixed: tuple[int, int] | None) -> None:
    import onnx

    names = outputs_of(graph)
    sides = {} if fixed else {2: "height", 3: "width"}
    axes = {"images": {0: "batch", **sides}, "sizes": {0: "batch"}}
    axes |= {name: {0: "batch"} for name in names}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, about values that are constants here as they should be
        torch.onnx.export(
            graph,
            example(fixed) if fixed else example(),
            str(path),
            input_names=["images", "sizes"],
            output_names=names,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,  # the graph of the newer exporter is bound to the sizes that it has seen
        )
    model = onnx.load(str(path))
    for key, value in {KEY: json.dumps(described), "names": json.dumps(described["names"])}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        found = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        return [torch.from_numpy(value) for value in found]

    return run


def _program(graph: Graph, path: Path, described: dict[str, Any]) -> None:
    batch, height, width = (torch.export.Dim.DYNAMIC for _ in range(3))  # type: ignore[attr-defined]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            graph, example(), dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch}), strict=False
        )
        torch.export.save(program, str(path), extra_files={f"{KEY}.json": json.dumps(described)})


def _run_program(path: Path) -> Run:
    program = torch.export.load(str(path)).module()

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        try:
            with torch.inference_mode():
                return list(program(images, sizes))
        except AssertionError as error:  # of its guards: a level with one cell is another program
            height, width = images.shape[2:]
            raise UserError(
                f"the program does not take pictures of {height} x {width} pixels, only larger ones "
                f"({' '.join(str(error).split())[:160]})"
            ) from None

    return run


def _openvino(onnx_file: Path, path: Path, described: dict[str, Any]) -> None:
    import openvino

    model = openvino.convert_model(str(onnx_file))
    model.set_rt_info(json.dumps(described), [KEY])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _run_openvino(path: Path) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        found = compiled({"images": images.numpy(), "sizes": sizes.numpy()})
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return run


def _unused(images: Tensor, sizes: Tensor) -> list[Tensor]:
    return []


# ---- what is needed --------------------------------------------------------------------------------------------------


def _needed(suffix: str, check: bool) -> None:
    """Refuse before any work what a package is missing for."""
    packages = {".onnx": ["onnx"], ".pt2": [], ".xml": ["onnx", "openvino"]}[suffix]
    if check and suffix == ".onnx":
        packages = [*packages, "onnxruntime"]
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            extra = "openvino" if package == "openvino" else "export"
            raise UserError(f"writing {suffix} needs {package}: pip install 'tailfin[{extra}]'") from None


def _photos(detector: Detector, given: Sequence[str | Path] | None) -> list[Tensor]:
    """Up to ten photos at test size: those that are named, else of the run's validation or training set."""
    data = detector.recipe.data
    files: list[Path] = []
    if given:
        files = find_pictures(given)
    else:
        for part in (data.val, data.train):
            annotations = Path(data.root) / part.annotations
            if part.annotations and annotations.is_file():
                folder = image_folder(annotations, Path(data.root) / part.images if part.images else None)
                index = open_index(annotations)
                files = [folder / index.file_name(row) for row in range(min(len(index), PHOTOS))]
                break
        if not files:
            raise UserError(
                "the pictures of the run are not there to check the file on: name some (--photos FOLDER), or go "
                "without (--no-check)"
            )
    step = max(1, len(files) // PHOTOS)
    arrays = [
        read_image(file, max_pixels=data.max_pixels, value_range=data.value_range) for file in files[::step][:PHOTOS]
    ]
    return [to_test_size(torch.from_numpy(array).permute(2, 0, 1).contiguous(), data) for array in arrays]
