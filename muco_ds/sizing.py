"""Activation checkpointing as choices in order: from what a run has now to all of it, the cheapest layers first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from muco_ds.config import RunConfig
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.families import text_shape, vision_shape
from muco_ds.memory_activations import text_layer_bytes, vision_block_bytes


def choices(
    options: ActivationCheckpointing, backbone: PretrainedConfig, freeze_vision: bool
) -> list[ActivationCheckpointing]:
    """`options` and, in order, everything from there to all layers of both towers, one layer more at a time.

    First the layers of the tower that gives more bytes for a FLOP of its linear layers; which one depends on the model:
    in Qwen2-VL-2B the two are equal to a percent, in the 7B the vision tower's give twice as much.
    """
    text, vision = text_shape(backbone), vision_shape(backbone)
    n_text = options.text_layers(text.layers)
    n_vision = 0 if freeze_vision else options.vision_layers(vision.depth)

    def steps(vision_first: bool) -> Iterator[tuple[int, int]]:
        t, v = n_text, n_vision
        yield t, v
        towers = ("vision", "text") if vision_first else ("text", "vision")
        for tower in towers:
            while tower == "text" and t < text.layers - 1:
                t += 1
                yield t, v
            while tower == "vision" and not freeze_vision and v < vision.depth:
                v += 1
                yield t, v

    text_gain = text_layer_bytes(text, 1, 1, 2, fused=True) / sum(i * o for i, o in text.linears)
    vision_gain = vision_block_bytes(vision, 1, 2, fused=True) / sum(i * o for i, o in vision.linears)
    return [
        ActivationCheckpointing.of_layers(t, text.layers, None if freeze_vision else v, vision.depth)
        for t, v in steps(vision_gain > text_gain)
    ]


def least(
    options: list[ActivationCheckpointing], total: Callable[[ActivationCheckpointing], int], limit: float
) -> ActivationCheckpointing | None:
    """The first of `choices` whose `total` of bytes is within the limit; None if none is."""
    position = bisect_left(options, True, key=lambda choice: total(choice) <= limit)
    return options[position] if position < len(options) else None


def with_checkpointing(config: RunConfig, choice: ActivationCheckpointing) -> RunConfig:
    return replace(config, model=replace(config.model, activation_checkpointing=choice))


def overrides(choice: ActivationCheckpointing) -> dict[str, float]:
    """The dotted keys that ask for it; of a frozen vision tower there is none."""
    shares = {"text": choice.text, "vision": choice.vision}
    return {f"model.activation_checkpointing.{name}": share for name, share in shares.items() if share is not None}
