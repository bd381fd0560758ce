"""A backbone starts from the weights in its files, all of them, or not at all."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from muco_ds.errors import UserError
from muco_ds.models.backbones import (
    canonical_name,
    check_rotary_tables,
    compression_ids,
    load_backbone,
    load_config,
    load_tokenizer,
    new_rows,
    verify_weights,
)

from tiny_folders import KINDS
from tiny_models import model_folder, new_embedder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("qwen2_vl"), tmp_path / "model"))


def load(folder: Path, vocabulary: int = 960) -> PreTrainedModel:
    return load_backbone(str(folder), dtype=torch.float32, attention="sdpa", vocabulary=vocabulary)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_weight_is_missed_when_it_is_missing(kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder(kind), tmp_path / "model"))
    model = load(folder)
    whole = load_file(folder / "model.safetensors")
    names = {canonical_name(name) for name, _ in model.named_parameters()}
    assert {canonical_name(name) for name in whole} - {"lm_head.weight"} == names
    for name in whole:
        if name == "lm_head.weight":
            continue
        save_file({n: t for n, t in whole.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="lacks the weight") as error:
            verify_weights(model, str(folder))
        assert f"'{canonical_name(name)}'" in str(error.value)


def test_a_missing_weight_is_never_initialised_instead(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks the weight 'layers\.1\.mlp\.up_proj\.weight' \(1 in all are missing\)"):
        load(folder)


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    name = "visual.merger.mlp.2.bias"
    model = load(folder)
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
    with pytest.raises(UserError, match=r"merger\.mlp\.2\.bias' is \(7,\), expected \(96,\)"):
        verify_weights(model, str(folder))
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["language_model.embed_tokens.weight", "visual.blocks.2.norm1.bias"])
def test_one_altered_value_is_noticed(folder: Path, name: str) -> None:
    model = load(folder)
    verify_weights(model, str(folder))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-6
    with pytest.raises(UserError, match="was not loaded as stored"):
        verify_weights(model, str(folder))


def test_weights_in_bf16_are_compared_after_rounding() -> None:
    folder = model_folder("qwen2_vl")
    model = load_backbone(str(folder), dtype=torch.bfloat16, attention="sdpa", vocabulary=960)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(m.inv_freq.dtype == torch.float32 for m in model.modules() if hasattr(m, "inv_freq"))


def as_released(name: str) -> str:
    """`visual.*` and `model.layers.*`: published checkpoints up to Qwen2.5-VL, and what transformers writes of them."""
    return name if name.startswith("visual.") else f"model.{canonical_name(name)}"


def as_nested(name: str) -> str:
    """`model.visual.*` and `model.language_model.*`: the generating model's own names, and Qwen3-VL's release."""
    return f"model.{as_bare_model(name)}"


def as_bare_model(name: str) -> str:
    """`visual.*` and `language_model.*`: the names of the model without a vocabulary head."""
    name = canonical_name(name)
    return name if name.startswith("visual.") else f"language_model.{name}"


LAYOUTS = [(kind, rename) for kind in KINDS for rename in (as_released, as_nested, as_bare_model)]
LAYOUTS.remove(("qwen3_vl", as_released))  # there was no such checkpoint


@pytest.mark.parametrize(("kind", "rename"), LAYOUTS)
def test_names_of_every_layout_load(kind: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder(kind), tmp_path / "model"))
    want = dict(load(folder).named_parameters())
    tensors = load_file(folder / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    assert "model.layers.0.mlp.up_proj.weight" in (tensors if kind != "qwen3_vl" else map(as_released, tensors))
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    for name, parameter in load(folder).named_parameters():
        assert torch.equal(parameter, want[name]), name


def test_sharded_files_are_followed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % 2 + 1:05d}-of-00002.safetensors"
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in tensors if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    load(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"does not load.*00002-of-00002"):
        load(folder)


def test_tensors_without_a_place_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.adapter.weight": torch.zeros(2)}))
    with caplog.at_level(logging.WARNING, "muco_ds"):
        load(folder)
    assert "1 tensors are not part of the model" in caplog.text and "adapter.weight" in caplog.text


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "no JSON object"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "'llama' model; supported: qwen",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{"), "does not load"),
    ],
    ids=["no_config", "broken_config", "model_type", "no_weights", "truncated_weights"],
)
def test_a_folder_that_is_no_backbone_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_pickled_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(folder)


def test_text_weights_under_names_of_no_layout_are_refused(folder: Path) -> None:
    """transformers leaves such a text tower random and only logs it."""
    tensors = load_file(folder / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="was not loaded as stored"):
        load(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", ["visual", "language_model"])
def test_a_bad_rotary_table_is_noticed(kind: str, tower: str) -> None:
    for damage in (lambda table: table.bfloat16(), lambda table: table * 1.0001):
        model = new_embedder(kind).model
        check_rotary_tables(model)
        tables = [m for name, m in model.named_modules() if name.startswith(tower) and hasattr(m, "inv_freq")]
        assert tables
        tables[0].inv_freq = damage(tables[0].inv_freq)
        with pytest.raises(UserError, match=f"rotary table {tower}"):
            check_rotary_tables(model)


# ---- tokens and vocabulary


def rows(model: PreTrainedModel) -> torch.Tensor:
    return model.get_parameter("language_model.embed_tokens.weight")


def test_new_tokens_take_spare_rows(caplog: pytest.LogCaptureFixture) -> None:
    folder = model_folder("qwen2_vl")
    plain, tokenizer = load_tokenizer(str(folder), "<|im_end|>"), load_tokenizer(str(folder), "<|emb|>")
    assert "<|emb|>" not in plain.get_vocab()
    added = [tokenizer.convert_tokens_to_ids(token) for token in ("<|emb|>", "<|mask|>")]
    assert added == [len(plain), len(plain) + 1]
    assert tokenizer("a<|emb|>", add_special_tokens=False)["input_ids"][-1] == added[0]  # one token, not seven
    assert set(plain.all_special_tokens) < set(tokenizer.all_special_tokens)
    with caplog.at_level(logging.WARNING, "muco_ds"):
        model = load(folder, vocabulary=len(tokenizer))
    assert rows(model).shape[0] == load_config(str(folder)).text_config.vocab_size > len(plain)
    assert "enlarged" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_grows_only_when_rows_are_exhausted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = model_folder(kind)
    old = rows(load(folder, vocabulary=960))
    with caplog.at_level(logging.WARNING, "muco_ds"):
        model = load(folder, vocabulary=962)
    new = rows(model)
    assert new.shape == (962, old.shape[1]) and torch.equal(new[:960], old)
    assert torch.isfinite(new).all() and model.config.text_config.vocab_size == 962
    assert "960 rows enlarged to 962" in caplog.text


def test_compression_tokens_take_the_place_of_the_pool_token(tmp_path: Path) -> None:
    folder = str(model_folder("qwen2_vl"))
    plain, tokenizer = load_tokenizer(folder, "<|im_end|>"), load_tokenizer(folder, "<|emb|>", compression=11)
    ids = compression_ids(tokenizer)
    assert ids == list(range(len(plain), len(plain) + 11)) == new_rows(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<|ctoken_pad_10|>"
    text = "a<|ctoken_pad_10|><|ctoken_pad_1|>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"][-2:] == [ids[10], ids[1]]
    assert compression_ids(plain) == []

    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), "<|emb|>", compression=11)
    assert again.get_vocab() == tokenizer.get_vocab() and new_rows(again) == ids
    kept = load_tokenizer(str(tmp_path), "<|emb|>")
    assert compression_ids(kept) == ids and kept.convert_tokens_to_ids("<|emb|>") == len(tokenizer)
    cure = f"model.compression_tokens is 4 but '{tmp_path}' was compressed with 11: set it to 11"
    with pytest.raises(UserError, match=re.escape(cure)):
        load_tokenizer(str(tmp_path), "<|emb|>", compression=4)


def test_unknown_pool_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.pool_token: '<\|pool\|>' is not a token of .*use <\|emb\|>"):
        load_tokenizer(str(model_folder("qwen2_vl")), "<|pool|>")
