"""What is exchanged in a stock vision tower, of any family, for the same in less time.

- Attention: the stock layer calls flash-attn for all pictures, or, without that package, a kernel for each of them and
  asks the device for their lengths. Ours is one call, and its rotation one kernel.
- The first layer: a convolution whose kernel is as large as its input, one patch, is a matrix product; libraries for
  convolutions do not see that. On a CPU it took three times as long.
- Qwen2-VL's activation, three operations in the stock class.

Parameters keep their names: checkpoints are those of the stock model.

Shape suffixes: P patches of all pictures, D width of the tower, H heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import QuickGELUActivation

from muco_ds.data.segments import SegmentPlan
from muco_ds.models.attention import segment_attention
from muco_ds.models.pointwise import QuickGELU, rotated


class PictureAttention(nn.Module):
    """Takes the place of a stock attention layer and holds its parts under their own names.

    Args:
        attention: the stock layer.
        windowed: confined to windows of a picture (most layers of Qwen2.5-VL).
    """

    def __init__(self, attention: Any, *, windowed: bool) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.heads, self.scaling, self.windowed = attention.num_heads, attention.scaling, windowed

    def forward(
        self,
        hidden_PD: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # each [P, d], float32
        pictures: SegmentPlan,
        windows: SegmentPlan | None = None,
        **_: Any,
    ) -> torch.Tensor:
        plan = windows if self.windowed else pictures
        assert plan is not None
        qkv_P3Hd = self.qkv(hidden_PD).unflatten(-1, (3, self.heads, -1))
        q_PHd, k_PHd = rotated(qkv_P3Hd[:, :2], *position_embeddings).unbind(1)
        out_PHd = segment_attention(q_PHd, k_PHd, qkv_P3Hd[:, 2], plan, self.scaling, "auto")
        return self.proj(out_PHd.flatten(1))


class PatchProjection(nn.Conv3d):
    """A convolution over inputs of its kernel's own size."""

    def forward(self, patches_PCFHW: torch.Tensor) -> torch.Tensor:
        """[P, channels, frames, height, width] -> [P, D, 1, 1, 1]."""
        assert patches_PCFHW.shape[1:] == self.weight.shape[1:]
        return F.linear(patches_PCFHW.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def quicken(visual: Any) -> None:
    """Make these exchanges in a stock vision tower; its forward then takes `VisionInputs`' segments too."""
    projection = visual.patch_embed.proj
    assert type(projection) is nn.Conv3d and projection.stride == projection.kernel_size
    projection.__class__ = PatchProjection
    whole = getattr(visual, "fullatt_block_indexes", None)
    for i, block in enumerate(visual.blocks):
        block.attn = PictureAttention(block.attn, windowed=whole is not None and i not in whole)
        if isinstance(getattr(block.mlp, "act", None), QuickGELUActivation):
            block.mlp.act = QuickGELU()
