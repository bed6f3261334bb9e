"""Reading pictures: every mode, EXIF rotation, sizes, damage and the pixel bound."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tailfin.data.images import read_header, read_image, value_range
from tailfin.errors import UserError

# left half (200, 100, 50), right half black: turns and mirrors show
PIXELS = np.zeros((4, 6, 3), np.uint8)
PIXELS[:, :3] = (200, 100, 50)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "ending", "expected"),
    [
        ("RGB", "png", (200, 100, 50)),
        ("RGB", "webp", (200, 100, 50)),
        ("RGBA", "png", (200, 100, 50)),
        ("CMYK", "tif", (200, 100, 50)),
        ("CMYK", "jpg", (200, 100, 50)),
        ("YCbCr", "tif", (200, 100, 50)),
        ("LAB", "tif", (200, 100, 50)),
        ("P", "png", (200, 100, 50)),
        ("L", "jpg", (124, 124, 124)),
        ("LA", "png", (124, 124, 124)),
        ("1", "png", (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, ending: str, expected: tuple[int, int, int]) -> None:
    plain = Image.fromarray(np.full((16, 24, 3), (200, 100, 50), np.uint8))
    if mode == "P":
        image = plain.quantize(8)
    elif mode == "1":
        image = Image.new("1", (24, 16), 1)
    elif mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(plain, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    else:
        image = plain.convert(mode)
    path = save(tmp_path / f"x.{ending}", image)
    if mode == "YCbCr" and Image.open(path).mode == "RGB":  # Pillow before 13: refused, and not read wrongly
        path.write_bytes(path.read_bytes() + bytes(4096))
        with pytest.raises(UserError, match="YCbCr TIFF without compression, which this version of Pillow"):
            read_image(path)
        return
    array = read_image(path, width=24, height=16)
    assert array.shape == (16, 24, 3) and array.dtype == np.uint8
    assert array.flags.writeable and array.flags.c_contiguous
    tolerance = 6 if ending in ("jpg", "webp") or mode in ("LAB", "P") else 1
    assert np.abs(array.astype(int) - expected).max() <= tolerance


def test_a_tiff_whose_colours_pillow_would_read_from_the_wrong_places_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.tif", Image.new("YCbCr", (24, 16), (124, 86, 182)))
    data = path.read_bytes()
    halved = data.replace(
        b"\x12\x02\x03\x00\x02\x00\x00\x00\x01\x00\x01", b"\x12\x02\x03\x00\x02\x00\x00\x00\x02\x00\x02"
    )
    assert halved != data
    path.write_bytes(halved + bytes(4096))
    with pytest.raises(
        UserError, match="fewer samples of colour than of light, which Pillow cannot read: save it as RGB"
    ):
        read_image(path)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_sixteen_bits_are_scaled_by_their_own_depth(tmp_path: Path, channels: int) -> None:
    values = np.zeros((4, 6, channels), np.uint16)
    values[..., 0], values[..., -1] = np.arange(0, 4095, 171).reshape(4, 6), 65535
    if channels == 3:
        values[..., 2] = 4095
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    kind = {2: 4, 3: 2, 4: 6}[channels]
    head = (6).to_bytes(4, "big") + (4).to_bytes(4, "big") + bytes([16, kind, 0, 0, 0])
    path = tmp_path / "deep.png"
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    picture = read_image(path, width=6, height=4)
    expected = np.rint(values[..., 0] * (255 / 4095)).astype(np.uint8)
    assert picture.shape == (4, 6, 3) and np.array_equal(picture[..., 0], expected)
    assert read_header(path).mode.endswith(";16") and value_range(path) == (0, 4095 if channels == 3 else 3933)
    brighter = read_image(path, value_range=(0, 2000))
    assert brighter[..., 0].max() == 255


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert np.array_equal(read_image(save(tmp_path / "x.png", Image.fromarray(clear))), PIXELS)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 25700, 65535]], np.uint16)
    expected = [0, 0, 1, 100, 255]
    for name, array in (("x.png", values), ("x.tif", values), ("i.tif", values.astype(np.int32))):
        image = read_image(save(tmp_path / name, Image.fromarray(array)))
        assert image[0, :, 0].tolist() == expected and (image[..., 0] == image[..., 2]).all()
    big = Image.fromarray(values.astype(">u2"))
    assert read_image(save(tmp_path / "big.tif", big))[0, :, 0].tolist() == expected


def test_wide_integers_and_floats(tmp_path: Path) -> None:
    wide = np.array([[-5, 0, 2**30, 2**31 - 1]], np.int32)
    assert read_image(save(tmp_path / "i.tif", Image.fromarray(wide)))[0, :, 0].tolist() == [0, 0, 128, 255]
    unit = np.array([[0, 0.5, 1]], np.float32)
    assert read_image(save(tmp_path / "u.tif", Image.fromarray(unit)))[0, :, 0].tolist() == [0, 128, 255]
    other = np.array([[-3, 7.4, 300, np.nan, np.inf]], np.float32)
    assert read_image(save(tmp_path / "f.tif", Image.fromarray(other)))[0, :, 0].tolist() == [0, 7, 255, 0, 255]


TURNS = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, -1),
    7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
    8: np.rot90(PIXELS),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"x.{ending}", Image.fromarray(PIXELS), exif=exif)
    expected = TURNS[orientation]
    height, width = expected.shape[:2]
    assert np.array_equal(read_image(path), expected)
    assert np.array_equal(read_image(path, width=width, height=height), expected)
    assert read_header(path).shown_size == (width, height)
    if orientation >= 5 and ending == "png":  # the size fits only as stored: the boxes were drawn on the stored pixels
        assert np.array_equal(read_image(path, width=6, height=4), PIXELS)


def test_odd_orientation_and_damaged_exif_turn_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert np.array_equal(read_image(save(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)), PIXELS)
    path = save(tmp_path / "b.png", Image.fromarray(PIXELS), exif=b"Exif\0\0broken")
    assert np.array_equal(read_image(path), PIXELS)


def test_size_must_match(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(PIXELS))
    with pytest.raises(UserError, match=r"x\.png: its size is 6 x 4, the annotation file says 7 x 4$"):
        read_image(path, width=7, height=4)
    with pytest.raises(UserError, match="says 4 x 6 \\(width and height are swapped\\)"):
        read_image(path, width=4, height=6)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, Image.fromarray(PIXELS), exif=exif)
    with pytest.raises(UserError, match=r"its size is 4 x 6 \(6 x 4 before its EXIF rotation\), .* says 9 x 9"):
        read_image(path, width=9, height=9)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    good = save(
        tmp_path / "good.png", Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))
    )
    with pytest.raises(UserError, match=r'goood\.png does not exist \(did you mean "good\.png"\?\)'):
        read_image(tmp_path / "goood.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)
    for name, data in (
        ("empty.jpg", b""),
        ("text.jpg", b"hello"),
        ("cut.png", good.read_bytes()[:4000]),
        ("head.png", good.read_bytes()[:20]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_image(tmp_path / name)


def test_truncated_jpeg_is_an_error(data_dir: Path, tmp_path: Path) -> None:
    source = min((data_dir / "coco-sample" / "train").glob("*.jpg"))
    whole = source.read_bytes()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    assert read_header(cut) == read_header(source)
    with pytest.raises(UserError, match=r"cut\.jpg is damaged: .*truncated"):
        read_image(cut)
    shutil.copy(source, cut)
    assert np.array_equal(read_image(cut), np.asarray(Image.open(source)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged TIFF tags
@settings(max_examples=80, deadline=None)
@given(position=st.integers(0, 2000), value=st.integers(0, 255), ending=st.sampled_from(["png", "jpg", "gif", "tif"]))
def test_any_damage_is_a_picture_or_a_user_error(
    position: int, value: int, ending: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damage.{ending}"
    noise = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    data = bytearray(save(path, Image.fromarray(noise)).read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        array = read_image(path, max_pixels=100_000)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3


def test_pixel_bound_is_checked_before_decoding(tmp_path: Path) -> None:
    for side in (8001, 14000):  # beyond our bound, and beyond Pillow's own: few kilobytes, many pixels
        path = save(tmp_path / "x.png", Image.new("1", (side, side)))
        for read in (read_image, read_header):
            with pytest.raises(UserError, match=r"x\.png .*larger than the bound of 64,000,000 pixels"):
                read(path)
    small = save(tmp_path / "y.png", Image.fromarray(PIXELS))
    assert read_image(small, max_pixels=24).shape == (4, 6, 3)
    with pytest.raises(UserError, match="6 x 4, larger than the bound of 23 pixels"):
        read_image(small, max_pixels=23)
