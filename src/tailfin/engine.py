"""The training loop: one visible step on Hugging Face Accelerate, the same lines for one process and for many.

    for iteration in range(start, total):
        set the learning rate, a pure function of the iteration
        for each micro-batch: losses = step(model, images, targets); backward
        clip; optimiser step; average; log; checkpoint; evaluate

Nothing random outlives an iteration: every rank seeds its generators from (seed, iteration, rank), samples are keyed by
(seed, epoch, image) and batches are a pure function of (seed, epoch). A resumed run therefore needs the weights, the
optimiser and one number, and is equal to the straight run to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tailfin.checkpoint import load_resume_point, save_resume_point
from tailfin.data.dataset import TrainingDataset, training_loader
from tailfin.errors import UserError
from tailfin.models.detector import Detector
from tailfin.progress import Progress
from tailfin.samplers.plan import BatchPlan
from tailfin.schedule import Curve, build_optimizer, learning_rate
from tailfin.schema.recipe import Recipe
from tailfin.schema.training import Schedule
from tailfin.stop_signals import Interrupted, StopSignals
from tailfin.training_log import TrainingLog, all_skipped

Step = Callable[[nn.Module, list[Tensor], list[dict[str, Tensor]]], dict[str, Tensor]]
Evaluate = Callable[[nn.Module, int], dict[str, Any]]  # (model, iteration) -> metrics; called on every process
COMPILER: dict[str, Any] = {}  # options of torch.compile
DIVERGED = 1e6  # no weight of a detector that trains comes near it


@dataclass(frozen=True)
class Stage:
    """One optimisation: a model, a stream of batches and a step."""

    name: str
    folder: Path
    recipe: Recipe
    model: nn.Module
    dataset: TrainingDataset
    plan: BatchPlan
    step: Step
    evaluate: Evaluate | None = None
    save_best: Callable[[nn.Module], None] | None = None
    curve: Curve | None = None  # of the rate, where it is not the stage's own


def detector_step(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The step of any detector that returns its losses."""
    return model(images, targets)


