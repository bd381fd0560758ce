"""An adapter in a folder of its own, in peft's format, added to its backbone."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from muco_ds.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_OF_WHOLE = "base_model.model.model."
"""How the weights of an adapter begin that was put into the model with its vocabulary head (released MuCo code)."""


def base_of(path: str, base: str | None) -> str:
    """Folder of an adapter's backbone. Raises UserError where it is none.

    Args:
        base: in place of what the adapter names.
    """
    named = base or _config(path).get("base_model_name_or_path")
    if not isinstance(named, str) or not os.path.isdir(named):
        raise UserError(f"'{path}' is an adapter of '{named}', which is no folder here: give its backbone's as base")
    return named


def trained_ids(path: str) -> list[int]:
    """Rows of the embedding table that an adapter trained."""
    indices = _config(path).get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [row for rows in lists for row in rows]


def with_adapter(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The backbone with the adapter added to its weights, every tensor of the adapter compared with its file.

    Raises:
        UserError: files that do not load or belong to another model.
    """
    from peft import PeftModel, get_peft_model_state_dict  # seconds

    try:
        stored = load_file(os.path.join(path, _WEIGHTS))
        whole = any(name.startswith(_OF_WHOLE) for name in stored)
        adapted = PeftModel.from_pretrained(_Whole(model) if whole else model, path)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"'{path}': the adapter does not fit its backbone or does not load ({problem})") from error
    loaded: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name, tensor in stored.items():  # peft only warns of what it finds no place for
        if name not in loaded or not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise UserError(f"'{path}': the weight '{name}' has no place in its backbone: give the right one as base")
    if missing := sorted(loaded.keys() - stored.keys()):
        raise UserError(f"'{path}': lacks the weight '{missing[0]}': copy the adapter again")
    merged: Any = adapted.merge_and_unload()
    return merged.model if whole else merged


class _Whole(nn.Module):
    """In place of the model with a vocabulary head, which nobody asks for logits here."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


def _config(path: str) -> dict[str, Any]:
    try:
        with open(os.path.join(path, ADAPTER_CONFIG)) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"'{path}': {ADAPTER_CONFIG} can't be read ({error}): copy it again") from error
