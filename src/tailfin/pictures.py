"""Pictures to predict on: files, folders, globs and videos, one after another.

Video frames are read with PyAV (`pip install 'tailfin[video]'`); animated pictures count as their first frame.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tailfin.data.images import HEIC, is_hidden, picture_suffixes, read_header, read_image, to_rgb
from tailfin.errors import UserError, nearest
from tailfin.files import existing_file
from tailfin.schema.data import Data

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
OTHERS = {*HEIC, ".jxl", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}  # pictures, too


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """Files that the paths, folders (recursively) and globs stand for, each once, in order.

    In folders and globs the ending decides, and hidden files are passed over; a file that is named is taken at its word
    where Pillow knows what it is.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if not is_hidden(p, path) and _is_file(p))
            inside = [p for p in files if _is_input(p, path)]
            others = [p for p in files if p.suffix.lower() in OTHERS - picture_suffixes()]
            if not inside:
                raise UserError(f"{path}: there is no picture or video in this folder{_unread(others)}")
            if others:
                warnings.warn(f"{path}{_unread(others)}", UserWarning, stacklevel=2)
            found.update(dict.fromkeys(inside))
        elif path.is_file():
            if path.suffix.lower() not in picture_suffixes() | VIDEOS:
                try:
                    read_header(path)
                except UserError:
                    near = nearest(path.suffix, sorted(picture_suffixes() | VIDEOS))
                    raise UserError(
                        f"{path}: neither a picture nor a video, by its ending and by its content"
                        f"{near if 'did you mean' in near else ''}"
                    ) from None
            found[path] = None
        else:
            matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))  # noqa: PTH207
            matches = [match for match in matches if _is_input(match, None) and _is_file(match)]
            if not matches:
                hint = ""
                if path.parent.is_dir():
                    near = nearest(path.name, sorted(p.name for p in path.parent.iterdir()))
                    hint = near if "did you mean" in near else ""
                raise UserError(f"{given}: no such file, folder or glob{hint}")
            found.update(dict.fromkeys(matches))
    return list(found)


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a link that leads nowhere, whose reader says so."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _unread(files: Sequence[Path]) -> str:
    """Words about pictures that Pillow does not read here; none for none."""
    if not files:
        return ""
    plugin = ", pip install pillow-heif reads HEIC" if any(path.suffix.lower() in HEIC for path in files) else ""
    number = "1 file is" if len(files) == 1 else f"{len(files)} files are"
    return f": {number} of kinds that are not read here and left out (first: {files[0].name}{plugin})"


def _is_input(path: Path, root: Path | None) -> bool:
    return path.suffix.lower() in picture_suffixes() | VIDEOS and not is_hidden(path, root)


Picture = str | Path | Image.Image | np.ndarray | Tensor


def read_pictures(
    files: Sequence[Path], config: Data, bad: list[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 [H, W, 3]) of every picture and of every video frame (`clip.mp4#12`).

    With a list in `bad` a file that cannot be read adds its message there, and the next one follows.
    """
    for path in files:
        try:
            if path.suffix.lower() in VIDEOS:
                for number, frame in enumerate(_frames(path)):
                    yield f"{path}#{number}", frame
            else:
                yield str(path), read_image(path, max_pixels=config.max_pixels, value_range=config.value_range)
        except UserError as error:
            if bad is None:
                raise
            bad.append(str(error))


def _frames(path: Path) -> Iterator[np.ndarray]:
    try:
        import av
    except ImportError:
        raise UserError(f"{path}: reading video needs PyAV: pip install 'tailfin[video]'") from None
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} cannot be read as a video: {error}") from None


def to_tensor(image: Picture, config: Data) -> Tensor:
    """Any picture to [3, H, W], uint8 or float."""
    if isinstance(image, str | Path):
        path = existing_file(image, "image")
        image = read_image(path, max_pixels=config.max_pixels, value_range=config.value_range)
    elif isinstance(image, Image.Image):
        image = to_rgb(image, config.value_range)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"an array picture must be uint8 [H, W, 3], this is {image.dtype} {list(image.shape)}")
        return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"a tensor picture must be [3, H, W], this is {list(image.shape)}")
    return image
