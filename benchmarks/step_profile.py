"""What would a training step make an accelerator do, and how often would it wait? Counted on any machine.

    python benchmarks/step_profile.py fod/bacl_r18 fod/retinanet_r18 --train TRAIN.json
    python benchmarks/step_profile.py road12/mask_rcnn_r18 --train TRAIN.json --set data.sizes=[128] --lines
    python benchmarks/step_profile.py --short     # some recipes on fod31-lt of TAILFIN_DATA, else on the demo set

Every stage of every recipe is begun as `tailfin train` begins it, on the pretend device of `tests/pretend_device.py`,
and cut off after some iterations; the last one is reported, from one seeding to the next: the step, backward, clipping,
optimiser and checks. Without `--train` the recipe's own files are used.

    launches        operations that do work on the device; each costs some microseconds of the host. At batch 16 half
                    of torchvision's is the aim
    views           operations that launch nothing
    reads back      where the host waits for the device; `--lines` says where. Whatever the batch, at most 8 is the aim
    uploads         constants made on the host
    multiply-adds   of matrix products and convolutions, forward and backward
    bytes           that operations read and write, were nothing fused

`torchvision` as a recipe is torchvision's own Faster R-CNN with the settings of fod/faster_rcnn_r18_softmax. Overrides
of one recipe stand behind it with commas: `fod/drcl_r18,pretraining.views.detection=first`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from rich.console import Console
from rich.table import Table

import tailfin
from tailfin import engine, run
from tailfin.config import load_recipe
from tailfin.data.synth import demo_set

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).resolve().parent)]
from short_form import data, line, short  # noqa: E402

from pretend_device import DEVICE, Seen, bring_back, pretend_device  # noqa: E402

SHORT = (
    "torchvision",
    "fod/faster_rcnn_r18_softmax",
    "fod/bacl_r18",
    "fod/classifiers:forest",
    "fod/deformable_detr_tiny",
    "fod/stepwise_tiny,stepwise.exemplars.order=random",  # without scores of all training pictures
    "fod/drcl_r18",
    "fod/drcl_r18,pretraining.views.detection=first",
    "fod/drcl_r18,pretraining.views.detection=first,pretraining.reconstruction.share=0.25",
    "fod/d_fine_tiny",
)
PEER, PEER_RECIPE = "torchvision", "fod/faster_rcnn_r18_softmax"


class Step(NamedTuple):
    """One iteration of a stage."""

    stage: str
    operations: int
    views: int
    reads: Counter[str]  # by "file:line what"
    uploads: Counter[str]
    multiply_adds: int
    bytes: int


class _Enough(Exception):
    """The iterations that were asked for are done."""


def steps_of(
    recipe: str, train: Path | None, overrides: Sequence[str] = (), *, batch: int = 2, iterations: int = 2
) -> list[Step]:
    """The last of `iterations` of every stage of a recipe."""
    found: list[Step] = []
    fit = run.fit

    def cut_short(accelerator: Any, stage: Any) -> Any:
        with pretend_device() as seen, _on_device(accelerator):
            found.append(_one_step(seen, lambda: fit(accelerator, stage), stage.name, iterations))
            bring_back(stage.model)
        accelerator.free_memory()
        return stage.model

    kept = run.fit, run.Run.finish
    run.fit, run.Run.finish = cut_short, lambda self, model: None  # type: ignore[assignment,method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            every = [*_small_batches(recipe, overrides, batch, iterations), *overrides]
            tailfin.train(recipe, train=train, out=Path(folder) / "run", overrides=every)
    finally:
        run.fit, run.Run.finish = kept  # type: ignore[method-assign]
    return found


def _one_step(seen: Seen, train: Any, name: str, iterations: int) -> Step:
    """Run `train` until iteration number `iterations` is over; what the last one did."""
    marks: list[Step] = []
    seed = engine.seed_iteration

    def seeding(*arguments: Any) -> None:
        counters = (Counter(seen.reads), Counter(seen.uploads))
        marks.append(Step(name, seen.operations.total(), seen.views, *counters, seen.multiply_adds, seen.bytes))
        if len(marks) > iterations:
            raise _Enough
        seed(*arguments)

    engine.seed_iteration = seeding  # type: ignore[assignment]
    try:
        with contextlib.suppress(_Enough):
            train()
    finally:
        engine.seed_iteration = seed
    if len(marks) <= iterations:
        raise SystemExit(f"stage {name} has {len(marks)} iterations, {iterations + 1} are needed: take a smaller batch")
    before, after = marks[-2:]
    return Step(name, *(b - a for a, b in zip(before[1:], after[1:], strict=True)))  # type: ignore[operator]


@contextlib.contextmanager
def _on_device(accelerator: Any) -> Any:
    """The accelerator's device is the pretend one."""
    # parameters that are moved twice are new objects, of which the optimiser would not know
    placing = accelerator.device_placement
    accelerator.device_placement = False
    states = (accelerator.state, PartialState())
    for state in states:
        state.device = DEVICE
    try:
        yield
    finally:
        accelerator.device_placement = placing
        for state in states:
            state.device = torch.device("cpu")


