"""A trained adapter led back to the stock model: its updates added to the weights, or a folder in peft's format.

Shape suffixes: O outputs and I inputs of a linear layer, R trained rows or rank, V rows of the table, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PretrainedConfig

from muco_ds.config_lora import LoraOptions
from muco_ds.errors import UserError
from muco_ds.families import FAMILIES
from muco_ds.models.backbones import canonical_name, load_config, new_rows, tensor_files
from muco_ds.models.lora import ADAPTER, TABLE, base_digest, peft_config

ROWS = f"{TABLE}.trained_rows"
PEFT_PREFIX = "base_model.model."
PEFT_ROWS = f"{TABLE}.token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint that is put together when read."""

    shape: torch.Size
    read: Callable[[], torch.Tensor]


def stored_weight(path: str, name: str) -> Weight:
    """A tensor of a backbone's files, which must hold it."""
    file = dict(tensor_files(path))[name]
    with safe_open(file, framework="pt") as tensors:
        shape = torch.Size(tensors.get_slice(name).get_shape())

    def read() -> torch.Tensor:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)

    return Weight(shape, read)


@dataclass(frozen=True)
class Adapter:
    """What a checkpoint of a run with an adapter holds, and the backbone it belongs to."""

    options: LoraOptions
    weights: Mapping[str, Weight]
    base: str
    rows: list[int]

    @classmethod
    def of(cls, checkpoint: Path, meta: dict[str, Any], weights: Mapping[str, Weight], base: str | None) -> Adapter:
        """`base`: where the backbone is now; default: where it was. Raises UserError where it is another model."""
        model = meta["config"]["model"]
        path = base or model["path"]
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder, but {checkpoint} holds an adapter of that model: give --base DIR")
        if base_digest(path) != meta["base"]:
            raise UserError(
                f"{path}: is another model than the one whose adapter {checkpoint} holds: give that one by --base DIR"
            )
        try:
            options = LoraOptions(**model["lora"])
        except TypeError as error:
            raise UserError(f"{checkpoint}: its adapter is of another version of muco_ds ({error})") from error
        # As it was saved, with the tokens that training added.
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint / "hf")
        return cls(options, weights, path, new_rows(tokenizer) if ROWS in weights else [])

    def merged(self, config: PretrainedConfig) -> dict[str, Weight]:
        """All weights of the stock model, each put together in float32 when read."""
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in FAMILIES[config.model_type].model(config).named_parameters()}
        files = {canonical_name(name): (file, name) for name, file in tensor_files(self.base)}
        return {
            # Under its stock name the checkpoint holds what was trained in full.
            name: self.weights.get(name) or Weight(shape, self._reader(name, shape, *files[canonical_name(name)]))
            for name, shape in shapes.items()
        }

    def _reader(self, name: str, shape: torch.Size, file: str, stored: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safe_open(file, framework="pt") as tensors:
                weight = tensors.get_tensor(stored).float()
            if name == f"{TABLE}.weight" and self.rows:
                return self._with_rows(weight, shape)
            return self._updated(name.removesuffix(".weight"), weight)

        return read

    def _with_rows(self, table_VD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Where the backbone has no spare rows for the new tokens, the trained ones come behind its own."""
        missing = table_VD.new_zeros(max(0, shape[0] - len(table_VD)), shape[1])
        return torch.cat([table_VD, missing]).index_copy(0, torch.tensor(self.rows), self.weights[ROWS].read().float())

    def _updated(self, layer: str, weight_OI: torch.Tensor) -> torch.Tensor:
        def part(kind: str) -> torch.Tensor | None:
            found = self.weights.get(f"{layer}.{kind}.{ADAPTER}.weight")
            return None if found is None else found.read().float()

        down_RI, up_OR, length_O = part("lora_A"), part("lora_B"), part("lora_magnitude_vector")
        if down_RI is None or up_OR is None:
            return weight_OI
        weight_OI = weight_OI + self.options.alpha / self.options.rank * (up_OR @ down_RI)
        if length_O is None:
            return weight_OI
        return weight_OI * (length_O / weight_OI.norm(dim=1))[:, None]

    def write(self, folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """adapter_config.json and adapter_model.safetensors, for `peft.PeftModel.from_pretrained(base, folder)`."""
        rows = load_config(self.base).text_config.vocab_size
        if config.text_config.vocab_size > rows:
            raise UserError(
                f"{self.base}: has {rows} rows, none for the new tokens, and peft adds none: leave out --no-merge_lora"
            )
        if self.options.targets == "tokens":
            raise UserError(
                "model.lora.targets is tokens: peft has no adapter without linear layers, leave out --no-merge_lora"
            )
        with torch.device("meta"):
            description = peft_config(FAMILIES[config.model_type].model(config), self.options)
        description.base_model_name_or_path = self.base
        description.inference_mode = True
        table = TABLE.rpartition(".")[2]
        if self.rows:
            description.trainable_token_indices = {table: self.rows}
        if f"{TABLE}.weight" in self.weights:
            description.modules_to_save = [table]
        description.save_pretrained(str(folder))
        tensors = {_peft_name(name): weight.read().to(dtype, copy=True) for name, weight in self.weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_name(name: str) -> str:
    """A parameter's name in peft's files, which leave out the adapter's name."""
    if name == ROWS:
        return PEFT_PREFIX + PEFT_ROWS
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return PEFT_PREFIX + name.replace(f".{ADAPTER}.weight", ".weight")
