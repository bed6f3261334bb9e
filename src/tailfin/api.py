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

from tailfin import evaluation, recipes
from tailfin.checkpoint import load_model_file
from tailfin.config import load_recipe, recipe_from_file
from tailfin.data.dataset import Source, to_test_size
from tailfin.data.images import read_image, to_rgb
from tailfin.data.index import image_folder, open_index
from tailfin.errors import UserError
from tailfin.evaluation.results import merge_shards, result_files
from tailfin.files import existing_file
from tailfin.inference import counts_by_id
from tailfin.mask_encoding import decode_masks, encode_masks
from tailfin.schema.backbones import NAMED_WEIGHTS
from tailfin.schema.data import Data
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats
from tailfin.weights import load_whole

if TYPE_CHECKING:
    from tailfin import models
    from tailfin.models.detector import Limits

Picture = str | Path | Image.Image | np.ndarray | Tensor


class Detector:
    """A trained detector with its classes. `names` are in label order, `category_ids` the training file's ids."""

    def __init__(self, model: models.Detector, recipe: Recipe, stats: ClassStats, device: torch.device) -> None:
        self.model: models.Detector = model.to(device).eval()
        self.recipe, self.stats, self.device = recipe, stats, device

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
            score_threshold, max_dets: instead of the recipe's; `max_dets` -1 = no limit.

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
        limits = self.limits(score_threshold, max_dets)
        for start in range(0, len(images), batch):
            pictures = [_to_tensor(image, self.recipe.data) for image in images[start : start + batch]]
            resized = [to_test_size(picture, self.recipe.data) for picture in pictures]
            outputs = self.model([picture.to(self.device) for picture in resized], limits=limits)
            for picture, small, output in zip(pictures, resized, outputs, strict=True):
                across, down = picture.shape[-1] / small.shape[-1], picture.shape[-2] / small.shape[-2]
                boxes = output["boxes"].float().cpu() * torch.tensor([across, down, across, down])
                rest = {key: value.cpu() for key, value in output.items() if key not in ("boxes", "masks")}
                results.append({"boxes": boxes, **rest})
                if "masks" in output:
                    size = (picture.shape[-2], picture.shape[-1])
                    results[-1].update(rles=encode_masks(output["masks"], boxes, size), size=size)
        return results

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
    return Detector(model, file.recipe, file.stats, _device(device or _default_device()))


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
) -> Path:
    """Train every stage of a recipe and measure the result; returns the run folder.

    `recipe` is a name from `tailfin recipes list`, a YAML path, a published row's id, or a `Recipe`. `resume` goes on
    with the run in `out`. `reuse` is a run (or model file) whose finished stages are taken in the place of training
    them, in order, up to the first that this recipe would train differently; `stage1` is one whose first stage must be
    the one that the recipe would train, and is taken alone.
    """
    from tailfin.methods import METHODS
    from tailfin.processes import on_main, process_state
    from tailfin.run import Run, resumed_recipe, run_folder

    if resume:
        if out is None:
            raise UserError("resume needs the run folder: out=RUN")
        resolved, folder = resumed_recipe(out), Path(out)
    else:
        resolved = resolve_recipe(recipe, train, val, train_images, val_images, weights, overrides)
        if stage1 is not None and reuse is not None:
            raise UserError("--stage1 demands the first stage of a run, --reuse takes all that fit: give one of them")
        for option, given in (("--stage1", stage1), ("--reuse", reuse)):
            if given is not None and out is not None and Path(given).resolve().is_relative_to(Path(out).resolve()):
                raise UserError(f"{option} {given} is inside --out {out}, which would be replaced: give another --out")
        folder = on_main(process_state(), lambda: run_folder(out, resolved, overwrite=overwrite))
    first, others = (Path(given) if given is not None else None for given in (stage1, reuse))
    run = Run(resolved, folder, overwrite=overwrite, stage1=first, reuse=others)
    try:
        METHODS[resolved.method](run)
    finally:
        run.close()
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
            _check_data_is_named(str(recipe), resolved, overrides)
    values = resolved.model_dump(mode="json")
    values["data"]["root"] = str(Path(resolved.data.root).absolute())  # so that RUN/recipe.yaml means the same anywhere
    for split, file, images in (("train", train, train_images), ("val", val, val_images)):
        if file is not None:
            values["data"][split] = {"annotations": str(Path(file).absolute()), "images": ""}
        if images is not None:
            values["data"][split]["images"] = str(Path(images).absolute())
    if weights is not None:
        values["weights"] = str(weights)
    if values["weights"] not in NAMED_WEIGHTS:
        values["weights"] = str(Path(values["weights"]).absolute())
    if resolved.data.synthesize == "demo" and not values["data"]["train"]["annotations"]:
        from tailfin.data.synth import demo_set
        from tailfin.processes import on_main, process_state

        folder = Path(resolved.data.root or "demo") / "data"
        train_json, val_json = on_main(process_state(), lambda: demo_set(folder))
        values["data"]["train"] = {"annotations": str(train_json.absolute()), "images": ""}
        values["data"]["val"] = {"annotations": str(val_json.absolute()), "images": ""}
    return check_recipe(values, resolved.name or "recipe")


def _check_data_is_named(name: str, recipe: Recipe, overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """Refuse what a recipe of the package finds by chance: the file of the working directory that has the name of its
    own data's file."""
    data = recipe.data
    file = Path(data.train.annotations)
    if data.root or not data.train.annotations or file.is_absolute() or not recipes.find(name).packaged:
        return
    if any(key.startswith(("data.root", "data.train")) for key in overrides):
        return
    found = f", and {file} of the working directory would be taken" if file.is_file() else ""
    this = " (data.root=. for this one)" if found else ""
    raise UserError(
        f"{name}: no training data is named{found}: give --train FILE and --val FILE, or data.root=FOLDER{this}"
    )


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


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _device(name: str | torch.device) -> torch.device:
    """A device that works here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'device "{name}" cannot be used here: {reason[:200]}') from None


def _to_tensor(image: Picture, config: Data) -> Tensor:
    """Any picture to [3, H, W], uint8 or float."""
    if isinstance(image, str | Path):
        path = existing_file(image, "image")
        image = read_image(path, max_pixels=config.max_pixels, value_range=config.value_range)
    elif isinstance(image, Image.Image):
        image = to_rgb(image, config.value_range)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"an array picture must be uint8 [H, W, 3], this is {image.dtype} {list(image.shape)}")
        return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"a tensor picture must be [3, H, W], this is {list(image.shape)}")
    return image
