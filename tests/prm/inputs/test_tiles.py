from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from prm.inputs.tiles import IMAGE_FORMATS, MOST_PIXELS, Tiler, image_size, read_image
from prm.schema import DataError
from tests.prm.tiny import TILE, image_processor, save_image

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def tiles_by_pillow(image: Image.Image, most: int) -> torch.Tensor:
    """InternVL's ``dynamic_preprocess``, written down once more."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    aspect = image.width / image.height
    best, least = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(aspect - columns / rows)
        roomy = image.width * image.height > 0.5 * TILE * TILE * columns * rows
        if difference < least or (difference == least and roomy):
            best, least = (columns, rows), difference
    columns, rows = best
    large = image.resize((TILE * columns, TILE * rows), Image.Resampling.BICUBIC)
    pieces = [
        large.crop((TILE * i, TILE * j, TILE * (i + 1), TILE * (j + 1)))
        for j in range(rows)
        for i in range(columns)
    ]
    if len(pieces) > 1:
        pieces.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    pixels = [torch.from_numpy(np.array(piece)).permute(2, 0, 1) / 255 for piece in pieces]
    return (torch.stack(pixels) - MEAN) / STD


@pytest.mark.parametrize(
    ("width", "height", "most", "count"),
    [(56, 56, 12, 1), (640, 480, 12, 13), (640, 480, 6, 7), (100, 60, 6, 7), (50, 400, 4, 5),
     (3, 3, 12, 1), (300, 20, 12, 13), (200, 200, 1, 1), (112, 112, 4, 5)],
)  # fmt: skip
def test_tiles_are_those_of_the_original_tiling(tmp_path, width, height, most, count):
    path = save_image(tmp_path / "x.png", width, height)
    tiler = Tiler(image_processor(), max_patches=most)
    tiles = tiler.tiles(path)
    assert tiler.count(path) == len(tiles) == count
    assert tiles.dtype == torch.float32
    expected = tiles_by_pillow(Image.open(path), most)
    torch.testing.assert_close(tiles, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "most", "columns", "rows"),
    [
        (448, 448, 12, 1, 1),  # 2 x 2 is as near, but the image has not half its pixels
        (900, 900, 12, 2, 2),  # more than half of 2 x 2, not of 3 x 3
        (1000, 1000, 12, 3, 3),
        (1000, 1000, 6, 2, 2),
        (640, 480, 12, 4, 3),
        (640, 480, 6, 3, 2),  # 3/2 is nearer to 4/3 than 1/1
        (800, 600, 4, 2, 2),  # 1/1 is nearer than 2/1, and 2 x 2 breaks the tie
        (500, 600, 4, 1, 1),
        (3000, 100, 12, 12, 1),
        (100, 3000, 6, 1, 6),
        (896, 448, 1, 1, 1),
    ],
)
def test_grids_by_hand(tmp_path, width, height, most, columns, rows):
    path = tmp_path / "x.png"
    Image.new("RGB", (width, height)).save(path)
    processor = image_processor()
    processor.size = {"height": 448, "width": 448}
    grid = columns * rows
    assert Tiler(processor, max_patches=most).count(path) == grid + (grid > 1)


def test_order_among_grids_of_equal_area_never_matters():
    """The original sorts a set by area, so its order within an area is not defined by its rule."""
    for most in (*range(2, 13), 24):
        sides = range(1, most + 1)
        grids = [(i, j) for i in sides for j in sides if i * j <= most]
        ratios = {Fraction(*grid) for grid in grids}
        for (i, j), (k, m) in combinations(grids, 2):
            if i * j == k * m:
                one, other = Fraction(i, j), Fraction(k, m)
                between = (one + other) / 2  # the only aspect ratio at which they tie
                assert min(abs(ratio - between) for ratio in ratios) < abs(one - between)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), most=st.integers(1, 12))
def test_header_count_equals_decoded_count(tmp_path_factory, width, height, most):
    path = save_image(tmp_path_factory.mktemp("x") / "x.png", width, height)
    tiler = Tiler(image_processor(), max_patches=most)
    assert tiler.count(path) == len(tiler.tiles(path))


def test_the_size_of_a_png_is_read_without_its_pixels(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    plain, turned, late = (tmp_path / f"{name}.png" for name in ("plain", "turned", "late"))
    Image.new("RGB", (80, 20)).save(plain)
    Image.new("RGB", (80, 20)).save(turned, exif=exif)
    whole = turned.read_bytes()
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    late.write_bytes(whole[:start] + whole[end:-12] + whole[start:end] + whole[-12:])
    assert [read_image(path).size for path in (plain, turned, late)] == [
        (80, 20),
        (20, 80),
        (20, 80),
    ]
    assert [image_size(path) for path in (plain, turned, late)] == [(20, 80), (80, 20), (80, 20)]
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert [image_size(path) for path in (plain, turned)] == [(20, 80), (80, 20)]


def test_orientation_of_a_photo_is_applied(tmp_path):
    path = tmp_path / "x.jpg"
    image = Image.new("RGB", (80, 20), "red")
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    image.save(path, exif=exif)
    assert image_size(path) == (80, 20)
    assert read_image(path).size == (20, 80)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_eight_bit_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8), 0).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == ((255,) * 3 if mode == "CMYK" else (0,) * 3)


def test_palette_with_transparency_reads_without_a_warning(tmp_path):
    path = tmp_path / "x.png"
    Image.new("P", (8, 8), 1).save(path, transparency=b"\x00\x80")
    assert read_image(path).mode == "RGB"


BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def ink(mode: str) -> Image.Image:
    """Black ink on transparent ground: the left half is ink, the right half is transparent."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 4))
    return image if mode == "RGBA" else image.convert("LA").convert(mode)


