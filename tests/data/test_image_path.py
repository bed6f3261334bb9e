"""COCO 2014's picture names, which LVIS v0.5 uses, find COCO 2017's files."""

from tailfin.data.index import image_path


def test_names_of_2014_find_files_of_2017(tmp_path):
    name = "COCO_val2014_000000000139.jpg"
    assert image_path(tmp_path, name) == tmp_path / name
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "000000000139.jpg").touch()
    assert image_path(tmp_path, name) == tmp_path / "val2017" / "000000000139.jpg"
    (tmp_path / "000000000139.jpg").touch()
    assert image_path(tmp_path, name) == tmp_path / "000000000139.jpg"
    (tmp_path / name).touch()
    assert image_path(tmp_path, name) == tmp_path / name
    assert image_path(tmp_path, "other.jpg") == tmp_path / "other.jpg"


def test_letters_with_their_marks_apart_find_the_file(tmp_path):
    one, apart = "caf\u00e9.jpg", "cafe\u0301.jpg"
    (tmp_path / apart).touch()
    assert image_path(tmp_path, one).is_file()
    assert image_path(tmp_path, "caf%C3%A9.jpg").is_file()
