"""Activation checkpointing of single layers, by the stock layers' own switch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from muco_ds.config_activations import ActivationCheckpointing


def recompute_layers(model: PreTrainedModel, options: ActivationCheckpointing, *, freeze_vision: bool) -> None:
    """Have the first layers of each tower recomputed in the backward pass, as many as `options` says, and no other.

    The towers' own `activation_checkpointing_enable` knows no counts, has another name before transformers 5.23, and
    makes the embedded tokens require a gradient, which only reentrant checkpointing needs.

    Args:
        freeze_vision: the vision tower runs without a graph: there is nothing to recompute.
    """
    towers: Any = model
    text = towers.language_model.layers
    vision = towers.visual.blocks
    _recompute_first(text, options.text_layers(len(text)))
    _recompute_first(vision, 0 if freeze_vision else options.vision_layers(len(vision)))


def _recompute_first(layers: Sequence[Any], count: int) -> None:
    for i, layer in enumerate(layers):
        assert isinstance(layer, GradientCheckpointingLayer) or i >= count, type(layer)
        layer.gradient_checkpointing = i < count
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
