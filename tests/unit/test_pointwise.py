"""Fused functions equal the stock models' in their plain form; tests/gpu compares the compiled form with that."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import QuickGELUActivation
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from muco_ds.models.pointwise import QuickGELU, rotated


def tables(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_stock_towers(dtype: torch.dtype) -> None:
    x_P2Hd = torch.randn(7, 2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = tables(7, 8)
    expected = torch.stack(apply_rotary_pos_emb_vision(x_P2Hd[:, 0], x_P2Hd[:, 1], cos, sin), 1)
    found = rotated(x_P2Hd, cos, sin)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_quick_gelu_is_the_stock_one() -> None:
    x = torch.linspace(-8, 8, 101)
    torch.testing.assert_close(QuickGELU()(x), QuickGELUActivation()(x), rtol=0, atol=0)
