"""Pooling for sentence-transformers: the mean of exactly the last tokens of a prompt, the compression tokens.

Its own pooling modes take one token or all. This file is copied into the folder of an exported model, and works there
without muco_ds.

Shape suffixes: B prompts, L tokens of the longest one, K compression tokens, D hidden size, N = B x K.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentence_transformers.base.modules.module import Module


class CompressionPooling(Module):
    """Mean, in float32, of the states of a prompt's last `compression_tokens` tokens, padded left or right.

    Args:
        embedding_dimension: size of a state.
        compression_tokens: with how many of them the chat template ends a prompt.
    """

    config_keys = ["embedding_dimension", "compression_tokens"]  # noqa: RUF012 - declared so by the base class

    def __init__(self, embedding_dimension: int, compression_tokens: int) -> None:
        super().__init__()
        self.embedding_dimension = embedding_dimension
        self.compression_tokens = compression_tokens

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Set "sentence_embedding" [B, D] from "token_embeddings" [B, L, D] and "attention_mask" [B, L]."""
        mask_BL = features["attention_mask"].bool()
        left_BL = mask_BL.flip(1).cumsum(1).flip(1)  # tokens from this one to the last
        states_ND = features["token_embeddings"][mask_BL & (left_BL <= self.compression_tokens)]
        states_BKD = states_ND.float().view(len(mask_BL), self.compression_tokens, self.embedding_dimension)
        features["sentence_embedding"] = states_BKD.mean(1)
        return features

    def get_embedding_dimension(self) -> int:
        """Size of what `forward` gives."""
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write config.json, which the base class's `load` reads, into this module's folder, and this file beside it.

        sentence-transformers 6.2 saves such a file in the module's folder and looks for it in the model's.
        """
        self.save_config(output_path)
        shutil.copyfile(__file__, Path(output_path).parent / Path(__file__).name)
