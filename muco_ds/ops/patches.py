"""Pictures arrive as bytes, cut into patches; what the vision tower reads is made where it runs.

Shape legend: P patches of all pictures, S pixels of a patch, Y bytes of a patch (S pixels x C colours), C colours, V
the 256 values of a byte, F frames.
"""

from __future__ import annotations

import torch


def patch_values(pixels_PY: torch.Tensor, palette_CV: torch.Tensor, frames: int, dtype: torch.dtype) -> torch.Tensor:
    """Input of the vision tower in the stock processor's layout, [P, C * F * S] of ``dtype``.

    Rescaling and normalising are a look-up: a byte has 256 values and each colour one mean, so the result is the stock
    processor's to the last bit, on every device. Nothing is read back from the device.

    Args:
        pixels_PY: uint8, a patch's rows of pixels after each other, a pixel's colours together.
        palette_CV: float32, what each byte stands for, by colour.
        frames: times that a still picture is repeated along time.
    """
    pixels_PSC = pixels_PY.unflatten(1, (-1, len(palette_CV)))
    patches, pixels, colours = pixels_PSC.shape
    table_CV = palette_CV.to(dtype)
    values_PCFS = table_CV.new_empty(patches, colours, frames, pixels)
    for colour in range(colours):  # one at a time: indices are four times the bytes
        values = table_CV[colour].index_select(0, pixels_PSC[..., colour].int().flatten())
        values_PCFS[:, colour] = values.view(patches, 1, pixels)
    return values_PCFS.flatten(1)
