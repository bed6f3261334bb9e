"""Writing a data set folder: built beside its place, then renamed, so it is whole or not there; image placing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tailfin.errors import UserError
from tailfin.files import writing

Placing = Literal["copy", "link", "none"]


@contextlib.contextmanager
def staged_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well and vanishes when it does not.

    An existing `out` that is not empty is a `UserError` without `overwrite`; with it, it is replaced as a whole.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, a folder is to be written there")
    if out.is_dir():
        if Path.cwd().resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"{out} is or holds the working directory, which cannot be replaced; name a folder below it"
            )
        if any(out.iterdir()) and not overwrite:
            raise UserError(f"{out} exists and is not empty (--overwrite replaces it)")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name or 'data'}."))
    try:
        staged = work / "new"
        staged.mkdir()  # inside: mkdtemp's own folder is closed to other users
        yield staged
        if out.exists():
            out.rename(work / "old")
        staged.rename(out)
    finally:
        if not out.exists() and (work / "old").exists():
            (work / "old").rename(out)
        shutil.rmtree(work, ignore_errors=True)


def place_image(source: Path, target: Path, placing: Placing) -> None:
    """Put the image file at `target` (nothing for "none"); a link is hard where the disk is the same, else symbolic."""
    if placing == "none":
        return
    if not source.is_file():
        raise UserError(f"image {source} does not exist")
    target.parent.mkdir(parents=True, exist_ok=True)
    if placing == "link":
        try:
            os.link(source.resolve(), target)
        except OSError:
            target.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, target)


def leading_prefix(folder: Path, start: Path) -> str | None:
    """What leads a file name from `start` to `folder` ("" or "a/b/"); None when `folder` is not below `start`."""
    folder, start = folder.resolve(), start.resolve()
    if not folder.is_relative_to(start):
        return None
    step = folder.relative_to(start).as_posix()
    return "" if step == "." else f"{step}/"
