"""Data sets of Hugging Face's `datasets`, made from lists: pictures as they were, boxes, names, splits, `hf:`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tailfin.auto.plan import make_plan, move_files
from tailfin.cli.main import app
from tailfin.data.hub_sets import coco_of
from tailfin.data.index import open_index
from tailfin.errors import UserError

datasets: Any = pytest.importorskip("datasets", reason="the package datasets is not installed (tailfin[datasets])")


def jpeg(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    data = io.BytesIO()
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size).save(data, "JPEG")
    return data.getvalue()


def made(count: int, as_lists: bool = True) -> Any:
    """`count` pictures, of which picture k shows k % 3 objects."""
    label = datasets.ClassLabel(names=["bolt", "nut"])
    fields = {"bbox": datasets.Sequence(datasets.Value("float32"), length=4), "category": label}
    objects = datasets.Sequence(fields) if as_lists else [fields]
    boxes = [[[4.0 + k, 5.0, 20.0, 10.0] for k in range(number % 3)] for number in range(count)]
    rows = [
        {"bbox": own, "category": [k % 2 for k in range(len(own))]}
        if as_lists
        else [{"bbox": box, "category": k % 2} for k, box in enumerate(own)]
        for own in boxes
    ]
    pictures = [{"bytes": jpeg(number), "path": None} for number in range(count)]
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    return datasets.Dataset.from_dict({"image": pictures, "objects": rows}, features=features)


@pytest.mark.parametrize("as_lists", [True, False])
def test_a_set_in_memory(tmp_path: Path, as_lists: bool) -> None:
    document = coco_of(made(5, as_lists), tmp_path, "train")
    assert [category["name"] for category in document["categories"]] == ["bolt", "nut"]
    assert [(i["width"], i["height"]) for i in document["images"]] == [(64, 48)] * 5
    assert [a["image_id"] for a in document["annotations"]] == [2, 3, 3, 5]
    assert [a["category_id"] for a in document["annotations"]] == [1, 1, 2, 1]
    assert document["annotations"][2]["bbox"] == [5.0, 5.0, 20.0, 10.0]
    assert (tmp_path / "train" / "000003.jpg").read_bytes() == jpeg(2)  # not compressed anew


def test_from_a_folder_to_a_plan(tmp_path: Path) -> None:
    whole = datasets.DatasetDict({"train": made(12), "validation": made(7)})
    whole.save_to_disk(str(tmp_path / "stored"))
    source = f"hf:{tmp_path / 'stored'}"
    shown = CliRunner().invoke(app, ["data", "check", source])
    assert shown.exit_code == 0 and "val: usable" in shown.output, shown.output
    work, place = tmp_path / "work", tmp_path / "run" / "data"
    plan = move_files(make_plan(source, None, work), work, place)
    train, val = open_index(plan.recipe.data.train.annotations), open_index(plan.recipe.data.val.annotations)
    assert (len(train), len(val)) == (12, 7) and train.names == ("bolt", "nut")
    assert (Path(plan.recipe.data.train.images) / train.file_name(0)).is_file()
    assert Path(plan.recipe.data.val.images) == place / "val"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column image"):
        coco_of(datasets.Dataset.from_dict({"picture": [1]}), tmp_path, "train")
    with pytest.raises(UserError, match="no column objects"):
        coco_of(made(1).remove_columns("objects"), tmp_path, "train")
