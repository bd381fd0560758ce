"""Model FLOPs of both towers: the plan balances ranks on them and MFU is reported against them.

Counted: matrix products of the vision tower, its mergers and the text layers, and attention over the pairs that are
really attended (causal halves it). Not counted: the embedding table, the unused vocabulary head, recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from muco_ds.families import VisionShape, text_shape, vision_shape

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
        """From the configuration of a supported backbone."""
        text = text_shape(config)
        layer = text.hidden * (2 * text.queries + 2 * text.keys) + 3 * text.hidden * text.inner
        per_patch, per_patch_pair = _vision(vision_shape(config))
        return cls(
            per_token=2.0 * layer * text.layers,
            per_token_pair=4.0 * text.queries * text.layers,
            per_patch=per_patch,
            per_patch_pair=per_patch_pair,
            train_vision=train_vision,
        )

    def training(self, tokens, token_pairs, patches, patch_pairs):  # type: ignore[no-untyped-def]
        """FLOPs of forward and backward; numbers or arrays. A frozen vision tower has no backward."""
        vision = self.per_patch * patches + self.per_patch_pair * patch_pairs
        text = self.per_token * tokens + self.per_token_pair * token_pairs
        return 3.0 * text + (3.0 if self.train_vision else 1.0) * vision


def _vision(vision: VisionShape) -> tuple[float, float]:
    """FLOPs per patch, and per pair of patches of one picture."""
    width, merged = vision.width, vision.merge * vision.width
    layer = 4 * width**2 + (3 if vision.gated else 2) * width * vision.inner
    merger = (merged**2 + merged * vision.out) / vision.merge
    per_patch = 2.0 * (vision.pixels * width + vision.depth * layer + vision.features * merger)
    # Attention inside windows of a fixed number of patches is linear in the patches.
    windows = 4.0 * width * vision.window_layers * vision.window_patches
    return per_patch + windows, 4.0 * width * (vision.depth - vision.window_layers)


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None where the table has no sourced number (a CPU, for one)."""
    if device.type != "cuda":
        return None
    # Whole words: an A10G is not an A10, an L40 not an L4.
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    matches = [key for key in PEAK_BF16_FLOPS if all(word in words for word in key.split())]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
