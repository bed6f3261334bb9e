"""A run directory: what a method writes its stages into, and how it is measured at the end.

RUN/recipe.yaml  environment.json  stages/<k>-<name>/{last/, model.safetensors, metrics.jsonl}
RUN/model.safetensors  results.bbox.json  (results.segm.json)  metrics.json  report.html
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tailfin import evaluation
from tailfin.checkpoint import content_hash, load_model_file, resume_point, save_model
from tailfin.config import dump_recipe, recipe_from_file
from tailfin.data.dataset import TrainingDataset, open_source, unchecked_note
from tailfin.engine import Stage as Optimisation
from tailfin.engine import Step, check_shares, detector_step, fit
from tailfin.errors import UserError
from tailfin.evaluation.results import merge_shards, result_files
from tailfin.files import read_object, write_atomic, write_json, writing
from tailfin.inference import check_kinds, check_validation, counts_by_id, infer
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.plan_notes import plan_notes, shared_pictures_note
from tailfin.processes import make_accelerator, on_main, slow_precision
from tailfin.progress import Progress
from tailfin.provenance import environment, now
from tailfin.reuse import Data, Reused, finished_stages, first_stage
from tailfin.run_files import check_replaceable, empty_run, lock, remove_leftovers, unlock
from tailfin.samplers.plan import BatchPlan
from tailfin.schedule import Curve
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import PRETRAIN, Stage, stages
from tailfin.stats import ClassStats
from tailfin.weights import load_whole

SHOWN = 8  # files in a message


class Run:
    """Everything the stages of a method share: data, classes, accelerator, folder."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        overwrite: bool = False,
        stage1: Path | None = None,
        reuse: Path | None = None,
    ) -> None:
        self.recipe, self.out = recipe, out
        # a run is in the folder, which this one replaces: not before all is known to be right
        self.overwrite = overwrite and (out / "recipe.yaml").exists()
        self.plan = {stage.name: stage for stage in stages(recipe)}
        self.accelerator = make_accelerator(recipe, out)
        self.train = open_source(recipe.data.train, recipe.data.root, "train")
        self.val = open_source(recipe.data.val, recipe.data.root, "val") if recipe.data.val.annotations else None
        self.stats = ClassStats.from_index(self.train.index, group_bounds=recipe.evaluation.group_bounds)
        if self.val is not None:
            check_validation(self.stats, self.val.index, recipe.evaluation.iou)
        data = Data(self.stats, self.train.index.fingerprint, self.val.index.fingerprint if self.val else "")
        self.reused = Reused()  # finished stages that take the place of training them
        if stage1 is not None:
            self.reused = first_stage(stage1, recipe, data)
        elif reuse is not None:
            self.reused = finished_stages(reuse, recipe, data)
        self.parents: list[str] = []
        self.final_recipe = recipe  # of the stage that made the final model: what rebuilds it
        self.stages_done = 0
        self.begun = False
        self.lock: int | None = None  # of the main process, see `tailfin.run_files`
        if slow := slow_precision(self.accelerator):
            self.say(f"warning: {slow}")

    def detector(self, recipe: Recipe | None = None) -> Detector:
        """The recipe's detector with its starting weights, the same on every process; says what it starts from.

        A run that is past its start does not need them: its first stage has better ones. `recipe` is the first stage's
        own, where it differs from the run's.
        """
        torch.manual_seed(self.recipe.seed)
        stages = () if self.overwrite and not self.begun else self.out.glob("stages/1-*")
        begun = bool(self.reused.stages) or any(
            resume_point(stage) or (stage / "model.safetensors").exists() for stage in stages
        )
        model, notes = build_detector(recipe or self.recipe, self.stats, start=not begun)
        for note in notes if not begun else ():
            self.say(note)
        return model

    def planned(self, name: str) -> Stage[Recipe]:
        """What the recipe says of its stage `name`."""
        if name not in self.plan:
            raise ValueError(f"method {self.recipe.method} has no stage {name}, but {', '.join(self.plan)}")
        return self.plan[name]

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
            name: of a stage of the recipe (`tailfin.schema.stages`).
            recipe: in the place of the stage's own.
            dataset, plan: other samples or another order than the recipe's own.
            product: the submodule of `model` that the stage is for (a detector in the shell that trains it); that alone
                is saved, measured and returned. By default the whole model.
        """
        planned = self.planned(name)
        recipe = self.final_recipe = recipe or planned.recipe
        dataset = dataset or TrainingDataset(self.train, recipe.data, recipe.seed)
        detector: Any = model.get_submodule(product)
        check_kinds(detector, self.recipe.evaluation.iou, "evaluation.iou")
        if "segm" in detector.kinds:
            dataset = dataset.with_masks()
        about_masks = [dataset.missing_masks(), dataset.misplaced_masks()]
        plan = plan or batch_plan(recipe, dataset, self.stats)
        check_shares(recipe.schedule, self.accelerator.num_processes)
        self.begin()  # not earlier: a mistake in data, weights or model leaves no half-begun run behind
        self.stages_done += 1
        folder = self.out / "stages" / planned.folder
        finished = folder / "model.safetensors"
        if finished.exists():
            model = model.get_submodule(product)
            load_whole(model, load_model_file(finished).weights, str(finished))
            self.say(f"stage {name}: finished before, {finished}")
            model.to(self.accelerator.device)
        else:
            self.say(
                f"stage {name}: {len(dataset.rows())} images, {plan.iterations} iterations of {recipe.schedule.batch}, "
                f"{self.stats.num_classes} classes, loss {recipe.loss.name}, sampler {recipe.sampler.name}"
            )
            odd = plan_notes(replace(planned, recipe=recipe), plan, self.accelerator.num_processes)
            rate = recipe.schedule.rate_told()
            for note in (rate, *about_masks, unchecked_note(self.train, recipe.data), *odd):
                if note:
                    self.say(note)
            seeing: list[Any] = [module for module in model.modules() if hasattr(module, "see_annotations")]
            for module in seeing:  # what it takes from them is in its state, a resume point or model file brings it
                module.see_annotations(self.train.index)
            best = folder / "best.safetensors"

            def evaluate(measured: nn.Module, _: int) -> dict[str, Any]:
                return self.measure(measured.get_submodule(product))

            def keep_best(measured: nn.Module) -> None:
                self._save(best, measured.get_submodule(product), recipe, name)

            evaluated = evaluate if self.val is not None else None
            best_kept = keep_best if recipe.evaluation.select == "best" else None
            model = fit(
                self.accelerator,
                Optimisation(
                    name,
                    folder,
                    recipe,
                    model,
                    dataset,
                    plan,
                    step,
                    evaluate=evaluated,
                    save_best=best_kept,
                    curve=curve_of(self.recipe, planned),
                ),
            )
            model = model.get_submodule(product)
            if on_main(self.accelerator, best.exists):
                load_whole(model, load_model_file(best).weights, str(best))
                self.accelerator.wait_for_everyone()  # until all have read it
            on_main(self.accelerator, lambda: self._save(finished, model, recipe, name))
            on_main(self.accelerator, lambda: best.unlink(missing_ok=True))
        self.parents = [*self.parents, content_hash(finished)]
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
            masks="segm" in recipe.evaluation.iou,
        )
        self.accelerator.wait_for_everyone()

        def score() -> dict[str, Any]:
            results = self.out / ("results.bbox.json" if keep else "results.last.bbox.json")
            merge_shards(shards, results, ranks=self.accelerator.num_processes)
            metrics = evaluation.evaluate(
                val.index.path,
                result_files(results, recipe.evaluation.iou),
                recipe.evaluation.protocol,
                recipe.evaluation.iou,
                max_dets=recipe.evaluation.max_dets if recipe.evaluation.protocol == "lvis" else None,
                group_bounds=recipe.evaluation.group_bounds,
                train_counts=counts_by_id(self.stats, val.index),
            )
            shutil.rmtree(shards, ignore_errors=True)
            for file in result_files(results, ("bbox", "segm")).values() if not keep else ():
                file.unlink(missing_ok=True)
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

    def begin(self) -> None:
        """Write the folder's first files, once, with the stages that another run has trained."""
        if self.begun:
            return
        self.begun = True
        on_main(self.accelerator, self._record)
        if self.val is not None and (leak := shared_pictures_note(self.train, self.val)):
            self.say(leak)
        if self.recipe.logging.trackers:
            config = {"recipe": dump_recipe(self.recipe), "run": str(self.out)}
            self.accelerator.init_trackers("tailfin", config=config)

    def close(self) -> None:
        """Let other processes write to the folder."""
        unlock(self.out, self.lock)
        self.lock = None

    def _save(self, path: Path, model: nn.Module, recipe: Recipe, stage: str) -> None:
        save_model(path, model, recipe, self.stats, parents=self.parents, stage=stage)

    def _record(self) -> None:
        if self.overwrite and (foreign := empty_run(self.out)):
            more = ", ..." if len(foreign) > SHOWN else ""
            self.say(f"--overwrite: not of a run, they stay: {', '.join(foreign[:SHOWN])}{more}")
        self.lock = lock(self.out)
        with writing(self.out):
            remove_leftovers(self.out)
        path = self.out / "environment.json"
        before = read_object(path, "environment file") if path.exists() else None
        if before is not None and _of_training(before, path) != self.train.index.fingerprint:
            raise UserError(
                f"{self.out} was begun with other training annotations than {self.train.index.path} holds now; "
                "training cannot go on with them"
            )
        for finished in self.reused.stages:  # before recipe.yaml, which makes the folder a run that can be resumed
            finished.copy_to(self.out)
            beside = "".join(f" with {file.name}" for file in finished.files)
            self.say(f"stage {finished.stage.name}: taken{beside} from {finished.run}")
        for note in self.reused.notes:
            self.say(note)
        write_atomic(self.out / "recipe.yaml", dump_recipe(self.recipe))
        if before is not None:
            resumed = before.get("resumed")
            before["resumed"] = [*(resumed if isinstance(resumed, list) else []), now()]
            write_json(path, before, indent=1)
        else:
            facts = environment(self.recipe, self.accelerator, self.train, self.val)
            if self.reused.stages:
                facts["reused"] = [finished.facts() for finished in self.reused.stages]
            write_json(path, facts, indent=1)

    def _report(self) -> None:
        from tailfin.report import write_report

        try:
            write_report([self.out])
        except UserError as error:  # the numbers are safe; `tailfin report` can be run again
            self.say(f"no report: {error}")


