"""Adapters in the stock model: what is trained, that they change nothing at first, and the draws of dropout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.data.schema import Dialogue
from muco_ds.distributed.gradient_cache import cached_backward
from muco_ds.errors import UserError
from muco_ds.export_adapter import ROWS, Adapter, Weight
from muco_ds.models.backbones import load_backbone, load_config, load_tokenizer, new_rows
from muco_ds.models.embedder import Embedder
from muco_ds.models.lora import TABLE, TrainedRows, add_adapter, base_digest
from muco_ds.models.recompute import recompute_layers

from tiny_folders import KINDS
from tiny_models import embedder, model_folder, new_embedder, pack, picture, processing

DIALOGUES = [Dialogue(("Where?", "What is it?"), (picture(0),)), Dialogue(("A red square.",))]


def adapted(kind: str, options: LoraOptions) -> Embedder:
    tokenizer = processing(kind).tokenizer
    model = load_backbone(str(model_folder(kind)), dtype=torch.float32, attention="sdpa", vocabulary=len(tokenizer))
    add_adapter(model, options, new_rows(tokenizer), seed=0)
    return Embedder(model, freeze_vision=options.targets != "all")


def trained(kind: str, options: LoraOptions) -> set[str]:
    return {name for name, parameter in adapted(kind, options).named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["text", "all"])
@pytest.mark.parametrize("dora", [True, False])
def test_every_linear_layer_of_the_tower_and_nothing_else_is_trained(kind: str, targets: Any, dora: bool) -> None:
    towers = "model.language_model." if targets == "text" else "model."
    linears = {
        name for name, m in new_embedder(kind).named_modules() if isinstance(m, nn.Linear) and name.startswith(towers)
    }
    parts = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if dora else [])]
    expected = {f"{name}.{part}.default.weight" for name in linears for part in parts}
    assert trained(kind, LoraOptions(rank=4, dora=dora, targets=targets)) == {*expected, f"model.{TABLE}.trained_rows"}
    assert len({".visual." in name for name in linears}) == (1 if targets == "text" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_and_the_whole_table_are_trained_alone(kind: str) -> None:
    layers = new_embedder(kind).model.config.text_config.num_hidden_layers
    expected = {
        f"model.language_model.layers.{layer}.self_attn.{part}_proj.{matrix}.default.weight"
        for layer in range(layers)
        for part in "qkvo"
        for matrix in ("lora_A", "lora_B")
    }
    options = LoraOptions(rank=4, targets="attention", train_embeddings="all")
    assert trained(kind, options) == {*expected, f"model.{TABLE}.weight"}
    assert trained(kind, replace(options, train_embeddings="none")) == expected


@pytest.mark.parametrize(("embeddings", "name"), [("new", "trained_rows"), ("all", "weight")])
def test_rows_of_the_table_are_trained_alone(embeddings: Any, name: str) -> None:
    options = LoraOptions(rank=1, dora=True, targets="tokens", train_embeddings=embeddings)
    assert trained("qwen2_vl", options) == {f"model.{TABLE}.{name}"}
    batch = pack(DIALOGUES, True)
    model = adapted("qwen2_vl", options)
    assert torch.equal(model.eval()(batch), embedder()(batch))
    model.train()(batch).sum().backward()
    assert model.get_parameter(f"model.{TABLE}.{name}").grad is not None


@pytest.mark.parametrize("dora", [True, False])
def test_a_new_adapter_changes_nothing_and_is_a_function_of_the_seed(dora: bool) -> None:
    torch.manual_seed(5)
    first = adapted("qwen2_vl", LoraOptions(rank=4, dora=dora)).eval()
    torch.manual_seed(6)
    second = adapted("qwen2_vl", LoraOptions(rank=4, dora=dora))
    batch = pack(DIALOGUES, True)
    with torch.no_grad():
        torch.testing.assert_close(first(batch), embedder()(batch), rtol=0, atol=1e-6)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_of_new_tokens_are_trained_in_a_table_that_is_not() -> None:
    table = nn.Embedding(10, 4)
    table.requires_grad_(False)
    rows = TrainedRows(table, [7, 3])
    ids_T = torch.tensor([1, 3, 7, 3, 9])
    assert torch.equal(rows(ids_T), table(ids_T))
    rows.trained_rows.data += 1
    expected_TD = table(ids_T)
    expected_TD[[1, 2, 3]] += 1
    torch.testing.assert_close(rows(ids_T), expected_TD)
    weights_TD = torch.randn(5, 4)
    (rows(ids_T) * weights_TD).sum().backward()
    torch.testing.assert_close(rows.trained_rows.grad, torch.stack([weights_TD[2], weights_TD[1] + weights_TD[3]]))
    assert table.weight.grad is None


COMPRESSION = [f"<|ctoken_pad_{i}|>" for i in range(12)]


@pytest.mark.parametrize(
    ("pool_token", "options", "tokens"),
    [
        ("<|emb|>", {}, ["<|emb|>", "<|mask|>"]),
        ("<|im_end|>", {"masks": True}, ["<|mask|>"]),
        ("<|im_end|>", {}, []),
        ("<|emb|>", {"compression": 12}, COMPRESSION),
        ("<|emb|>", {"compression": 12, "masks": True}, ["<|mask|>", *COMPRESSION]),
    ],
)
def test_new_rows_are_those_of_the_tokens_that_were_added(pool_token: str, options: Any, tokens: list[str]) -> None:
    tokenizer = load_tokenizer(str(model_folder("qwen2_vl")), pool_token, **options)
    assert tokenizer.convert_ids_to_tokens(new_rows(tokenizer)) == tokens
    before = load_tokenizer(str(model_folder("qwen2_vl")), "<|im_end|>")
    assert len(tokenizer) == len(before) + len(tokens)


class Engine(nn.Module):
    """What the gradient cache uses of a DeepSpeed engine, in one process."""

    optimizer = None

    def __init__(self, module: Embedder) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> torch.Tensor:
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        pass


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("targets", ["text", "all"])
def test_both_passes_of_the_gradient_cache_leave_out_the_same(targets: Any, checkpointing: bool) -> None:
    options = LoraOptions(rank=4, alpha=8, dropout=0.5, dora=True, targets=targets)
    model = adapted("qwen2_vl", options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    if checkpointing:
        recompute_layers(model.model, ActivationCheckpointing(), freeze_vision=targets != "all")
    engine = Engine(model).train()
    packs = [pack([dialogue], True) for dialogue in DIALOGUES]

    def loss_of(parts: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        emb_ED = torch.cat(parts)
        return nn.functional.cross_entropy(emb_ED @ emb_ED.flip(0).T / 0.1, torch.arange(len(emb_ED))), None

    def gradients() -> list[torch.Tensor]:
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return found

    torch.manual_seed(3)
    loss_of([engine(batch) for batch in packs])[0].backward()
    whole = gradients()
    torch.manual_seed(3)
    cached_backward(engine, [partial(engine, batch) for batch in packs], loss_of)
    cached = gradients()
    torch.manual_seed(4)
    loss_of([engine(batch) for batch in packs])[0].backward()
    other = gradients()
    assert len(whole) == len(cached) > 50
    for expected, got, redrawn in zip(whole, cached, other, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-9
        assert not torch.allclose(redrawn, expected, rtol=0.01) or not expected.any()


def test_another_model_has_another_digest() -> None:
    first, second = (base_digest(str(model_folder(kind))) for kind in KINDS[:2])
    assert first != second and first == base_digest(str(model_folder(KINDS[0])))


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    shutil.copytree(model_folder("qwen2_vl"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"the weights in .*model. can't be read .*: copy the model again"):
        base_digest(str(tmp_path / "model"))


def test_an_adapter_of_another_version_is_refused(tmp_path: Path) -> None:
    path = str(model_folder("qwen2_vl"))
    model = {"path": path, "pool_token": "<|emb|>", "lora": {"rank": 4, "train_new_rows": True}}
    meta = {"config": {"model": model}, "base": base_digest(path)}
    with pytest.raises(UserError, match=r"its adapter is of another version of muco_ds .*'train_new_rows'"):
        Adapter.of(tmp_path, meta, {}, None)


@pytest.mark.parametrize("spare", [True, False])
def test_a_table_trained_in_full_is_that_of_the_checkpoint(spare: bool, tmp_path: Path) -> None:
    config = load_config(str(model_folder("qwen2_vl")))
    config.text_config.vocab_size += 0 if spare else 2
    table_VD = torch.randn(config.text_config.vocab_size, 96)
    weights = {f"{TABLE}.weight": Weight(table_VD.shape, lambda: table_VD)}
    options = LoraOptions(rank=4, targets="tokens", train_embeddings="all")
    adapter = Adapter(options, weights, str(model_folder("qwen2_vl")), [])
    merged = adapter.merged(config)
    assert torch.equal(merged[f"{TABLE}.weight"].read(), table_VD)
    norm = "language_model.layers.0.input_layernorm.weight"
    assert torch.equal(merged[norm].read(), new_embedder().model.get_parameter(norm))
    with pytest.raises(UserError, match="targets is tokens: peft has no" if spare else "none for the new tokens"):
        adapter.write(tmp_path, config, torch.float32)


def test_without_spare_rows_the_trained_ones_come_behind(tmp_path: Path) -> None:
    """The table of the merged model; a folder for peft, which adds no rows, is refused."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen2_vl"), folder)
    rows_RD = torch.randn(2, 96)
    weights = {ROWS: Weight(rows_RD.shape, lambda: rows_RD)}
    config = load_config(str(folder))
    spare = config.text_config.vocab_size
    adapter = Adapter(LoraOptions(rank=4), weights, str(folder), [spare, spare + 1])
    config.text_config.vocab_size = spare + 2
    merged = adapter.merged(config)
    table_VD = merged["language_model.embed_tokens.weight"].read()
    assert torch.equal(table_VD[-2:], rows_RD) and table_VD.shape == merged["language_model.embed_tokens.weight"].shape
    assert torch.equal(table_VD[:-2], embedder().model.language_model.embed_tokens.weight)
    name = "language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[name].read(), embedder().model.get_parameter(name))
    with pytest.raises(UserError, match="none for the new tokens"):
        adapter.write(tmp_path, config, torch.float32)
