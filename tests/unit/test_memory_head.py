"""What a vocabulary head needs, by the estimate, against what a forward and backward of it really allocate."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_memory import bigger, ds_config, load_of, packed, released, shipped, tiny_estimate
from torch import nn
from torch.profiler import ProfilerActivity, profile

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.data.schema import PackedBatch
from muco_ds.memory import Memory, vocabulary_head
from muco_ds.memory_activations import Head, Load
from muco_ds.models.head import VocabularyHead
from muco_ds.models.lora import TrainedRows, add_adapter
from muco_ds.models.recompute import recompute_layers
from muco_ds.tasks.compress import CompressTask

VOCABULARY, PREDICTED, NEW = 20_000, 300, [5, 6, 7]
ROWS, WHOLE_TABLE = LoraOptions(rank=4, targets="attention"), LoraOptions(rank=4, train_embeddings="all")


def task_of(tied: bool, lora: LoraOptions) -> CompressTask:
    """The task on a model with a table so large that the head's part matters."""
    made: Any = bigger(torch.float32, True)
    model, width = made.model, made.model.config.text_config.hidden_size
    model.set_input_embeddings(nn.Embedding(VOCABULARY, width))
    model.config.text_config.vocab_size = VOCABULARY
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied
    if lora.rank:
        add_adapter(model, lora, NEW, seed=0)
    table = model.get_input_embeddings()
    if not tied:
        return CompressTask(made, VocabularyHead(nn.Parameter(torch.randn(VOCABULARY, width), not lora.rank)))
    if isinstance(table, TrainedRows):
        whole: Any = table.base_layer
        return CompressTask(made, VocabularyHead(whole.weight, table.trained_rows, table.ids_R))
    return CompressTask(made, VocabularyHead(table.weight))


def conversation_pack() -> PackedBatch:
    """A pack of which some rows predict a token, in stretches as answers are."""
    batch, generator = packed(4, history=True), torch.Generator().manual_seed(0)
    starts = torch.linspace(0, batch.tokens - 10, PREDICTED // 10).long()
    rows = (starts[:, None] + torch.arange(10)).flatten()
    labels = torch.randint(0, VOCABULARY, (PREDICTED,), generator=generator)
    read_segments = batch.segments.of_rows(rows.numpy())
    return replace(batch, emb_index_E=rows, labels_E=labels, read_rows_Q=rows, read_segments=read_segments)


def peak_bytes(task: CompressTask, batch: PackedBatch) -> int:
    for parameter in filter(lambda p: p.requires_grad, task.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    task.train()
    task(batch).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task(batch).backward()
    live = peak = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def estimated(task: CompressTask, load: Load, **options: Any) -> Memory:
    config = task.embedder.model.config
    options = {"vocabulary": VOCABULARY, "world_size": 1, "fused_attention": False, "new_tokens": len(NEW), **options}
    return tiny_estimate(config, ds_config(2, "fp32", 1), load, predicts_tokens=True, **options)


@pytest.mark.parametrize(
    ("tied", "lora", "chunk", "checkpointing"),
    [
        (True, LoraOptions(), 50, True),
        (True, LoraOptions(), 5000, False),
        (False, LoraOptions(), 50, False),
        (False, LoraOptions(), 5000, True),
        (True, ROWS, 50, True),
        (False, ROWS, 5000, True),
        (True, WHOLE_TABLE, 50, False),
    ],
)
def test_the_head_needs_what_is_estimated(
    tied: bool, lora: LoraOptions, chunk: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("muco_ds.losses.linear_cross_entropy")
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * chunk)
    task, batch = task_of(tied, lora), conversation_pack()
    options = ActivationCheckpointing(float(checkpointing))
    recompute_layers(task.embedder.model, options, freeze_vision=task.embedder.freeze_vision)
    load = replace(load_of(batch), predicted=PREDICTED)
    memory = estimated(task, load, lora=lora, activation_checkpointing=options)
    found = memory.embeddings + memory.activations + memory.logits
    assert memory.logits > 0.2 * found, "the head does not matter here"
    assert found == pytest.approx(peak_bytes(task, batch), rel=0.05)


def test_parts_by_hand() -> None:
    """In bf16 on 8 ranks, with the sizes of the 2B, tied as released and with a head of its own."""
    config, numel = released(1536, 28, 12, 2, 8960), 151_936 * 1536
    load = Load(1, 18000, 18000, 72000, 72000, 4000, 0, predicted=4000)
    several = replace(load, packs=2)

    def memory(load: Load = load, **options: Any) -> Memory:
        defaults = {
            "world_size": 8,
            "precision": "bf16",
            "activation_checkpointing": ActivationCheckpointing(0),
            "predicts_tokens": True,
        }
        return tiny_estimate(config, shipped("zero3"), load, **{**defaults, **options})

    adapter = LoraOptions(rank=8, targets="attention")
    rows = (LoraOptions(rank=8, train_embeddings="new"), LoraOptions(rank=8, train_embeddings="none"))
    config.tie_word_embeddings = True
    tied, adapted = memory(), memory(lora=adapter, new_tokens=32)
    assert tied.weights == memory(predicts_tokens=False).weights, "a tied head has no weights of its own"
    assert tied.embeddings == 4000 * 1536 * (2 + 4 + 2) and adapted.embeddings == 4000 * 1536 * (2 + 4)
    assert tied.update == 12 * numel
    # Where a layer at work needs more than the head at work: the gradient of the table waits beside it.
    longer = replace(load, tokens=30_000)
    assert memory(longer, activation_checkpointing=ActivationCheckpointing()).logits == 2 * numel
    assert memory(activation_checkpointing=ActivationCheckpointing(), lora=adapter, new_tokens=32).logits == 0
    assert vocabulary_head(config, 200_000) == Head(200_000, 1536, tied=True, trained=True, rows=False)
    assert [vocabulary_head(config, 0, lora, 32).rows for lora in rows] == [True, False]
    config.tie_word_embeddings = False
    assert vocabulary_head(config, 200_000) == Head(200_000, 1536, tied=False, trained=True, rows=False)
    own, frozen = memory(), memory(lora=adapter, new_tokens=32)
    share = -(-numel // 8)
    assert own.weights - tied.weights == 2 * share == frozen.weights - adapted.weights
    assert own.optimizer - tied.optimizer == 12 * share and frozen.optimizer == adapted.optimizer
    assert own.gradients - tied.gradients == 4 * share
    assert memory(several).gradients - own.gradients == 4 * (memory(several).optimizer // 12 * 8), "waits whole"
    # A chunk of 220 rows in float32 and bf16; the weight's gradient in float32 and bf16, or reduced: fp32 and copies.
    chunk, states = 220 * 151_936 * 6, 2 * 1536 * 4000
    head = vocabulary_head(config, 0)
    assert head.working_bytes(4000, 2, 0) == states + chunk + 6 * numel
    assert head.working_bytes(4000, 2, 12 * numel) == 12 * numel
    assert own.logits - memory(several).logits == 12 * numel - head.working_bytes(4000, 2, 0)
    assert vocabulary_head(config, 0, adapter, 32).working_bytes(4000, 2, 0) == states + chunk
    assert memory(several, freeze_vision=True).inputs == own.inputs, "no second pass: nothing is kept for it"
