"""Pictures from files: every mode of Pillow becomes 8-bit RGB, turned as its EXIF tag says, with a bound on its size.

How modes are read: alpha is dropped (the colour below it stays), as common readers do; 16-bit grey is scaled by the
bits that the picture's largest value needs (a sensor of 12 bits fills 4,095 of 65,535 values), at least 8, or by a
`value_range` that all pictures share; 32-bit integers are 16-bit values where all of them fit, else the full 31-bit
range; floats are 0..1 where all of them fit, else 0..255. Only the first frame of an animation counts.

Which files are pictures is decided by what Pillow can read (`picture_suffixes`), with the HEIC plugin where it is
installed (`pip install pillow-heif`); hidden files, such as the `._name.jpg` of macOS, are none.

Boxes belong to the picture as it is shown, after its EXIF rotation. A picture whose size fits the annotation file only
without the rotation was annotated by a tool that ignores the tag: it is then read without it, so that boxes and pixels
agree either way. (TIFF files are always turned.)
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from tailfin.errors import UserError
from tailfin.files import existing_file

MAX_PIXELS = 64_000_000
HEIC = (".heic", ".heif", ".hif")
ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2-4 mirrored or upside down, 5-8 turned by 90 degrees
TIFF_WIDTH, TIFF_HEIGHT, TIFF_COMPRESSION, TIFF_PHOTOMETRIC, TIFF_SUBSAMPLING = 256, 257, 259, 262, 530  # tags
YCBCR = 6
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


@dataclass(frozen=True)
class Header:
    """What a picture's header says, without decoding it."""

    width: int  # as stored
    height: int
    orientation: int  # EXIF, 1..8
    mode: str  # Pillow's
    frames: bool = False  # several, of which the first is read

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) after the EXIF rotation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


STUBS = {
    "BUFR",
    "EPS",
    "GRIB",
    "HDF5",
    "IPTC",
    "MPEG",
    "PCD",
    "WMF",
}  # known to Pillow, not read without other programs


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Endings, in small letters, of the files that Pillow reads here."""
    _init_pillow()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    known = {suffix for suffix in readable if Image.registered_extensions()[suffix] not in STUBS}
    return frozenset({suffix.lower() for suffix in known} | {".mpo"})


def is_picture(path: Path, root: Path | None = None) -> bool:
    """Whether a file is a picture by its name; nothing hidden is, nor what lies in a hidden folder below `root`."""
    return path.suffix.lower() in picture_suffixes() and not is_hidden(path, root)


def is_hidden(path: Path, root: Path | None = None) -> bool:
    """Whether a name begins with a dot (macOS writes `._name` beside each file), or lies in `__MACOSX` or such a folder
    below `root`."""
    parts = (path.relative_to(root) if root is not None else Path(path.name)).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def pictures_below(folder: Path) -> list[Path]:
    """All pictures in a folder and its folders, sorted; also links that lead nowhere, whose reader says so."""
    found = (path for path in folder.rglob("*") if is_picture(path, folder))
    return sorted(path for path in found if path.is_file() or (path.is_symlink() and not path.exists()))


@functools.cache
def _init_pillow() -> None:
    """Load all readers of Pillow, and the HEIC plugin where there is one."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def read_image(
    path: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    max_pixels: int = MAX_PIXELS,
    value_range: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode a picture to uint8 [H, W, 3] RGB (writable, contiguous).

    Args:
        path: the file.
        width: what the annotation file says, in pixels; None leaves the size unchecked. `height` likewise.
        max_pixels: a larger picture is refused before it is decoded.
        value_range: values of 16-bit pictures and of 32-bit grey ones that become 0 and 255.

    A missing, unreadable, truncated or too large picture and a size that differs are a `UserError` naming the file.
    """
    with _open(path, max_pixels) as image:
        deep = _deep(image)
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # a decoder of Pillow may raise anything on damaged bytes
            raise UserError(f"image {path} is damaged: {_reason(error)}") from None
        header = _header(image, loaded=True)
        turn = header.orientation > 1
        if width is not None and height is not None:
            if problem := size_problem(header, width, height):
                raise UserError(f"image {path}: {problem}")
            turn = turn and header.shown_size == (width, height)
        if deep:
            colours = Image.fromarray(_grey(_deep_values(path, image), value_range))
            return np.array(colours.transpose(TURNS[header.orientation]) if turn else colours)
        if turn:
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image, value_range)


def read_header(path: str | Path, max_pixels: int = MAX_PIXELS) -> Header:
    """Size, rotation and mode of a picture from its header; errors as `read_image` has them."""
    with _open(path, max_pixels) as image:
        return replace(_header(image, loaded=False), frames=_has_frames(image))


def size_problem(header: Header, width: int, height: int) -> str | None:
    """Why a picture does not fit the size in the annotation file; None when it does, with or without EXIF rotation."""
    stored = (header.width, header.height)
    if (width, height) in (header.shown_size, stored):
        return None
    text = "its size is {} x {}".format(*header.shown_size)
    if header.orientation >= 5:
        text += " ({} x {} before its EXIF rotation)".format(*stored)
    swapped = " (width and height are swapped)" if stored == (height, width) else ""
    return f"{text}, the annotation file says {width} x {height}{swapped}"


# ---- details ---------------------------------------------------------------------------------------------------------


def _open(path: str | Path, max_pixels: int) -> Image.Image:
    try:
        if Path(path).suffix.lower() in HEIC:
            _init_pillow()
        image = Image.open(path)
    except (FileNotFoundError, IsADirectoryError):
        existing_file(path, "image")
        raise UserError(f"image {path} cannot be opened") from None
    except UnidentifiedImageError:
        empty = not Path(path).stat().st_size
        plugin = " without pillow-heif (pip install pillow-heif)" if Path(path).suffix.lower() in HEIC else ""
        raise UserError(f"image {path} is {'empty' if empty else f'no picture that can be read{plugin}'}") from None
    except Image.DecompressionBombError:
        raise UserError(f"image {path} is larger than the bound of {max_pixels:,} pixels") from None
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {_reason(error)}") from None
    except Exception as error:  # a damaged header, in a decoder's own words
        raise UserError(f"image {path} is damaged: {_reason(error)}") from None
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        image.close()
        raise UserError(f"image {path} is {size}, larger than the bound of {max_pixels:,} pixels")
    if image.format == "TIFF" and (what := _misread(image)):
        image.close()
        raise UserError(f"image {path} is a YCbCr TIFF without compression, {what}: save it as RGB")
    return image


def _misread(image: Image.Image) -> str:
    """What Pillow gets wrong about a TIFF of YCbCr samples as they are, where it does: it takes four bytes for each
    pixel (before version 13), or three where colours are stored for every other one."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(TIFF_PHOTOMETRIC) != YCBCR or tags.get(TIFF_COMPRESSION, 1) != 1:
        return ""
    if tuple(tags.get(TIFF_SUBSAMPLING, (2, 2))) != (1, 1):
        return "with fewer samples of colour than of light, which Pillow cannot read"
    return "" if image.mode == "YCbCr" else "which this version of Pillow takes for RGBX"


