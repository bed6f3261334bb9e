"""A run directory: what a method writes its stages into, and how it is measured at the end.

RUN/recipe.yaml  environment.json  stages/<k>-<name>/{last/, model.safetensors, metrics.jsonl}
RUN/model.safetensors  results.bbox.json  metrics.json  report.html
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import nn

from tailfin import evaluation
from tailfin.checkpoint import file_hash, load_model_file, load_weights, resume_point, save_model
from tailfin.config import dump_recipe, recipe_from_file
from tailfin.data.dataset import Source, TrainingDataset, open_source
from tailfin.engine import Stage, Step, check_shares, detector_step, fit
from tailfin.errors import UserError
from tailfin.evaluation.results import merge_shards
from tailfin.files import read_json, write_atomic, write_json
from tailfin.first_stage import first_stage
from tailfin.inference import category_ids_for, counts_by_id, infer
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.progress import Progress
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

T = TypeVar("T")
TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}


class Run:
    """Everything the stages of a method share: data, classes, accelerator, folder."""

    def __init__(self, recipe: Recipe, out: Path, stage1: Path | None = None) -> None:
        self.recipe, self.out = recipe, out
        self.accelerator = make_accelerator(recipe, out)
        self.train = open_source(recipe.data.train, recipe.data.root, "train")
        self.val = open_source(recipe.data.val, recipe.data.root, "val") if recipe.data.val.annotations else None
        self.stats = ClassStats.from_index(self.train.index, group_bounds=recipe.evaluation.group_bounds)
        if self.val is not None:
            category_ids_for(self.stats.names, self.val.index)
        if "segm" in recipe.evaluation.iou:
            raise UserError(
                f"evaluation.iou: segm needs a detector with masks, {recipe.detector.name} gives boxes only"
            )
        # a finished first stage that takes the place of training one
        self.given = first_stage(stage1, recipe, self.stats, self.train.index.fingerprint) if stage1 else None
        self.parents: list[str] = []
        self.final_recipe = recipe  # of the stage that made the final model: what rebuilds it
        self.stages_done = 0
        self.begun = False

    def detector(self, recipe: Recipe | None = None) -> Detector:
        """The recipe's detector with its starting weights, the same on every process; says what it starts from.

        A run that is past its start does not need them: its first stage has better ones. `recipe` is the first stage's
        own, where it differs from the run's.
        """
        torch.manual_seed(self.recipe.seed)
        begun = self.given is not None or any(
            resume_point(stage) or (stage / "model.safetensors").exists() for stage in self.out.glob("stages/1-*")
        )
        model, notes = build_detector(recipe or self.recipe, self.stats, start=not begun)
        for note in notes if not begun else ():
            self.say(note)
        return model

    def stage(
        self,
        name: str,
        model: nn.Module,
        *,
        step: Step = detector_step,
        recipe: Recipe | None = None,
        dataset: TrainingDataset | None = None,
        plan: BatchPlan | None = None,
        product: str = "",
    ) -> Detector:
        """Train `model` as the next stage, or load it where the stage is already finished; returns the plain detector.

        Args:
            recipe: the stage's own (another schedule, loss or sampler); by default the run's.
            dataset, plan: other samples or another order than the recipe's own.
            product: the submodule of `model` that the stage is for (a detector in the shell that trains it); that alone
                is saved, measured and returned. By default the whole model.
        """
        recipe = self.final_recipe = recipe or self.recipe
        dataset = dataset or TrainingDataset(self.train, recipe.data, recipe.seed)
        plan = plan or batch_plan(recipe, dataset, self.stats)
        check_shares(recipe.schedule, self.accelerator.num_processes)
        self.begin(name)  # not earlier: a mistake in data, weights or model leaves no half-begun run behind
        self.stages_done += 1
        folder = self.out / "stages" / f"{self.stages_done}-{name}"
        finished = folder / "model.safetensors"
        if finished.exists():
            model = model.get_submodule(product)
            load_weights(model, load_model_file(finished).weights, str(finished))
            self.say(f"stage {name}: finished before, {finished}")
            model.to(self.accelerator.device)
        else:
            self.say(
                f"stage {name}: {len(dataset.rows())} images, {plan.iterations} iterations of {recipe.schedule.batch}, "
                f"{self.stats.num_classes} classes, loss {recipe.loss.name}, sampler {recipe.sampler.name}"
            )
            seeing: list[Any] = [module for module in model.modules() if hasattr(module, "see_annotations")]
            for module in seeing:  # what it takes from them is in its state, a resume point or model file brings it
                module.see_annotations(self.train.index)
            best = folder / "best.safetensors"

            def evaluate(measured: nn.Module, _: int) -> dict[str, Any]:
                return self.measure(measured.get_submodule(product))

            def keep_best(measured: nn.Module) -> None:
                save_model(best, measured.get_submodule(product), recipe, self.stats, parents=self.parents)

            model = fit(
                self.accelerator,
                Stage(
                    name,
                    folder,
                    recipe,
                    model,
                    dataset,
                    plan,
                    step,
                    evaluate=evaluate if self.val is not None else None,
                    save_best=keep_best if recipe.evaluation.select == "best" else None,
                ),
            )
            model = model.get_submodule(product)
            if on_main(self.accelerator, best.exists):
                load_weights(model, load_model_file(best).weights, str(best))
                self.accelerator.wait_for_everyone()  # until all have read it
            on_main(self.accelerator, lambda: save_model(finished, model, recipe, self.stats, parents=self.parents))
            on_main(self.accelerator, lambda: best.unlink(missing_ok=True))
        self.parents = [*self.parents, file_hash(finished)]
        return cast(Detector, model)

    def measure(self, model: nn.Module, keep: bool = False) -> dict[str, Any]:
        """Metrics of `model` on the validation set, the same on every process; `keep` writes the results file too."""
        if self.val is None:
            raise UserError("there is no validation set: give --val FILE or data.val.annotations")
        recipe, val = self.recipe, self.val
        shards = self.out / "results.shards"
        on_main(self.accelerator, lambda: shutil.rmtree(shards, ignore_errors=True))
        infer(
            model,
            val,
            recipe.data,
            shards,
            self.stats.names,
            accelerator=self.accelerator,
            batch=recipe.evaluation.batch,
            title="evaluation",
        )
        self.accelerator.wait_for_everyone()

        def score() -> dict[str, Any]:
            results = self.out / ("results.bbox.json" if keep else "results.last.bbox.json")
            merge_shards(shards, results, ranks=self.accelerator.num_processes)
            metrics = evaluation.evaluate(
                val.index.path,
                results,
                recipe.evaluation.protocol,
                recipe.evaluation.iou,
                max_dets=recipe.evaluation.max_dets if recipe.evaluation.protocol == "lvis" else None,
                group_bounds=recipe.evaluation.group_bounds,
                train_counts=counts_by_id(self.stats, val.index),
            )
            shutil.rmtree(shards, ignore_errors=True)
            if not keep:
                results.unlink()
            return metrics

        return on_main(self.accelerator, score)

    def finish(self, model: nn.Module) -> dict[str, Any] | None:
        """Write the final model, measure it and write the report; returns the metrics."""
        final = self.out / "model.safetensors"

        def save() -> None:  # asked on one process alone: another might see the file that was written meanwhile
            if not final.exists():
                save_model(final, model, self.final_recipe, self.stats, parents=self.parents)

        on_main(self.accelerator, save)
        metrics = None
        if self.val is not None:
            metrics = self.measure(model, keep=True)
            on_main(self.accelerator, lambda: write_json(self.out / "metrics.json", metrics, indent=1))
        on_main(self.accelerator, self._report)
        if self.recipe.logging.trackers:
            for tracker in self.accelerator.trackers:  # `end_training` would end the process group too
                tracker.finish()
        return metrics

    def say(self, text: str) -> None:
        """A line on the main process."""
        if self.accelerator.is_main_process:
            Progress("", 1).note(text)

    def begin(self, name: str) -> None:
        """Write the folder's first files, once; `name` is the first stage's."""
        if self.begun:
            return
        self.begun = True
        on_main(self.accelerator, lambda: self._record(name))
        if self.recipe.logging.trackers:
            config = {"recipe": dump_recipe(self.recipe), "run": str(self.out)}
            self.accelerator.init_trackers("tailfin", config=config)

    def _record(self, name: str) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.given is not None:  # before recipe.yaml, which makes the folder a run that can be resumed
            self.given.copy_to(self.out / "stages" / f"1-{name}")
            self.say(f"stage {name}: taken from {self.given.run}")
        write_atomic(self.out / "recipe.yaml", dump_recipe(self.recipe))
        path = self.out / "environment.json"
        if path.exists():
            before = read_json(path)
            if before.get("data", {}).get("train") != self.train.index.fingerprint:
                raise UserError(
                    f"{self.out} was begun with other training annotations than {self.train.index.path} holds now; "
                    "training cannot go on with them"
                )
            before.setdefault("resumed", []).append(_now())
            write_json(path, before, indent=1)
        else:
            facts = environment(self.recipe, self.accelerator, self.train, self.val)
            if self.given is not None:
                facts["first_stage"] = self.given.facts()
            write_json(path, facts, indent=1)

    def _report(self) -> None:
        from tailfin.report import write_report

        try:
            write_report([self.out])
        except UserError as error:  # the numbers are safe; `tailfin report` can be run again
            self.say(f"no report: {error}")


def make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """Accelerate with this recipe's precision and trackers; loss statistics are never overwritten by DDP."""
    for tracker in recipe.logging.trackers:
        if tracker not in TRACKERS:
            raise UserError(f'there is no tracker "{tracker}" (choices: {", ".join(TRACKERS)})')
        if importlib.util.find_spec(TRACKERS[tracker]) is None:
            raise UserError(f"the tracker {tracker} needs its package: pip install {TRACKERS[tracker]}")
    # DDP announces a successor of this option that does not exist yet
    warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
    return new_accelerator(
        recipe.schedule.precision,
        log_with=list(recipe.logging.trackers) or None,
        project_dir=str(out),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def new_accelerator(precision: str, *, cpu: bool = False, **options: Any) -> Accelerator:
    """An `Accelerator` in a recipe's precision, also where this process had one in another precision before."""
    state = process_state(cpu)
    limit_threads()
    precision = fastest_precision() if precision == "auto" else precision
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=state.device.type == "cpu", **options)


