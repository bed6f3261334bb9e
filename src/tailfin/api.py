"""The Python interface: train, load, predict, evaluate.

import tailfin
tailfin.train("fod/faster_rcnn_r18_softmax", train="train.json", val="val.json", out="RUN")
detector = tailfin.load("RUN/model.safetensors")
detections = detector.predict(["photo.jpg"])      # [{"boxes", "scores", "labels"(, "masks")}]
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tailfin import evaluation
from tailfin.checkpoint import load_model_file
from tailfin.coco_form import converted, with_coco_files
from tailfin.config import check_data_is_named, load_recipe, recipe_from_file
from tailfin.data.dataset import Source, to_test_size
from tailfin.data.index import image_folder, open_index
from tailfin.data.layouts import as_given
from tailfin.errors import UserError, nearest
from tailfin.evaluation.operating import OperatingPoints
from tailfin.evaluation.results import merge_shards, result_files
from tailfin.files import existing_file
from tailfin.inference import counts_by_id
from tailfin.mask_encoding import decode_masks, encode_masks
from tailfin.pictures import Picture, to_tensor
from tailfin.processes import default_device, usable_device
from tailfin.progress import Progress
from tailfin.schema.backbones import NAMED_WEIGHTS
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats
from tailfin.weights import load_whole

if TYPE_CHECKING:
    from tailfin import models
    from tailfin.models.detector import Limits

THRESHOLDS = "thresholds"  # metadata of a model file: operating points, as JSON


class Detector:
    """A trained detector with its classes. `names` are in label order, `category_ids` the training file's ids.

    `points` are its operating points, where `tailfin calibrate --thresholds` has stored some.
    """

    def __init__(
        self,
        model: models.Detector,
        recipe: Recipe,
        stats: ClassStats,
        device: torch.device,
        points: OperatingPoints | None = None,
    ) -> None:
        self.model: models.Detector = model.to(device).eval()
        self.recipe, self.stats, self.device, self.points = recipe, stats, device, points

    @property
    def names(self) -> list[str]:
        """Class names, index = label."""
        return list(self.stats.names)

    @property
    def category_ids(self) -> list[int]:
        """The ids of the classes in the training file, index = label."""
        return [int(number) for number in self.stats.category_ids]

    def predict(
        self,
        images: Picture | Sequence[Picture],
        *,
        score_threshold: float | None = None,
        max_dets: int | None = None,
        batch: int = 8,
    ) -> list[dict[str, Tensor]]:
        """Detections of each picture, best first, on the CPU.

        Args:
            images: paths, PIL pictures, uint8 arrays [H, W, 3] or tensors [3, H, W] (uint8, or float in 0..1).
            score_threshold, max_dets: instead of the recipe's; `max_dets` -1 = no limit. Without a `score_threshold`
                the operating points of the model count, where it has some.

        Returns:
            Per picture: boxes float32 [D, 4] (xyxy, pixels of the picture), scores float32 [D], labels int64 [D]; of a
            detector with masks also masks bool [D, H, W] of the whole picture. `results` has them as RLEs, in a
            fraction of the memory.
        """
        found = self.results(images, score_threshold=score_threshold, max_dets=max_dets, batch=batch)
        for output in found:
            if "rles" in output:
                output["masks"] = decode_masks(output.pop("rles"), output.pop("size"))
        return found

    @torch.inference_mode()
    def results(
        self,
        images: Picture | Sequence[Picture],
        *,
        score_threshold: float | None = None,
        max_dets: int | None = None,
        batch: int = 8,
    ) -> list[dict[str, Any]]:
        """As `predict`, with `rles` in the place of masks: D dicts of COCO's compressed RLE; `size` is the picture's
        (H, W).
        """
        if isinstance(images, str | Path | Image.Image | np.ndarray) or isinstance(images, Tensor) and images.ndim == 3:
            images = [images]
        results: list[dict[str, Any]] = []
        for start in range(0, len(images), batch):
            group = images[start : start + batch]
            for found in self.raw(list(group), score_threshold, max_dets):
                size = found.pop("size")
                results.append({key: value.cpu() for key, value in found.items() if key != "masks"})
                if "masks" in found:
                    results[-1].update(rles=encode_masks(found["masks"], found["boxes"], size), size=size)
        return results

    @torch.inference_mode()
    def raw(
        self, images: Sequence[Picture], score_threshold: float | None = None, max_dets: int | None = None
    ) -> list[dict[str, Any]]:
        """One batch, as `results`, with the detector's own `masks` [D, m, m] within the boxes, and the `size` (H, W) of
        each picture."""
        results: list[dict[str, Any]] = []
        limits = self.limits(score_threshold, max_dets)
        thresholds = self.thresholds if score_threshold is None else None
        if thresholds is not None:
            limits = limits._replace(score_threshold=max(float(thresholds.min()) - 1e-6, 0.0))
        pictures = [to_tensor(image, self.recipe.data) for image in images]
        resized = [to_test_size(picture, self.recipe.data) for picture in pictures]
        outputs = self.model([picture.to(self.device) for picture in resized], limits=limits)
        for picture, small, output in zip(pictures, resized, outputs, strict=True):
            if thresholds is not None:
                keep = output["scores"].float() >= thresholds.to(output["scores"].device)[output["labels"]]
                output = {key: value[keep] for key, value in output.items()}
            size = (picture.shape[-2], picture.shape[-1])
            across, down = size[1] / small.shape[-1], size[0] / small.shape[-2]
            boxes = output["boxes"].float().cpu() * torch.tensor([across, down, across, down])
            rest = {key: value if key == "masks" else value.cpu() for key, value in output.items() if key != "boxes"}
            results.append({"boxes": boxes, **rest, "size": size})
        return results

    @property
    def thresholds(self) -> Tensor | None:
        """Operating points float32 [C] in label order: detections count from these scores on."""
        if self.points is None:
            return None
        own = self.points.thresholds
        missing = next((name for name in self.names if name not in own), None)
        if missing is not None:
            raise UserError(f'the operating points of the model have no class "{missing}"{nearest(missing, own)}')
        return torch.tensor([own[name] for name in self.names])

    def limits(self, score_threshold: float | None = None, max_dets: int | None = None) -> Limits:
        """The recipe's limits of what is reported, with those given in their place."""
        if self.model.loss is None:
            raise UserError(
                "a localizer finds objects and knows no classes, so it cannot predict or be evaluated; its boxes, and "
                "their recall, come from `tailfin data proposals MODEL --annotations FILE --out FILE --evaluate`"
            )
        return self.model.limits.replaced(score_threshold, max_dets)


