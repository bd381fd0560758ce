"""LoRA and DoRA by peft's own layers inside the stock model, and trained rows of a table that is not trained.

peft wraps each linear layer: its weight is called `...q_proj.base_layer.weight`, and beside it there are
`...q_proj.lora_A.default.weight` and others. muco_ds/export_adapter.py leads the names back to the stock model's.

Shape suffixes: T rows of the pack, R trained rows, D hidden size.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from muco_ds.config_lora import LoraOptions
from muco_ds.errors import UserError
from muco_ds.models.backbones import gathered, tensor_files

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
"""peft's name of the adapter, part of its parameters' names."""

TABLE = "language_model.embed_tokens"
_TARGETS = {
    "text": r"language_model\.",
    "attention": r"language_model\..*\.self_attn\.",
    "all": r"(language_model|visual)\.",
    "tokens": r"(?!)",  # matches nothing
}


class TrainedRows(nn.Module):
    """An embedding table of which only some rows are trained.

    peft's layer for this copies the whole table in every forward, and under ZeRO-3 needs a GPU to be built.

    Args:
        base_layer: the table, partitioned by ZeRO-3 or not; it stays as it is.
        rows: which ones; `trained_rows` [R, D] begins as a copy of them.
    """

    ids_R: torch.Tensor

    def __init__(self, base_layer: nn.Module, rows: list[int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("ids_R", torch.tensor(rows), persistent=False)
        table = base_layer.weight
        assert isinstance(table, nn.Parameter)
        with gathered(table):
            self.trained_rows = nn.Parameter(table.detach()[rows].clone())

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        hidden_TD = self.base_layer(ids_T)
        own_TR = ids_T[..., None] == self.ids_R
        # A product with ones and zeros is exact, and its gradient sums each row's tokens in a fixed order.
        return hidden_TD.masked_fill(own_TR.any(-1, keepdim=True), 0) + own_TR.to(hidden_TD.dtype) @ self.trained_rows


def add_adapter(model: PreTrainedModel, options: LoraOptions, rows: list[int], seed: int) -> None:
    """Freeze a backbone and put what is trained into it, the same on every rank; the outputs stay as they are.

    Under ZeRO-3 the caller keeps an `HfDeepSpeedConfig` alive: DoRA begins with the lengths of whole weights.

    Args:
        rows: of the embedding table, those of new tokens.
    """
    from peft import inject_adapter_in_model  # seconds, for the runs that have an adapter

    model.requires_grad_(False)
    if options.targets != "tokens":  # peft refuses to put nothing in
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(peft_config(model, options), model, ADAPTER)
    if options.dora:
        _hold_weights(model)
    table = model.get_input_embeddings()
    if options.train_embeddings == "all":
        table.requires_grad_(True)
    elif options.train_embeddings == "new" and rows:
        model.set_input_embeddings(TrainedRows(table, rows))


def peft_config(model: nn.Module, options: LoraOptions) -> LoraConfig:
    """The adapter as peft describes it."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_dora=options.dora,
        target_modules=[name for name, _ in adapted_layers(model, options)],
    )


def adapted_layers(model: nn.Module, options: LoraOptions) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every linear layer that gets an update."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.match(_TARGETS[options.targets], name):
            yield name, module


def adapter_sizes(layer: nn.Linear, options: LoraOptions) -> list[int]:
    """Entries of each of a layer's trained tensors."""
    sizes = [options.rank * layer.in_features, options.rank * layer.out_features]
    return [*sizes, layer.out_features] if options.dora else sizes


def base_digest(path: str) -> str:
    """What tells a backbone's weights from another's: names, shapes, and the first row of each.

    Raises:
        UserError: a file of them is missing or damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted({file for _, file in tensor_files(path)}):
            with safe_open(file, framework="pt") as tensors:
                for name in sorted(tensors.keys()):
                    part = tensors.get_slice(name)
                    digest.update(f"{name}{part.get_shape()}".encode())
                    digest.update(part[:1].float().numpy().tobytes())
    except (OSError, SafetensorError) as error:
        problem = f"model.path: the weights in '{path}' can't be read ({str(error).splitlines()[0]})"
        raise UserError(f"{problem}: copy the model again") from error
    return digest.hexdigest()


def _hold_weights(model: nn.Module) -> None:
    """Under ZeRO-3, keep a DoRA layer's weight from its first use to its last.

    peft uses it in two modules, each of which would gather it.
    """
    import deepspeed
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for parameter in module.get_base_layer().parameters():
                if hasattr(parameter, "ds_id"):
                    deepspeed.zero.register_external_parameter(module, parameter)
