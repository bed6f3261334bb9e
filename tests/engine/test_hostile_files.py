"""Files that were made to harm: code in pickles, headers that lie, bombs, names that steer a terminal or a page."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tailfin import checkpoint
from tailfin.config import recipe_from_file
from tailfin.data.index import open_index
from tailfin.data.proposal_files import read_proposals
from tailfin.data.yolo_yaml import load_plain_yaml
from tailfin.errors import UserError, printable
from tailfin.evaluation.table import per_category_table
from tailfin.exemplar_scores import read_scores
from tailfin.files import read_npz
from tailfin.foreign import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def sign(tmp_path):
    """A path that exists once code was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin", "model.pkl"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_weights(name, writer, sign, tmp_path):
    path = tmp_path / name
    if writer == "torch":
        torch.save({"x": Evil(sign)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Evil(sign)}))
    for read in (checkpoint.load_model_file, read_checkpoint):
        with pytest.raises(UserError, match=name):
            read(path)


def test_code_in_a_resume_point(sign, tmp_path):
    checkpoint.save_resume_point(tmp_path, {"iteration": 1, "x": Evil(sign)}, 1)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_resume_point(tmp_path)


def test_code_in_arrays(sign, tmp_path, tiny_set):
    path = tmp_path / "shards" / "000000.npz"
    path.parent.mkdir()
    objects = np.array([Evil(sign)], dtype=object)
    np.savez(path, image_ids=objects, offsets=objects, boxes=objects, scores=objects, rows=objects)
    for read in (
        read_npz,
        lambda path: read_scores(path.parent, 1),
        lambda p: read_proposals(p, open_index(tiny_set[0])),
    ):
        with pytest.raises(UserError, match=r"000000.npz is damaged"):
            read(path)


def test_arrays_that_claim_more_than_they_hold(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**45,)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("boxes.npy", header.getvalue())
    with pytest.raises(UserError, match=r"x.npz is damaged"):
        read_npz(tmp_path / "x.npz")


def lying(kind: str) -> bytes:
    """A safetensors file whose header lies."""
    whole = save({"a": torch.zeros(4)}, {"format": "tailfin-1"})
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    match kind:
        case "longer than the file":
            return struct.pack("<Q", 2**40) + whole[8:]
        case "longest":
            return struct.pack("<Q", 2**64 - 1) + whole[8:]
        case "outside":
            header["a"]["data_offsets"] = [0, 2**40]
        case "negative":
            header["a"]["data_offsets"] = [-8, 8]
        case "shape":
            header["a"]["shape"] = [2**40]
        case "overflow":
            header["a"]["shape"] = [2**32, 2**32]
        case "overlap":
            header["b"] = header["a"]
        case "dtype":
            header["a"]["dtype"] = "EVIL"
        case "list":
            header = [header]
        case "nested":
            return struct.pack("<Q", 200_000) + b"[" * 200_000
        case "cut":
            return whole[:-3]
        case "empty":
            return b""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


OFFSETS = ("longer than the file", "longest", "outside", "negative", "overlap", "cut", "empty")
KINDS = (*OFFSETS, "shape", "overflow", "dtype", "list", "nested")


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_headers_that_lie(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(lying(kind))
    with pytest.raises(UserError, match=r"model.safetensors"):
        checkpoint.load_model_file(path)
    assert len(checkpoint.content_hash(path)) == 64


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


HARMFUL = {
    "aliases of aliases": BOMB,
    "alias of itself": "about: &a [*a]",
    "nested": "[" * 100_000,
    "nested keys": "a: " * 5000,
    "python tag": "loss: !!python/object/apply:os.getcwd []",
    "half a surrogate pair": 'loss: "\\ud800"',
}


@pytest.mark.parametrize("reader", [recipe_from_file, load_plain_yaml], ids=["recipe", "data.yaml"])
@pytest.mark.parametrize("kind", HARMFUL)
def test_yaml_that_harms(kind, reader, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(HARMFUL[kind])
    began = time.monotonic()
    with pytest.raises(UserError, match=r"recipe.yaml is not valid YAML"):
        reader(path)
    assert time.monotonic() - began < 5


def test_names_are_shown_and_not_obeyed():
    name = "\x1b[2Jcat\x9b31m\n\u202etac\u2066\x07[red]"
    shown = printable(name, lines=False)
    assert shown == "\\x1b[2Jcat\\x9b31m\\n\\u202etac\\u2066\\x07[red]"
    assert printable("two\nlines\té 猫 👩‍🚀") == "two\nlines\té 猫 👩‍🚀"
    row = {"id": 1, "name": name, "image_count": 1, "frequency": "r", "bbox": {"AP": 0.5}}
    table = per_category_table({"protocol": "coco", "per_category": [row]})
    assert str(next(iter(table.columns[0].cells))) == shown


def test_three_seconds_of_each_kind_of_mutated_file(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "faults" / "fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = fuzz
    spec.loader.exec_module(fuzz)
    for kind in fuzz.KINDS:
        counts = fuzz.fuzz(kind, 3, 0, tmp_path)
        assert counts.tried > 5 and counts.findings == []
