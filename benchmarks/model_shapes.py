"""Qwen2-VL models with random weights in named shapes, written as folders that the trainer and stock classes load.

The tokenizer is the demo's in all of them: only the number of tokens counts here, and their ids are rows of any table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.models.demo_model import write_model

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The demo's model as it is: 0.7M weights.
    "tiny": ({}, {}),
    # Large enough that matrix products are most of a step, with the vision tower's share of one that M3T's sizes give.
    "small": (
        {
            **{"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4},
            **{"num_attention_heads": 6, "num_key_value_heads": 2, "mrope_section": [8, 12, 12]},
        },
        {"depth": 4, "embed_dim": 256, "num_heads": 4},
    ),
    # The released Qwen2-VL-2B-Instruct and Qwen2-VL-7B-Instruct.
    "2b": (
        {
            **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
            **{"num_attention_heads": 12, "num_key_value_heads": 2, "mrope_section": [16, 24, 24]},
            **{"rope_theta": 1e6, "vocab_size": 151936, "initializer_range": 0.02},
        },
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "initializer_range": 0.02},
    ),
    "7b": (
        {
            **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
            **{"num_attention_heads": 28, "num_key_value_heads": 4, "mrope_section": [16, 24, 24]},
            **{"rope_theta": 1e6, "vocab_size": 152064, "initializer_range": 0.02, "tie_word_embeddings": False},
        },
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "initializer_range": 0.02},
    ),
}


def write_shape(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """A model folder at `folder`, random weights of one seed; drawn on the GPU where there is one."""
    scenes = folder.parent / "scenes"
    write_model(folder, row_texts(write_data(scenes, 64, 1, seed=0)), seed=0)
    text, vision = SHAPES[shape]
    if not text:
        return
    values = Qwen2VLConfig.from_pretrained(folder).to_dict()
    rope = {"rope_type": "default", "rope_theta": text.get("rope_theta", 1e4), "mrope_section": text["mrope_section"]}
    own = {name: value for name, value in text.items() if name not in ("mrope_section", "rope_theta")}
    values["text_config"].update(own, rope_parameters=rope, layer_types=None)
    values["text_config"].pop("head_dim", None)  # of the demo's model
    values["vision_config"].update(vision, hidden_size=text["hidden_size"])
    values["tie_word_embeddings"] = text.get("tie_word_embeddings", True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration._from_config(Qwen2VLConfig.from_dict(values), dtype=dtype)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    del model
    torch.cuda.empty_cache()