def fit(accelerator: Accelerator, stage: Stage) -> nn.Module:
    """Train a stage from its newest resume point, or from the start; returns the trained (or averaged) plain model."""
    recipe, schedule, plan = stage.recipe, stage.recipe.schedule, stage.plan
    check_shares(schedule, accelerator.num_processes)
    total = plan.iterations
    milestones = [plan.iteration_at(epoch) for epoch in schedule.milestones]
    checkpoint_every = recipe.logging.checkpoint_every or int(plan.boundaries[1])
    evaluate_at = _evaluation_points(recipe, plan) if stage.evaluate is not None else set()

    plain = stage.model.to(accelerator.device)
    if schedule.channels_last:
        plain = plain.to(memory_format=torch.channels_last)
    average = None
    if schedule.ema is not None:  # copied before Accelerate wraps the model's forward
        average = AveragedModel(plain, multi_avg_fn=moving_average(schedule.ema), use_buffers=True)
    if schedule.compile:
        compile_backbones(plain)
    model, optimizer = accelerator.prepare(plain, build_optimizer(plain, schedule))
    start, best, skipped_before = _restore(accelerator, stage, plain, optimizer, average)
    log = TrainingLog(accelerator, stage.name, stage.folder, stage.plan, recipe, start)
    batches = training_loader(
        stage.dataset,
        plan,
        start=start,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        accumulation=schedule.accumulation,
    )

    skips = recipe.data.on_bad_image == "skip"

    def save(iteration: int) -> None:
        _refuse_diverged(stage, plain, iteration)
        _average_norms(accelerator, plain, average)
        left_out = all_skipped(stage.dataset.skipped, skipped_before) if skips else {}
        if accelerator.is_main_process:
            state = {
                "iteration": iteration,
                "best": best,
                "model": plain.state_dict(),
                "optimizer": optimizer.state_dict(),
                "processes": accelerator.num_processes,
                "skipped": left_out,
            }
            if average is not None:
                state["average"] = average.state_dict()
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            save_resume_point(stage.folder, state, iteration)

    told: list[Any] = [module for module in plain.modules() if hasattr(module, "at_epoch")]
    model.train()
    with (
        closing(batches),  # whatever ends the loop ends the loader's workers
        StopSignals() as signals,
        Progress(stage.name, total, start, enabled=accelerator.is_main_process) as progress,
    ):
        for iteration in range(start, total):
            if 0 < recipe.evaluation.patience <= best["waited"]:
                progress.note(f"no better AP in {best['waited']} evaluations: stopped after {iteration} iterations")
                break
            if stage.curve is not None:
                rate = stage.curve.rate(plan.epoch_at(iteration), iteration)
            else:
                rate = learning_rate(iteration, total, milestones, schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            seed_iteration(recipe.seed, iteration, accelerator.process_index)
            for module in told:
                module.at_epoch(plan.epoch_at(iteration))

            parts: dict[str, Tensor] = {}
            seen: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = []
            for micro in range(schedule.accumulation):
                images, targets = _to_device(next(batches), accelerator.device)
                last = micro == schedule.accumulation - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    losses = stage.step(model, images, targets)
                    loss = torch.stack(list(losses.values())).sum()
                    accelerator.backward(loss / schedule.accumulation)
                log.note(getattr(plain, "diagnostics", {}))
                losses = {name: value.detach() for name, value in losses.items()}
                seen.append((losses, targets))
                for name, value in losses.items():
                    parts[name] = parts.get(name, 0) + value / schedule.accumulation
            # the one look at the losses of a step, when all of its work is launched and nothing is changed yet
            if not math.isfinite(torch.stack(list(parts.values())).sum().item()):
                raise UserError(_diagnose(stage, seen, iteration, rate, plain))
            if schedule.clip is not None:
                parts["grad_norm"] = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), schedule.clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update_parameters(plain)

            done = iteration + 1
            log.add(parts, rate, done)
            progress.update(done, log.loss, log.images_per_second)
            if done in evaluate_at and stage.evaluate is not None:
                _average_norms(accelerator, plain, average)
                measured = average.module if average is not None else plain
                metrics = stage.evaluate(measured, done)
                model.train()
                best = log.evaluation(metrics, done, best)
                if best["iteration"] == done and stage.save_best is not None and accelerator.is_main_process:
                    stage.save_best(measured)
                save(done)
            elif done % checkpoint_every == 0 and done < total:
                save(done)
            if received := _agree(accelerator, signals.received):
                save(done)
                raise Interrupted(received, stage.folder.parent.parent)
    _refuse_diverged(stage, plain, total)
    _average_norms(accelerator, plain, average)
    log.close(all_skipped(stage.dataset.skipped, skipped_before) if skips else {})
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # the optimiser's state, which the accelerator would hold through later stages
    return average.module if average is not None else plain


def compile_backbones(model: nn.Module) -> None:
    """Let torch.compile have the backbone, and its pyramid, of every detector in a model; names of weights stay."""
    for module in model.modules():
        if isinstance(module, Detector):
            module.backbone.compile(**COMPILER)


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """The update of the averaged weights; counters and flags are copied, an average would round them down."""
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: Any, current: Any, number: Any) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, number)
        else:
            torch._foreach_copy_(averaged, current)

    return update


def check_shares(schedule: Schedule, processes: int) -> None:
    """Refuse a batch that cannot be cut into equal parts for the processes and accumulation steps."""
    if schedule.batch % (processes * schedule.accumulation):
        raise UserError(
            f"schedule.batch {schedule.batch} cannot be shared out evenly over {processes} processes x "
            f"{schedule.accumulation} accumulation steps; use a number of processes that divides it"
        )


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed torch's generators for one iteration of one rank (RPN and RoI sampling, dropout, ... draw from them)."""
    value = int(np.random.SeedSequence([seed, 4, iteration, rank]).generate_state(1, np.uint64)[0]) >> 1
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(value)


