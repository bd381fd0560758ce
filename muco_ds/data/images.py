"""Pictures: limits, decoding, bytes cut into patches for the vision tower.

Shape suffixes: P patches of one picture, Y bytes of a patch (rows x columns x RGB), C colours, V the 256
values of a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from muco_ds.data.decode import ImageError as ImageError
from muco_ds.data.decode import decode as decode
from muco_ds.data.decode import read_size as read_size
from muco_ds.data.schema import ImageRef

TINY_SIDE, TINY_SIZE = 28, 56
"""A picture with a side under 28 px becomes 56 x 56, bicubic (released MuCo code), before anything else."""


@dataclass(frozen=True)
class ImageLimits:
    """How pictures become patches. Pixel counts are after resizing; `short_side` is applied first (paper: 640)."""

    min_pixels: int
    max_pixels: int
    short_side: int | None = None


@dataclass(frozen=True)
class Patches:
    """One picture as the vision tower takes it, but for `ops.patches`: pixels_PY uint8 and its grid (t, h, w)."""

    pixels_PY: np.ndarray
    grid: tuple[int, int, int]


class ImagePipeline:
    """What the stock image processor does to a picture, under the run's limits, up to bytes: an eighth of its floats.

    `palette_CV` (float32) is the rest, what the processor makes of each byte; `ops.patches.patch_values` applies it.
    """

    def __init__(self, processor: Qwen2VLImageProcessorPil, limits: ImageLimits) -> None:
        self.limits = limits
        self.factor = processor.patch_size * processor.merge_size
        self.merge_size = processor.merge_size
        self.patch_size = processor.patch_size
        self.processor = processor
        self.palette_CV = _palette(processor)
        self._resample = Image.Resampling(processor.resample)

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Patch grid (t, h, w) of a picture of this size, without opening it."""
        wide, high = self._size(*self._first_size(width, height))
        return 1, high // self.patch_size, wide // self.patch_size

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """How many `<|image_pad|>` tokens a grid becomes after the vision tower's merger."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def patches(self, ref: ImageRef) -> Patches:
        """Decode, resize, cut into patches. Raises ImageError."""
        image = decode(ref)
        if min(image.size) < TINY_SIDE:
            image = image.resize((TINY_SIZE, TINY_SIZE), Image.Resampling.BICUBIC)
        image = _resized(image, self._first_size(*image.size), Image.Resampling.LANCZOS)
        return self._cut(_resized(image, self._size(*image.size), self._resample))

    def placeholder(self) -> Patches:
        """The smallest grey picture: stands in for one that broke at run time, and for packs without pictures."""
        return self._cut(Image.new("RGB", (self.factor, self.factor), (127, 127, 127)))

    def _cut(self, image: Image.Image) -> Patches:
        patch, merge = self.patch_size, self.merge_size
        high, wide = image.height // patch, image.width // patch
        blocks = np.asarray(image).reshape(high // merge, merge, patch, wide // merge, merge, patch * 3)
        pixels_PY = blocks.transpose(0, 3, 1, 4, 2, 5).reshape(high * wide, patch * patch * 3)
        return Patches(pixels_PY, (1, high, wide))

    def _size(self, width: int, height: int) -> tuple[int, int]:
        try:
            high, wide = smart_resize(height, width, self.factor, self.limits.min_pixels, self.limits.max_pixels)
        except ValueError as error:
            raise ImageError(str(error)) from error
        return wide, high

    def _first_size(self, width: int, height: int) -> tuple[int, int]:
        if min(width, height) < TINY_SIDE:
            width = height = TINY_SIZE
        if self.limits.short_side is not None:
            scale = self.limits.short_side / min(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
        return width, height


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resample)  # Pillow would copy it


def _palette(processor: Qwen2VLImageProcessorPil) -> np.ndarray:
    """What the stock processor makes of each byte, by colour: float32 [3, 256]."""
    values_C1V: np.ndarray = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
    if processor.do_rescale:
        values_C1V = processor.rescale(values_C1V, processor.rescale_factor)
    if processor.do_normalize:
        values_C1V = processor.normalize(values_C1V, processor.image_mean, processor.image_std)
    return values_C1V[:, 0].astype(np.float32)