def save_with_key(path, mode: str) -> None:
    """As ``ink``, where a single value of an image without alpha is the transparent one."""
    keys = {"L": 7, "RGB": (7, 7, 7), "P": 1, "1": 255}
    image = Image.new(mode, (8, 4), keys[mode])
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.paste(0 if mode != "RGB" else BLACK, (0, 0, 4, 4))
    image.save(path, transparency=keys[mode])


@pytest.mark.parametrize("mode", ["LA", "RGBA", "L key", "RGB key", "P key", "1 key", "16 key"])
def test_transparent_images_lie_on_white(tmp_path, mode):
    path = tmp_path / "x.png"
    if mode == "16 key":
        values = np.full((4, 8), 300, dtype=np.uint16)
        values[:, :4] = 0
        Image.fromarray(values).save(path, transparency=300)
    elif mode.endswith("key"):
        save_with_key(path, mode.split()[0])
    else:
        ink(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert (image.getpixel((0, 0)), image.getpixel((7, 3))) == (BLACK, WHITE)


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff"])
def test_other_formats_lie_on_white_too(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    ink("RGBA").save(path, **({"lossless": True} if kind == "webp" else {}))
    image = read_image(path)
    assert (image.getpixel((0, 0)), image.getpixel((7, 3))) == (BLACK, WHITE)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_palettes_with_alpha_and_premultiplied_alpha_lie_on_white(tmp_path, monkeypatch, mode):
    """No file of these formats opens so today, but Pillow has the modes."""
    path = save_image(tmp_path / "x.png", 8, 8)
    if mode == "PA":
        image = Image.new("P", (8, 4), 0)
        image.putalpha(ink("RGBA").getchannel("A"))
    else:
        image = ink({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    assert image.mode == mode
    monkeypatch.setattr(Image, "open", lambda *_, **__: image)
    read = read_image(path)
    assert (read.getpixel((0, 0)), read.getpixel((7, 3))) == (BLACK, WHITE)


def test_half_transparent_ink_is_half_as_dark_and_turned_as_told(tmp_path):
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[274] = 3  # half a turn
    image = Image.new("RGBA", (2, 1), (100, 0, 200, 51))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.save(path, exif=exif)
    read = read_image(path)
    # 51 / 255 = 1/5: a fifth of the ink and four fifths of white.
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (224, 204, 244)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_opaque_images_keep_their_bits(tmp_path, mode):
    path = tmp_path / "x.png"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image = noise.convert({"LA": "L", "P": "P"}.get(mode, "RGB"))
    expected = np.asarray(image.convert("RGB"))
    if mode == "P":
        image.save(path, transparency=bytes([255] * 256))
    else:
        image.putalpha(255)
        image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode
    assert np.array_equal(np.asarray(read_image(path)), expected)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_values_of_sixteen_bits_are_scaled(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    values = np.array([[0, 128, 129, 257, 40_000, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    read = np.asarray(read_image(path))
    # round(value / 257)
    assert read[0, :, 0].tolist() == read[0, :, 2].tolist() == [0, 0, 1, 1, 156, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_known_range_are_refused_by_the_header_already(tmp_path, dtype):
    path = tmp_path / "x.tiff"
    Image.fromarray(np.full((8, 8), 400, dtype=dtype)).save(path)
    for read in (read_image, image_size):
        with pytest.raises(
            DataError, match="8 bits per channel, or grey values of 16 bits"
        ) as told:
            read(path)
        assert "Pillow mode" in told.value.found


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_truncated_files_are_refused_at_any_length(tmp_path, kind):
    whole = save_image(tmp_path / f"x.{kind}", 40, 30).read_bytes()
    path = tmp_path / f"cut.{kind}"
    for length in np.linspace(0, len(whole) * 0.9, 25, dtype=int):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert caught.value.file == path
        assert caught.value.remedy.startswith("replace or re-download the file")
        assert "\n" not in str(caught.value)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of a header, ``chunks`` and next to no pixels."""
    return png_of((width, height, 8, 2), b"\0" * 16, *chunks)


def png_of(kind: tuple[int, int, int, int], pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of width, height, bits and colour type, its rows each behind a zero byte."""
    header = struct.pack(">IIBBBBB", *kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    ("kind", "row", "colour", "second"),
    [
        ((2, 1, 2, 0), b"\x60", b"\x00\x01", 170),  # grey values 1 and 2 of 0 to 3
        ((2, 1, 4, 0), b"\x3a", b"\x00\x03", 170),  # 3 and 10 of 0 to 15
        ((2, 1, 16, 2), b"\x04\xd2" * 3 + b"\xaa\xaa" * 3, b"\x04\xd2" * 3, 170),
    ],
    ids=["2 bits", "4 bits", "16 bits, RGB"],
)
def test_the_transparent_colour_of_any_depth_is_white(tmp_path, kind, row, colour, second):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(kind, b"\0" + row, (b"tRNS", colour)))
    assert np.asarray(read_image(path)).tolist() == [[[255] * 3, [second] * 3]]


@pytest.mark.parametrize(
    "size", [(9_000, 9_000), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 1)]
)
def test_files_that_claim_more_pixels_than_anyone_needs_are_refused(tmp_path, size):
    """Above our limit, above the one where Pillow warns, and above the one where it stops."""
    path = tmp_path / "x.png"
    path.write_bytes(png(*size))
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r"(pixels|size|limit)") as caught:
            read(path)
        assert caught.value.file == path
        if size != (2**31 - 1, 1):  # of which Pillow makes no image at all
            assert "at most 80,000,000 pixels" in caught.value.expected
            assert caught.value.remedy.startswith("scale it down, for example")
            assert "magick x.png -resize 4096x4096 small-x.png" in caught.value.remedy


def test_the_largest_image_is_counted(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(8_000, MOST_PIXELS // 8_000))
    assert image_size(path) == (10_000, 8_000)


def test_text_chunks_that_unpack_to_much_are_refused(tmp_path):
    path = tmp_path / "x.png"
    bomb = zlib.compress(b"a" * 2**26)
    path.write_bytes(png(8, 8, (b"zTXt", b"note\0\0" + bomb)))
    assert path.stat().st_size < 2**17
    with pytest.raises(DataError, match="too large"):
        read_image(path)


def test_only_common_formats_are_decoded(tmp_path):
    """Not those of Pillow's decoders that start programs, whatever the name says."""
    assert set(IMAGE_FORMATS) == {"BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"}
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for content in (eps, b"P6 1 1 255 abc", b"%PDF-1.4", b"<svg/>", b"\x00\x00\x01\x00"):
        path = tmp_path / "x.png"
        path.write_bytes(content)
        for read in (read_image, image_size):
            with pytest.raises(DataError, match=r"GIF, .* found (a|an|text) ") as caught:
                read(path)
            assert caught.value.file == path
    Image.new("RGB", (8, 8)).save(tmp_path / "wrong.jpg", format="PNG")
    assert read_image(tmp_path / "wrong.jpg").size == (8, 8)


def test_damaged_files_raise_nothing_but_data_errors(tmp_path):
    whole = save_image(tmp_path / "x.png", 40, 30).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.png"
    refused = 0
    for _ in range(200):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=3)] ^= rng.integers(1, 256, 3, dtype=np.uint8)
        path.write_bytes(damaged.tobytes())
        try:
            read_image(path)
        except DataError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("name", ["none.png", "."])
def test_missing_files_are_refused(tmp_path, name):
    for read in (read_image, image_size):
        with pytest.raises(DataError, match="expected an image file") as caught:
            read(tmp_path / name)
        assert caught.value.file == tmp_path / name


def test_cache_holds_recent_tiles_within_its_bytes(tmp_path, monkeypatch):
    paths = [save_image(tmp_path / f"{seed}.png", 56, 56, seed) for seed in range(3)]
    one = 3 * TILE * TILE * 4
    tiler = Tiler(image_processor(), cache_bytes=2 * one)
    decoded = []
    monkeypatch.setattr(
        "prm.inputs.tiles.read_image",
        lambda path, read=read_image: decoded.append(path) or read(path),
    )
    for place in (0, 1, 0, 2, 0, 1):  # 2 drops 1, the least recently used
        tiler.tiles(paths[place])
    assert decoded == [paths[place] for place in (0, 1, 2, 1)]
    nothing_kept = Tiler(image_processor(), cache_bytes=0)
    first = nothing_kept.tiles(paths[0])
    assert torch.equal(nothing_kept.tiles(paths[0]), first)
    assert len(decoded) == 6


def test_a_file_that_changes_is_refused(tmp_path):
    path = save_image(tmp_path / "x.png", 56, 56)
    tiler = Tiler(image_processor())
    assert tiler.count(path) == 1
    save_image(path, 300, 56)
    with pytest.raises(DataError, match=r"expected 1 tiles, as counted .* found 6"):
        tiler.tiles(path)


def test_other_image_processors_are_refused():
    with pytest.raises(ValueError, match="found object"):
        Tiler(object())
    with pytest.raises(ValueError, match="max_patches >= 1, found 0"):
        Tiler(image_processor(), max_patches=0)
