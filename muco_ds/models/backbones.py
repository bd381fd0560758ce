"""Loading a Qwen2-VL-class backbone, its tokenizer and image processor, with proof that every weight arrived."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.data.templates import COMPRESSION_TOKEN, MASK
from muco_ds.errors import UserError
from muco_ds.families import FAMILIES
from muco_ds.models.attention import BACKENDS, register_attention
from muco_ds.models.vision_tower import quicken

log = logging.getLogger(__name__)

EMB_TOKEN = "<|emb|>"


def load_config(path: str) -> PretrainedConfig:
    """Configuration of a supported backbone folder. Raises UserError for a folder that is none."""
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"model.path: '{path}' holds no config.json: give a Hugging Face model folder")
    try:
        with open(os.path.join(path, "config.json")) as file:
            model_type = json.load(file).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"model.path: '{path}' holds a config.json that is no JSON object: copy it again") from error
    if model_type not in FAMILIES:
        raise UserError(f"model.path: '{path}' is a '{model_type}' model; supported: {', '.join(FAMILIES)}")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        problem = " ".join(str(error).split())
        raise UserError(
            f"model.path: '{path}' holds a config.json that does not load ({problem}): copy it again"
        ) from error
    text = config.text_config
    if "sliding_attention" in getattr(text, "layer_types", ()) or text.attention_dropout:
        raise UserError(f"model.path: '{path}' uses sliding windows or attention dropout: packed attention has neither")
    return config


def load_tokenizer(path: str, pool_token: str, *, masks: bool = False, compression: int = 0) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with `<|emb|>` and `<|mask|>` added behind its last token (spare vocabulary rows).

    With another `model.pool_token`, which must be one of the tokenizer's own, nothing is added but the mask, and that
    only for a stage that masks words (`masks`). With `compression` tokens those are added in place of `<|emb|>`.

    Raises:
        UserError: no tokenizer, an unknown pool token, a model that was compressed with another number of tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: '{path}' holds no tokenizer that loads: copy its tokenizer files") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"model.path: '{path}' has no tokenizer.json: save its tokenizer in the fast format")
    if pool_token != EMB_TOKEN and pool_token not in tokenizer.get_vocab():
        raise UserError(f"model.pool_token: '{pool_token}' is not a token of '{path}': use {EMB_TOKEN} or <|im_end|>")
    present = len(compression_ids(tokenizer))
    if compression and present not in (0, compression):
        problem = f"model.compression_tokens is {compression} but '{path}' was compressed with {present}"
        raise UserError(f"{problem}: set it to {present}")
    if compression:
        new = [COMPRESSION_TOKEN.format(i) for i in range(compression)] + [MASK] * masks
    else:
        new = [EMB_TOKEN, MASK] if pool_token == EMB_TOKEN else [MASK] * masks
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    return tokenizer


def new_rows(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of those tokens in a tokenizer that `load_tokenizer` may have added."""
    vocabulary = tokenizer.get_vocab()
    own = [vocabulary[token] for token in (EMB_TOKEN, MASK) if token in vocabulary]
    return own + compression_ids(tokenizer)


def compression_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the compression tokens in a tokenizer, by their numbers. Raises UserError where one of them is missing."""
    pattern = re.compile(re.escape(COMPRESSION_TOKEN).replace(r"\{\}", r"\d+"))
    vocabulary = tokenizer.get_vocab()
    names = [COMPRESSION_TOKEN.format(i) for i in range(sum(map(bool, map(pattern.fullmatch, vocabulary))))]
    if missing := [name for name in names if name not in vocabulary]:
        problem = f"has {len(names)} compression tokens but no {missing[0]}"
        raise UserError(f"'{tokenizer.name_or_path}' {problem}: copy its tokenizer again")
    return [vocabulary[name] for name in names]


def unknown_compression_ids(path: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the compression tokens in a tokenizer, if the backbone in a folder was never compressed."""
    ours = compression_ids(tokenizer)
    if not ours:  # most runs: their start need not read a tokenizer again
        return []
    theirs: Any = AutoTokenizer.from_pretrained(path)
    return [] if compression_ids(theirs) else ours


@torch.no_grad()
def draw_rows(model: PreTrainedModel, rows: list[int], seed: int) -> None:
    """Give rows of the embedding table distinct values, spread as those of the rows before them; alike on every rank.

    Spare rows of a released model were never trained, and may be all the same.
    """
    table: Any = model.get_input_embeddings().weight
    with gathered(table, changed=True):
        known_VD = table[: min(rows)].float()
        noise_RD = torch.randn(len(rows), table.shape[1], generator=torch.Generator().manual_seed(seed))
        table[rows] = (known_VD.mean(0) + known_VD.std(0) * noise_RD.to(table.device)).to(table.dtype)
    log.info("vocabulary: %d compression tokens begin with rows drawn like the others", len(rows))


