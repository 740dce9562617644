"""Image files to tiles: decoding, tiling by the image processor of transformers, and a cache."""

from __future__ import annotations

import re
import shlex
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from prm.data_urls import is_embedded, opened, picture_key
from prm.inputs.tokens import ImageTokens
from prm.schema import DataError
from prm.signatures import LOOK, beginning, content_of

CACHE_BYTES = 256 * 2**20
"""The default limit of a cache of image inputs in bytes."""
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The accepted image formats, independent of file names. Other decoders of Pillow are not tried:
some start programs (EPS), and others are rarely used and so rarely tested on untrusted files."""
MOST_PIXELS = 80_000_000
"""The largest number of pixels by an image's header: a few bytes can claim gigabytes of pixels."""
_MOST_CHUNKS = 100_000
_ORIENTATION = 274  # EXIF tag, whose values 5 to 8 exchange width and height.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    # Pillow computes with the values of a damaged header, whatever their type.
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
    zlib.error,
)
_REPLACE = "replace or re-download the file"
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # from premultiplied alpha
_8_BITS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", *_WITH_ALPHA)
_16_BITS = ("I;16", "I;16L", "I;16B")


def read_image(path: Path) -> Image.Image:
    """Decode ``path`` completely, upright (EXIF orientation applied), as RGB on white.

    A transparent image is laid on white, as viewers show it. Grey values of 16 bits become
    round(value / 257), so that 0 stays black and 65,535 white.

    Raises:
        DataError: The file is missing, truncated, not one of ``IMAGE_FORMATS``, has more than
            ``MOST_PIXELS``, or values without a known range (32-bit integers, floats).
    """
    with _opened(path) as image:
        _scale_transparent_colour(image)
        upright = ImageOps.exif_transpose(image)
        if _has_16_bits(image):
            return _from_16_bits(upright)
        if upright.mode in _WITH_ALPHA or "transparency" in upright.info:
            return _on_white(upright)
        return upright.convert("RGB")


