"""Pictures from files: sizes from headers, decoding. Needs nothing but Pillow, so that small programs start at once."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Decoders that are allowed to see a data set's files; everything else Pillow knows stays closed."""

MAX_DECODED_PIXELS = 178_956_970
"""Pillow's own decompression-bomb limit; above it a picture is refused before anything is decoded."""

_ORIENTATION_TAG, _UPRIGHT, _TRANSPOSED = 0x0112, 1, (5, 6, 7, 8)


_KEPT_BLOCKS = 4
"""As many as one picture needs at once: decoded, resized, resized again, and one between the two directions."""


@dataclass(frozen=True, eq=False)
class StoredPicture:
    """A picture's file that lies inside another file, read when it is needed. `name` is for messages."""

    name: str
    open: Callable[[], BinaryIO]

    def __str__(self) -> str:
        return self.name


class ImageError(ValueError):
    """A picture that can't be used; the message says why, without the path."""


def keep_memory() -> None:
    """Let Pillow keep a picture's memory for the next one, in all of this process.

    Fresh pages from the system are a sixth of the time of a picture of 640 x 853. At most four blocks of 16 MiB stay.
    """
    Image.core.set_blocks_max(_KEPT_BLOCKS)


def read_size(path: str | Path | StoredPicture) -> tuple[int, int]:
    """Width and height as displayed, from the header alone. Raises ImageError."""
    with _open(path, whole=False) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _TRANSPOSED else (width, height)


def decode(ref: str | StoredPicture | Image.Image) -> Image.Image:
    """RGB picture, upright; transparency lies on white. Raises ImageError for anything that does not decode."""
    if isinstance(ref, Image.Image):
        return _to_rgb(loaded(ref))
    with _open(ref, whole=True) as image:
        try:
            return _to_rgb(image if _orientation(image) == _UPRIGHT else ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
            raise ImageError(f"does not decode ({type(error).__name__}: {error})") from error


def loaded(image: Image.Image) -> Image.Image:
    """The same object, its pixels read if its file was but opened: threads must not do that to one object at a time.

    Raises ImageError.
    """
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"does not decode ({type(error).__name__}: {error})") from error
    return image


def _open(path: str | Path | StoredPicture, *, whole: bool) -> Image.Image:
    try:
        if isinstance(path, StoredPicture):
            file: str | Path | BinaryIO = path.open()
        else:
            # Network file systems prefer one read to many small ones; a header needs only the first bytes.
            file = io.BytesIO(Path(path).read_bytes()) if whole else path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except Exception as error:
        raise ImageError(f"is not a picture that can be read ({type(error).__name__})") from error
    width, height = image.size
    if width * height > MAX_DECODED_PIXELS:
        raise ImageError(f"{width} x {height} pixels are over the limit of {MAX_DECODED_PIXELS}")
    if max(width, height) >= 200 * min(width, height):
        raise ImageError(f"{width} x {height}: sides differ by a factor of 200 or more")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that is still to be applied, from the header alone, so that sizes and pixels agree."""
    if image.format == "TIFF":  # Pillow applies it itself, already to the size in the header
        return _UPRIGHT
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode all of it to look behind the pixels
        return _UPRIGHT
    try:
        return image.getexif().get(_ORIENTATION_TAG, _UPRIGHT)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return _UPRIGHT


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()  # Pillow decodes lazily, and the caller closes the file
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip at 255, which is white, instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
