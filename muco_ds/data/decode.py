"""Pictures from files: sizes from headers, decoding. Needs nothing but Pillow, so that small programs start at once."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from muco_ds.data.picture_parts import too_many_parts

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Decoders that are allowed to see a data set's files; everything else Pillow knows stays closed."""

MAX_DECODED_PIXELS = 178_956_970
"""Pillow's own decompression-bomb limit; above it a picture is refused before anything is decoded."""

MAX_FILE_BYTES = 2**27
"""A larger file is no picture to train on, whatever it says it is; nothing of it is read."""

MAX_SLOW_BYTES = 2**23
"""The same where Pillow decodes in Python, a few MB a second (_SLOW_CODECS)."""

MAX_SCANS = 100
"""Of a JPEG. Progressive ones have about ten. Each goes over the whole picture, and takes a few bytes to ask for."""

_SLOW_CODECS = ("ppm", "ppm_plain", "bmp_rle")

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # of a TIFF

_STRIP_PIXELS = 2**22
"""Transparent pictures are put on white so many pixels at a time: all at once takes four copies of a large one."""

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
    with _opened(path, whole=False) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _TRANSPOSED else (width, height)


def decode(ref: str | StoredPicture | Image.Image) -> Image.Image:
    """RGB picture, upright; transparency lies on white. Raises ImageError for anything that does not decode."""
    if isinstance(ref, Image.Image):
        return _to_rgb(loaded(ref))
    with _opened(ref, whole=True) as image:
        try:
            return _to_rgb(image if _orientation(image) == _UPRIGHT else ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
            raise _undecodable(error) from error


def loaded(image: Image.Image) -> Image.Image:
    """The same object, its pixels read if its file was but opened: threads must not do that to one object at a time.

    Raises ImageError.
    """
    try:
        image.load()
    except Exception as error:
        raise _undecodable(error) from error
    return image


def _undecodable(error: Exception) -> ImageError:
    said = " ".join(str(error).split())[:200]
    return ImageError(f"does not decode ({type(error).__name__}: {said})")


@contextmanager
def _opened(path: str | Path | StoredPicture, *, whole: bool) -> Iterator[Image.Image]:
    try:
        source = path.open() if isinstance(path, StoredPicture) else _regular_file(path)
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # a name with a NUL, or one that is no UTF-8
        raise _unreadable(error) from error
    with closing(source) as file:
        try:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size > MAX_FILE_BYTES:
                raise ImageError(f"{size} bytes are over the limit of {MAX_FILE_BYTES}")
            # Network file systems prefer one read to many small ones; a header needs only the first bytes.
            content = file.read(size) if whole else None
            stream = file if content is None else io.BytesIO(content)
            if (problem := too_many_parts(stream, size, whole=whole)) is not None:
                raise ImageError(problem)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a hostile file can ask for thousands of lines
                image = Image.open(stream, formats=FORMATS)
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"its pixels are far over the limit of {MAX_DECODED_PIXELS}") from error
        except Exception as error:
            raise _unreadable(error) from error
        _check_shape(image, size)
        if content is not None and image.format in ("JPEG", "MPO"):
            scans = content.count(b"\xff\xda")  # what is entropy-coded holds no such bytes
            if scans > MAX_SCANS:
                raise ImageError(f"{scans} scans are over the limit of {MAX_SCANS}")
        yield image


def _unreadable(error: Exception) -> ImageError:
    return ImageError(f"is not a picture that can be read ({type(error).__name__})")


def _regular_file(path: str | Path) -> BinaryIO:
    """Opened without waiting: a pipe has no end, and opening one may take for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError("is not a picture that can be read (a folder, a pipe or a device)")
    return open(descriptor, "rb")


def _check_shape(image: Image.Image, size: int) -> None:
    """What Pillow would start on though it costs more than a picture may; `size` is of the file, in bytes."""
    width, height = image.size
    if width * height > MAX_DECODED_PIXELS:
        raise ImageError(f"{width} x {height} pixels are over the limit of {MAX_DECODED_PIXELS}")
    if max(width, height) >= 200 * min(width, height):
        raise ImageError(f"{width} x {height}: sides differ by a factor of 200 or more")
    tags: Any = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    if all(isinstance(side, int) for side in tile) and tile[0] * tile[1] > MAX_DECODED_PIXELS:
        raise ImageError(f"tiles of {tile[0]} x {tile[1]} pixels are over the limit of {MAX_DECODED_PIXELS}")
    codec = next((part[0] for part in getattr(image, "tile", ())), "")
    if codec in _SLOW_CODECS and size > MAX_SLOW_BYTES:
        raise ImageError(f"{size} bytes of {image.format} as text or runs are over the limit of {MAX_SLOW_BYTES}")


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
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image.load()
    width, height = image.size
    rows, out = max(1, _STRIP_PIXELS // width), Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        out.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return out
