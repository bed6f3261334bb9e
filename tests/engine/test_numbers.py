"""Numbers at their ends: absurd rates, one class, no boxes, 20,000 classes, pictures of one pixel and of 10,000 x 10, a
process without foreground."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tailfin
from tailfin.data.dataset import TrainingDataset
from tailfin.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_training")
SHORT = ["schedule.epochs=1", "schedule.warmup=0", "schedule.milestones=[]", "sampler=plain"]


def made(folder: Path, sizes: list[tuple[int, int]], classes: int, objects: list[tuple[int, int, list[int]]]) -> Path:
    """A set of noise; an object is (number of its picture, class, box)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = []
    for number, (width, height) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    annotations = [
        {"id": k, "image_id": picture, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for k, (picture, label, box) in enumerate(objects, 1)
    ]
    categories = [{"id": number, "name": f"c{number}"} for number in range(classes)]
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return path


BOX = [5, 5, 20, 20]
SETS = {
    "one class": ([(64, 48)] * 5, 1, [(n, 0, BOX) for n in range(5)]),
    "classes without boxes": ([(64, 48)] * 5, 7, [(n, n % 2, BOX) for n in range(5)]),
    "20,000 classes": ([(64, 48)] * 5, 20_000, [(n, 4_000 * n, BOX) for n in range(5)]),
    "one pixel": ([(1, 1)] * 2 + [(64, 48)] * 3, 2, [(0, 0, [0, 0, 1, 1]), (1, 1, [0, 0, 1, 1]), (2, 0, BOX)]),
    "10,000 x 10": ([(10_000, 10), (10, 10_000), (64, 48)], 2, [(0, 0, [9, 0, 3000, 10]), (1, 1, [0, 5, 10, 9000])]),
}


@pytest.mark.parametrize("kind", SETS)
def test_sets_at_the_ends(tiny_recipe, tmp_path, kind):
    path = made(tmp_path / "set", *SETS[kind])
    run = tailfin.train(tiny_recipe, train=path, val=path, out=tmp_path / "run", overrides=SHORT)
    detector = tailfin.load(run, "cpu")
    assert all(torch.isfinite(value).all() for value in detector.model.parameters())
    assert len(json.loads((run / "metrics.json").read_text())["per_category"]) == SETS[kind][1]
    first = detector.predict([path.with_suffix("") / "0.png"])[0]
    width, height = SETS[kind][0][0]
    assert torch.isfinite(first["boxes"]).all() and (first["boxes"][:, [0, 2]] <= width + 0.01).all()
    assert (first["boxes"][:, [1, 3]] <= height + 0.01).all()


@pytest.mark.parametrize("rate", [1e3, 1e8, 1e30])
def test_absurd_rates_end_with_one_line(tiny_recipe, tiny_set, tmp_path, rate):
    overrides = [*SHORT, f"schedule.lr={rate}"]
    with pytest.raises(UserError, match="the weights have diverged.*schedule.lr"):
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("every", [1, 1000])
def test_a_last_step_that_diverges_leaves_no_model_and_no_resume_point(tiny_recipe, tiny_set, tmp_path, every):
    """No loss follows it that would not be finite."""
    overrides = [*SHORT, "schedule.lr=1e30", "schedule.epochs=0.01", f"logging.checkpoint_every={every}"]
    with pytest.raises(UserError, match="diverged after 1 iterations"):
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".safetensors", ".pt")]


def test_a_process_without_foreground_for_100_steps(tiny_recipe, tiny_set, tmp_path, train_on_ranks):
    overrides = [*SHORT, "schedule.epochs=8", "loss=eqlv2", "schedule.batch=2", "data.sizes=[32]"]
    sample = TrainingDataset.sample

    def bare(self, *key):
        image, target = sample(self, *key)
        rows = torch.zeros(0, dtype=torch.int64)
        return image, {name: value if name == "image_id" else value[rows] for name, value in target.items()}

    def train(rank):
        if rank:
            TrainingDataset.sample = bare
        run = tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
        lines = [json.loads(line) for line in (run / "stages/1-train/metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]

    first, second = train_on_ranks(train)
    assert first == second and len(first) > 100 and np.isfinite(first).all()
    model = tailfin.load(tmp_path / "run", "cpu").model
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
