"""Pictures: limits, sizes from headers, decoding, patches for the vision tower.

Shape suffixes: P patches of one picture, C values of a patch (channels x temporal x patch x patch).
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from muco_ds.data.schema import ImageRef

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Decoders that are allowed to see a data set's files; everything else Pillow knows stays closed."""

MAX_DECODED_PIXELS = 178_956_970
"""Pillow's own decompression-bomb limit; above it a picture is refused before anything is decoded."""

TINY_SIDE, TINY_SIZE = 28, 56
"""A picture with a side under 28 px becomes 56 x 56 (released MuCo code)."""

_ORIENTATION_TAG, _UPRIGHT, _TRANSPOSED = 0x0112, 1, (5, 6, 7, 8)


class ImageError(ValueError):
    """A picture that can't be used; the message says why, without the path."""


@dataclass(frozen=True)
class ImageLimits:
    """How pictures become patches. Pixel counts are after resizing; `short_side` is applied first (paper: 640)."""

    min_pixels: int
    max_pixels: int
    short_side: int | None = None


@dataclass(frozen=True)
class Patches:
    """One picture ready for the vision tower: pixels_PC float32 and its grid (t, h, w) in patches."""

    pixels_PC: np.ndarray
    grid: tuple[int, int, int]


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height as displayed, from the header alone. Raises ImageError."""
    with _open(path, whole=False) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _TRANSPOSED else (width, height)


def decode(ref: ImageRef) -> Image.Image:
    """RGB picture, upright; transparency lies on white. Raises ImageError for anything that does not decode."""
    if isinstance(ref, Image.Image):
        return _to_rgb(ref)
    with _open(ref, whole=True) as image:
        try:
            return _to_rgb(image if _orientation(image) == _UPRIGHT else ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
            raise ImageError(f"does not decode ({type(error).__name__}: {error})") from error


def _open(path: str | Path, *, whole: bool) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Network file systems prefer one read to many small ones; a header needs only the first bytes.
            image = Image.open(io.BytesIO(Path(path).read_bytes()) if whole else path, formats=FORMATS)
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


class ImagePipeline:
    """Resizing and patching with the stock image processor, under the run's limits."""

    def __init__(self, processor: Qwen2VLImageProcessorPil, limits: ImageLimits) -> None:
        self.limits = limits
        self.factor = processor.patch_size * processor.merge_size
        self.merge_size = processor.merge_size
        self.patch_size = processor.patch_size
        self.processor = processor
        self._size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Patch grid (t, h, w) of a picture of this size, without opening it."""
        width, height = self._first_size(width, height)
        try:
            high, wide = smart_resize(height, width, self.factor, self.limits.min_pixels, self.limits.max_pixels)
        except ValueError as error:
            raise ImageError(str(error)) from error
        return 1, high // self.patch_size, wide // self.patch_size

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """How many `<|image_pad|>` tokens a grid becomes after the vision tower's merger."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def patches(self, ref: ImageRef) -> Patches:
        """Decode, resize, normalise, cut into patches. Raises ImageError."""
        image = decode(ref)
        size = self._first_size(*image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return self._cut(image, self._size)

    def placeholder(self) -> Patches:
        """The smallest grey picture: stands in for one that broke at run time, and for packs without pictures."""
        image = Image.new("RGB", (self.factor, self.factor), (127, 127, 127))
        return self._cut(image, {"shortest_edge": self.factor**2, "longest_edge": self.factor**2})

    def _cut(self, image: Image.Image, size: dict[str, int]) -> Patches:
        out = self.processor(images=[image], size=size, return_tensors="np")
        return Patches(np.asarray(out["pixel_values"], np.float32), tuple(out["image_grid_thw"][0].tolist()))

    def _first_size(self, width: int, height: int) -> tuple[int, int]:
        if min(width, height) < TINY_SIDE:
            width = height = TINY_SIZE
        if self.limits.short_side is not None:
            scale = self.limits.short_side / min(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
        return width, height
