"""What is predicted on, in a fixed order: files, folders, globs, lists, videos, and addresses that fsspec knows.

An address (`s3://bucket/folder`, `memory://...`) is read through fsspec, with the package of its kind beside it.
Pictures are decoded by threads ahead of the detector; the order stays.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tailfin.data.images import picture_suffixes, read_image
from tailfin.errors import UserError
from tailfin.files import existing_file, read_text
from tailfin.pictures import VIDEOS, find_pictures
from tailfin.schema.data import Data

MARK = "://"


def find_inputs(paths: Sequence[str | Path], lists: Sequence[str | Path] = ()) -> list[str]:
    """Names of pictures and videos that `paths` and the lines of `lists` stand for, each once, in order."""
    given = [str(path) for path in paths]
    for file in lists:
        lines = [line.strip() for line in read_text(existing_file(file, "list"), "list").splitlines()]
        given += [line for line in lines if line and not line.startswith("#")]
    found: dict[str, None] = {}
    local: list[str] = []
    for name in [*given, ""]:
        if name and MARK not in name:
            local.append(name)
            continue
        if local:  # together, as one check of many names
            found.update(dict.fromkeys(map(str, find_pictures(local))))
            local = []
        if name:
            found.update(dict.fromkeys(_addresses(name)))
    if not found:
        raise UserError("there is nothing to predict on: give pictures, folders, globs, videos or --list FILE")
    return list(found)


def is_video(name: str) -> bool:
    """Whether a name is a video's, by its ending."""
    return PurePosixPath(name).suffix.lower() in VIDEOS


def read_input(name: str, config: Data) -> np.ndarray:
    """A picture, uint8 [H, W, 3]; one that cannot be read is a `UserError`."""
    if MARK not in name:
        return read_image(name, max_pixels=config.max_pixels, value_range=config.value_range)
    with fetched(name) as path:
        try:
            return read_image(path, max_pixels=config.max_pixels, value_range=config.value_range)
        except UserError as error:
            raise UserError(str(error).replace(str(path), name)) from None


class fetched:
    """A local copy of what is at an address, for as long as it is needed; a local name is its own copy."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        if MARK not in self.name:
            return Path(self.name)
        system, path = _system(self.name)
        self.folder = tempfile.TemporaryDirectory(prefix="tailfin-")
        copy = Path(self.folder.name) / PurePosixPath(self.name).name
        try:
            system.get_file(path, str(copy))
        except Exception as error:
            self.folder.cleanup()
            raise UserError(f"{self.name} cannot be read: {' '.join(str(error).split())[:200]}") from None
        return copy

    def __exit__(self, *problem: Any) -> None:
        if self.folder is not None:
            self.folder.cleanup()


def decoded(
    names: Iterable[tuple[int, str]], config: Data, *, threads: int, ahead: int
) -> Iterator[tuple[int, str, np.ndarray | UserError]]:
    """(number, name, picture or what is wrong with it) in order, `ahead` of them decoded before they are asked for."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: deque[tuple[int, str, Future[np.ndarray]]] = deque()

        def first() -> tuple[int, str, np.ndarray | UserError]:
            number, name, future = waiting.popleft()
            try:
                return number, name, future.result()
            except UserError as error:
                return number, name, error

        try:
            for number, name in names:
                waiting.append((number, name, pool.submit(read_input, name, config)))
                if len(waiting) > ahead:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, _, future in waiting:
                future.cancel()


def _addresses(name: str) -> list[str]:
    """Pictures and videos at an address: a file, a folder with all below it, or a glob."""
    system, path = _system(name)
    protocol = name.partition(MARK)[0]
    try:
        if any(sign in path for sign in "*?["):
            files = sorted(system.glob(path))
        elif system.isdir(path):
            files = sorted(system.find(path))
        else:
            return [name] if system.exists(path) else _nothing(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be listed: {' '.join(str(error).split())[:200]}") from None
    known = picture_suffixes() | VIDEOS
    chosen = [file for file in map(str, files) if PurePosixPath(file).suffix.lower() in known]
    return [f"{protocol}{MARK}{file.lstrip('/') if protocol != 'file' else file}" for file in chosen] or _nothing(name)


def _nothing(name: str) -> list[str]:
    raise UserError(f"{name}: there is no picture or video")


def _system(name: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{name}: addresses are read by fsspec: pip install 'tailfin[remote]'") from None
    try:
        system, path = fsspec.core.url_to_fs(name)
    except (ValueError, ImportError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:200]}") from None
    return system, str(path)
