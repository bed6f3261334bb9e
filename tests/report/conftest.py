"""A small data set and run directories as training leaves them: finished, unfinished, with hostile names."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tailfin.config import check_recipe, dump_recipe

NAMES = ("bolt", "cup", "traffic light", "чашка")
TRAIN_IMAGES = (3, 12, 240, 0)


@dataclass(frozen=True)
class DataSet:
    """Twelve pictures of 96 x 64 with two objects each; `objects` are (image id, label, xywh)."""

    root: Path
    names: tuple[str, ...]
    objects: list[tuple[int, int, list[float]]]


class Page(HTMLParser):
    """What a browser would see: elements with attributes, visible text, links, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.elements)


@pytest.fixture
def parse_page() -> Callable[[str], Page]:
    """HTML text -> `Page`; badly nested elements fail the test."""
    return Page


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., DataSet]:
    """`make_data(names=..., file_name="{}.png")` writes a data set and returns it."""

    def make(names: Sequence[str] = NAMES, file_name: str = "{}.png", folder: str = "set") -> DataSet:
        root = tmp_path / folder
        (root / "val").mkdir(parents=True)
        rng = np.random.default_rng(0)
        images, annotations, objects = [], [], []
        for image_id in range(1, 13):
            file = file_name.format(image_id)
            pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / file, "PNG")
            images.append({"id": image_id, "width": 96, "height": 64, "file_name": file})
            for place in range(2):
                label = (image_id + 2 * place) % len(names)
                box = [4.0 + 44 * place, 8.0, 36.0, 40.0]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image_id, "category_id": 10 * label + 5, "bbox": box}
                )
                objects.append((image_id, label, box))
        categories = [{"id": 10 * label + 5, "name": name} for label, name in enumerate(names)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / "val.json").write_text(json.dumps(document))
        return DataSet(root, tuple(names), objects)

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("a", data, ap=0.3)` writes a finished run directory and returns it; `finished=False` one at work."""

    def make(
        name: str,
        data: DataSet,
        *,
        ap: float = 0.3,
        finished: bool = True,
        masks: bool = False,
        found: Sequence[int] = (0, 1, 2, 3),
        recipe: dict[str, Any] | None = None,
        every: bool = True,
    ) -> Path:
        run = tmp_path / "runs" / name
        stage = run / "stages" / "1-train"
        stage.mkdir(parents=True)
        values = {
            "name": f"set/{name}",
            "detector": {"norm": "bn", "frozen_layers": 0},
            "schedule": {"epochs": 4},
            "data": {"root": str(data.root), "train": {"annotations": "val.json"}, "val": {"annotations": "val.json"}},
        }
        (run / "recipe.yaml").write_text(dump_recipe(check_recipe({**values, **(recipe or {})}, "test")))
        environment = {
            "command": "tailfin train set",
            "started": "2025-03-04T05:06:07+00:00",
            "commit": "0123456789abcdef",
            "seed": 7,
            "versions": {"torch": "2.9.0"},
            "devices": {"type": "cpu"},
            "data": {"train": "aa", "val": "bb"},
        }
        (run / "environment.json").write_text(json.dumps(environment))
        (stage / "metrics.jsonl").write_text("".join(_lines(100 if finished else 55, ap if every else None)))
        if not finished:
            with (stage / "metrics.jsonl").open("a") as file:
                file.write('{"iteration": 560, "epo')
            return run
        (run / "metrics.json").write_text(json.dumps(_metrics(data, ap, masks)))
        (run / "results.bbox.json").write_text(json.dumps(_results(data, found)))
        return run

    return make


def _lines(number: int, ap: float | None) -> list[str]:
    lines = []
    for step in range(1, number + 1):
        parts = {"classification": 2 / step, "box": 0.5, "rpn_objectness": 0.1, "rpn_box": 0.05}
        line = {"iteration": 10 * step, "epoch": step / 25, "lr": 0.02, "loss": sum(parts.values()), **parts}
        lines.append(json.dumps({**line, "grad_norm": 1.5, "images_per_second": 40.0, "seconds": 3.0}) + "\n")
        if ap is not None and step % 25 == 0:
            evaluation = {"bbox": {"AP": ap * step / 100, "APr": ap / 2, "APc": ap, "APf": -1}}
            lines.append(json.dumps({"iteration": 10 * step, "epoch": step / 25, "eval": evaluation}) + "\n")
    return lines


def _metrics(data: DataSet, ap: float, masks: bool) -> dict[str, Any]:
    box = {"AP": ap, "AP50": ap + 0.2, "AP75": ap, "APs": -1, "APm": ap, "APl": -1}
    box |= {"APr": ap - 0.1, "APc": ap, "APf": ap + 0.1, "AR@300": ap + 0.3}
    kinds = ("bbox", "segm") if masks else ("bbox",)
    per_category = [
        {
            "id": 10 * label + 5,
            "name": name,
            "frequency": ("r", "c", "f", None)[label % 4],
            "image_count": TRAIN_IMAGES[label % 4],
            "instance_count": 2 * TRAIN_IMAGES[label % 4],
            **{kind: {"AP": ap if label else -1, "AP50": ap + 0.2 if label else -1} for kind in kinds},
        }
        for label, name in enumerate(data.names)
    ]
    return {"protocol": "lvis", **dict.fromkeys(kinds, box), "per_category": per_category}


def _results(data: DataSet, found: Sequence[int]) -> list[dict[str, Any]]:
    """Every object of a class in `found`, a pixel off; the others are taken for the next class."""
    return [
        {
            "image_id": image_id,
            "category_id": 10 * (label if label in found else (label + 1) % len(data.names)) + 5,
            "bbox": [box[0] + 1, *box[1:]],
            "score": 0.9,
        }
        for image_id, label, box in data.objects
    ]
