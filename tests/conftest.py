"""Shared fixtures: real photo sets, reference vectors, a set that trains in seconds, the command line."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from accelerate.state import AcceleratorState
from PIL import Image

from tailfin.run import Run

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ.get("TAILFIN_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real photo sets (`fod31-lt`, `coco-sample`, ...): `TAILFIN_DATA`, else `../shared/data`."""
    path = Path(os.environ.get("TAILFIN_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real photo sets are not at {path} (set TAILFIN_DATA)")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the reference vectors that the repository carries."""
    return ROOT / "tests" / "golden"


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Annotation indexes made by tests stay out of the user's cache."""
    os.environ["TAILFIN_CACHE"] = str(tmp_path_factory.mktemp("tailfin-cache"))


TINY_RECIPE = """\
weights: none
backbone: resnet18
detector:
  norm: bn
  frozen_layers: 0
  fpn_channels: 16
  fpn_layers: [2, 3]
  fpn_pool: false
  anchor_sizes: [12, 24]
  rpn_batch: 32
  rpn_pre_nms: [100, 100]
  rpn_post_nms: [50, 50]
  roi_size: 3
  roi_batch: 16
  head_channels: 32
schedule: {epochs: 5, batch: 4, lr: 0.01, warmup: 4, milestones: [4]}
data: {resize: square, sizes: [64], workers: 0}
sampler: {name: rfs, threshold: 0.5}
logging: {every: 1, checkpoint_every: 5}
evaluation: {max_dets: 20}
"""


def make_tiny_set(folder: Path, images: int, seed: int) -> Path:
    """Coloured rectangles of three classes (ids 3, 5, 9; the last one rare) on noise; returns the JSON's path."""
    rng = np.random.default_rng(seed)
    path = folder.with_suffix(".json")
    folder.mkdir(parents=True)
    document: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "red"}, {"id": 5, "name": "green"}, {"id": 9, "name": "blue"}],
    }
    for number in range(images):
        width, height = (80, 60) if number % 3 else (60, 80)
        picture = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
        for _ in range(0 if number == images - 1 else 1 + number % 2):
            label = int(rng.choice(3, p=[0.5, 0.4, 0.1]))
            w, h = (int(side) for side in rng.integers(14, 30, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            picture[y : y + h, x : x + w] = 40
            picture[y : y + h, x : x + w, label] = 230
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": 100 + number,
                    "category_id": (3, 5, 9)[label],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        document["images"].append({"id": 100 + number, "file_name": f"{number}.png", "width": width, "height": height})
        Image.fromarray(picture).save(folder / f"{number}.png")
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="session")
def make_set() -> Callable[[Path, int, int], Path]:
    """`make_set(folder, images, seed)`: a set like `tiny_set`'s of another size; returns the JSON's path."""
    return make_tiny_set


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train.json, val.json) of a set that trains in seconds; the last image of each has no annotation."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_set(folder / "train", 26, 0), make_tiny_set(folder / "val", 9, 1)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for it: 35 to 40 iterations of 4 images."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


def tailfin_command(*arguments: object, processes: int = 1) -> list[str]:
    """The command line as a list: this interpreter's `tailfin`, under torchrun for several processes."""
    words = [str(argument) for argument in arguments]
    if processes == 1:
        return [sys.executable, "-m", "tailfin", *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", "tailfin", *words]


@pytest.fixture(scope="session")
def run_tailfin():
    """Run the command line to its end: `run_tailfin("train", ..., processes=2) -> CompletedProcess` (text)."""

    def run(
        *arguments: object, processes: int = 1, timeout: float = 300, **options: Any
    ) -> subprocess.CompletedProcess:
        command = tailfin_command(*arguments, processes=processes)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=child_environment(), **options
        )

    return run


@pytest.fixture(scope="module")
def quick_training() -> Iterator[None]:
    """Trainings in this process take half the time: no report is written, and the garbage collection at the end of a
    stage does not go through all imported modules."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_report", lambda self: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def start_tailfin():
    """Start the command line and return the running process."""

    def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
        command = tailfin_command(*arguments, processes=processes)
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=child_environment(),
            start_new_session=True,
        )

    return start


def child_environment() -> dict[str, str]:
    """One thread per process, whatever the machine, and no GPU: bit-equality is tested on the CPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TAILFIN_CACHE": os.environ["TAILFIN_CACHE"],
    }


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[..., list[Any]]:
    """`run_on_ranks(function, n=2)`: what `function(rank)` returns on each of n gloo processes (picklable values)."""

    def run(function: Callable[[int], Any], n: int = 2) -> list[Any]:
        for _ in range(3):  # now and then the system refuses gloo a connection, before anything of ours has run
            results = _outcomes(function, n)
            if all(error != NO_GROUP for error, _ in results.values()):
                break
        for rank, (error, _) in results.items():
            assert error is None, f"rank {rank}: {error}"
        return [results[rank][1] for rank in range(n)]

    return run


@pytest.fixture(scope="session")
def train_on_ranks(run_on_ranks: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """As `run_on_ranks`, with what a launcher sets: `tailfin.train` in `function` is one process of n. Forked processes
    have all imports already, which `run_tailfin(..., processes=n)` pays for n times."""

    def run(function: Callable[[int], Any], n: int = 2) -> list[Any]:
        def on_rank(rank: int) -> Any:
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1", CUDA_VISIBLE_DEVICES="")  # the group is there
            return function(rank)

        return run_on_ranks(on_rank, n)

    return run


NO_GROUP = "the processes did not find each other"


def _outcomes(function: Callable[[int], Any], n: int) -> dict[int, Any]:
    """(error, value) of each rank; of the first rank alone that could not join the others."""
    context = multiprocessing.get_context("fork")
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [context.Process(target=_on_rank, args=(function, rank, n, folder, queue)) for rank in range(n)]
        for process in processes:
            process.start()
        while len(results) < n:
            rank, outcome = queue.get(timeout=240)
            results[rank] = outcome
            if outcome[0] == NO_GROUP:
                for process in processes:
                    process.kill()
                break
        for process in processes:
            process.join(timeout=60)
    return results


def _on_rank(function: Callable[[int], Any], rank: int, n: int, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)  # a forked process must not use the parent's thread pool
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    except RuntimeError:
        queue.put((rank, (NO_GROUP, None)))
        return
    try:
        queue.put((rank, (None, function(rank))))
    except BaseException as error:
        queue.put((rank, (repr(error), None)))
    finally:
        torch.distributed.destroy_process_group()
