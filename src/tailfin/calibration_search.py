"""NorCal's strength for a trained detector (`tailfin calibrate`): a model file in, a model file out.

Only the recipe in the file changes (`calibration`), the weights are the same; the class counts are those of its
training, which the file carries. The strength gamma is given, or the one with the best AP on training pictures, as in
the paper.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from tailfin import evaluation
from tailfin.api import load
from tailfin.checkpoint import content_hash, load_model_file, save_model
from tailfin.data.dataset import Source, evaluation_loader
from tailfin.data.document import load_document, positions, subset
from tailfin.data.index import image_folder, open_index
from tailfin.errors import UserError
from tailfin.evaluation.results import ResultWriter
from tailfin.files import existing_file, write_json
from tailfin.inference import category_ids_for, counts_by_id, picture_scale
from tailfin.models.detector import Detector
from tailfin.models.rescoring import NorCal
from tailfin.progress import Progress
from tailfin.samplers.class_aware import class_aware_order
from tailfin.schema.calibration import NorCal as Calibration
from tailfin.schema.data import Data
from tailfin.schema.recipe import Evaluation
from tailfin.stats import ClassStats

GAMMAS = tuple(step / 10 for step in range(11))


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    gamma: float | None = None,
    train: str | Path | None = None,
    train_images: str | Path | None = None,
    max_images: int = 1000,
    overwrite: bool = False,
    device: str | None = None,
) -> tuple[float, dict[float, float]]:
    """Write the calibrated model to `out`; returns gamma and the AP of every gamma that was tried (none where given).

    Args:
        model: model file or run folder of a Faster R-CNN whose scores are a softmax.
        gamma: strength; without it `train` is needed.
        train, train_images: training annotations and the folder of their pictures.
        max_images: so many of them are looked at, drawn class by class where there are more.
    """
    path, target = Path(model), Path(out)
    path = existing_file(path / "model.safetensors" if path.is_dir() else path, "model")
    if target.suffix != ".safetensors" or target.is_dir():
        raise UserError(f"--out {target} must be a file that ends in .safetensors")
    if target.exists() and not overwrite:
        raise UserError(f"--out {target} exists already; add --overwrite to replace it")
    if gamma is None and train is None:
        raise UserError("give the strength (--gamma 0.6), or training annotations (--train FILE) to find the best one")
    if gamma is not None and not 0 <= gamma < float("inf"):
        raise UserError(f"--gamma must not be negative (given: {gamma})")
    detector = load(path, device)
    plain = detector.model
    if plain.loss is None:
        raise UserError(f"model {path}: {detector.recipe.detector.name} has no softmax scores to calibrate")
    NorCal(detector.stats, plain.loss, gamma=0.0)  # refuses other scores before any work is done
    tried: dict[float, float] = {}
    if gamma is None:
        assert train is not None
        limits = detector.recipe.evaluation
        candidates = {value: NorCal(detector.stats, plain.loss, gamma=value).to(detector.device) for value in GAMMAS}
        with tempfile.TemporaryDirectory() as folder:
            annotations = _some_images(train, max_images, detector.recipe.seed, Path(folder))
            source = Source(open_index(annotations), image_folder(train, train_images))
            _detect(plain, source, detector.recipe.data, detector.names, candidates, Path(folder), limits.batch)
            tried = {
                value: _precision(annotations, Path(folder) / str(value), limits, detector.stats) for value in GAMMAS
            }
        gamma = max(tried, key=lambda value: (tried[value], -value))
    file = load_model_file(path)
    recipe = file.recipe.model_copy(update={"calibration": Calibration(gamma=gamma)})
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(target, plain, recipe, file.stats, parents=[content_hash(path)])
    return gamma, tried


@torch.inference_mode()
def _detect(
    model: Detector,
    source: Source,
    config: Data,
    names: list[str],
    candidates: dict[float, NorCal],
    folder: Path,
    batch: int,
) -> None:
    """Detections under every candidate, from one pass of the network, as shards in `folder/<gamma>`."""
    ids = category_ids_for(names, source.index)
    model.eval()
    device = next(model.parameters()).device
    with ExitStack() as stack:
        loader = stack.enter_context(closing(evaluation_loader(source, config, batch=batch, rank=0, processes=1)))
        writers = {value: stack.enter_context(ResultWriter(folder / str(value))) for value in candidates}
        progress = stack.enter_context(Progress("calibration", len(source.index)))
        done = 0
        for images, rows in loader:
            seen = model.outputs([image.to(device) for image in images])
            for value, rescore in candidates.items():
                model.rescore = rescore
                found = model.detections(seen, model.limits)
                for image, row, output in zip(images, rows, found, strict=True):
                    boxes = output["boxes"].cpu().numpy() * picture_scale(image.shape[-2:], source.index, row)
                    labels, scores = output["labels"].cpu().numpy(), output["scores"].cpu().numpy()
                    writers[value].add(int(source.index.image_ids[row]), boxes, scores, ids[labels])
            done += len(rows)
            progress.update(done)


def _precision(annotations: Path, shards: Path, limits: Evaluation, stats: ClassStats) -> float:
    metrics = evaluation.evaluate(
        annotations,
        shards,
        limits.protocol,
        "bbox",
        max_dets=limits.max_dets if limits.protocol == "lvis" else None,
        group_bounds=limits.group_bounds,
        train_counts=counts_by_id(stats, open_index(annotations)),
    )
    return float(metrics["bbox"]["AP"])


def _some_images(train: str | Path, most: int, seed: int, folder: Path) -> Path:
    """The file itself, or a smaller one with at most so many of its annotated pictures, each class's in turn."""
    document = load_document(existing_file(train, "train annotations"))
    image_of, class_of = positions(document)
    if len(np.unique(image_of)) == 0:
        raise UserError(f"{train} has no annotation to calibrate on")
    if len(document["images"]) <= most:
        return Path(train)
    order = class_aware_order(image_of, class_of, 4 * most, np.random.default_rng([seed, 6]))
    _, first = np.unique(order, return_index=True)
    chosen = np.zeros(len(document["images"]), dtype=bool)
    chosen[order[np.sort(first)[:most]]] = True
    path = folder / "images.json"
    write_json(path, subset(document, chosen, chosen[image_of]))
    return path
