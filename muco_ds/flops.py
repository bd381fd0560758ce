"""Model FLOPs of both towers: the plan balances ranks on them and MFU is reported against them.

Counted: matrix products of the vision tower, its merger and the text layers, and attention over the pairs that are
really attended (causal halves it). Not counted: the embedding table, the unused vocabulary head, recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

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
    """Forward FLOPs: linear and attention coefficients of the two towers."""

    per_token: float
    per_token_pair: float
    per_patch: float
    per_patch_pair: float
    train_vision: bool

    @classmethod
    def from_config(cls, config: PretrainedConfig, *, train_vision: bool) -> FlopsModel:
        """From a Qwen2-VL or Qwen2.5-VL configuration."""
        text, vision = config.text_config, config.vision_config
        hidden, heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        projections = hidden * head_dim * (2 * heads + 2 * text.num_key_value_heads)
        layer = projections + 3 * hidden * text.intermediate_size
        per_patch, per_patch_pair = _vision(vision, hidden)
        return cls(
            per_token=2.0 * layer * text.num_hidden_layers,
            per_token_pair=4.0 * heads * head_dim * text.num_hidden_layers,
            per_patch=per_patch,
            per_patch_pair=per_patch_pair,
            train_vision=train_vision,
        )

    def training(self, tokens, token_pairs, patches, patch_pairs):  # type: ignore[no-untyped-def]
        """FLOPs of forward and backward; numbers or arrays. A frozen vision tower has no backward."""
        vision = self.per_patch * patches + self.per_patch_pair * patch_pairs
        text = self.per_token * tokens + self.per_token_pair * token_pairs
        return 3.0 * text + (3.0 if self.train_vision else 1.0) * vision


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


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None where the table has no sourced number (a CPU, for one)."""
    if device.type != "cuda":
        return None
    # Whole words: an A10G is not an A10, an L40 not an L4.
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    matches = [key for key in PEAK_BF16_FLOPS if all(word in words for word in key.split())]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
