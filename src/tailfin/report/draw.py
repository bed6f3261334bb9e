"""Boxes, masks and names drawn on a picture, as a Pillow image.

    picture = draw_detections(image, boxes, labels, names, scores)
    picture.save("drawn.jpg")

A class has the same colour in every picture (a hash of its name). Label plates stay inside the picture, and where
boxes crowd they move to the corner of the box that covers the fewest other labels.
"""

from __future__ import annotations

import base64
import colorsys
import functools
import io
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

# Fonts of common systems that know more scripts than Pillow's own; used only for names that Pillow's cannot show.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "segoeui.ttf",
    "LiberationSans-Regular.ttf",
)
_MASK_OPACITY = 0.45
_LONGEST_NAME = 40  # letters; longer names end in an ellipsis
# Hues at even steps of a hash: greens look alike over a wide range of angles, yellows and reds do not.
_HUES = (0, 18, 34, 48, 66, 100, 150, 174, 190, 206, 224, 246, 268, 290, 312, 332, 350)


def draw_detections(
    image: np.ndarray,
    boxes: ArrayLike,
    labels: ArrayLike,
    names: Sequence[str],
    scores: ArrayLike | None = None,
    masks: ArrayLike | None = None,
    *,
    width: int | None = None,
    size: int | None = None,
    colors: Sequence[Color] | None = None,
    texts: Sequence[str] | None = None,
    dashed: ArrayLike | None = None,
) -> Image.Image:
    """Draw N objects on a copy of a picture.

    Args:
        image: uint8 [H, W, 3], RGB.
        boxes: float [N, 4], xyxy in pixels of `image`; parts outside the picture are clipped.
        labels: int [N], indices into `names`; one without a name is shown as its number.
        names: class names.
        scores: float [N] in 0..1, written behind the name.
        masks: bool [N, H, W] (numbers above 0.5 count as set), tinted in the colour of the object.
        width: line width in pixels of the result; by default it grows with the picture.
        size: long side of the result in pixels (the picture is scaled, lines and text are not); by default unchanged.
        colors: N RGB colours instead of the class colours.
        texts: N labels instead of name and score; an empty one draws no label.
        dashed: bool [N], objects whose box is drawn with dashes.

    Raises:
        ValueError: shapes that do not fit together.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    box_array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(box_array)
    label_list = [int(label) for label in np.asarray(labels).reshape(-1)]
    score_array = None if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    dash_array = np.zeros(count, bool) if dashed is None else np.asarray(dashed, dtype=bool).reshape(-1)
    for what, value in (("labels", label_list), ("scores", score_array), ("colors", colors), ("texts", texts)):
        if value is not None and len(value) != count:
            raise ValueError(f"{count} boxes but {len(value)} {what}")
    if len(dash_array) != count:
        raise ValueError(f"{count} boxes but {len(dash_array)} dashed")

    shown = [names[label] if 0 <= label < len(names) else str(label) for label in label_list]
    paint = list(colors) if colors is not None else [class_color(name) for name in shown]
    if masks is not None and count:
        image = _tint(image, np.asarray(masks), paint)
    picture = Image.fromarray(image)
    if size is not None and size != max(picture.size):
        scale = size / max(picture.size)
        target = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        box_array *= np.array([target[0] / picture.width, target[1] / picture.height] * 2)
        picture = picture.resize(target, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)

    long_side = max(picture.size)
    line = width if width is not None else max(1, min(2, long_side // 120), round(long_side / 300))
    font_size = max(11.0, long_side / 38)
    box_array = np.nan_to_num(box_array, posinf=1e6, neginf=-1e6)
    box_array[:, 0::2] = box_array[:, 0::2].clip(0, picture.width - 1)
    box_array[:, 1::2] = box_array[:, 1::2].clip(0, picture.height - 1)
    draw = ImageDraw.Draw(picture)
    area = (box_array[:, 2] - box_array[:, 0]) * (box_array[:, 3] - box_array[:, 1])
    for index in np.argsort(-area, kind="stable"):  # small boxes over large ones
        _box(draw, box_array[index], paint[index], line, bool(dash_array[index]))

    # The best detection chooses its label's place first and is drawn last.
    order = np.arange(count) if score_array is None else np.argsort(-score_array, kind="stable")
    plates: list[tuple[_Plate, int]] = []
    for index in order:
        if texts is not None:
            text = texts[index]
        else:
            # Where no font here has the letters, the class number says more than blanks.
            name = shown[index] if _readable(shown[index]) else f"class {label_list[index]}"
            name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
            text = name if score_array is None else f"{name} {score_array[index]:.2f}"
        text = _one_line(text)
        if text:
            taken = [plate.rect for plate, _ in plates]
            plates.append((_place(text, font_size, box_array[index], line, picture.size, taken), int(index)))
    for plate, index in reversed(plates):
        left, top, right, bottom = plate.rect
        draw.rectangle((left, top, right - 1, bottom - 1), fill=paint[index])
        origin = (left + plate.pad, top + plate.pad)
        draw.text(origin, plate.text, font=plate.font, fill=_ink(paint[index]), anchor="la")
    return picture


def data_uri(picture: Image.Image, quality: int = 84) -> str:
    """A picture as text for the `src` of an image, a JPEG of this quality."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def class_color(name: str) -> Color:
    """An RGB colour that depends on the name alone: the same in every picture, run and process."""
    code = zlib.crc32(name.encode("utf-8", "surrogatepass"))
    hue = float(np.interp(code % 997 / 997, np.linspace(0, 1, len(_HUES)), _HUES)) / 360
    saturation = 0.72 + 0.22 * ((code >> 9) % 4) / 3
    value = 0.82 + 0.18 * ((code >> 13) % 3) / 2
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