def _scale_transparent_colour(image: Image.Image) -> None:
    """Give the transparent colour of a PNG the scale of its pixels, which Pillow decodes to 8 bits.

    Pillow leaves that colour as the file has it, in 2, 4 or 16 bits.
    """
    colour = image.info.get("transparency")
    tiles = image.tile if isinstance(image, PngImageFile) else []
    raw_mode = tiles[0][3] if tiles else None
    if isinstance(colour, int) and raw_mode in _LEVEL:
        image.info["transparency"] = colour * _LEVEL[raw_mode]
    elif isinstance(colour, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


_LEVEL = {"L;2": 85, "L;4": 17}  # the distance of two grey values, by Pillow's raw mode


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    straight = image.convert(_STRAIGHT.get(image.mode, image.mode)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", straight.size, "white"), straight).convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    # Older versions of Pillow open a PNG of 16 bits with mode "I".
    return image.mode in _16_BITS or (image.mode == "I" and image.format == "PNG")


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of the upright image from the file's header.

    Raises:
        DataError: The file is missing, not one of ``IMAGE_FORMATS``, has more than
            ``MOST_PIXELS``, or values without a known range.
    """
    with _opened(path) as image:
        width, height = image.size
        # Pillow decodes a whole PNG file to read the chunks after its pixels.
        header_only = image.format == "PNG" and _nothing_behind_pixels(path)
        exif = Image.Image.getexif(image) if header_only else image.getexif()
        turned = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def pixel_count(path: Path) -> int:
    """Return the number of pixels that the header of an image claims; nothing is decoded.

    Raises:
        DataError: As ``image_size``.
    """
    with _opened(path) as image:
        return int(image.width * image.height)


def _nothing_behind_pixels(path: Path) -> bool:
    """Return whether only the end chunk follows the pixels of a PNG file, by its chunk headers."""
    behind = False
    with opened(path) as file:
        file.seek(8)
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            kind = head[4:]
            if len(head) < 8 or kind == b"IEND":
                return True
            if behind and kind != b"IDAT":
                return False
            behind = behind or kind == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image by its header; every failure is raised as a ``DataError``."""
    _check_exists(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = opened(path) if is_embedded(path) else path
            image = Image.open(source, formats=IMAGE_FORMATS)
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise _too_large(path, f"{image.width} x {image.height}")
            if image.mode not in _8_BITS and not _has_16_bits(image):
                raise DataError(
                    expected="an image of 8 bits per channel, or grey values of 16 bits",
                    found=f"Pillow mode {image.mode!r}, whose range of values is not known",
                    file=path,
                    remedy="convert it to 8-bit RGB or grey values first",
                )
            yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+ pixels", str(error))
        raise _too_large(path, pixels[0] if pixels else "more") from error
    except UnidentifiedImageError as error:
        raise _no_picture(path) from error
    except _DECODE_ERRORS as error:
        raise _unreadable(path, error) from error


@runtime_checkable
class ImageInputs(Protocol):
    """The preparation of images for one kind of model."""

    def count(self, path: Path) -> int:
        """Return the number of tiles, the unit of ``ImageTokens.per_tile`` and ``num_patches``."""

    def expanded(self, path: Path, tokens: ImageTokens) -> str:
        """Return the text of the image's tokens."""

    def inputs(self, path: Path) -> Mapping[str, Tensor]:
        """Return the model inputs, which a batch concatenates over images along the first axis."""


class Tiler:
    """Cuts images into tiles with a PIL image processor of the GotOcr2/InternVL kind.

    Among the grids of 1 to ``max_patches`` square tiles, the one whose aspect ratio is nearest to
    the image's is chosen; at equal distance the larger one, if the image has more than half its
    pixels. The image is resized to the grid (bicubic) and cut row by row. If there is more than one
    tile, a thumbnail is appended. This is the rule of InternVL's ``dynamic_preprocess``.

    A least-recently-used cache holds tiles up to ``cache_bytes`` (in float32, an image of 7 tiles
    of 448 x 448 pixels takes 17 MB). Every worker of a data loader has a cache of its own. A file
    that changes during the tiler's lifetime is not read again.

    Args:
        image_processor: An image processor with ``get_number_of_image_patches`` and
            ``crop_to_patches``.
        max_patches: The largest number of tiles per image, without the thumbnail. None means the
            processor's own number.
        cache_bytes: The limit of the tile cache in bytes. 0 disables the cache.
    """

    def __init__(
        self,
        image_processor: Any,
        *,
        max_patches: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if not hasattr(image_processor, "crop_to_patches"):
            raise ValueError(
                "expected an image processor that tiles (crop_to_patches), such as the one of "
                f"InternVL checkpoints; found {type(image_processor).__name__}"
            )
        check_max_patches(max_patches)
        self.image_processor = image_processor
        most = image_processor.max_patches if max_patches is None else max_patches
        # Checkpoints store crop_to_patches=False, which InternVLProcessor overrides.
        self._options = {
            "crop_to_patches": True,
            "min_patches": min(image_processor.min_patches, most),
            "max_patches": most,
        }
        self._cache = RecentImages(cache_bytes)
        self._counts: dict[str, int] = {}

    def count(self, path: Path) -> int:
        """Return the number of tiles of ``path``, thumbnail included, from the file's header."""
        key = picture_key(path)
        if key not in self._counts:
            self._counts[key] = self.image_processor.get_number_of_image_patches(
                *image_size(path), self._options
            )
        return self._counts[key]

    def expanded(self, path: Path, tokens: ImageTokens) -> str:
        """Return the text of the image's tokens."""
        return tokens.expanded(self.count(path))

    def inputs(self, path: Path) -> Mapping[str, Tensor]:
        """Return ``pixel_values`` [tiles, channels, height, width], which are read-only.

        Raises:
            DataError: The file cannot be decoded, or has changed since it was counted.
        """
        return self._cache.get(path, self._read)

    def tiles(self, path: Path) -> Float[Tensor, "tiles channels height width"]:
        """Return the pixel values [tiles, channels, height, width] of ``path``; see ``inputs``."""
        return self.inputs(path)["pixel_values"]

    def _read(self, path: Path) -> Mapping[str, Tensor]:
        processed = self.image_processor([read_image(path)], return_tensors="pt", **self._options)
        tiles = torch.as_tensor(processed["pixel_values"])
        check_count(path, self.count(path), len(tiles))
        return {"pixel_values": tiles}


class RecentImages:
    """A least-recently-used cache of model inputs of images.

    Args:
        limit: The limit in bytes. 0 disables the cache.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._images: OrderedDict[Path, Mapping[str, Tensor]] = OrderedDict()

    def get(self, path: Path, read: Callable[[Path], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the cached result of ``read(path)``, and call it if there is none."""
        if path in self._images:
            self._images.move_to_end(path)
            return self._images[path]
        inputs = read(path)
        if _bytes(inputs) <= self._limit:
            self._images[path] = inputs
            self._held += _bytes(inputs)
            while self._held > self._limit:
                self._held -= _bytes(self._images.popitem(last=False)[1])
        return inputs


def check_max_patches(max_patches: int | None) -> None:
    """Raise ValueError if ``max_patches`` is less than 1."""
    if max_patches is not None and max_patches < 1:
        raise ValueError(f"expected max_patches >= 1, found {max_patches}")


def check_count(path: Path, expected: int, found: int) -> None:
    """Raise DataError if an image no longer has the number of tiles that was counted."""
    if found != expected:
        raise DataError(
            expected=f"{expected} tiles, as counted when the example was encoded",
            found=f"{found}",
            file=path,
            remedy="do not change image files during a run",
        )


def _bytes(inputs: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in inputs.values())


def _check_exists(path: Path) -> None:
    if not is_embedded(path) and not path.is_file():
        raise DataError(
            expected="an image file",
            found="a folder" if path.is_dir() else "no such file",
            file=path,
            remedy="check the path and image_root",
        )


def _too_large(path: Path, found: str) -> DataError:
    return DataError(
        expected=f"an image of at most {MOST_PIXELS:,} pixels (a model sees far fewer)",
        found=found,
        file=path,
        remedy="scale it down, for example by ImageMagick: "
        f"magick {shlex.quote(path.name)} -resize 4096x4096 {shlex.quote(f'small-{path.name}')}",
    )


def _no_picture(path: Path) -> DataError:
    """Return the error of a file that is no picture of ``IMAGE_FORMATS``, named by its start."""
    with opened(path) as file:
        start = file.read(LOOK)
    content, text = content_of(start), beginning(start)
    if content is None:
        found = "content of another kind" if text is None else f"text that begins with {text}"
        remedy = f"{_REPLACE}, or convert it to PNG"
    elif content.name.removeprefix("a ").removesuffix(" image") in IMAGE_FORMATS:
        found, remedy = f"a damaged file that starts as {content.name}", _REPLACE
    else:
        found, remedy = content.name, content.remedy or "convert it to PNG"
    return DataError(
        expected=f"an image file ({', '.join(IMAGE_FORMATS)})",
        found=found,
        file=path,
        remedy=remedy,
    )


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        expected="a complete, readable image",
        found=reason,
        file=path,
        remedy=_REPLACE,
    )
