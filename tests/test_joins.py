"""Joining classes and pictures by name."""

from __future__ import annotations

import pytest

from tailfin.joins import PictureNames, join_classes


def test_classes_are_joined_and_what_has_no_partner_is_known():
    join = join_classes(["a", "b", "c"], ["c", "x", "a"])
    assert join.rows.tolist() == [2, -1, 0]
    assert join.missing == ["b"] and join.unknown == ["x"]
    assert join_classes(["a"], ["a", "a"]).rows.tolist() == [0]
    assert join_classes([], ["a"]).rows.tolist() == []


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ("train/1.jpg", [0]),
        ("val/1.jpg", [1]),
        ("/data/train/1.jpg", [0]),
        ("train\\1.jpg", [0]),
        ("./train/1.jpg", [0]),
        ("1.jpg", [0, 1]),
        ("test/1.jpg", []),
        ("2.png", [2]),
        ("2", [2]),
        ("2.jpg", []),
        ("with%20space.jpg", [3]),
        ("with space.jpg", [3]),
        ("a.b", [4]),
    ],
)
def test_pictures_are_found_with_more_or_fewer_folders(wanted, rows):
    names = PictureNames(["train/1.jpg", "val/1.jpg", "deep/2.png", "with space.jpg", "a.b.jpg", None])
    assert names.find(wanted) == rows and names.known
    assert not PictureNames([None]).known


def test_letters_and_marks_apart_are_the_same_name():
    one, apart = "Stra\u00dfe/\u00e9.jpg", "Stra\u00dfe/e\u0301.jpg"
    assert PictureNames([one, "b.jpg"]).find(f"data/{apart}") == [0] == PictureNames([apart, "b.jpg"]).find(one)
    assert join_classes(["caf\u00e9", "bus"], ["bus", "cafe\u0301"]).rows.tolist() == [1, 0]
    assert join_classes(["cafe\u0301"], ["caf\u00e9", "cafe\u0301"]).rows.tolist() == [1]  # the very name first
    join = join_classes(["cafe\u0301"], ["caf\u00e9"])
    assert join.missing == [] and join.unknown == []
