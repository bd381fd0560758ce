"""Folders of tiny random backbones, one of each supported family, with one tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from muco_ds.models.demo_model import model_config

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

# What Qwen3-VL's release says otherwise than Qwen2-VL's.
QWEN3_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
}


def change_family(folder: Path, kind: str) -> None:
    """Turn the folder of the demo model, which is a Qwen2-VL, into one of this kind, and shake it."""
    if kind != "qwen2_vl":
        config, model_class = qwen2_5_vl(folder) if kind == "qwen2_5_vl" else qwen3_vl(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model_class(config).save_pretrained(folder)
    if kind == "qwen3_vl":
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | QWEN3_IMAGES))
    shake(folder)


def qwen2_5_vl(folder: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    text, tokens = shared(folder)
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 96}
    # Windows of 2 x 2 merged tokens: pictures of 84 px and more have several, and ragged ones at the edges.
    vision |= {"window_size": 56, "fullatt_block_indexes": [1], "initializer_range": 0.05}
    text["model_type"] = "qwen2_5_vl_text"
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    return config, Qwen2_5_VLForConditionalGeneration


def qwen3_vl(folder: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    text, tokens = shared(folder)
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 112, "num_heads": 4, "out_hidden_size": 96}
    # A grid of 5 x 5 learned positions, which no picture has; every feature map is of another kind of block.
    vision |= {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.05}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    # As in the 4B, all heads together are wider than the hidden states.
    text |= {"model_type": "qwen3_vl_text", "head_dim": 32, "rope_parameters": rope}
    for name in ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"):
        del text[name]
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    return config, Qwen3VLForConditionalGeneration


def shared(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The demo model's text tower, and the ids of its tokens."""
    config = model_config(Tokenizer.from_file(str(folder / "tokenizer.json"))).to_dict()
    tokens = {key: config[key] for key in config if key.endswith("_token_id") and config[key] is not None}
    return config["text_config"], tokens


def shake(folder: Path) -> None:
    """Norms start at one and biases at zero: an operation that forgets them would go unseen."""
    generator = torch.Generator().manual_seed(2)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
