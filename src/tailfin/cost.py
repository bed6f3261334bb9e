"""What detectors cost: multiply-adds, parameters and pictures per second, several side by side (`tailfin cost`).

    counted = cost(["lvis_v1/faster_rcnn_r50", "lvis_v1/faster_rcnn_r50_bacl"], size=(800, 1333))

Multiply-adds are counted on one picture, the box head on as many proposals as the recipe keeps at test time. They are
what detection papers print as FLOPs; a multiply-add is two floating-point operations. Elementwise work, RoIAlign and
NMS are not counted.

Pictures per second come with the time of each part: the detector's children, and what makes detections of its outputs
(`post-processing`: scores, selection, NMS). The detectors take turns, so that a machine that slows down slows all. A
trained model (a run or model file) is measured as it is. A recipe has no weights yet: its norms are settled on the
picture and its outputs are those of `Detector.rehearsed` (proposals at random places, spread logits), since what NMS
costs depends on the scores. Numbers of both kinds do not compare.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.models.detector import Detector, Limits
from tailfin.models.frozen_norms import norms_apart
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import final_stage
from tailfin.stats import ClassStats

POST = "post-processing"
REST = "rest"
OWN = "measuring"  # this module's own work, which does not count
# classes of the data sets that recipes are named after, where their files are not at hand
CLASSES = {"lvis_v1": 1203, "lvis_v0.5": 1230, "coco": 80, "coco_lt": 80, "fod": 31, "road12": 12, "demo": 24}


@dataclass
class Cost:
    """What one detector costs."""

    name: str
    trained: bool
    classes: int
    size: tuple[int, int]  # height and width of the picture that multiply-adds are counted on
    proposals: int | None  # of the box head; None for a detector without one
    gmacs: float
    parameters: int
    published: dict[str, float]  # the recipe's numbers, as printed
    part_gmacs: dict[str, float] = field(default_factory=dict)
    part_parameters: dict[str, int] = field(default_factory=dict)
    images_per_second: float | None = None
    part_seconds: dict[str, float] = field(default_factory=dict)  # per picture, median
    candidates: float | None = None  # scores above the threshold per picture, which NMS has to sort out

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class Subject:
    """A detector to measure."""

    name: str
    model: Detector
    recipe: Recipe
    stats: ClassStats
    trained: bool


def cost(
    subjects: Sequence[str | Path],
    *,
    size: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
    classes: int | None = None,
    images: Sequence[str | Path] = (),
    rounds: int = 5,
    speed: bool = True,
    device: str | torch.device | None = None,
) -> list[Cost]:
    """Multiply-adds, parameters and pictures per second of each of `subjects`.

    Args:
        subjects: recipes (name, YAML path, published row's id), run folders or model files.
        size: (height, width) of the picture; by default each recipe's test size, short side by its bound.
        overrides: `key=value` for the recipes among them.
        classes: of the recipes; by default those of their training file, else of the data set they are named after.
        images: pictures to measure the speed on, resized as each recipe says; by default one made-up picture of `size`.
        rounds: measured rounds, after one that warms up.
        speed: false counts only.
        device: by default a GPU where there is one.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: at least one round is needed")
    if size is not None and min(size) < 32:
        raise UserError(f"--size {size[0]} {size[1]}: a picture of at least 32 x 32 pixels is needed")
    found = [open_subject(subject, overrides, classes) for subject in subjects]
    from tailfin.processes import default_device, usable_device

    where = usable_device(device or default_device())
    costs, pictures = [], []
    for subject in found:
        short, bound = subject.recipe.data.inference_size
        shape = size or (short, bound)
        subject.model.to(where).eval()
        if speed and not subject.trained:
            settle(subject.model, sample_picture(shape).to(where))
        costs.append(counted(subject, sample_picture(shape).to(where)))
        own = [_test_picture(path, subject.recipe) for path in images] or [sample_picture(shape)]
        pictures.append([picture.to(where) for picture in own])
    if speed:
        measure(found, costs, pictures, rounds)
    return costs


def open_subject(given: str | Path, overrides: Sequence[str] = (), classes: int | None = None) -> Subject:
    """A trained model (run folder or model file), or the final stage's detector of a recipe with random weights."""
    from tailfin.api import load
    from tailfin.models import build_detector

    path = Path(given)
    if path.suffix == ".safetensors" or path.is_dir():
        detector = load(path, "cpu")
        return Subject(str(given), detector.model, detector.recipe, detector.stats, True)
    recipe = load_recipe(given, overrides)
    stats = _stats(recipe, str(given), classes)
    final = final_stage(recipe).recipe
    torch.manual_seed(0)
    model, _ = build_detector(final, stats, start=False)
    return Subject(str(given), model, final, stats, False)


# ---- counting --------------------------------------------------------------------------------------------------------


def counted(subject: Subject, picture: Tensor) -> Cost:
    """Multiply-adds of one picture and parameters, in all and by part."""
    model = subject.model
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _rehearsing(subject.model), counter:
        model([picture])
    counts = counter.get_flop_counts()
    root = type(model).__name__
    macs, parameters = {}, {}
    for name, child in _parts(model):
        macs[name] = _operations(counts, f"{root}.{name}", child) / 2e9
        parameters[name] = sum(parameter.numel() for parameter in child.parameters())
    return Cost(
        subject.name,
        subject.trained,
        subject.stats.num_classes,
        (picture.shape[1], picture.shape[2]),
        model.num_proposals,
        counter.get_total_flops() / 2e9,
        sum(parameter.numel() for parameter in model.parameters()),
        subject.recipe.about.published,
        {name: value for name, value in macs.items() if value},
        {name: value for name, value in parameters.items() if value},
    )


def _operations(counts: dict[str, Any], name: str, module: nn.Module) -> int:
    """Those of a module, or of what is called inside one that is never called as a whole."""
    if name in counts:
        return sum(counts[name].values())
    return sum(_operations(counts, f"{name}.{key}", child) for key, child in module.named_children())


def _timed_modules(part: nn.Module) -> Iterator[nn.Module]:
    """A part and what a detector may call one by one in its place: its children, and theirs below one that has no
    `forward`."""
    yield part
    called = type(part).forward is not nn.Module.forward
    for child in part.children():
        yield from (child,) if called else _timed_modules(child)


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in model.named_children() if next(child.parameters(), None) is not None]


