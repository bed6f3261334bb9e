"""Mutated files of every kind into the command that reads them: tracebacks, hangs, memory and lost data are counted.

    python benchmarks/faults/fuzz.py                          # a minute of each kind
    python benchmarks/faults/fuzz.py --seconds 600 --kinds coco voc --seed 7
    python benchmarks/faults/fuzz.py --table                  # the rows of docs/reliability.md

Every file is a valid one with one to four changes: bytes flipped, deleted, repeated, cut off; a value of a JSON or YAML
document replaced by a hostile one or taken out. File number n of a seed is always the same, so a finding can be made
again. "refused" is exit code 1 or 2 with a message, "read" is 0; anything else is a finding, and its file is kept. So
is a file that was read with fewer pictures or objects than it has, where no line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tailfin.class_rows import read_aliases
from tailfin.cli.main import main
from tailfin.config import recipe_from_file
from tailfin.data.index import open_index
from tailfin.data.proposal_files import read_proposals
from tailfin.errors import UserError
from tailfin.report import build_report

HANG, WAIT = 20, 300  # seconds of the processor, and of the clock, for one file
HOSTILE: tuple[Any, ...] = (
    None, True, [], {}, "", "x", 0, -1, 1.5, 2**31, 2**63, -(2**63), 2**70, 1e308, 1e400, -0.0, "1", "../../x", "a\0b",
    "<script>alert(1)</script>", "\x1b[2J", "=1+1", "\u202eabc", "a\nb", "\ud800", [[]], [1, [2, [3]]], {"a": {}},
    "x" * 5000, [0] * 3000, float("nan"),
)  # fmt: skip
RECIPE = {
    "backbone": "resnet18",
    "weights": "none",
    "detector": {"name": "faster_rcnn", "norm": "bn", "roi_size": 3},
    "loss": {"name": "seesaw"},
    "sampler": {"name": "rfs", "threshold": 0.5},
    "schedule": {"epochs": 5, "batch": 4, "lr": 0.01, "warmup": 4, "milestones": [4]},
    "data": {"resize": "square", "sizes": [64], "workers": 0},
    "evaluation": {"max_dets": 20, "iou": ["bbox"]},
}


@dataclass
class Counts:
    """What became of the files of a kind."""

    kind: str
    tried: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    memory_mib: float = 0.0  # growth of this process's peak
    findings: list[str] = field(default_factory=list)


def fuzz(kind: str, seconds: float, seed: int, folder: Path, *, most: int = 10**9) -> Counts:
    """Mutated files of a kind until the time is over, or `most` of them."""
    counts, began = Counts(kind), time.monotonic()
    before = _peak()
    shutil.rmtree(folder / kind, ignore_errors=True)  # of an earlier call
    seeds, read, *lost = KINDS[kind](folder / kind)
    whole = {path: path.read_bytes() for path in seeds}
    while time.monotonic() - began < seconds and counts.tried < most:
        rng = random.Random(f"{kind} {seed} {counts.tried}")
        path = rng.choice(seeds)
        path.write_bytes(mutated(whole[path], path.suffix, rng))
        counts.tried += 1
        outcome, said = _outcome(read)
        if outcome == "read" and lost and (missing := lost[0](said)):
            outcome = f"lost without a word: {missing}"
        if outcome in ("read", "refused"):
            setattr(counts, outcome, getattr(counts, outcome) + 1)
        else:
            kept = folder / f"{kind}-{seed}-{counts.tried - 1}{path.suffix}"
            shutil.copyfile(path, kept)
            counts.findings.append(f"{kept}: {outcome}")
        path.write_bytes(whole[path])
    counts.seconds, counts.memory_mib = time.monotonic() - began, _peak() - before
    return counts


def mutated(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """A file with one to four changes of its values or its bytes."""
    if suffix in (".json", ".yaml") and rng.random() < 0.6:
        text = data.decode()
        document = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
        for _ in range(rng.randint(1, 4)):
            document = _changed(document, rng)
        if suffix == ".yaml":
            with contextlib.suppress(Exception):  # what YAML cannot say
                return yaml.safe_dump(document, sort_keys=False).encode("utf-8", "surrogatepass")
        return json.dumps(document).encode()
    if rng.random() < 0.03:
        opening = rng.choice([b"[", b'{"a":', b"<a>", b"- ", b"&a [*a, "])
        return opening * rng.choice([100, 5000, 100_000])
    for _ in range(rng.randint(1, 4)):
        data = _bytes_changed(data, rng)
    return data


def _changed(document: Any, rng: random.Random) -> Any:
    """A copy with one value replaced or taken out; small containers, near the top, as often as the many leaves."""
    document = copy.deepcopy(document)
    parent, key, here = None, None, document
    while isinstance(here, dict | list) and here and rng.random() < 0.85:
        parent, key = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = parent[key]
    if parent is None:
        return rng.choice(HOSTILE) if rng.random() < 0.2 else document
    match rng.randrange(4):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.append(copy.deepcopy(here))
        case _:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return document


def _bytes_changed(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 1, 2, 8, 100]))
    match rng.randrange(6):
        case 0:
            return data[:start]
        case 1:
            return data[:start] + data[end:]
        case 2:
            return data[:start] + data[start:end] * 3 + data[end:]
        case 3:
            return data[:start] + rng.randbytes(end - start) + data[end:]
        case 4:
            return (
                data[:start]
                + rng.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"-", b"e999", b"\n"])
                + data[end:]
            )
        case _:
            return data[:start] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[start:end]) + data[end:]


def _outcome(read: Callable[[], Any]) -> tuple[str, str]:
    """What became of a file, and what was printed."""
    said = io.StringIO()
    return _ended(read, said), said.getvalue()


def _ended(read: Callable[[], Any], said: io.StringIO) -> str:
    def stop(number: int, _: Any) -> None:
        raise TimeoutError(f"more than {HANG if number == signal.SIGPROF else WAIT} s")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, HANG)
    signal.alarm(WAIT)
    try:
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            read()
        return "read"
    except UserError:
        return "refused"
    except SystemExit as stopped:
        return "read" if not stopped.code else "refused" if stopped.code in (1, 2) else f"exit code {stopped.code}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:120]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def command(*words: object) -> Callable[[], None]:
    """The command line in this process."""

    def call() -> None:
        before, sys.argv = sys.argv, ["tailfin", *map(str, words)]
        try:
            main()
        finally:
            sys.argv = before

    return call


# ---- kinds: (files that are mutated, what reads them) ----------------------------------------------------------------

# Beside these two, what a text that was printed does not say is missing; empty where nothing is
Kind = tuple[list[Path], Callable[[], Any]] | tuple[list[Path], Callable[[], Any], Callable[[str], str]]
SAID = re.compile(r"left out|dropped|skipped|ignored|without|not in|joined|no box|empty|are none|note:|warning:")


def _fewer(what: str, before: int, after: int, said: str) -> str:
    """Words for data that is gone, where nothing printed speaks of it."""
    return f"{before} {what}, {after} of them read" if after < before and not SAID.search(said) else ""


def _annotations(path: Path) -> tuple[int, int]:
    """(images, annotations) of a file as any JSON reader sees it; none where it does not."""
    try:
        document = json.loads(path.read_bytes())
        return len(document["images"]), len(document["annotations"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0, 0


def _pictures(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 48), (80 * number, 90, 100)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(3)]


def _coco(folder: Path) -> Kind:
    names = _pictures(folder / "images")
    box = {"iscrowd": 0, "area": 200.0, "bbox": [4.0, 5.0, 20.0, 10.0]}
    polygon = {"segmentation": [[4, 5, 24, 5, 24, 15, 4, 15]]}
    document = {
        "info": {"year": 2024},
        "images": [{"id": n + 1, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(names)],
        "annotations": [
            {"id": n + 1, "image_id": n % 3 + 1, "category_id": n % 2 + 1, **box, **polygon} for n in range(5)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "frequency": "r"}],
    }
    path = folder / "set.json"
    path.write_text(json.dumps(document))
    commands = [
        command("data", "check", path, "--images", folder / "images"),
        command("data", "stats", path),
        command("data", "merge", path, "--out", folder / "merged.json", "--overwrite"),
    ]
    turn = itertools.count()
    out = folder / "merged.json"

    def read() -> None:
        out.unlink(missing_ok=True)
        commands[next(turn) % len(commands)]()

    def lost(said: str) -> str:
        if not out.exists():  # the turn of another command
            return ""
        before, after = _annotations(path), _annotations(out)
        return _fewer("images", before[0], after[0], said) or _fewer("annotations", before[1], after[1], said)

    return [path], read, lost


def _results(folder: Path) -> Kind:
    _coco(folder)
    path = folder / "results.json"
    found = [
        {"image_id": n % 3 + 1, "category_id": n % 2 + 1, "bbox": [4.0, 5.0, 20.0, 10.0], "score": 0.1 * n}
        for n in range(8)
    ]
    path.write_text(json.dumps(found))
    words = ("--results", path, "--annotations", folder / "set.json", "--protocol", "coco", "--per-category")
    options = ("--method", "norcal", "--strength", "0.5", "--out", folder / "calibrated.json", "--overwrite")
    commands = [
        command("evaluate", *words),
        command("calibrate", path, "--train", folder / "set.json", *options),
        command("evaluate", *words),
        command("calibrate", path, "--train", folder / "set.json", "--holdout", folder / "set.json", *options),
    ]
    turn = itertools.count()
    return [path], lambda: commands[next(turn) % len(commands)]()


def _lists(folder: Path) -> Kind:
    """Small files that commands take: maps and counts of classes, image ids, scores and exemplars."""
    _coco(folder)
    texts = {
        "map.yaml": "cat: feline\ndog: null\n",
        "counts.yaml": "cat: 2\ndog: 1\n",
        "aliases.yaml": "cat: [feline, kitty]\ndog: hound\n",
        "ids.json": json.dumps({"cat": [1, 2], "dog": [3]}),
        "ids.txt": "1\n2\n3\n",
        "scores.json": json.dumps({str(number): 0.1 * number for number in range(1, 6)}),
        "ranked.json": json.dumps([{"annotation_id": number, "score": 0.1 * number} for number in range(1, 6)]),
    }
    files = [folder / name for name in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text)
    data, out = folder / "set.json", folder / "out"
    single = ("--out", folder / "out.json", "--overwrite")
    tails = ("--annotations", data, "--division", "2", "--head", "1,1", "--tail", "1,all", "--out", out, "--overwrite")
    commands = [
        command("data", "merge", data, "--map", files[0], *single),
        command("data", "split", data, "--counts", files[1], "--out-train", folder / "out.json", "--overwrite"),
        lambda: read_aliases(str(files[2])),
        command("data", "coco-lt", data, "--image-ids", files[3], *single),
        command("data", "coco-lt", data, "--image-ids", files[4], *single),
        command("data", "smooth-tail", files[5], *tails),
        command("data", "smooth-tail", files[6], *tails),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        commands[5]()
    files.append(shutil.copyfile(out / "exemplars.json", folder / "exemplars.json"))
    texts["exemplars.json"] = files[-1].read_text()
    commands.append(command("data", "smooth-tail", files[-1], *tails))

    def read() -> None:  # the command of the file that differs
        changed = [own for own, file, text in zip(commands, files, texts.values(), strict=True)
                   if file.read_bytes() != text.encode()]  # fmt: skip
        for own in changed:
            own()

    return files, read


def _recipe(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return [path], lambda: recipe_from_file(path)


def _yolo(folder: Path) -> Kind:
    names = _pictures(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    for name in names:
        label = folder / "labels" / "train" / name.replace(".png", ".txt")
        label.write_text("0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.3 0.1 0.3 0.3\n")
    data = folder / "data.yaml"
    data.write_text("path: .\ntrain: images/train\nnames:\n  0: cat\n  1: dog\n")
    labels = sorted((folder / "labels" / "train").iterdir())
    out = folder / "out.json"

    def lost(said: str) -> str:
        texts = [
            label.read_bytes().removeprefix(b"\xff\xfe").decode("utf-8", "replace") for label in labels
        ]  # UTF-16's mark
        rows = sum(bool(line.strip(" \t\x00\ufeff")) for text in texts for line in text.splitlines())
        images, objects = _annotations(out)
        return _fewer("images", len(names), images, said) or _fewer("rows", rows, objects, said)

    return [data, *labels], command("data", "convert", folder, out, "--overwrite"), lost


def _voc(folder: Path) -> Kind:
    names = _pictures(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name in names:
        (folder / "Annotations" / name.replace(".png", ".xml")).write_text(
            f"<annotation><filename>{name}</filename><size><width>64</width><height>48</height><depth>3</depth></size>"
            "<object><name>cat</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>20</xmax>"
            "<ymax>30</ymax></bndbox></object></annotation>"
        )
    listed = folder / "ImageSets" / "Main" / "train.txt"
    listed.write_text("0\n1\n2\n")
    files = [listed, *sorted((folder / "Annotations").iterdir())]
    out = folder / "out"

    def lost(said: str) -> str:
        objects = sum(file.read_bytes().count(b"<object>") for file in files[1:])
        found = [_annotations(path) for path in out.glob("*.json")]
        return _fewer("objects", objects, sum(pair[1] for pair in found), said)

    def read() -> None:
        shutil.rmtree(out, ignore_errors=True)
        command("data", "convert", folder, out, "--overwrite")()

    return files, read, lost


def _proposals(folder: Path) -> Kind:
    _coco(folder)
    index = open_index(folder / "set.json")
    as_json, as_npz = folder / "p.json", folder / "p.npz"
    as_json.write_text(json.dumps([{"image_id": n % 3 + 1, "bbox": [1, 2, 9, 9], "score": 0.5} for n in range(6)]))
    arrays = {"offsets": np.array([0, 2, 3, 4]), "scores": np.full(4, 0.5, np.float32)}
    np.savez(as_npz, image_ids=np.arange(1, 4), boxes=np.tile(np.float32([1, 2, 9, 9]), (4, 1)), **arrays)

    def read() -> None:
        for path in (as_json, as_npz):
            read_proposals(path, index)

    return [as_json, as_npz], read


def _run(folder: Path) -> Kind:
    run = folder / "run"
    (run / "stages" / "1-train").mkdir(parents=True)
    metrics = {
        "protocol": "coco",
        "bbox": {"AP": 0.1, "AP50": 0.2, "APr": -1.0},
        "per_category": [
            {"id": 1, "name": "cat", "frequency": "r", "image_count": 3, "instance_count": 4, "bbox": {"AP": 0.1}},
        ],
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (run / "metrics.json").write_text(json.dumps(metrics))
    environment = {"command": "x", "seed": 0, "versions": {"torch": "2"}, "data": {"train": "a", "val": "b"}}
    (run / "environment.json").write_text(json.dumps(environment))
    lines = [{"iteration": n, "epoch": 0.1 * n, "lr": 0.01, "loss": 1.0, "cls": 0.5} for n in range(1, 6)]
    lines.append({"iteration": 5, "epoch": 0.5, "eval": {"bbox": {"AP": 0.1}}})
    (run / "stages" / "1-train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "results.bbox.json").write_text("[]")
    np.savez(run / "stages" / "1-train" / "pictures.npz", view1=np.zeros((1, 3, 8, 8), np.uint8))
    return [path for path in sorted(run.rglob("*")) if path.is_file()], lambda: build_report([run])


KINDS: dict[str, Callable[[Path], Kind]] = {
    "coco": _coco,
    "results": _results,
    "lists": _lists,
    "recipe": _recipe,
    "yolo": _yolo,
    "voc": _voc,
    "proposals": _proposals,
    "run": _run,
}


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files and findings; default: a temporary one")
    parser.add_argument("--table", action="store_true", help="print rows of docs/reliability.md")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tailfin-fuzz-"))
    found = 0
    for kind in options.kinds:
        counts = fuzz(kind, options.seconds, options.seed, folder)
        found += len(counts.findings)
        if options.table:
            survived = counts.tried - len(counts.findings)
            print(f"| mutated files: {kind} | {counts.tried:,} | {survived:,} | {len(counts.findings)} |")
        else:
            print(
                f"{kind:10} {counts.tried:6} tried, {counts.read:6} read, {counts.refused:6} refused, "
                f"{len(counts.findings)} findings, {counts.seconds:.0f} s, +{counts.memory_mib:.0f} MiB"
            )
        for finding in counts.findings:
            print("  ", finding, file=sys.stderr)
    if not found and options.keep is None:
        shutil.rmtree(folder)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(_main())