# ---- details ---------------------------------------------------------------------------------------------------------


class _Plate(NamedTuple):
    """A label with its font and its place."""

    text: str
    font: ImageFont.FreeTypeFont
    pad: int
    rect: tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded


def _tint(image: np.ndarray, masks: np.ndarray, paint: Sequence[Color]) -> np.ndarray:
    masks = masks.reshape(-1, *masks.shape[-2:])
    if masks.shape != (len(paint), *image.shape[:2]):
        raise ValueError(f"masks must be [{len(paint)}, {image.shape[0]}, {image.shape[1]}], not {list(masks.shape)}")
    tinted = image.copy()
    for mask, color in zip(masks, paint, strict=True):
        chosen = mask if mask.dtype == bool else mask > 0.5
        blend = tinted[chosen] * (1 - _MASK_OPACITY) + np.array(color) * _MASK_OPACITY
        tinted[chosen] = blend.round().astype(np.uint8)
    return tinted


def _box(draw: ImageDraw.ImageDraw, box: np.ndarray, color: Color, line: int, dashed: bool) -> None:
    left, top = int(box[0]), int(box[1])
    right, bottom = max(left, round(float(box[2]))), max(top, round(float(box[3])))
    if not dashed:
        draw.rectangle((left, top, right, bottom), outline=color, width=line)
        return
    step = 4 * line + 4
    half = step // 2 + 1
    for start in range(left, right + 1, step):
        end = min(start + half, right)
        draw.rectangle((start, top, end, min(top + line - 1, bottom)), fill=color)
        draw.rectangle((start, max(bottom - line + 1, top), end, bottom), fill=color)
    for start in range(top, bottom + 1, step):
        end = min(start + half, bottom)
        draw.rectangle((left, start, min(left + line - 1, right), end), fill=color)
        draw.rectangle((max(right - line + 1, left), start, right, end), fill=color)


def _place(
    text: str,
    font_size: float,
    box: np.ndarray,
    line: int,
    picture: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> _Plate:
    """The text cut to the picture's width, at the place around the box that hides the fewest other labels."""
    text = _one_line(text) or "?"
    font = _font(text, font_size)
    pad = max(1, round(font_size / 8))
    while font.getlength(text) + 2 * pad > picture[0] and font_size > 9:
        font_size = max(9.0, font_size * 0.9)
        font, pad = _font(text, font_size), 1
    while len(text) > 1 and font.getlength(text) + 2 * pad > picture[0]:
        text = text.removesuffix("…")[:-1] + "…" if len(text) > 2 else text[:1]
    ascent, descent = font.getmetrics()
    wide = min(picture[0], int(np.ceil(font.getlength(text))) + 2 * pad)
    high = min(picture[1], ascent + descent + 2 * pad)
    left, top, right, bottom = (round(float(side)) for side in box)
    right, bottom = right + 1, bottom + 1
    corners = (
        (left, top - high),
        (left, bottom),
        (left, top),
        (right - wide, top - high),
        (right - wide, bottom),
        (left, bottom - high),
        (right, top),
        (left - wide, top),
    )
    best: tuple[int, tuple[int, int, int, int]] | None = None
    for x, y in corners:
        inside_x, inside_y = min(max(x, 0), picture[0] - wide), min(max(y, 0), picture[1] - high)
        rect = (inside_x, inside_y, inside_x + wide, inside_y + high)
        # Being pushed back into the picture costs a little: the label then leaves its corner or covers the object.
        cost = 4 * sum(_overlap(rect, other) for other in taken) + abs(inside_x - x) + abs(inside_y - y) * wide // 4
        if best is None or cost < best[0]:
            best = (cost, rect)
    assert best is not None
    return _Plate(text, font, pad, best[1])


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> int:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(high, 0)


def _ink(color: Color) -> Color:
    """Black or white, whichever reads better on `color` (relative luminance)."""
    linear = [(part / 255) ** 2.2 for part in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.22 else (255, 255, 255)


def _readable(text: str) -> bool:
    return any(_covers(source, text) for source in _sources())


def _one_line(text: str) -> str:
    """Control characters and separators as single spaces: text layout fails on some of them (U+0085, U+2029)."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _font(text: str, size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or the first wide one that has every letter of `text`."""
    source = next((source for source in _sources() if _covers(source, text)), "")
    return _load(source, round(size, 1))


@functools.cache
def _sources() -> tuple[str, ...]:
    """Font names that load on this machine; the empty name is Pillow's own font."""
    found = [""]
    for name in _WIDE_FONTS:
        try:
            ImageFont.truetype(name, 12)
        except OSError:
            continue
        found.append(name)
    return tuple(found)


@functools.lru_cache(maxsize=256)
def _load(source: str, size: float) -> ImageFont.FreeTypeFont:
    if source:
        return ImageFont.truetype(source, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


@functools.lru_cache(maxsize=8192)
def _covers(source: str, text: str) -> bool:
    return all(char.isascii() or char.isspace() or _has_glyph(source, char) for char in set(text))


@functools.lru_cache(maxsize=8192)
def _has_glyph(source: str, char: str) -> bool:
    """Whether a font has a letter: a missing one is drawn as the glyph of a code point that no font has."""
    font = _load(source, 16.0)
    mask, blank = font.getmask(char), font.getmask("\U000fffff")
    return mask.size != blank.size or bytes(mask) != bytes(blank)
