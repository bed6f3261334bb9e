"""Where a run's numbers come from: command, commit, versions, machine and data, for RUN/environment.json."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tailfin.data.dataset import Source
from tailfin.schema.recipe import Recipe


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
        "started": now(),
        "seed": recipe.seed,
        "commit": commit(),
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


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
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