def curve_of(recipe: Recipe, stage: Stage[Recipe]) -> Curve | None:
    """The rate over a pre-training and the stage after it, where they share one."""
    own = recipe.pretraining
    if own is None or not own.one_curve or PRETRAIN not in (stage.name, stage.starts_from):
        return None
    before = 0.0 if stage.name == PRETRAIN else own.schedule.epochs
    return Curve(recipe.schedule, before, own.schedule.epochs + recipe.schedule.epochs)


def _of_training(before: dict[str, Any], path: Path) -> str:
    """The fingerprint of the training annotations in an environment file."""
    data = before.get("data")
    value = data.get("train") if isinstance(data, dict) else None
    if not isinstance(value, str):
        raise UserError(f"environment file {path} is damaged: it does not say what the run was trained on (data.train)")
    return value


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


def run_folder(out: str | Path | None, recipe: Recipe, *, overwrite: bool = False) -> Path:
    """The folder of a new run: `out`, which is new, empty, or a run's where it may be overwritten; without it a free
    name under `runs/`. Nothing is made or deleted yet."""
    if out is None:
        stem = re.sub(r"[/:]", "_", recipe.name) or "run"
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
        check_replaceable(path)
    return path


def resumed_recipe(run: str | Path) -> Recipe:
    """The recipe of an interrupted run."""
    path = Path(run)
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"--resume {path}: there is no run (no recipe.yaml in it)")
    return recipe_from_file(path / "recipe.yaml")
