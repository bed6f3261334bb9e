"""Numpy columns on disk: written once, memory-mapped by every process that opens the same file later.

A bundle is one safetensors file (any safetensors reader opens it) in the cache folder: `TAILFIN_CACHE`, else
`XDG_CACHE_HOME/tailfin`, else `~/.cache/tailfin`. Its name holds the resolved path of the source file and a stamp of
its state, so a bundle is never rewritten: a changed source gets a new bundle and the old one is removed. A cache that
cannot be read or written is no error; the caller then works on the columns in memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FORMAT = 2  # part of every stamp: raise it when the meaning of a column changes
SAMPLE = 1 << 16  # bytes hashed at the head, in the middle and at the tail of the source

_DTYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}


@dataclass(frozen=True)
class Bundle:
    """Read-only columns by name, text metadata, and the file they are mapped from (None: they live in memory)."""

    columns: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    file: Path | None


def folder() -> Path:
    """The cache folder of this user; it need not exist."""
    if own := os.environ.get("TAILFIN_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "tailfin"
    return Path("~/.cache/tailfin").expanduser()


def stamp(path: Path) -> str:
    """State of a source file in 32 hex digits: size, modification time and samples of its bytes."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.blake2b(f"{FORMAT} {status.st_size} {status.st_mtime_ns} ".encode(), digest_size=16)
        for start in (0, status.st_size // 2, max(0, status.st_size - SAMPLE)):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def digest(data: bytes) -> str:
    """Hash of a whole file's bytes in 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def load(source: Path, stamp: str, kind: str) -> Bundle | None:
    """The stored bundle of `source` in state `stamp`, or None."""
    try:
        return read(_file(source, stamp, kind))
    except RuntimeError:  # no home folder
        return None


def store(
    source: Path, stamp: str, kind: str, columns: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Bundle:
    """Write a bundle and return it memory-mapped; where the cache cannot be written, return the columns as they are."""
    in_memory = Bundle({name: _frozen(column) for name, column in columns.items()}, dict(metadata), None)
    try:
        target = _file(source, stamp, kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.")
        os.close(handle)
        try:
            save_file(dict(in_memory.columns), temporary, dict(metadata))
            Path(temporary).replace(target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        for old in target.parent.glob(f"{_key(source)}-*.{kind}"):
            if old != target:
                old.unlink(missing_ok=True)
        return read(target) or in_memory
    except (OSError, RuntimeError):
        return in_memory
    except Exception as error:  # safetensors wraps a full disk or a lost folder in an exception of its own
        if type(error).__name__ != "SafetensorError":
            raise
        return in_memory


def read(file: Path) -> Bundle | None:
    """A bundle by its own path, memory-mapped; None where it is missing or not whole."""
    try:
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__", {})
        columns = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            column = np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, start + begin)
            columns[name] = column.reshape(entry["shape"])
        return Bundle(columns, metadata, file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _frozen(column: np.ndarray) -> np.ndarray:
    column = np.ascontiguousarray(column)
    column.setflags(write=False)
    return column


def _key(source: Path) -> str:
    return hashlib.blake2b(os.fsencode(source.resolve()), digest_size=10).hexdigest()


def _file(source: Path, stamp: str, kind: str) -> Path:
    return folder() / f"{_key(source)}-{stamp}.{kind}"
