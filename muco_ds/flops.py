"""Model FLOPs of both towers: the plan balances ranks on them and MFU is reported against them.

Counted: matrix products of the vision tower, its mergers and the text layers, and attention over the pairs that are
really attended (causal halves it), and the vocabulary head on the rows that it predicts from. Not counted: the
embedding table, recomputation, DoRA's lengths of rows, what the last text layer is spared (`models.last_layer`), and
its attention, which few rows ask for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from muco_ds.config_lora import LoraOptions
from muco_ds.families import VisionShape, reads_last_layer, text_shape, vision_shape

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

    `adapter`: beside it, no linear layer's own weight is trained. `per_unread`: what the last text layer is spared for
    a row that is not read.
    """

    per_token: float
    per_token_pair: float
    per_patch: float
    per_patch_pair: float
    train_vision: bool
    adapter: bool = False
    adapter_per_token: float = 0.0
    adapter_per_patch: float = 0.0
    per_predicted: float = 0.0
    train_head: bool = False
    per_unread: float = 0.0
    adapter_per_unread: float = 0.0

    @classmethod
    def from_config(
        cls, config: PretrainedConfig, *, train_vision: bool, lora: LoraOptions | None = None, train_head: bool = False
    ) -> FlopsModel:
        """From the configuration of a supported backbone."""
        rank, targets = (0, "text") if lora is None else (lora.rank, lora.targets)
        text, vision = text_shape(config), vision_shape(config)
        per_patch, per_patch_pair = _vision(vision)
        reads = reads_last_layer(config)
        return cls(
            per_token=2.0 * _weights(text.linears) * text.layers,
            per_token_pair=4.0 * text.queries * (text.layers - reads),
            per_patch=per_patch,
            per_patch_pair=per_patch_pair,
            train_vision=train_vision,
            adapter=rank > 0,
            adapter_per_token=2.0 * rank * _ends(text.adapted(targets)) * text.layers,
            adapter_per_patch=2.0 * rank * _vision_ends(vision) if train_vision else 0.0,
            per_predicted=2.0 * text.hidden * config.text_config.vocab_size,
            train_head=train_head,
            per_unread=2.0 * reads * (_weights(text.linears) - _weights(text.key_linears)),
            adapter_per_unread=2.0 * reads * rank * (_ends(text.adapted(targets)) - _ends(text.adapted_keys(targets))),
        )

    def training(self, tokens, token_pairs, patches, patch_pairs, predicted=0, read=None):  # type: ignore[no-untyped-def]
        """FLOPs of forward and backward; numbers or arrays.

        A frozen vision tower has no backward. Beside an adapter a linear layer has no gradient of its weight.
        `predicted`: tokens that the vocabulary head predicts; `read`: those that the last layer is asked for, default
        all.
        """
        linear = 2.0 if self.adapter else 3.0
        unread = 0 if read is None else tokens - read
        text = linear * self.per_token * tokens + 3.0 * self.per_token_pair * token_pairs
        text = text + 3.0 * self.adapter_per_token * tokens
        text = text - (linear * self.per_unread + 3.0 * self.adapter_per_unread) * unread
        text = text + (3.0 if self.train_head else 2.0) * self.per_predicted * predicted
        if not self.train_vision:
            return text + self.per_patch * patches + self.per_patch_pair * patch_pairs
        vision = linear * self.per_patch * patches + 3.0 * self.per_patch_pair * patch_pairs
        return text + vision + 3.0 * self.adapter_per_patch * patches


def _vision(vision: VisionShape) -> tuple[float, float]:
    """FLOPs per patch, and per pair of patches of one picture."""
    mergers = vision.features * _weights(vision.merger_linears) / vision.merge
    per_patch = 2.0 * (vision.pixels * vision.width + vision.depth * _weights(vision.linears) + mergers)
    # Attention inside windows of a fixed number of patches is linear in the patches.
    windows = 4.0 * vision.width * vision.window_layers * vision.window_patches
    return per_patch + windows, 4.0 * vision.width * (vision.depth - vision.window_layers)


def _vision_ends(vision: VisionShape) -> float:
    """Inputs and outputs of all linear layers of the tower and its mergers, by patch."""
    mergers = vision.features * _ends(vision.merger_linears) / vision.merge
    return vision.depth * _ends(vision.linears) + mergers


def _weights(linears: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in linears)


def _ends(linears: list[tuple[int, int]]) -> int:
    return sum(inputs + outputs for inputs, outputs in linears)


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None where the table has no sourced number (a CPU, for one)."""
    if device.type != "cuda":
        return None
    # Whole words: an A10G is not an A10, an L40 not an L4.
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    matches = [key for key in PEAK_BF16_FLOPS if all(word in words for word in key.split())]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
