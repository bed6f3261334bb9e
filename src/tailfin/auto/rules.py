"""The rules of `tailfin train auto`, one table: from facts to choices, each with its reason and what was measured.

    choices = choose(facts)             # [Choice("sampler", "rfs", "the largest class has 83 times ...", ...), ...]
    choices = choose(facts, {"sampler": "plain"})  # what the user gives is taken; later rows see it

Of the rows of a choice the first whose condition holds is taken. `docs/choosing.md` shows the table as `markdown`
writes it; a row is changed here, and there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tailfin.auto.facts import Facts
from tailfin.data.advice import FEW, LONG

Taken = Mapping[str, Any]  # the values of the choices before
SIZES = (128, 160, 192, 224, 256, 320, 416, 512, 640, 800)  # sides of the square that pictures are fitted into
SMALL = 12  # pixels that a small object (QUANTILES[0]) should have
MOST = {"cpu": 320}  # largest size on a device
PER_PIXEL = {"packaged": 900, "none": 700, "coco": 1300}  # bytes of a training step in float32
HOLDOUT = 100  # validation pictures from which on a half of them is enough
FEW_OBJECTS = 8  # objects in a crowded picture up to which the small number of proposals is enough
DENSE = ("retinanet", "atss")

NOT_MEASURED = "not measured"
EVIDENCE = {  # what a row cites: file and heading, and its numbers, which a test looks up there
    "two_stage": (
        "results.md: FOD31-LT",
        "Faster R-CNN with RFS 0.385 in 14 epochs; RetinaNet 0.108, ATSS 0.143 in 7: not the same length",
    ),
    "masks": (
        "results.md: Other detectors from packaged ImageNet weights",
        "boxes 0.274 in 12 epochs, masks 0.193; Faster R-CNN in 24: 0.348; no control of equal length",
    ),
    "packaged": (
        "results.md: Packaged ImageNet weights on FOD31-LT",
        "0.386 in 5 epochs of 128 px; random start 0.385 in 14 of 160 px",
    ),
    "rfs": ("results.md: FOD31-LT", "RFS: AP 0.385, APr 0.407; plain: 0.279, 0.174"),
    "cosine": ("results.md: Demo set", "random start, 4 epochs: linear 0.117, cosine 0.198; from other starts not"),
    "calibration": ("use.md: Calibrated scores", "fod31-lt: NorCal 39.7, plain 38.5; APr 46.7, 44.2 (percent)"),
}


@dataclass(frozen=True)
class Row:
    """`take` when `holds`; `when` and `shown` say so in the table, `why` in the line that a run prints."""

    choice: str
    when: str
    holds: Callable[[Facts, Taken], bool]
    take: Callable[[Facts, Taken], Any]
    why: str  # a format of f (facts) and c (choices so far)
    shown: str = ""  # in the table, where the value depends on facts
    evidence: str = ""  # key of EVIDENCE


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    name: str
    value: Any
    why: str
    measured: str = field(default="")


def always(_: Facts, __: Taken) -> bool:
    """The condition of a last row."""
    return True


def value(constant: Any) -> Callable[[Facts, Taken], Any]:
    """A row's value that depends on nothing."""
    return lambda f, c: constant


def size_for(facts: Facts, most: int) -> int:
    """The smallest of SIZES in which a small object has SMALL pixels; not above `most`, nor above the pictures."""
    bound = min(most, max(facts.long_side, SIZES[0]))
    fitting = [size for size in SIZES if size <= bound]
    return next((size for size in fitting if size * facts.sides[0] >= SMALL), fitting[-1])


def batch_for(facts: Facts, taken: Taken) -> int:
    """The largest of 16, 8, 4, 2 of which a step takes at most half of the free memory, over all processes."""
    each = taken["size"] ** 2 * PER_PIXEL.get(taken["start"], max(PER_PIXEL.values()))
    own = next((size for size in (16, 8, 4) if size * each <= facts.memory / 2), 2)
    return max(own, own * facts.processes) if own < 16 else max(16, 2 * facts.processes)


def epochs_for(facts: Facts, seen: int, least: int, most: int) -> int:
    """So many that about `seen` pictures are seen, within bounds."""
    return int(min(max(round(seen / facts.pictures), least), most))


