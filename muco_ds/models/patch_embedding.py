"""The vision tower's first layer as the matrix product that it is.

The stock towers write it as a three-dimensional convolution whose kernel is as large as its input, one patch. Libraries
for convolutions do not see that: on a CPU it took three times as long, and cuDNN has no fast kernel for it in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Conv3d):
    """A convolution over inputs of its kernel's own size. The parameters, and their names, are the stock layer's."""

    def forward(self, patches_PCFHW: torch.Tensor) -> torch.Tensor:
        """[P, channels, frames, height, width] -> [P, width of the tower, 1, 1, 1]."""
        assert patches_PCFHW.shape[1:] == self.weight.shape[1:]
        return F.linear(patches_PCFHW.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def use_matrix_product(visual: Any) -> None:
    """Let a stock vision tower embed its patches by a matrix product."""
    projection = visual.patch_embed.proj
    assert type(projection) is nn.Conv3d and projection.stride == projection.kernel_size
    projection.__class__ = PatchProjection