def _restore(
    accelerator: Accelerator, stage: Stage, plain: nn.Module, optimizer: Any, average: AveragedModel | None
) -> tuple[int, dict[str, Any], dict[str, int]]:
    """(iteration to go on from, best evaluation so far, pictures skipped so far)."""
    state = load_resume_point(stage.folder)
    if state is None:
        return 0, {"AP": -math.inf, "iteration": 0, "waited": 0}, {}
    if state["iteration"] > stage.plan.iterations:
        raise UserError(f"{stage.folder}: its resume point is beyond the end of this recipe's schedule")
    plain.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["iteration"], state["best"], state.get("skipped", {})


def _to_device(batch: Any, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = batch
    images = [image.to(device, non_blocking=True) for image in images]
    return images, [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]


def _evaluation_points(recipe: Recipe, plan: BatchPlan) -> set[int]:
    """Iterations after which the model is measured; the end is one of them only where the best model is chosen."""
    every = recipe.evaluation.every
    if not every:
        return set()
    points = {plan.iteration_at(epoch) for epoch in range(every, math.ceil(recipe.schedule.epochs), every)}
    end = {plan.iterations}
    return points | end if recipe.evaluation.select == "best" else points - end


def _agree(accelerator: Accelerator, received: int | None) -> int:
    """The signal that any process has received, 0 for none: all of them stop after the same iteration."""
    if accelerator.num_processes == 1:
        return received or 0
    number = torch.tensor(received or 0, device=accelerator.device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def _average_norms(accelerator: Accelerator, plain: nn.Module, average: AveragedModel | None) -> None:
    """Batch norm's running statistics differ between ranks (each saw its own pictures): take their mean."""
    if accelerator.num_processes == 1:
        return
    norms = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    buffers = [
        buffer
        for model in (plain, average.module if average is not None else None)
        if model is not None
        for name in norms
        for key, buffer in model.get_submodule(name).named_buffers(recurse=False)
        if key in ("running_mean", "running_var")
    ]
    if buffers:
        flat = accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), reduction="mean")
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def _refuse_diverged(stage: Stage, model: nn.Module, iteration: int) -> None:
    """End training before weights that mean nothing are written: the last step may diverge, and no loss follows it."""
    values = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    if not values or bool((torch.stack(torch._foreach_norm(values, math.inf)) < DIVERGED).all()):
        return
    raise UserError(
        f"the weights have diverged after {iteration} iterations of stage {stage.name}: lower schedule.lr, lengthen "
        f"schedule.warmup or set schedule.clip=10"
        + (f". The resume point {stage.folder / 'last'} is intact" if (stage.folder / "last").exists() else "")
    )


def _diagnose(
    stage: Stage,
    seen: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]],
    iteration: int,
    rate: float,
    model: nn.Module,
) -> str:
    """Why the loss is not finite, as far as it can be seen: of the losses and targets of the step's micro-batches the
    first that are to blame."""
    named = [([name for name, value in own.items() if not bool(torch.isfinite(value).all())], at) for own, at in seen]
    bad, targets = next(((names, at) for names, at in named if names), named[0])
    index = stage.dataset.source.index
    files = [index.file_name(int(target["image_id"])) for target in targets]
    broken = [name for name, value in model.named_parameters() if not bool((value.abs() < DIVERGED).all())]
    cause = (
        f"the weights have diverged in an earlier step (first: {broken[0]}): lower schedule.lr, lengthen "
        "schedule.warmup or set schedule.clip=10"
        if broken
        else "the weights have not diverged: look at these pictures' boxes, lower schedule.lr, lengthen "
        "schedule.warmup or set schedule.clip=10"
    )
    return (
        f"the loss is not finite at iteration {iteration} of stage {stage.name} ({', '.join(bad)}; learning rate "
        f"{rate:g}; pictures {', '.join(files[:4])}{', ...' if len(files) > 4 else ''}); {cause}"
        + (f". The resume point {stage.folder / 'last'} is intact" if (stage.folder / "last").exists() else "")
    )
