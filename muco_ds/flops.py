"""Model FLOPs of both towers: the plan balances ranks on them and MFU is reported against them.

Counted: matrix products of the vision tower, its merger and the text layers, and attention over the pairs that are
really attended (causal halves it). Not counted: the embedding table, the unused vocabulary head, recomputation, DoRA's
lengths of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from muco_ds.config_lora import LoraOptions

PEAK_BF16_FLOPS = {
    # Dense bf16 with fp32 accumulation, from NVIDIA's data sheets of each product.
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}


@dataclass(frozen=True)
class FlopsModel:
    """Forward FLOPs: linear and attention coefficients of the two towers, and those of their adapters.

    `adapter`: beside it, no linear layer's own weight is trained.
    """

    per_token: float
    per_token_pair: float
    per_patch: float
    per_patch_pair: float
    train_vision: bool
    adapter: bool = False
    adapter_per_token: float = 0.0
    adapter_per_patch: float = 0.0

    @classmethod
    def from_config(
        cls, config: PretrainedConfig, *, train_vision: bool, lora: LoraOptions | None = None
    ) -> FlopsModel:
        """From a Qwen2-VL or Qwen2.5-VL configuration."""
        rank = 0 if lora is None else lora.rank
        text, vision = config.text_config, config.vision_config
        hidden, heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        projections = hidden * head_dim * (2 * heads + 2 * text.num_key_value_heads)
        layer = projections + 3 * hidden * text.intermediate_size
        adapted = 2 * (hidden + heads * head_dim) + 2 * (hidden + text.num_key_value_heads * head_dim)
        adapted += 3 * (hidden + text.intermediate_size)
        per_patch, per_patch_pair = _vision(vision, hidden)
        return cls(
            per_token=2.0 * layer * text.num_hidden_layers,
            per_token_pair=4.0 * heads * head_dim * text.num_hidden_layers,
            per_patch=per_patch,
            per_patch_pair=per_patch_pair,
            train_vision=train_vision,
            adapter=rank > 0,
            adapter_per_token=2.0 * rank * adapted * text.num_hidden_layers,
            adapter_per_patch=2.0 * rank * _vision_adapted(vision, hidden) if train_vision else 0.0,
        )

    def training(self, tokens, token_pairs, patches, patch_pairs):  # type: ignore[no-untyped-def]
        """FLOPs of forward and backward; numbers or arrays.

        A frozen vision tower has no backward. Beside an adapter a linear layer has no gradient of its weight.
        """
        linear = 2.0 if self.adapter else 3.0
        text = linear * self.per_token * tokens + 3.0 * self.per_token_pair * token_pairs
        text = text + 3.0 * self.adapter_per_token * tokens
        if not self.train_vision:
            return text + self.per_patch * patches + self.per_patch_pair * patch_pairs
        vision = linear * self.per_patch * patches + 3.0 * self.per_patch_pair * patch_pairs
        return text + vision + 3.0 * self.adapter_per_patch * patches


def _vision(vision: PretrainedConfig, hidden: int) -> tuple[float, float]:
    merge = vision.spatial_merge_size**2
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    windowed = getattr(vision, "fullatt_block_indexes", None)
    width = vision.embed_dim if windowed is None else vision.hidden_size
    mlp = 2 * width * int(width * vision.mlp_ratio) if windowed is None else 3 * width * vision.intermediate_size
    merger = ((merge * width) ** 2 + merge * width * hidden) / merge
    per_patch = 2.0 * (patch_values * width + vision.depth * (4 * width**2 + mlp) + merger)
    per_pair = 4.0 * width
    if windowed is None:
        return per_patch, per_pair * vision.depth
    # Qwen2.5-VL: most layers attend inside windows of a fixed number of patches, which is linear in the patches.
    window_patches = (vision.window_size // vision.patch_size) ** 2
    window_layers = vision.depth - len(windowed)
    return per_patch + per_pair * window_layers * window_patches, per_pair * len(windowed)


def _vision_adapted(vision: PretrainedConfig, hidden: int) -> float:
    """Inputs and outputs of the linear layers of the tower and its merger, by patch."""
    merged = vision.spatial_merge_size**2
    windowed = getattr(vision, "fullatt_block_indexes", None)
    width = vision.embed_dim if windowed is None else vision.hidden_size
    mlp = 2 * (width + int(width * vision.mlp_ratio)) if windowed is None else 3 * (width + vision.intermediate_size)
    return vision.depth * (6 * width + mlp) + (3 * merged * width + hidden) / merged


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None where the table has no sourced number (a CPU, for one)."""
    if device.type != "cuda":
        return None
    # Whole words: an A10G is not an A10, an L40 not an L4.
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    matches = [key for key in PEAK_BF16_FLOPS if all(word in words for word in key.split())]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
