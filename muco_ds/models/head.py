"""The vocabulary head of a backbone, for the stage that predicts tokens.

Shape suffixes: N rows that predict a token, V rows of the vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from muco_ds.errors import UserError
from muco_ds.losses.linear_cross_entropy import linear_cross_entropy
from muco_ds.models.backbones import canonical_name, load_config, tensor_files
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


def tied(config: PretrainedConfig) -> bool:
    """Whether a backbone's embedding table is its vocabulary head as well."""
    return bool(config.tie_word_embeddings or getattr(config.text_config, "tie_word_embeddings", False))


def _check_tied(path: str, files: dict[str, str]) -> None:
    """transformers would load a head that is in the files, whatever the configuration says."""
    (table,) = (name for name in files if canonical_name(name) == "embed_tokens.weight")
    if NAME in files and not torch.equal(_stored(files, NAME), _stored(files, table)):
        raise UserError(
            f"model.path: '{path}' says that its embedding table is its vocabulary head but holds another {NAME}: "
            "set tie_word_embeddings to false in its config.json, or remove that tensor"
        )


def _stored(files: dict[str, str], name: str) -> torch.Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        return tensors.get_tensor(name)


def enlarged(weight_VD: torch.Tensor, rows: int) -> torch.Tensor:
    """With rows of zeros behind its own: stock models have as many as their table, which new tokens may enlarge."""
    return torch.cat([weight_VD, weight_VD.new_zeros(max(0, rows - len(weight_VD)), weight_VD.shape[1])])


def check_head(path: str) -> None:
    """Does a backbone's folder hold the head that predicts tokens? Raises UserError where it does not."""
    files = dict(tensor_files(path))
    if tied(load_config(path)):
        _check_tied(path, files)
    elif NAME not in files:
        raise UserError(
            f"model.path: '{path}' holds no {NAME}, which predicts answers: give the whole model, as it was released"
        )


def vocabulary_head(model: PreTrainedModel, path: str, *, trained: bool) -> VocabularyHead:
    """The head of the backbone in a folder (see `check_head`), for a model that was loaded from there.

    Args:
        trained: of a head with weights of its own: train them. A tied one is trained as the table is.
    """
    if tied(load_config(path)):
        table: Any = model.get_input_embeddings()
        if isinstance(table, TrainedRows):
            whole: Any = table.base_layer
            return VocabularyHead(whole.weight, table.trained_rows, table.ids_R)
        return VocabularyHead(table.weight)
    weight_VD = enlarged(_stored(dict(tensor_files(path)), NAME), model.config.text_config.vocab_size)
    return VocabularyHead(nn.Parameter(weight_VD.to(model.dtype), requires_grad=trained))
