"""Pictures: limits, decoding, patches for the vision tower.

Shape suffixes: P patches of one picture, C values of a patch (channels x temporal x patch x patch).
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
"""A picture with a side under 28 px becomes 56 x 56 (released MuCo code)."""


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