@contextmanager
def _rehearsing(model: Detector) -> Iterator[None]:
    """The outputs are those of `Detector.rehearsed`, whatever an untrained network finds."""

    def rehearsed(images: Sequence[Tensor], targets: Any = None) -> Any:
        del model.outputs  # a detector may rehearse on its own outputs
        try:
            return model.rehearsed(images)
        finally:
            model.outputs = rehearsed  # type: ignore[method-assign]

    model.outputs = rehearsed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.outputs


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    subjects: Sequence[Subject], costs: Sequence[Cost], pictures: Sequence[Sequence[Tensor]], rounds: int
) -> None:
    """Fill in pictures per second, seconds by part and candidates; picture by picture, in turns."""
    seconds: list[list[dict[str, float]]] = [[] for _ in subjects]
    seen: list[list[int]] = [[] for _ in subjects]
    for number in range(-1, rounds):
        order = range(len(subjects)) if number % 2 else reversed(range(len(subjects)))
        for which in order:
            spent = _timed(subjects[which], pictures[which], seen[which])
            if number >= 0:
                seconds[which].append(spent)
    for which, found in enumerate(costs):
        per_picture = {
            name: statistics.median(spent.get(name, 0.0) for spent in seconds[which]) / len(pictures[which])
            for name in dict.fromkeys(name for spent in seconds[which] for name in spent)
        }
        total = statistics.median(sum(spent.values()) for spent in seconds[which]) / len(pictures[which])
        found.part_seconds, found.images_per_second = per_picture, 1 / total
        found.candidates = statistics.mean(seen[which]) if seen[which] else None


