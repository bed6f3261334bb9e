"""Safe files: writes go to a temporary name and are renamed, reads fail with one clear message.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one; JSON also without. Anything else is one
message that names the file and the first byte that does not fit: a guessed encoding would give wrong class names.
"""

from __future__ import annotations

import codecs
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tailfin.errors import UserError, nearest


def existing_file(path: str | os.PathLike[str], what: str = "file") -> Path:
    """`path` if it is a file; otherwise a `UserError` that names the nearest file in the same folder."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder, a file is needed{_inside(path)}")
    hint = ""
    if path.parent.is_dir():
        near = nearest(path.name, sorted(p.name for p in path.parent.iterdir() if p.suffix == path.suffix))
        hint = near if "did you mean" in near else ""
    else:
        hint = f" (there is no folder {path.parent})"
    raise UserError(f"{what} {path} does not exist{hint}")


def _inside(folder: Path) -> str:
    """What a folder has for one who looks for an annotation file in it: JSON files, in its folders too, or beside it,
    or labels in another form."""
    files = [path for pattern in ("*.json", "*/*.json") for path in sorted(folder.glob(pattern))]
    names = [path.relative_to(folder).as_posix() for path in files if not path.name.startswith(".")]
    if names:
        return f" (it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    beside = Path(f"{folder.absolute()}.json")
    if beside.is_file():
        return f" (it holds no JSON file; {folder.with_name(beside.name)} is beside it)"
    if any(next(folder.glob(pattern), None) for pattern in ("*.yaml", "*.yml", "labels/", "Annotations/*.xml")):
        return f" (it holds no JSON file, but what may be YOLO or VOC labels: tailfin data convert {folder} FILE.json)"
    return ""


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """A full disk, a read-only folder, a spent quota while `path` is written: a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from None


def disk_problem(error: OSError) -> str:
    """One line about a file that could not be read or written."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{os.fspath(error.filename)}: {reason}" if isinstance(error.filename, str | os.PathLike) else reason


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write `data` so that `path` is either the old file or the whole new one, never a part.

    Raises:
        UserError: the disk is full, the folder cannot be written, ...; the old file is as it was.
    """
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in parts that takes its name at the end: `path` is the old one or the whole new one."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(ordinary_mode())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int = 0) -> None:
    """Write JSON atomically; `indent` > 0 makes it readable."""
    data = msgspec.json.encode(value)
    write_atomic(path, msgspec.json.format(data, indent=indent) if indent else data)


def read_json(path: str | os.PathLike[str], what: str = "JSON file") -> Any:
    """Parse a JSON file into plain Python values; a missing or broken file is a `UserError` that names the position."""
    path = existing_file(path, what)
    data = json_bytes(path.read_bytes(), f"{what} {path}")
    if not data.strip():
        raise UserError(f"{what} {path} is empty")
    try:
        return msgspec.json.decode(data)
    except UnicodeDecodeError:
        raise UserError(not_utf8(data, f"{what} {path}")) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid JSON: {error}") from None


def read_object(path: str | os.PathLike[str], what: str = "JSON file") -> dict[str, Any]:
    """As `read_json`, of a file that holds a JSON object; anything else is a `UserError`."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {os.fspath(path)} must hold a JSON object, not {type(value).__name__}")
    return value


LARGEST = 1_000_000  # values in a YAML file: aliases of aliases would fill the memory


def check_values(value: Any, known: dict[int, int] | None = None) -> int:
    """Values inside what YAML has read, those of an alias as often as it is used.

    Raises:
        ValueError: they are too many, one stands for what it is inside of, or a text has half of a surrogate pair.
    """
    known = {} if known is None else known
    if isinstance(value, str) and not value.isascii():
        value.encode()
    if not isinstance(value, dict | list):
        return 1
    if known.get(id(value)) == 0:
        raise ValueError("an alias stands for what it is inside of")
    if id(value) not in known:
        known[id(value)] = 0
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(check_values(part, known) for part in inside)
        if known[id(value)] > LARGEST:
            raise ValueError(f"its aliases stand for more than {LARGEST:,} values")
    return known[id(value)]


def read_npz(path: str | os.PathLike[str], what: str = "file") -> dict[str, Any]:
    """The arrays of an .npz file by name; a damaged one, or one with pickled objects, is a `UserError`."""
    import numpy as np

    path = existing_file(path, what)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile may raise anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} {path} is damaged or no .npz file: {reason}") from None


_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: str | os.PathLike[str], what: str = "file") -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; anything else is a `UserError`."""
    path = existing_file(path, what)
    return decode_text(path.read_bytes(), f"{what} {path}")


def decode_text(data: bytes, label: str) -> str:
    """Bytes as text, see `read_text`; `label` names them in the message."""
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if not mark:
            raise UserError(not_utf8(data, label)) from None
        raise UserError(f"{label} begins as {encoding.upper()} text but is not, at byte {error.start}") from None


def json_bytes(data: bytes, label: str) -> bytes:
    """JSON text in UTF-8 without a mark, from UTF-8, UTF-16 or UTF-32 (JSON's first two characters tell which)."""
    if data[:3] == codecs.BOM_UTF8:
        return data[3:]
    if not data or (data[0] not in (0xFE, 0xFF) and 0 not in data[:4]):
        return data
    if any(data.startswith(mark) for mark, _ in _MARKS):
        return decode_text(data, label).encode("utf-8", "surrogatepass")
    zeros = tuple(byte == 0 for byte in data[:4])
    encodings = {
        (True, True, True, False): "utf-32-be",
        (False, True, True, True): "utf-32-le",
        (True, False, True, False): "utf-16-be",
        (False, True, False, True): "utf-16-le",
    }
    try:
        return data.decode(encodings[zeros]).encode() if zeros in encodings else data
    except UnicodeError:
        return data


PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}  # by the first bytes


def not_utf8(data: bytes, label: str) -> str:
    """The message about bytes that are no UTF-8: where they stop being it, and in which line."""
    if packed := next((name for mark, name in PACKED.items() if data.startswith(mark)), None):
        return f"{label} is packed ({packed}): unpack it first"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return (
            f"{label} is not UTF-8 text: byte {error.start} (line {line}) is 0x{data[error.start]:02x}; "
            "it seems to be in a legacy encoding (Latin-1, CP1252, GBK, ...): save it as UTF-8"
        )
    return f"{label} is not UTF-8 text"


def ordinary_mode() -> int:
    """The mode that `open` gives a new file; temporary files start with a private one."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
