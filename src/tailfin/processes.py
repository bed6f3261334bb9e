"""The processes of a run: ranks, devices, threads, precision, and what the main process does for all.

Accelerate is the engine. `new_accelerator` is what everything gets its device from; `on_main` runs writing and deciding
on one process, whose value or mistake reaches every other.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from tailfin.errors import UserError
from tailfin.files import disk_problem
from tailfin.schema.recipe import Recipe

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


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker that there is not, or whose package is not installed."""
    for tracker in recipe.logging.trackers:
        if tracker not in TRACKERS:
            raise UserError(f'there is no tracker "{tracker}" (choices: {", ".join(TRACKERS)})')
        if importlib.util.find_spec(TRACKERS[tracker]) is None:
            raise UserError(f"the tracker {tracker} needs its package: pip install {TRACKERS[tracker]}")


def make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """Accelerate with this recipe's precision and trackers; loss statistics are never overwritten by DDP."""
    check_trackers(recipe)
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


def slow_precision(accelerator: Accelerator) -> str:
    """What to say of half precision on a processor without instructions for it; empty otherwise."""
    if accelerator.device.type != "cpu" or accelerator.mixed_precision in ("no", fastest_precision()):
        return ""
    return (
        f"this processor has no instructions for {accelerator.mixed_precision}: training takes many times as long as "
        "in float32, which schedule.precision=auto takes here"
    )


def limit_threads() -> None:
    """Not more threads than this process may use: a container's share is often smaller than the machine."""
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            usable = min(usable, max(1.0, int(limit) / int(period)))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), int(usable))))


def on_main(accelerator: Accelerator | PartialState, action: Callable[[], T]) -> T:
    """Run `action` on the main process; its value, or its `UserError`, reaches every process.

    An `OSError` (a full disk, a lost folder) is a `UserError` too: the others would wait for a value that never comes.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = disk_problem(error)
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def default_device() -> str:
    """A GPU where there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name: str | torch.device) -> torch.device:
    """A device that works here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'device "{name}" cannot be used here: {reason[:200]}') from None
