"""Functions of single values, fused on CUDA: written out, each operation would read and write the whole tensor again.

In the vision tower that is more bytes than its attention and linear layers move. torch.compile sees no parameter here,
so ZeRO-3, whose hooks it can't follow, does not matter to it.

Shape suffixes: N rows, d head dimension; dots: heads, or whatever else lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half

Pointwise = Callable[..., torch.Tensor]


def fused(function: Pointwise) -> Pointwise:
    """One kernel forward and one backward on CUDA, compiled at the first call for tensors of any size."""
    compiled = cache(lambda: torch.compile(function, dynamic=True))

    @wraps(function)
    def chosen(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return (compiled() if x.is_cuda else function)(x, *rest)

    return chosen


def rotated(x_Nd: torch.Tensor, cos_Nd: torch.Tensor, sin_Nd: torch.Tensor) -> torch.Tensor:
    """Queries or keys [N, ..., d] by the rotary tables [N, d] of their positions, in the dtype of x.

    Computed in the wider of the two dtypes, as the stock models do.
    """
    shape = (len(cos_Nd), *[1] * (x_Nd.ndim - 2), -1)
    return _rotated(x_Nd, cos_Nd.view(shape), sin_Nd.view(shape))


@fused
def _rotated(x_Nd: torch.Tensor, cos_Nd: torch.Tensor, sin_Nd: torch.Tensor) -> torch.Tensor:
    wide_Nd = x_Nd.to(torch.promote_types(x_Nd.dtype, cos_Nd.dtype))
    return torch.addcmul(wide_Nd * cos_Nd, rotate_half(wide_Nd), sin_Nd).to(x_Nd.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), Qwen2-VL's activation in the vision tower."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _quick_gelu(x)


@fused
def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)