def load_image_processor(path: str) -> Qwen2VLImageProcessorPil:
    """The folder's image processor in its Pillow form: torchvision is not needed to train."""
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: '{path}' holds no preprocessor_config.json that loads: copy it there") from error


def load_backbone(path: str, *, dtype: torch.dtype, attention: str, vocabulary: int) -> PreTrainedModel:
    """The stock Hugging Face model without vocabulary head, every weight compared with the files.

    Under ZeRO-3 the caller keeps an `HfDeepSpeedConfig` alive, and the weights arrive partitioned (zero.Init).

    Args:
        attention: a key of `attention.BACKENDS`, for the text tower.
        vocabulary: ids the tokenizer can produce; the embedding table is enlarged only if it has fewer rows.
    Raises:
        UserError: unsupported or incomplete folder, a weight that is missing or differs from the file.
    """
    config = load_config(path)
    register_attention()
    text_attention = BACKENDS[attention]
    implementation = {"": text_attention, "text_config": text_attention, "vision_config": "sdpa"}
    try:
        model = FAMILIES[config.model_type].model.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=implementation,
            # transformers 5.23 leaves the tower of a checkpoint with nested names (`model.visual.*`) uninitialised.
            key_mapping={r"^model\.visual\.": "visual."},
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path: '{path}' does not load: {str(error).splitlines()[0]}") from error
    verify_weights(model, path)
    check_rotary_tables(model)
    quicken(model.visual)
    rows = config.text_config.vocab_size
    if vocabulary > rows:
        log.warning("vocabulary: %d rows enlarged to %d for the new tokens", rows, vocabulary)
        model.resize_token_embeddings(vocabulary)
    return model


def verify_weights(model: PreTrainedModel, path: str) -> None:
    """Compare each parameter with the safetensors files: name, shape and every value. Works on ZeRO-3 partitions.

    transformers re-initialises a missing weight with no more than a warning; a model that trains from such a start
    looks healthy and is ruined.
    """
    files = {canonical_name(name): (file, name) for name, file in tensor_files(path)}
    loaded = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    missing = sorted(loaded.keys() - files.keys())
    if missing:
        raise UserError(f"model.path: '{path}' lacks the weight '{missing[0]}' ({len(missing)} in all are missing)")
    unused = sorted(files.keys() - loaded.keys() - {"lm_head.weight"})
    if unused:
        log.warning("%s: %d tensors are not part of the model and are not used, e.g. %s", path, len(unused), unused[0])
    for name, parameter in loaded.items():
        file, stored_name = files[name]
        with gathered(parameter), safe_open(file, framework="pt") as tensors:
            stored = tensors.get_tensor(stored_name).to(parameter.dtype)
            if stored.shape != parameter.shape:
                raise UserError(f"{file}: '{stored_name}' is {tuple(stored.shape)}, expected {tuple(parameter.shape)}")
            if not torch.equal(stored, parameter.detach().cpu()):
                raise UserError(f"{file}: '{stored_name}' was not loaded as stored: the model would start wrong")


def gathered(parameter: torch.nn.Parameter, *, changed: bool = False) -> Any:
    """Context in which a parameter is whole on every rank, partitioned by ZeRO-3 or not.

    Args:
        changed: what rank 0 writes into it is kept, on all ranks.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changed else None)


def canonical_name(name: str) -> str:
    """One name for a weight in every layout transformers ever wrote for these models."""
    for prefix in ("model.", "language_model.model.", "language_model."):
        name = name.removeprefix(prefix)
    return name


def tensor_files(path: str) -> Iterator[tuple[str, str]]:
    """Stored name and safetensors file of every weight in a model folder. Raises UserError where there is none."""
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(index):
        with open(index) as file:
            weight_map = json.load(file)["weight_map"]
        yield from ((name, os.path.join(path, shard)) for name, shard in weight_map.items())
        return
    single = os.path.join(path, "model.safetensors")
    if not os.path.isfile(single):
        raise UserError(f"model.path: '{path}' holds no model.safetensors: convert the weights to safetensors first")
    with safe_open(single, framework="pt") as tensors:
        yield from ((name, single) for name in tensors.keys())  # noqa: SIM118 - not a dict


def check_rotary_tables(model: PreTrainedModel) -> None:
    """Every rotary table must be float32 and equal a fresh one: before transformers 5.23 zero.Init makes it bf16.

    Raises:
        UserError: naming the table; the cure is a newer transformers.
    """
    for name, module in model.named_modules():
        table = getattr(module, "inv_freq", None)
        if table is None:
            continue
        fresh = type(module)(module.config).inv_freq
        if table.dtype != torch.float32 or not torch.allclose(table.cpu(), fresh.cpu(), rtol=1e-6, atol=0):
            raise UserError(f"rotary table {name} is {table.dtype} or altered: install transformers>=5.23")