def _small_batches(recipe: str, overrides: Sequence[str], batch: int, iterations: int) -> list[str]:
    """Overrides: `batch` pictures in every stage, float32, nothing written on the way."""
    loaded = load_recipe(recipe, list(overrides))
    values = ["data.workers=0", "logging.every=1000000", "logging.checkpoint_every=1000000"]
    values += ["evaluation.every=0", "data.val.annotations=''"]
    schedules = ["schedule", *(["second.schedule"] if loaded.method in ("bacl", "decoupled") else [])]
    if loaded.pretraining is not None:
        schedules.append("pretraining.schedule")
    for name in schedules:
        values += [f"{name}.batch={batch}", f"{name}.precision=no", f"{name}.accumulation=1"]
    return values


def torchvision_step(train: Path | None, overrides: Sequence[str], batch: int) -> list[Step]:
    """The same of torchvision's Faster R-CNN, on made-up pictures with three objects each."""
    import training_speed as peer

    sizes = [int(value) for value in load_recipe(PEER_RECIPE, list(overrides)).data.sizes]
    options = argparse.Namespace(r50=False, size=sizes[0], batch=batch, classes=31, device="cpu", precision="no")
    options.channels_last = False
    recipe, pictures, targets = peer.workload(options)
    model = peer.detector(recipe, options.classes)
    twin = peer.torchvision_twin(model, recipe).train()
    with pretend_device() as seen:
        twin.to(DEVICE)
        images = [picture.to(DEVICE) for picture in pictures]
        wanted = [{k: v.to(DEVICE) for k, v in target.items()} for target in peer.for_torchvision(targets)]
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(2):
            seen.clear()
            loss = torch.stack(list(twin(images, wanted).values())).sum()
            if not torch.isfinite(loss).item():
                raise SystemExit("torchvision's loss is not finite")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
        return [Step("", seen.operations.total(), seen.views, seen.reads, seen.uploads, seen.multiply_adds, seen.bytes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--train", type=Path, help="annotation file in the place of the recipes' own")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 16], help="pictures per step")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipes")
    parser.add_argument("--lines", action="store_true", help="where the host reads back")
    short(parser, recipes=SHORT)
    options = parser.parse_args()
    options.recipes = SHORT if options.short else options.recipes  # the parser sets what is not given last
    with tempfile.TemporaryDirectory() as folder:
        if options.short and options.train is None:
            options.train = data("fod31-lt", "train.json") or demo_set(Path(folder) / "demo")[0]
        report(options)


def report(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = Table()
    names = ("recipe", "stage", "pictures", "launches", "views", "reads back", "uploads", "multiply-adds", "bytes")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < 2 else "right")
    lines = []
    for given in options.recipes:
        recipe, *own = given.split(",")
        few = options.short and recipe not in (
            PEER,
            PEER_RECIPE,
        )  # that the counts are those of any batch is seen there
        for batch in options.batch[-1:] if few else options.batch:
            if recipe == PEER:
                steps = torchvision_step(options.train, options.set, batch)
            else:
                steps = steps_of(recipe, options.train, [*options.set, *own], batch=batch)
            name = " ".join([recipe, *own])
            if options.short:
                ratio_line(name, batch, steps)
            for step in steps:
                numbers = (step.operations - step.views, step.views, step.reads.total(), step.uploads.total())
                size = (f"{step.multiply_adds / 1e9:,.2f} G", f"{step.bytes / 2**30:,.2f} GiB")
                cells = (name, step.stage, str(batch), *(f"{number:,}" for number in numbers), *size)
                table.add_row(*cells)
                if options.short:
                    print(f"| {' | '.join(cells)} |", flush=True)
                lines += [f"{name} {step.stage}, {batch} pictures: {n} x {at}" for at, n in step.reads.most_common()]
    console = Console(width=140)
    console.print(table)
    if options.lines:
        for text in lines:
            console.print(text, highlight=False)


def ratio_line(name: str, batch: int, steps: Sequence[Step]) -> None:
    """What a step of a pre-training multiplies beside one of the training that follows."""
    work = {step.stage: step.multiply_adds for step in steps}
    if "pretrain" in work:
        ours, theirs = (f"{work[stage] / 1e9:.1f} G" for stage in ("pretrain", "train"))
        what = f"multiply-adds of a pre-training step, {name}, {batch} pictures"
        line(what, ours, f"supervised {theirs}", f"{work['pretrain'] / work['train']:.2f}")


if __name__ == "__main__":
    main()