ROWS: tuple[Row, ...] = (
    Row(
        "detector",
        "every object of both files has a mask",
        lambda f, c: f.masks,
        value("mask_rcnn"),
        "every object has a mask",
        evidence="masks",
    ),
    Row("detector", "else", always, value("faster_rcnn"), "boxes alone, two-stage", evidence="two_stage"),
    Row(
        "start",
        "a GPU, and COCO weights of the detector are on this machine",
        lambda f, c: f.device != "cpu" and c["detector"] in f.coco,
        value("coco"),
        "COCO weights of {c[detector]} are on this machine, and a {f.device} device",
    ),
    Row(
        "start",
        "packages of `tailfin[weights]` are installed",
        lambda f, c: f.packaged,
        value("packaged"),
        "ImageNet weights (EfficientNet-Lite0) are installed, nothing is downloaded",
        evidence="packaged",
    ),
    Row(
        "start",
        "else",
        always,
        value("none"),
        "random start, ResNet-18: no weights are installed (pip install 'tailfin[weights]')",
        evidence="packaged",
    ),
    Row("loss", "RetinaNet or ATSS was asked for", lambda f, c: c["detector"] in DENSE, value("focal"), "one-stage"),
    Row("loss", "else", always, value("softmax"), "the sampler sees to the tail, calibration to the scores"),
    Row(
        "sampler",
        f"imbalance above {LONG:g}",
        lambda f, c: f.imbalance > LONG,
        value("rfs"),
        "the largest class has {f.imbalance:.0f} times the pictures of the smallest; classes in fewer than "
        "{f.threshold:g} of the pictures are repeated",
        evidence="rfs",
    ),
    Row("sampler", "else", always, value("plain"), "the largest class has {f.imbalance:.2g} times the smallest's"),
    Row(
        "classifier",
        f"imbalance above {LONG:g}, a class with at most {FEW} pictures, and a random start",
        lambda f, c: f.imbalance > LONG and f.rare > 0 and c["start"] == "none" and c["detector"] not in DENSE,
        value("cosine"),
        "{f.rare} classes with at most 10 pictures, random start",
        evidence="cosine",
    ),
    Row("classifier", "else", always, value("linear"), "the detector's own"),
    Row(
        "size",
        "COCO weights",
        lambda f, c: c["start"] == "coco",
        value(800),
        "the size that the weights were trained at",
    ),
    Row(
        "size",
        "else",
        always,
        lambda f, c: size_for(f, MOST.get(f.device, 640)),
        "of {f.long_side:.0f} px pictures; a small object has {small:.0f} px of them ({f.device})",
        shown=f"the smallest of {SIZES[0]} to {MOST['cpu']} (GPU: 640) where a small object has {SMALL} px",
    ),
    Row(
        "proposals",
        f"at most {FEW_OBJECTS} objects in a crowded picture (95 %)",
        lambda f, c: f.crowd <= FEW_OBJECTS,
        value(100),
        "{f.crowd} objects in a crowded picture",
    ),
    Row("proposals", "else", always, value(300), "{f.crowd} objects in a crowded picture"),
    Row(
        "batch",
        "always",
        always,
        batch_for,
        "{gib:.0f} GiB free on {f.device}, {f.processes} process(es)",
        shown="16; 8, 4 or 2 where a step would take over half of the memory; the rate follows",
    ),
    Row("epochs", "COCO weights", lambda f, c: c["start"] == "coco", value(12), "the 1x schedule of the weights"),
    Row(
        "epochs",
        "random start",
        lambda f, c: c["start"] == "none",
        lambda f, c: epochs_for(f, 28_000, 14, 72),
        "{f.pictures} pictures, random start",
        shown="28,000 pictures seen, 14 to 72",
    ),
    Row(
        "epochs",
        "else",
        always,
        lambda f, c: epochs_for(f, 16_000, 8, 36),
        "{f.pictures} pictures",
        shown="16,000 pictures seen, 8 to 36",
    ),
    Row(
        "flip",
        "a class with left or right in its name",
        lambda f, c: bool(f.sided),
        value(0.0),
        'a mirrored "{f.sided[0]}" is another class',
    ),
    Row("flip", "else", always, value(0.5), "no class has a side in its name (in English)"),
    Row(
        "holdout",
        f"at least {HOLDOUT} validation pictures",
        lambda f, c: f.val_pictures >= HOLDOUT,
        value("half_of_val"),
        "calibration and thresholds are chosen on a half of the {f.val_pictures} validation pictures, numbers are of "
        "the other",
        evidence="calibration",
    ),
    Row(
        "holdout",
        "else",
        always,
        value("train"),
        "calibration and thresholds are chosen on training pictures: there are but {f.val_pictures} for validation",
        evidence="calibration",
    ),
)
NAMES = tuple(dict.fromkeys(row.choice for row in ROWS))


def choose(facts: Facts, given: Mapping[str, Any] | None = None) -> list[Choice]:
    """A value for each of NAMES, in order; those of `given` are the user's own."""
    given = given or {}
    taken: dict[str, Any] = {}
    found = []
    for name in NAMES:
        if name in given:
            choice = Choice(name, given[name], "given")
        else:
            row = next(row for row in ROWS if row.choice == name and row.holds(facts, taken))
            own = row.take(facts, taken)
            small = (own if name == "size" else 0) * facts.sides[0]
            why = row.why.format(f=facts, c=taken, small=small, gib=facts.memory / 2**30)
            choice = Choice(name, own, why, EVIDENCE[row.evidence][0] if row.evidence else NOT_MEASURED)
        taken[name] = choice.value
        found.append(choice)
    return found


def markdown() -> str:
    """The table as `docs/choosing.md` has it."""
    lines = ["| choice | when | taken | measured |", "|---|---|---|---|"]
    before = ""
    for row in ROWS:
        place, text = EVIDENCE[row.evidence] if row.evidence else ("", "")
        file, _, heading = place.partition(": ")
        measured = f"[{heading}]({file}#{_anchor(heading)}): {text}" if place else ""
        shown = row.shown or f"`{row.take(_ANY, {})}`"
        lines.append(f"| {row.choice if row.choice != before else ''} | {row.when} | {shown} | {measured} |")
        before = row.choice
    return "\n".join(lines) + "\n"


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


_ANY: Any = None  # constants do not look at facts