def _header(image: Image.Image, *, loaded: bool) -> Header:
    mode = f"{image.mode};16" if _deep(image) else image.mode
    try:
        if image.format == "TIFF":  # Pillow turns these itself on loading, so what counts is the size as shown
            if loaded:
                return Header(image.width, image.height, 1, mode)
            tags = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags[TIFF_WIDTH], tags[TIFF_HEIGHT]
            turned = tags.get(ORIENTATION, 1) in range(5, 9)
            return Header(*((height, width) if turned else (width, height)), 1, mode)
        orientation = Image.Image.getexif(image).get(ORIENTATION, 1)  # the PNG reader's own would decode the picture
    except Exception:  # a damaged tag block turns nothing
        orientation = 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = 1
    return Header(image.width, image.height, orientation, mode)


def _has_frames(image: Image.Image) -> bool:
    """Whether a file holds several pictures of equal standing; those of a camera's MPO are views of one."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame, which nobody reads
        return True


def _deep(image: Image.Image) -> bool:
    """Whether a picture that is not decoded yet holds colours of 16 bits, of which Pillow keeps the upper 8."""
    modes = [tile[3] if isinstance(tile[3], str) else (tile[3] or [""])[0] for tile in getattr(image, "tile", [])]
    return image.mode in ("RGB", "RGBA", "RGBX", "LA") and any(";16" in str(mode) for mode in modes)


def _deep_values(path: str | Path, image: Image.Image) -> np.ndarray:
    """Colours of 16 bits, uint16 [H, W, 3] as stored; of other files than PNG the lower 8 are lost."""
    if image.format == "PNG":
        from torchvision.io import decode_png, read_file

        try:
            values = decode_png(read_file(str(path))).numpy()
        except RuntimeError as error:
            raise UserError(f"image {path} is damaged: {_reason(error)}") from None
        if values.dtype == np.uint16:
            return np.ascontiguousarray(values[: 3 if len(values) > 2 else 1].transpose(1, 2, 0).repeat(
                1 if len(values) > 2 else 3, axis=2))  # fmt: skip
    return np.array(image.convert("RGB")).astype(np.uint16) << 8


def to_rgb(image: Image.Image, value_range: tuple[int, int] | None = None) -> np.ndarray:
    """A picture of any mode as uint8 [H, W, 3]; 16-bit and float pictures are scaled, alpha is dropped.

    `value_range` as in `read_image`.
    """
    mode = image.mode
    if mode == "RGB":
        return np.array(image)
    if mode.startswith("I") or mode == "F":
        grey = _grey(np.asarray(image), value_range)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode == "LAB":
        return np.array(ImageCms.applyTransform(image, _lab_to_rgb()))
    return np.array(image.convert("RGB"))


def _grey(values: np.ndarray, value_range: tuple[int, int] | None) -> np.ndarray:
    low = 0
    if values.dtype.kind != "f" and value_range is not None:
        low, high = value_range
        scale = 255 / (high - low)
    elif values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64), posinf=255.0, neginf=0.0)
        scale = 255.0 if values.size and values.min() >= 0 and values.max() <= 1 else 1.0
    else:
        sixteen = values.dtype.itemsize == 2 or not values.size or (values.min() >= 0 and values.max() < 2**16)
        bits = depth(int(values.max(initial=0))) if sixteen else 31
        scale = 255 / (2**bits - 1)
    return np.clip(np.rint((values.astype(np.float64) - low) * scale), 0, 255).astype(np.uint8)


def depth(largest: int) -> int:
    """Bits that a picture's largest value needs, 8 to 16."""
    return min(max(int(largest).bit_length(), 8), 16)


def value_range(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Smallest and largest value of a grey picture as stored; errors as `read_image` has them."""
    with _open(path, max_pixels) as image:
        deep = _deep(image)
        try:
            values = np.asarray(image)
            values = _deep_values(path, image) if deep else values
        except (MemoryError, UserError):
            raise
        except Exception as error:  # a decoder of Pillow may raise anything on damaged bytes
            raise UserError(f"image {path} is damaged: {_reason(error)}") from None
        return int(values.min()), int(values.max())


@functools.cache
def _lab_to_rgb() -> Any:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