@torch.inference_mode()
def _timed(subject: Subject, pictures: Sequence[Tensor], seen: list[int]) -> dict[str, float]:
    """Seconds of each part for all pictures; the number of candidates of each goes to `seen`."""
    device = pictures[0].device
    spent: dict[str, float] = {}
    open_parts: list[tuple[str, float]] = []

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def begin(name: str) -> None:
        open_parts.append((name, clock()))

    def end() -> None:
        name, begun = open_parts.pop()
        length = clock() - begun
        spent[name] = spent.get(name, 0.0) + length
        if open_parts:  # a part inside another one counts once
            outer = open_parts[-1][0]
            spent[outer] = spent.get(outer, 0.0) - length

    handles = []
    for name, child in _parts(subject.model):
        for module in _timed_modules(child):
            handles.append(module.register_forward_pre_hook(lambda _, __, name=name: begin(name)))
            handles.append(module.register_forward_hook(lambda *_: end()))
    with _post_processing(subject, begin, end, seen):
        try:
            for picture in pictures:
                begin(REST)
                subject.model([picture])
                end()
        finally:
            for handle in handles:
                handle.remove()
    spent.pop(OWN, None)
    return spent


@contextmanager
def _post_processing(
    subject: Subject, begin: Callable[[str], None], end: Callable[[], None], seen: list[int]
) -> Iterator[None]:
    """Time what becomes of a detector's outputs, and count the candidates in them; an untrained one rehearses."""
    model = subject.model
    detections = model.detections

    def timed(outputs: Any, limits: Limits) -> Any:
        begin(OWN)
        count = model.candidates(outputs, limits)
        if count is not None:
            seen.append(count)
        end()
        begin(POST)
        found = detections(outputs, limits)
        end()
        return found

    model.detections = timed  # type: ignore[method-assign]
    try:
        with nullcontext() if subject.trained else _rehearsing(model):
            yield
    finally:
        del model.detections


@torch.no_grad()
def settle(model: nn.Module, picture: Tensor) -> None:
    """Statistics of every batch norm from what reaches it, in one pass: random weights give numbers of sane size."""

    def follow(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        value = arguments[0].float()
        variance, mean = torch.var_mean(value, dim=(0, 2, 3))
        norm.running_mean.copy_(mean)  # type: ignore[operator, union-attr]
        norm.running_var.copy_(variance.nan_to_num(1.0).clamp(min=1e-6))  # type: ignore[operator, union-attr]

    norms = [module for module in model.modules() if hasattr(module, "running_mean") and hasattr(module, "running_var")]
    handles = [norm.register_forward_pre_hook(follow) for norm in norms]
    try:
        with norms_apart(model):
            model([picture])
    finally:
        for handle in handles:
            handle.remove()


# ---- details ---------------------------------------------------------------------------------------------------------


def sample_picture(size: tuple[int, int]) -> Tensor:
    """A made-up picture float [3, H, W] in 0..1: coarse colours and some noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 8, 8), generator=generator)
    picture = F.interpolate(coarse, size=size, mode="bilinear")[0]
    return (0.9 * picture + 0.1 * torch.rand(picture.shape, generator=generator)).clamp(0, 1)


def _test_picture(path: str | Path, recipe: Recipe) -> Tensor:
    from tailfin.data.dataset import to_test_size
    from tailfin.pictures import to_tensor

    return to_test_size(to_tensor(path, recipe.data), recipe.data)


def _stats(recipe: Recipe, given: str, classes: int | None) -> ClassStats:
    """The classes of a recipe's training file, or so many."""
    if classes is None and recipe.data.train.annotations:
        file = Path(recipe.data.root) / recipe.data.train.annotations
        if file.is_file():
            return ClassStats.from_json(file)
    number = classes or CLASSES.get(_data_set(given))
    if number is None:
        raise UserError(f"{given}: the number of its classes is not known without its data; give --classes")
    count = np.full(number, 100)
    return ClassStats(image_count=count, instance_count=count, num_images=100 * number)


def _data_set(given: str) -> str:
    """The data set that a recipe is named after; a published row's is that of its recipe."""
    from tailfin import recipes

    if given in {row.id for row in recipes.rows()}:
        return recipes.published_row(given).dataset
    return given.removesuffix(".yaml").split("/")[0]
