"""`tailfin train --auto-batch`: the largest batch that the device's memory holds.

    recipe, lines = largest_batch(recipe)

The dry run's estimate of memory per picture says how many fit into `SHARE` of what is free; then one training step with
that many copies of the largest picture is made on the device, and halved for as long as it runs out of memory. Pictures
can be larger later in a training than in its first batch, so some memory is left free. The batch is that of all
processes, without accumulation; `schedule.lr_rule` says whether the learning rate follows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tailfin.config import check_recipe
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.engine import detector_step
from tailfin.errors import UserError
from tailfin.memory import training_memory, watched_step
from tailfin.models import build_detector
from tailfin.processes import new_accelerator
from tailfin.run import batch_plan
from tailfin.schedule import build_optimizer
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

SHARE = {"cuda": 0.85, "mps": 0.7, "cpu": 0.5}  # of the free memory; a CPU that runs out ends the process
HALF = ("bf16", "fp16")  # in which activations take about half of what the estimate, in float32, says
Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]


def largest_batch(
    recipe: Recipe, *, free: Callable[[torch.device], int] | None = None, probe: Callable[..., None] | None = None
) -> tuple[Recipe, list[str]]:
    """The recipe with the largest batch, and lines that say how it was found.

    Args:
        free: bytes that are free on a device; by default asked of it.
        probe: makes a training step, for a model, recipe, samples and device; by default `training_step`.

    Raises:
        UserError: not one picture fits.
    """
    accelerator = new_accelerator(recipe.schedule.precision)
    device = accelerator.device
    train = open_source(recipe.data.train, recipe.data.root, "train")
    stats = ClassStats.from_index(train.index, group_bounds=recipe.evaluation.group_bounds)
    dataset = TrainingDataset(train, recipe.data, recipe.seed)
    torch.manual_seed(recipe.seed)
    model, _ = build_detector(recipe, stats, start=False)
    if "segm" in model.kinds:
        dataset = dataset.with_masks()
    keys = next(batch_plan(recipe, dataset, stats).keys(0, slice(0, 1), 1))
    samples = [dataset.sample(*key) for key in keys]
    largest = max(samples, key=lambda sample: sample[0].shape[-1] * sample[0].shape[-2])
    step, states = watched_step(model, *largest), 2 if recipe.schedule.optimizer == "adamw" else 1
    # of few pictures the gradients may be the peak
    some, more = (training_memory(model, step, pictures, states).total for pictures in (32, 64))
    each = (more - some) // 32
    weights = some - 32 * each
    each = max(each // (2 if accelerator.mixed_precision in HALF and device.type == "cuda" else 1), 1)
    there = (free or free_memory)(device)
    usable = int(SHARE.get(device.type, 0.5) * there)
    most = max(len(dataset.rows()) // accelerator.num_processes, 1)  # an epoch has at least one step
    size = min(max((usable - weights) // each, 1), most)
    lines = [
        f"auto-batch: {there / 2**30:.1f} GiB free on {device}, {weights / 2**20:.0f} MiB for weights and optimiser, "
        f"about {each / 2**20:.1f} MiB a picture of {largest[0].shape[-2]} x {largest[0].shape[-1]}: {size} a process"
    ]
    while True:
        try:
            (probe or training_step)(model, recipe, [largest] * size, accelerator)
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if size == 1:
                raise UserError(f"--auto-batch: not one picture fits into the memory of {device}") from None
            size //= 2
            lines.append(f"auto-batch: a step ran out of memory, {size} a process")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    size = _least(size, accelerator)
    return _with_batch(recipe, size * accelerator.num_processes, lines)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, as it says itself."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    facts = Path("/proc/meminfo")
    if facts.exists():
        found = [line.split() for line in facts.read_text().splitlines() if line.startswith("MemAvailable:")]
        if found:
            return int(found[0][1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def training_step(model: torch.nn.Module, recipe: Recipe, samples: list[Sample], accelerator: Any) -> None:
    """Forward, backward and a step of the optimiser in the recipe's precision; the model is thrown away afterwards."""
    device = accelerator.device
    model.to(device).train()
    images = [image.to(device) for image, _ in samples]
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in samples]
    optimizer = build_optimizer(model, recipe.schedule)
    with accelerator.autocast():
        losses = detector_step(model, images, targets)
    total = torch.stack([value.float() for value in losses.values()]).sum()
    total.backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # its memory is what counts
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---- details ---------------------------------------------------------------------------------------------------------


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "out of memory" in text
    )


def _least(size: int, accelerator: Any) -> int:
    """The smallest of all processes' sizes."""
    if accelerator.num_processes == 1:
        return size
    number = torch.tensor(size, device=accelerator.device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN)
    return int(number)


def _with_batch(recipe: Recipe, batch: int, lines: list[str]) -> tuple[Recipe, list[str]]:
    values = recipe.model_dump(mode="json")
    own = recipe.schedule
    values["schedule"] |= {"batch": batch, "accumulation": 1, "lr_batch": own.lr_batch or own.batch}
    found = check_recipe(values, recipe.name or "recipe")
    rate = found.schedule.rate_told() or (
        f"schedule.lr stays {own.lr:g}; schedule.lr_rule=linear or sqrt scales it from the batch of {own.batch}"
    )
    return found, [*lines, f"auto-batch: schedule.batch={batch}; {rate}"]
