"""Class statistics: counts equal to the real files' own, groups, and the `data stats` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from tailfin.cli.data import app
from tailfin.data.index import open_index
from tailfin.data.stats_report import figure, sparkline, summarize
from tailfin.errors import UserError
from tailfin.stats import ClassStats, frequency_groups, gini, imbalance_factor


def made(counts: list[float], **options: Any) -> ClassStats:
    options.setdefault("num_images", max(1, int(sum(counts))))
    return ClassStats(image_count=counts, instance_count=counts, **options)


@pytest.mark.parametrize("name", ["coco-sample", "fod31-lt", "road12-masks-lt"])
def test_counts_are_those_that_the_categories_carry(data_dir: Path, name: str) -> None:
    path = data_dir / name / "train.json"
    stats = ClassStats.from_json(path)
    categories = sorted(json.loads(path.read_text())["categories"], key=lambda category: category["id"])
    assert stats.image_count.tolist() == [category["image_count"] for category in categories]
    assert stats.instance_count.tolist() == [category["instance_count"] for category in categories]  # crowds count
    assert list(stats.frequency) == [category["frequency"] for category in categories]
    assert list(stats.names) == [category["name"] for category in categories]
    assert stats.category_ids.tolist() == [category["id"] for category in categories]
    assert stats.image_count.dtype == stats.instance_count.dtype == np.int64


def test_images_without_annotation_are_counted(data_dir: Path) -> None:
    stats = ClassStats.from_json(data_dir / "coco-sample" / "train.json")
    assert (stats.num_images, stats.num_annotated_images, stats.num_classes) == (80, 79, 80)


def test_group_precedence(tmp_path: Path) -> None:
    document = {
        "images": [{"id": i, "width": 10, "height": 10, "file_name": f"{i}.jpg"} for i in range(120)],
        "categories": [{"id": c, "name": f"n{c}", **({"frequency": "f"} if c == 1 else {})} for c in range(5)],
        "annotations": [],
    }
    for category, images in ((0, 101), (1, 3), (2, 100), (3, 10)):
        document["annotations"] += [
            {"id": len(document["annotations"]) + i, "image_id": i, "category_id": category, "bbox": [0, 0, 5, 5]}
            for i in range(images)
        ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document))
    assert ClassStats.from_json(path).frequency == ("f", "f", "c", "r", "")
    assert ClassStats.from_json(path, group_bounds=(2, 3)).frequency == ("f", "c", "f", "f", "")
    with pytest.raises(UserError, match="two ascending image counts"):
        ClassStats.from_json(path, group_bounds=(3, 2))


def test_lvis_bounds() -> None:
    assert frequency_groups([0, 1, 10, 11, 100, 101]) == ("", "r", "r", "c", "c", "f")


@pytest.mark.parametrize(
    "counts",
    [[3, 0, 5], (3, 0, 5), np.array([3, 0, 5]), torch.tensor([3, 0, 5]), torch.tensor([3.0, 0, 5]), [3.0, 0, 5]],
)
def test_counts_of_any_kind(counts: Any) -> None:
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=9)
    assert stats.image_count.tolist() == [3, 0, 5] and stats.image_count.dtype == np.int64
    assert stats.num_annotated_images == 9 and stats.names == ("0", "1", "2")
    assert stats.frequency == ("r", "", "r") and stats.category_ids.tolist() == [0, 1, 2]


def test_fractions_stay() -> None:
    assert made([0.5, 2]).image_count.tolist() == [0.5, 2.0]


def test_source_arrays_are_not_shared() -> None:
    counts = np.array([3, 4])
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=9)
    counts[0] = 100
    assert stats.image_count[0] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_count": [1, -2]}, "image_count of class 1 is -2"),
        ({"instance_count": [1, float("nan")]}, "instance_count of class 1 is nan"),
        ({"instance_count": [1]}, "instance_count has 1 entries, image_count has 2"),
        ({"image_count": []}, "image_count must be one number per class"),
        ({"image_count": 3}, "image_count must be one number per class"),
        ({"image_count": [[1, 2]]}, "image_count must be one number per class"),
        ({"image_count": ["a", "b"]}, "image_count must be one number per class"),
        ({"image_count": [True, False]}, "image_count must be one number per class"),
        ({"image_count": [[1], [1, 2]]}, "image_count must be one number per class"),
        ({"num_images": -1}, "num_images must be a whole number"),
        ({"num_images": 1.5}, "num_images must be a whole number"),
        ({"num_images": "many"}, "num_images must be a whole number"),
        ({"num_annotated_images": 11}, "num_annotated_images 11 is more than num_images 10"),
        ({"names": ["a"]}, "names has 1 entries"),
        ({"frequency": ["r", "x"]}, 'frequency "x" is none of'),
        ({"category_ids": [1, 2, 3]}, "category_ids has 3 entries"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClassStats(**{"image_count": [1, 2], "instance_count": [1, 2], "num_images": 10, **changes})


def test_dictionary_round_trip(data_dir: Path) -> None:
    stats = ClassStats.from_json(data_dir / "fod31-lt" / "train.json")
    values = json.loads(json.dumps(stats.to_dict()))
    assert ClassStats.from_dict(values).to_dict() == stats.to_dict()
    with pytest.raises(KeyError, match="names"):
        ClassStats.from_dict({key: value for key, value in values.items() if key != "names"})


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_gini_is_the_mean_difference(counts: list[int]) -> None:
    values = np.array(counts, np.float64)
    by_definition = np.abs(values[:, None] - values).sum() / (2 * len(values) * values.sum()) if values.sum() else 0.0
    assert gini(counts) == pytest.approx(by_definition, abs=1e-12)
    assert 0 <= gini(counts) < 1


def test_imbalance_ignores_empty_classes() -> None:
    assert imbalance_factor([0, 3, 600]) == 200
    assert np.isnan(imbalance_factor([0, 0]))


# ---- command ---------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["stats", *map(str, arguments)])


def test_command_prints_and_writes(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "fod31-lt" / "train.json"
    result = run(path, "--json", tmp_path / "s.json", "--plot", tmp_path / "s.html", "--images", path.with_suffix(""))
    assert result.exit_code == 0, result.output
    for text in ("3614, 0 without annotation", "200 of images", "8 rare, 12 common, 11 frequent", "AdjustableClamp"):
        assert text in result.output
    assert "3614 of 3614" in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("advice: ")]) == 1
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["per_class"][0] == {
        "id": 4,
        "name": "Bolt",
        "frequency": "f",
        "image_count": 600,
        "instance_count": 600,
    }
    assert sum(summary["box_sizes"].values()) == summary["annotations"] == 3690
    page = (tmp_path / "s.html").read_text()
    assert "AdjustableClamp" in page and "<script src=" not in page


def test_long_lists_are_cut_unless_asked(data_dir: Path) -> None:
    path = data_dir / "coco-sample" / "train.json"
    assert "toothbrush" in run(path, "--all-classes").output
    short = run(path, "--group-bounds", "2,5").output
    assert "40 more" in short and "9 crowd" in short


def test_command_refuses_before_it_works(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "fod31-lt" / "val.json"
    for arguments, message in (
        ((path, "--plot", tmp_path / "s.png"), "must be an .html file"),
        ((path, "--group-bounds", "10"), "two ascending image counts"),
        ((path, "--group-bounds", "a,b"), "two whole numbers"),
        ((path, "--images", tmp_path / "none"), "does not exist"),
        ((path, "--json", path / "s.json"), "cannot be written"),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_names_are_escaped_in_the_picture(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 1, "width": 10, "height": 10, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "<b>bold</b></script><script>alert(1)</script>"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}],
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document))
    index = open_index(path)
    page = figure(summarize(index, ClassStats.from_index(index)), index.areas).to_html(include_plotlyjs=False)
    assert "<b>bold" not in page and "<script>alert" not in page


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_sparkline_falls_with_the_counts(counts: list[int]) -> None:
    line = sparkline(sorted(counts, reverse=True))
    assert 1 <= len(line) <= 48
    heights = [" ▁▂▃▄▅▆▇█".index(character) for character in line]
    assert heights == sorted(heights, reverse=True)
