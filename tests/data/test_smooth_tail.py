"""Smooth-tail data: the division of classes, the rules of exemplars, views, files and the command."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tailfin.cli.main import app
from tailfin.data import smooth_tail
from tailfin.data.dataset import Source, TrainingDataset
from tailfin.data.index import image_folder, open_index
from tailfin.data.smooth_tail import ALL, choose, count_kept, divide, per_class, rank_exemplars
from tailfin.errors import UserError
from tailfin.schema.data import Data


class TestDivision:
    @pytest.mark.parametrize(
        ("table", "boundary", "head", "tail"),
        [
            ("lvis_v1_train_categories", "gt", 650, 553),
            ("lvis_v1_train_categories", "ge", 655, 548),
            ("lvis_v0_5_train_categories", "gt", 524, 706),
            ("lvis_v0_5_train_categories", "ge", 531, 699),
        ],
    )
    def test_lvis(self, data_dir, table, boundary, head, tail):
        path = data_dir.parent / "lvis" / f"{table}.json"
        if not path.is_file():
            pytest.skip(f"the class table {path} is not there")
        counts = [category["image_count"] for category in json.loads(path.read_text())]
        assert np.bincount(divide(counts, (30,), boundary)).tolist() == [head, tail]

    def test_parts_by_hand(self):
        counts = [0, 10, 11, 30, 31, 100, 101, 5000]
        assert divide(counts, (30,)).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
        assert divide(counts, (30,), "ge").tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
        assert divide(counts, (10, 100)).tolist() == [2, 2, 1, 1, 1, 1, 0, 0]
        assert divide(counts, (10, 30, 100)).tolist() == [3, 3, 2, 2, 1, 1, 0, 0]

    @given(st.lists(st.integers(0, 200), min_size=1), st.integers(1, 150), st.integers(1, 150))
    def test_a_higher_cut_never_has_more_head_classes(self, counts, low, high):
        low, high = min(low, high), max(low, high)
        assert (divide(counts, (low,)) <= divide(counts, (high,))).all()
        assert (divide(counts, (low,), "ge") <= divide(counts, (low,), "gt")).all()

    def test_counts_of_a_step(self):
        parts = np.array([0, 1, 2, 0])
        assert per_class(parts, 0, 200, 30).tolist() == [200, 30, 30, 200]
        assert per_class(parts, 1, 50, ALL, after=30).tolist() == [50, ALL, 30, 50]
        assert per_class(parts, 2, 50, ALL, after=30).tolist() == [50, 50, ALL, 50]


def make_index(tmp_path, links):
    """An annotation file with (image, class) links; annotation ids run from 1 in this order."""
    images, classes = max(image for image, _ in links) + 1, max(label for _, label in links) + 1
    annotations = [
        {"id": number, "image_id": image, "category_id": label + 1, "bbox": [1, 1, 5, 5], "extra": {"kept": number}}
        for number, (image, label) in enumerate(links, 1)
    ]
    document = {
        "info": {"a": 1},
        "images": [{"id": n, "width": 20, "height": 20, "file_name": f"{n}.png"} for n in range(images)],
        "annotations": annotations,
        "categories": [{"id": n + 1, "name": f"class {n}"} for n in range(classes)],
    }
    path = tmp_path / "set.json"
    path.write_text(json.dumps(document))
    return open_index(path)


def ids(index, exemplars, label):
    own = slice(exemplars.offsets[label], exemplars.offsets[label + 1])
    return index.annotation_ids[exemplars.rows[own]].tolist()


class TestExemplars:
    def test_by_hand(self, tmp_path):
        """Image 0 has three of the class, image 1 two, images 2 and 3 one each."""
        index = make_index(tmp_path, [(0, 0), (0, 0), (0, 0), (1, 0), (1, 0), (2, 0), (3, 0), (3, 1)])
        rows = np.arange(8)
        scores = np.array([0.9, 0.95, 0.4, 0.6, 0.7, 0.3, 0.45, 0.2], np.float32)
        ranked = rank_exemplars(index, rows, scores)
        # 2 (.95, image 0) and 5 (.7, image 1) come first; then plain score order
        assert ids(index, ranked, 0) == [2, 5, 1, 4, 7, 3, 6]
        assert ids(index, ranked, 1) == [8]
        assert ids(index, rank_exemplars(index, rows, scores, length=3), 0) == [2, 5, 1]
        assert ids(index, rank_exemplars(index, rows, scores, distinct_images=False), 0) == [2, 1, 5, 4, 7, 3, 6]
        assert ids(index, rank_exemplars(index, rows, scores, threshold=0.92), 0) == [2, 1, 5, 4, 7, 3, 6]
        assert ids(index, rank_exemplars(index, rows, scores, threshold=0.4), 0) == [2, 5, 7, 1, 4, 3, 6]

    def test_ties_are_in_the_order_of_ids(self, tmp_path):
        index = make_index(tmp_path, [(2, 0), (1, 0), (0, 0), (3, 0)])
        ranked = rank_exemplars(index, np.arange(4), np.full(4, 0.8, np.float32))
        assert ids(index, ranked, 0) == [1, 2, 3, 4]

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_rules_hold(self, tmp_path_factory, data):
        links = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=30))
        index = make_index(tmp_path_factory.mktemp("set"), links)
        quarter = st.integers(0, 8).map(lambda value: value / 8)
        scores = np.array(data.draw(st.lists(quarter, min_size=len(links), max_size=len(links))), np.float32)
        length = data.draw(st.integers(1, 8))
        ranked = rank_exemplars(index, np.arange(len(links)), scores, length=length)
        assert len(np.unique(ranked.rows)) == len(ranked.rows)
        for label in range(len(index.categories)):
            own = ranked.rows[ranked.offsets[label] : ranked.offsets[label + 1]]
            members = np.flatnonzero(index.labels == label)
            assert len(own) == min(length, len(members))
            expected = walked(members, index, scores)[:length]
            assert own.tolist() == expected

    def test_sets(self, tmp_path):
        index = make_index(tmp_path, [(image, image % 3 if image < 6 else 0) for image in range(12)])
        rows = np.arange(len(index.labels))
        ranked = rank_exemplars(index, rows, np.linspace(0.9, 0.1, len(rows)).astype(np.float32))
        kept = choose(ranked, index, np.array([3, 1, ALL]))
        assert count_kept(index, kept).tolist() == [3, 1, 2]
        assert index.annotation_ids[kept].tolist() == [1, 2, 3, 4, 6, 7]


def walked(members, index, scores):
    """The rule as a person would follow it."""
    order = sorted(members.tolist(), key=lambda row: (-scores[row], index.annotation_ids[row]))
    first, taken = [], set()
    for row in order:
        if scores[row] > 0.5 and index.image_of[row] not in taken:
            first.append(row)
            taken.add(index.image_of[row])
    return [*first, *(row for row in order if row not in first)]


class TestViews:
    def test_only_kept_annotations_are_seen(self, tiny_set):
        index = open_index(tiny_set[0])
        kept = np.zeros(len(index.labels), dtype=bool)
        kept[[0, 3, 4, 9]] = True
        source = Source(index, image_folder(tiny_set[0]))
        dataset = TrainingDataset(source, Data(resize="square", sizes=(64,), flip=0.0), 0, kept=kept)
        assert dataset.rows().tolist() == sorted(set(index.image_of[kept].tolist()))
        whole = TrainingDataset(source, dataset.config, 0)
        for row in dataset.rows().tolist():
            image, target = dataset.sample(0, row, 0)
            everything = whole.sample(0, row, 0)
            own = slice(int(index.offsets[row]), int(index.offsets[row + 1]))
            assert target["labels"].tolist() == index.labels[own][kept[own]].tolist()
            assert (target["boxes"] == everything[1]["boxes"][kept[own]]).all()
            assert (image == everything[0]).all()

    def test_a_view_is_pickled_with_its_marks(self, tiny_set):
        index = open_index(tiny_set[0])
        kept = np.arange(len(index.labels)) % 3 == 0
        clean = pickle.loads(pickle.dumps(index.clean(kept)))
        assert clean.rows.tolist() == index.clean(kept).rows.tolist() == np.flatnonzero(kept).tolist()
        assert clean.offsets[-1] == kept.sum()
        assert len(index.clean().rows) == len(kept)


class TestFiles:
    def test_lists_come_back(self, tmp_path, tiny_set):
        index = open_index(tiny_set[0])
        scores = np.random.default_rng(0).random(len(index.labels)).astype(np.float32)
        ranked = rank_exemplars(index, np.arange(len(scores)), scores, length=9)
        path = tmp_path / "exemplars.json"
        smooth_tail.write_exemplars(path, ranked, index, np.array([0, 0, 1]), {"score": "max"})
        again = smooth_tail.read_exemplars(path, index)
        assert again.rows.tolist() == ranked.rows.tolist()
        assert again.offsets.tolist() == ranked.offsets.tolist()
        document = json.loads(path.read_text())
        assert document["score"] == "max" and [entry["part"] for entry in document["classes"]] == [
            *("head", "head", "tail")
        ]
        first = document["classes"][0]["exemplars"][0]
        row = ranked.rows[0]
        assert first["annotation"] == index.annotation_ids[row]
        assert first["image"] == index.image_ids[index.image_of[row]]
        assert first["score"] == pytest.approx(float(ranked.scores[0]), rel=1e-5)

    def test_other_annotations_are_refused(self, tmp_path, tiny_set):
        index, other = open_index(tiny_set[0]), open_index(tiny_set[1])
        ranked = rank_exemplars(index, np.arange(4), np.ones(4, np.float32))
        path = tmp_path / "exemplars.json"
        smooth_tail.write_exemplars(path, ranked, index, np.zeros(3, int), {})
        with pytest.raises(UserError, match="chosen from other annotations"):
            smooth_tail.read_exemplars(path, other)
        text = path.read_text().replace('"annotation": 1,', '"annotation": 999,')
        path.write_text(text)
        with pytest.raises(UserError, match="there is no annotation 999"):
            smooth_tail.read_exemplars(path, index)

    def test_kept_entries_are_as_they_were(self, tmp_path):
        index = make_index(tmp_path, [(0, 0), (0, 1), (2, 1), (3, 0)])
        kept = np.array([False, True, True, False])
        assert smooth_tail.write_subset(tmp_path / "part.json", index, kept) == (2, 2)
        text = (tmp_path / "part.json").read_text()
        before, after = json.loads((tmp_path / "set.json").read_text()), json.loads(text)
        assert after["annotations"] == before["annotations"][1:3]
        assert after["images"] == [before["images"][0], before["images"][2]]
        assert after["categories"] == before["categories"] and after["info"] == before["info"]
        for entry in before["annotations"][1:3]:
            assert json.dumps(entry) in text  # byte for byte
        assert open_index(tmp_path / "part.json").annotation_ids.tolist() == [2, 3]


def command(*arguments):
    return CliRunner().invoke(app, ["data", "smooth-tail", *map(str, arguments)])


class TestCommand:
    def scores(self, tmp_path, tiny_set):
        index = open_index(tiny_set[0])
        values = np.random.default_rng(1).random(len(index.labels)).round(3)
        path = tmp_path / "scores.json"
        path.write_text(json.dumps(dict(zip(index.annotation_ids.tolist(), values.tolist(), strict=True))))
        return index, path

    def test_sets_of_scores(self, tmp_path, tiny_set):
        index, path = self.scores(tmp_path, tiny_set)
        options = ["--annotations", tiny_set[0], "--division", 10, "--head", "6,1", "--tail", "4,all"]
        done = command(path, *options, "--out", tmp_path / "sets")
        assert done.exit_code == 0, done.output
        assert "2 head, 1 tail" in done.output
        counts = {}
        for name in ("d_head", "d_tail"):
            part = open_index(tmp_path / "sets" / f"{name}.json")
            counts[name] = np.bincount(part.labels, minlength=3).tolist()
            assert len(part) == len(np.unique(part.image_of)), "only images with a kept annotation"
        rare = int((index.labels == 2).sum())
        assert counts == {"d_head": [6, 6, 1], "d_tail": [4, 4, rare]}
        assert "smooth-tail" in (tmp_path / "sets" / "curves.html").read_text().lower()
        # the lists that were written give the same sets
        source = tmp_path / "sets" / "exemplars.json"
        assert command(source, *options, "--out", tmp_path / "again").exit_code == 0
        assert (tmp_path / "again" / "d_tail.json").read_bytes() == (tmp_path / "sets" / "d_tail.json").read_bytes()
        refused = command(path, *options, "--out", tmp_path / "sets")
        assert isinstance(refused.exception, UserError) and "--overwrite" in str(refused.exception)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--division", "x"], "--division x: whole numbers"),
            (["--head", "5"], "two counts are needed"),
            (["--score", "mx"], 'did you mean "max"'),
            (["--boundary", "lt"], "boundary"),
        ],
    )
    def test_mistakes(self, tmp_path, tiny_set, change, message):
        _, path = self.scores(tmp_path, tiny_set)
        result = command(path, "--annotations", tiny_set[0], "--out", tmp_path / "sets", *change)
        assert isinstance(result.exception, UserError) and message in str(result.exception)
        assert not (tmp_path / "sets").exists()

    def test_unknown_annotation(self, tmp_path, tiny_set):
        path = tmp_path / "scores.json"
        for text, message in (
            ('{"12345": 0.5}', "there is no annotation 12345"),
            ('[{"annotation_id": 1, "score": 0.5}, {"annotation_id": 1, "score": 0.6}]', "annotation 1 has two scores"),
            ('{"9223372036854775808": 0.5}', "is needed"),
            ('[{"annotation_id": 18446744073709551615, "score": 0.5}]', "is needed"),
            ('{"a": 1}', "is needed"),
        ):
            path.write_text(text)
            result = command(path, "--annotations", tiny_set[0], "--out", tmp_path / "sets")
            assert isinstance(result.exception, UserError) and message in str(result.exception)