def load(path: str | Path, device: str | torch.device | None = None) -> Detector:
    """A detector from `RUN/model.safetensors` (or a run folder); `device` defaults to a GPU where there is one."""
    from tailfin.models import build_detector

    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    file = load_model_file(path)
    model, _ = build_detector(file.recipe, file.stats, start=False)
    load_whole(model, file.weights, f"model {path}")
    stored = file.fact(THRESHOLDS)
    points = None if stored is None else OperatingPoints.from_dict(stored)
    return Detector(model, file.recipe, file.stats, usable_device(device or default_device()), points)


def train(
    recipe: str | Path | Recipe,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    train_images: str | Path | None = None,
    val_images: str | Path | None = None,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    stage1: str | Path | None = None,
    reuse: str | Path | None = None,
    auto_batch: bool = False,
) -> Path:
    """Train every stage of a recipe and measure the result; returns the run folder.

    `recipe` is a name from `tailfin recipes list`, a YAML path, a published row's id, or a `Recipe`. `resume` goes on
    with the run in `out`. `reuse` is a run (or model file) whose finished stages are taken in the place of training
    them, in order, up to the first that this recipe would train differently; `stage1` is one whose first stage must be
    the one that the recipe would train, and is taken alone; a later stage of a run (RUN/stages/K-NAME) is taken with
    those before it. `auto_batch` takes the largest batch that the memory holds (`tailfin.auto_batch`).
    """
    from tailfin.methods import method
    from tailfin.processes import on_main, process_state
    from tailfin.run import Run, resumed_recipe, run_folder

    if resume:
        if out is None:
            raise UserError("resume needs the run folder: out=RUN")
        resolved, folder = resumed_recipe(out), Path(out)
    else:
        resolved = resolve_recipe(recipe, train, val, train_images, val_images, weights, overrides)
        if auto_batch:
            resolved = with_largest_batch(resolved)
        if stage1 is not None and reuse is not None:
            raise UserError("--stage1 demands the first stage of a run, --reuse takes all that fit: give one of them")
        for option, given in (("--stage1", stage1), ("--reuse", reuse)):
            if given is not None and out is not None and Path(given).resolve().is_relative_to(Path(out).resolve()):
                raise UserError(f"{option} {given} is inside --out {out}, which would be replaced: give another --out")
        folder = on_main(process_state(), lambda: run_folder(out, resolved, overwrite=overwrite))
        resolved = on_main(process_state(), lambda: with_coco_files(resolved, folder.absolute() / "data"))
    first, others = (Path(given) if given is not None else None for given in (stage1, reuse))
    try:
        run = Run(resolved, folder, overwrite=overwrite, stage1=first, reuse=others)
        try:
            method(resolved.method)(run)
        finally:
            run.close()
    except UserError:
        if not (folder / "recipe.yaml").exists():  # nothing has begun: no folder stays that would be in the way
            shutil.rmtree(folder / "data", ignore_errors=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return folder


def resolve_recipe(
    recipe: str | Path | Recipe,
    train: str | Path | None = None,
    val: str | Path | None = None,
    train_images: str | Path | None = None,
    val_images: str | Path | None = None,
    weights: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Recipe:
    """A recipe with files, weights and overrides filled in; makes the synthetic set where the recipe asks for it."""
    from tailfin.config import check_recipe

    if isinstance(recipe, Recipe):
        if overrides:
            raise UserError("overrides go with a recipe's name or path, not with a Recipe object")
        resolved = recipe
    else:
        resolved = load_recipe(recipe, overrides)
        if train is None:
            check_data_is_named(str(recipe), resolved, overrides)
    values = resolved.model_dump(mode="json")
    values["data"]["root"] = str(Path(resolved.data.root).absolute())  # so that RUN/recipe.yaml means the same anywhere
    for split, file, images in (("train", train, train_images), ("val", val, val_images)):
        if file is not None:
            values["data"][split] = {"annotations": as_given(file), "images": ""}
        if images is not None:
            values["data"][split]["images"] = str(Path(images).absolute())
    if weights is not None:
        values["weights"] = str(weights)
    if values["weights"] not in NAMED_WEIGHTS:
        values["weights"] = str(Path(values["weights"]).absolute())
    if values["classes"]["map"]:
        values["classes"]["map"] = str(Path(values["classes"]["map"]).absolute())
    if resolved.data.synthesize == "demo" and not values["data"]["train"]["annotations"]:
        from tailfin.data.synth import demo_set
        from tailfin.processes import on_main, process_state

        folder = Path(resolved.data.root or "demo") / "data"
        train_json, val_json = on_main(process_state(), lambda: demo_set(folder))
        values["data"]["train"] = {"annotations": str(train_json.absolute()), "images": ""}
        values["data"]["val"] = {"annotations": str(val_json.absolute()), "images": ""}
    return check_recipe(values, resolved.name or "recipe")


def with_largest_batch(recipe: Recipe) -> Recipe:
    """The recipe with the largest batch that the memory holds; says how it was found."""
    from tailfin.auto_batch import largest_batch
    from tailfin.processes import process_state

    with converted(recipe) as ready:
        found, lines = largest_batch(ready)
    found = found.model_copy(update={"data": recipe.data})
    if process_state().is_main_process:
        for line in lines:
            Progress("", 1).note(line)
    return found


def evaluate(
    annotations: str | Path, results: Any, protocol: str = "lvis", iou_type: str = "bbox", **options: Any
) -> dict[str, Any]:
    """Numbers of COCO results on an annotation file, as in `metrics.json`; see `tailfin.evaluation.evaluate`."""
    return evaluation.evaluate(annotations, results, protocol, iou_type, **options)


def predict_to_results(
    model_path: str | Path,
    annotations: str | Path,
    images: str | Path | None,
    out_folder: str | Path,
    *,
    max_dets: int | None = None,
    device: str | None = None,
    kinds: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Run a model over an annotation file's images; returns the results files by IoU type.

    `kinds` (`bbox`, `segm`) are what is needed; by default all that the detector gives.
    """
    from tailfin.inference import check_kinds, infer
    from tailfin.processes import new_accelerator, on_main

    detector = load(model_path, "cpu")
    limits = detector.limits(None, max_dets)
    kinds = tuple(detector.model.kinds if kinds is None else kinds)
    check_kinds(detector.model, kinds, str(model_path))
    accelerator = new_accelerator(detector.recipe.schedule.precision, cpu=device == "cpu")
    detector.model.to(accelerator.device)
    index = open_index(annotations)
    source = Source(index, image_folder(annotations, images))
    out = on_main(accelerator, lambda: Path(out_folder).absolute())  # one folder, also where each process has its own
    shards = out / "results.shards"
    on_main(accelerator, lambda: shards.mkdir(parents=True, exist_ok=True))
    infer(
        detector.model,
        source,
        detector.recipe.data,
        shards,
        detector.names,
        accelerator=accelerator,
        batch=detector.recipe.evaluation.batch,
        limits=limits,
        masks="segm" in kinds,
    )
    accelerator.wait_for_everyone()
    results = out / "results.bbox.json"
    on_main(accelerator, lambda: merge_shards(shards, results, ranks=accelerator.num_processes))
    on_main(accelerator, lambda: shutil.rmtree(shards))
    return result_files(results, kinds)


def validation_files(run: str | Path) -> tuple[Path, Path | None]:
    """(annotation file, image folder or none) that a run was validated on."""
    recipe = recipe_from_file(existing_file(Path(run) / "recipe.yaml", "recipe"))
    files, root = recipe.data.val, Path(recipe.data.root)
    if not files.annotations:
        raise UserError(f"{run} has no validation set; name one with --annotations")
    return root / files.annotations, root / files.images if files.images else None


def train_counts(model_path: str | Path, annotations: str | Path) -> evaluation.TrainCounts:
    """Training counts stored in a model, by the category ids of `annotations` (classes are matched by name)."""
    path = Path(model_path)
    stats = load_model_file(path / "model.safetensors" if path.is_dir() else path).stats
    return counts_by_id(stats, open_index(annotations))
