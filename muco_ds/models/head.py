"""The vocabulary head of a backbone, for the stage that predicts tokens.

Shape suffixes: N rows that predict a token, V rows of the vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from muco_ds.errors import UserError
from muco_ds.losses.linear_cross_entropy import linear_cross_entropy
from muco_ds.models.backbones import load_config, tensor_files
from muco_ds.models.lora import TrainedRows

NAME = "lm_head.weight"


class VocabularyHead(nn.Module):
    """Logits of states are their products with `weight` [V, D], which is the embedding table's own where they are tied.

    Args:
        trained_rows: of a tied table of which only these are trained, [R, D], at `ids_R`.
    """

    ids_R: torch.Tensor

    def __init__(
        self, weight: nn.Parameter, trained_rows: nn.Parameter | None = None, ids_R: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight, self.trained_rows = weight, trained_rows  # both are gathered by ZeRO-3 for this module's forward
        self.register_buffer("ids_R", ids_R, persistent=False)

    def forward(self, state_ND: torch.Tensor, label_N: torch.Tensor | None) -> torch.Tensor:
        """Sum of the cross-entropies of labels, 0-d float32; without labels the likeliest ids, int64 [N]."""
        weight_VD: torch.Tensor = self.weight
        if self.trained_rows is not None:
            weight_VD = weight_VD.index_copy(0, self.ids_R, self.trained_rows)
        if label_N is None:
            return (state_ND @ weight_VD.T).argmax(-1)
        return linear_cross_entropy(state_ND, weight_VD, label_N)


def vocabulary_head(
    model: PreTrainedModel, path: str, *, trained: bool, partition: dict[str, Any] | None
) -> VocabularyHead:
    """The head of the backbone in a folder, for a model that was loaded from there.

    Args:
        trained: of a head with weights of its own: train them. A tied one is trained as the table is.
        partition: the DeepSpeed configuration of ZeRO-3.
    Raises:
        UserError: the folder has none.
    """
    config = load_config(path)
    if config.tie_word_embeddings:
        table: Any = model.get_input_embeddings()
        if isinstance(table, TrainedRows):
            whole: Any = table.base_layer
            return VocabularyHead(whole.weight, table.trained_rows, table.ids_R)
        return VocabularyHead(table.weight)
    files = dict(tensor_files(path))
    if NAME not in files:
        raise UserError(
            f"model.path: '{path}' holds no {NAME}, which predicts answers: give the whole model, as it was released"
        )
    with safe_open(files[NAME], framework="pt") as tensors:
        stored_VD = tensors.get_tensor(NAME).to(model.dtype)
    weight = nn.Parameter(stored_VD, requires_grad=trained)
    head = VocabularyHead(weight)
    if partition is not None:
        import deepspeed

        deepspeed.zero.Init(module=head, config_dict_or_path=partition)
    return head
