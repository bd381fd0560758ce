"""The last text layer, for the rows that are read alone.

Nothing but the read rows of its output is used. Keys and values are needed of every row; queries, the output
projection and the MLP, most of the layer's work, of the read rows only. Their arithmetic is that of the stock layer.

Shape suffixes: T rows of the pack, Q rows that are read, D hidden size, H query heads, G key/value heads, d head
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from muco_ds.data.segments import SegmentPlan
from muco_ds.models.pointwise import rotated


class LastLayer(nn.Module):
    """Takes the place of a stock decoder layer and holds its parts under their own names, so that checkpoints are those
    of the stock model. Never recomputed: it keeps little.

    Args:
        layer: of any supported family.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(
        self,
        hidden_states: torch.Tensor,  # [1, T, D]
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # each [1, T, d]
        read_rows: torch.Tensor,
        read_segments: SegmentPlan,
        **_: Any,
    ) -> torch.Tensor:
        """The read rows behind the layer, [1, Q, D]."""
        attention = self.self_attn
        hidden_TD = hidden_states[0]
        normed_TD = self.input_layernorm(hidden_TD)
        tables_Td = [table_1Td[0] for table_1Td in position_embeddings]
        tables_Qd = [table_Td.index_select(0, read_rows) for table_Td in tables_Td]
        q_QHd = rotated(self._heads("q", normed_TD.index_select(0, read_rows)), *tables_Qd)
        k_TGd, v_TGd = rotated(self._heads("k", normed_TD), *tables_Td), self._heads("v", normed_TD)
        attended_1QHd, _weights = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation](
            attention,
            *(x.transpose(0, 1)[None] for x in (q_QHd, k_TGd, v_TGd)),
            None,
            scaling=attention.scaling,
            segments=read_segments,
        )
        out_QD = hidden_TD.index_select(0, read_rows) + attention.o_proj(attended_1QHd[0].flatten(1))
        return (out_QD + self.mlp(self.post_attention_layernorm(out_QD)))[None]

    def _heads(self, name: str, x_ND: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values by head, through the norm of their own that some families have."""
        attention: Any = self.self_attn
        x_NHd = getattr(attention, f"{name}_proj")(x_ND).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return x_NHd if norm is None else norm(x_NHd)