def process_state(cpu: bool = False) -> PartialState:
    """This process among the others, with their group. Without a GPU Accelerate must be told so, or each process that
    torchrun started would train alone."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    without = not torch.accelerator.is_available() or (several and torch.backends.mps.is_available())
    return PartialState(cpu=cpu or without)


def fastest_precision() -> str:
    """bf16 where this machine's first device has instructions for it, else "no" (float32)."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def limit_threads() -> None:
    """Not more threads than this process may use: a container's share is often smaller than the machine."""
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            usable = min(usable, max(1.0, int(limit) / int(period)))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), int(usable))))


def batch_plan(recipe: Recipe, dataset: TrainingDataset, stats: ClassStats) -> BatchPlan:
    """The order of a stage's images."""
    return BatchPlan(
        dataset.source.index,
        dataset.rows(),
        stats,
        recipe.sampler,
        recipe.schedule.batch,
        recipe.schedule.epochs,
        recipe.seed,
        recipe.data.group_by_aspect,
    )


def on_main(accelerator: Accelerator | PartialState, action: Callable[[], T]) -> T:
    """Run `action` on the main process; its value, or its `UserError`, reaches every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def environment(recipe: Recipe, accelerator: Accelerator, train: Source, val: Source | None) -> dict[str, Any]:
    """What a run's numbers depend on beside its recipe."""
    packages = ("tailfin", "torch", "torchvision", "accelerate", "numpy", "hotcoco", "pillow")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "source"
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": " ".join(sys.argv),
        "started": _now(),
        "seed": recipe.seed,
        "commit": _commit(),
        "versions": versions,
        "platform": platform.platform(),
        "devices": {
            "type": device.type,
            "name": name,
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
        },
        "data": {
            "train": train.index.fingerprint,
            "train_file": str(train.index.path),
            "val": val.index.fingerprint if val else "",
            "val_file": str(val.index.path) if val else "",
        },
    }


def run_folder(out: str | Path | None, recipe: Recipe, *, overwrite: bool = False) -> Path:
    """The folder of a new run: `out`, new or emptied with `overwrite`; without it a free name under `runs/`."""
    if out is None:
        stem = recipe.name.replace("/", "_") or "run"
        taken = (Path("runs") / f"{stem}-{number}" for number in range(1, 10_000))
        return next(path for path in taken if not path.exists())
    path = Path(out)
    if path.is_file():
        raise UserError(f"--out {path} is a file, a folder is needed")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UserError(
                f"--out {path} exists already; add --overwrite to replace it, or go on with it: "
                f"tailfin train --resume {path}"
            )
        if not (path / "recipe.yaml").exists():
            raise UserError(f"--overwrite: {path} is not a run folder (it has no recipe.yaml), it is left as it is")
        shutil.rmtree(path)
    return path


def resumed_recipe(run: str | Path) -> Recipe:
    """The recipe of an interrupted run."""
    path = Path(run)
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"--resume {path}: there is no run (no recipe.yaml in it)")
    return recipe_from_file(path / "recipe.yaml")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str:
    """The commit that this source tree is at, where it is one."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5
        )
        inside = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 and inside.returncode == 0 else ""
