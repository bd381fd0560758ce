"""The estimate against what is really there: DeepSpeed's tensors on two ranks, and what autograd keeps and needs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Qwen2VLConfig, Qwen3VLConfig

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.distributed.testing import run_distributed
from muco_ds.families import FAMILIES, text_shape, vision_shape
from muco_ds.memory import GIB, Memory, estimate, parameters
from muco_ds.memory_activations import Load, activation_bytes, text_layer_bytes, vision_block_bytes
from muco_ds.models.attention import register_attention
from muco_ds.models.backbones import load_backbone
from muco_ds.models.embedder import KEPT_ON_DEVICE, Embedder
from muco_ds.models.lora import add_adapter
from muco_ds.models.recompute import recompute_layers

from tiny_models import model_folder, new_embedder, pack, picture

REPOSITORY = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
NOTHING = Load(packs=1, tokens=0, attended=0, patches=0, rank_patches=0, rank_rows=0, keys=0)


def ds_config(stage: int, precision: str, ranks: int, **zero: Any) -> dict[str, Any]:
    return {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": stage, **SMALL, **zero},
    }


CASES = [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]  # bf16 at stage 1 takes another optimizer


def states_on_a_rank(folder: Path, batch: PackedBatch) -> list[dict[str, int]]:
    """Bytes of DeepSpeed's own tensors after a backward of the tiny model, by part of the estimate, for each case."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed("gloo", verbose=False)
    found = []
    for stage, precision in CASES:
        model = load_backbone(str(folder), dtype=DTYPES[precision], attention="sdpa", vocabulary=0)
        embedder = Embedder(model, freeze_vision=True)
        trained = [parameter for parameter in embedder.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        engine, *_ = deepspeed.initialize(model=embedder, optimizer=optimizer, config=ds_config(stage, precision, 2))
        engine.backward(engine(batch).sum())
        found.append(states(engine.optimizer, list(embedder.parameters()), stage))
        engine.destroy()
    return found


def states(zero: Any, parameters: list[Any], stage: int) -> dict[str, int]:
    if stage == 3:
        weights: list[torch.Tensor] = [parameter.ds_tensor for parameter in parameters]
        gradients = [zero.grad_partitions_flat_buffer]
        masters = zero.fp32_partitioned_groups_flat
    else:
        weights = parameters
        gradients = [tensor for group in zero.averaged_gradients.values() for tensor in group]
        masters = zero.single_partition_of_fp32_groups
    zero.step()
    moments = [tensor for state in zero.optimizer.state.values() for tensor in state.values() if tensor.numel() > 1]
    parts = {"weights": weights, "gradients": gradients, "optimizer": moments + masters}
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in parts.items()}


def test_states_are_those_of_deepspeed() -> None:
    config = new_embedder().model.config
    found = run_distributed(states_on_a_rank, 2, model_folder("qwen2_vl"), packed(2, history=True))[0]
    for (stage, precision), real in zip(CASES, found, strict=True):
        json_tree = ds_config(stage, precision, 2, contiguous_gradients=False)
        estimated = tiny_estimate(config, json_tree, NOTHING, world_size=2, precision=precision)
        if stage == 1:  # gradients are there whole until the backward pass is through
            trained = sum(weight.numel for weight in parameters(config, 0, freeze_vision=True) if weight.trained)
            real["gradients"] += 4 * trained
        # Partitions of stages 1 and 2 are padded by a few entries.
        assert {name: getattr(estimated, name) for name in real} == pytest.approx(real, rel=1e-4), (stage, precision)


def tiny_estimate(config: Any, json_tree: dict[str, Any], load: Load, **options: Any) -> Memory:
    defaults = {
        "vocabulary": 0,
        "precision": "fp32",
        "freeze_vision": True,
        "activation_checkpointing": ActivationCheckpointing(0),
    }
    return estimate(config, json_tree, load, **{**defaults, **options})


def packed(examples: int, history: bool, kind: str = "qwen2_vl") -> PackedBatch:
    turns = tuple(f"what is this red thing near box {j}" for j in range(4))
    return pack([Dialogue(turns, (picture(i, 84, 112),)) for i in range(examples)], history, kind)


def bigger(dtype: torch.dtype, frozen: bool, kind: str = "qwen2_vl") -> Embedder:
    """Other proportions than the tiny model's: wider MLP, fewer key/value heads, other width of the vision tower."""
    register_attention()
    config = copy.deepcopy(new_embedder(kind).model.config)
    tree = config.to_dict()
    rope = {**tree["text_config"]["rope_parameters"], "mrope_section": [4, 6, 6]}
    tree["text_config"] |= {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
        "rope_parameters": rope,
    }
    tree["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    if kind == "qwen2_vl":
        tree["text_config"] |= {"layer_types": ["full_attention"] * 5}
        tree["vision_config"] |= {"embed_dim": 160, "depth": 4, "hidden_size": 256}
    else:
        tree["text_config"] |= {"head_dim": 32}
        tree["vision_config"] |= {"hidden_size": 160, "intermediate_size": 560, "depth": 4, "out_hidden_size": 256}
    attention = {"": "muco_sdpa", "text_config": "muco_sdpa", "vision_config": "sdpa"}
    model = FAMILIES[kind].model._from_config(type(config)(**tree), dtype=dtype, attn_implementation=attention)
    return Embedder(model, freeze_vision=frozen)


def peak_bytes(embedder: Embedder, batch: PackedBatch) -> int:
    """Most memory that a forward and backward allocate at any moment, gradients dropped as soon as they are there."""
    for parameter in filter(lambda p: p.requires_grad, embedder.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    embedder.train()
    embedder(batch).sum().backward()  # what is made once for the batch is made here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        emb_ED = embedder(batch)
        with record_function("between"):
            (emb_ED * emb_ED.detach().cos()).sum().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("share", [1, 0.5, 0], ids=["checkpointing", "half", "plain"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind, big, history",
    [
        ("qwen2_vl", False, True),
        ("qwen2_5_vl", False, False),
        ("qwen3_vl", False, False),
        ("qwen2_vl", True, True),
        ("qwen3_vl", True, True),
    ],
)
def test_activations_are_what_is_really_needed(
    kind: str, big: bool, history: bool, precision: str, frozen: bool, share: float
) -> None:
    dtype = DTYPES[precision]
    made = bigger(dtype, frozen, kind) if big else new_embedder(kind, dtype=dtype, freeze_vision=frozen)
    checkpointing = ActivationCheckpointing(share)
    recompute_layers(made.model, checkpointing, freeze_vision=frozen)
    batch = packed(8, history, kind)
    estimated = activation_bytes(
        made.model.config,
        load_of(batch),
        width=dtype.itemsize,
        freeze_vision=frozen,
        checkpointing=checkpointing,
        fused_attention=False,
    )
    assert estimated.peak == pytest.approx(peak_bytes(made, batch), rel=0.2)


@pytest.mark.parametrize("share", [1, 0], ids=["checkpointing", "plain"])
@pytest.mark.parametrize(
    "lora",
    [
        LoraOptions(rank=8, dropout=0.1),
        LoraOptions(rank=8, dora=True, train_embeddings="none"),
        LoraOptions(rank=8, targets="all"),
        LoraOptions(rank=8, dora=True, targets="attention", train_embeddings="all"),
        LoraOptions(rank=1, targets="tokens"),
        LoraOptions(rank=1, dora=True, targets="tokens", train_embeddings="all"),
    ],
)
def test_activations_beside_an_adapter(lora: LoraOptions, share: float) -> None:
    frozen = lora.targets != "all"
    made, batch = bigger(torch.bfloat16, frozen), packed(8, True)
    config = made.model.config
    add_adapter(made.model, lora, [0, 1, 2], seed=0)
    expected = [(p.numel(), p.requires_grad) for p in made.model.parameters()]
    found = [(weight.numel, weight.trained) for weight in parameters(config, 0, frozen, lora, new_tokens=3)]
    assert sorted(found) == sorted(expected)
    checkpointing = ActivationCheckpointing(share)
    recompute_layers(made.model, checkpointing, freeze_vision=frozen)
    options: dict[str, Any] = {"width": 2, "freeze_vision": frozen, "checkpointing": checkpointing, "lora": lora}
    estimated = activation_bytes(config, load_of(batch), fused_attention=False, **options)
    assert estimated.peak == pytest.approx(peak_bytes(made, batch), rel=0.2)


def load_of(batch: PackedBatch) -> Load:
    attended = int(batch.segments.cu_k_S1[-1])
    rows = len(batch.emb_index_E)
    read, read_attended = len(batch.read_rows_Q), int(batch.read_segments.cu_k_S1[-1])
    return Load(
        1, batch.tokens, attended, batch.patches, batch.patches, rows, rows, read=read, read_attended=read_attended
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_autograd_keeps_what_a_layer_is_said_to_keep(kind: str, precision: str) -> None:
    """Distinct storages that autograd saves in one decoder layer more, and in one vision block more."""
    dtype = DTYPES[precision]
    batch = packed(6, history=False, kind=kind)
    made = bigger(dtype, False, kind)
    text, vision = text_shape(made.model.config), vision_shape(made.model.config)
    whole = saved_bytes(made, batch)
    made.model.language_model.layers = made.model.language_model.layers[1:]  # the last one is asked for some rows
    made.model.config.text_config.num_hidden_layers -= 1
    fewer_layers = saved_bytes(made, batch)
    made.model.visual.blocks = made.model.visual.blocks[:-1]
    fewer_blocks = saved_bytes(made, batch)
    load, width = load_of(batch), dtype.itemsize
    layer = text_layer_bytes(text, load.tokens, load.attended, width, fused=False)
    assert whole - fewer_layers == pytest.approx(layer, rel=0.1)
    block = vision_block_bytes(vision, load.patches, width, fused=False)
    assert fewer_layers - fewer_blocks == pytest.approx(block, rel=0.1)


def saved_bytes(embedder: Embedder, batch: PackedBatch) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in embedder.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embedder.train()
        out_ED = embedder(batch)
    assert out_ED.requires_grad  # alive until here, or storages would be used twice
    return sum(kept.values())


def released(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> Qwen2VLConfig:
    text = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    text |= {"num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": 151936}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": hidden}
    return Qwen2VLConfig(text_config=text, vision_config=vision)


def shipped(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())


def test_the_released_2b() -> None:
    """Parts worked out by hand: 2.21 B parameters, 1.54 B of them trained, on 64 ranks."""
    config = released(1536, 28, 12, 2, 8960)
    weights = parameters(config, 151700, freeze_vision=True)
    everything, trained = (sum(w.numel for w in part) for part in (weights, [w for w in weights if w.trained]))
    assert everything == pytest.approx(2.209e9, rel=1e-3) and trained == pytest.approx(1.5437e9, rel=1e-3)
    load = Load(1, 18000, 18000, 72000, 72000, 224, 7168)
    options: dict[str, Any] = {
        "world_size": 64,
        "precision": "bf16",
        "activation_checkpointing": ActivationCheckpointing(),
    }
    zero2, zero3, offload = (
        tiny_estimate(config, shipped(name), load, **options) for name in ("zero2", "zero3", "zero3_offload")
    )
    assert zero2.weights == 2 * everything and zero3.weights == pytest.approx(2 * everything / 64, rel=1e-3)
    assert zero2.optimizer == pytest.approx(12 * trained / 64, rel=1e-3) == zero3.optimizer
    assert zero2.gradients == pytest.approx(4 * trained / 64 + 2 * 2 * 2e8, rel=1e-3)
    assert zero3.gradients == pytest.approx(4 * trained / 64 + 4 * 5e7, rel=1e-3)
    assert (offload.weights, offload.optimizer) == (0, 0)
    assert offload.host == pytest.approx((2 * everything + 16 * trained) / 64, rel=1e-3)
    assert 2e9 <= zero3.gathered <= 2e9 + 2e7 and zero2.gathered == 0
    assert zero3.update == 151936 * 1536 * (4 + 4 + 4)
    # Layers' inputs, and one layer's norms, attention, MLP and its gradients.
    layer = 2 * 8 * 1536 + 2 * (2 * 1536 + 2 * 256) + 4 * 12 + (4 + 3) * 2 * 8960
    assert zero3.activations == pytest.approx(18000 * (27 * 2 * 1536 + layer + 2 * 2 * 128 + 2 * 1536), rel=1e-2)
    assert 8 * GIB < zero3.total < 12 * GIB


def test_the_released_qwen3_vl_2b() -> None:
    """Its 2,127,532,032 parameters; head norms, and three feature maps beside the tower's output, by hand."""
    text = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    config = Qwen3VLConfig(
        text_config={**text, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936},
        vision_config={**vision, "out_hidden_size": 2048, "num_heads": 16},
    )
    assert sum(weight.numel for weight in parameters(config, 151671, freeze_vision=True)) == 2_127_532_032
    attention = 2 * (2 * 2048 + 2 * 1024) + 4 * 16
    layer = 2 * 8 * 2048 + 6 * (2048 + 1024) + attention + 4 * 2 * 6144
    assert text_layer_bytes(text_shape(config), 1, 1, 2, fused=True) == layer
    assert vision_block_bytes(vision_shape(config), 1, 2, fused=True) == 2 * (4 + 6) * 1024 + 4 * 16 + 2 * 2 * 4096
    options: dict[str, Any] = {"world_size": 8, "precision": "bf16"}
    one = Load(1, 1000, 1000, 4000, 4000, 14, 14)
    several = replace(one, packs=2)
    kept = [tiny_estimate(config, shipped("zero3"), load, **options).inputs for load in (one, several)]
    assert kept[1] - kept[0] == 2 * 2048 * 4 * 1000


def test_what_a_change_costs_or_saves() -> None:
    config = released(1536, 28, 12, 2, 8960)
    load = Load(1, 18000, 18000, 72000, 72000, 224, 7168)
    several = replace(load, packs=3, rank_patches=3 * 72000)

    def memory(load: Load = load, **options: Any) -> Memory:
        defaults = {"world_size": 8, "precision": "bf16", "activation_checkpointing": ActivationCheckpointing()}
        return tiny_estimate(config, shipped("zero3"), load, **{**defaults, **options})

    trained = sum(w.numel for w in parameters(config, 0, freeze_vision=True) if w.trained)
    assert memory(several).gradients - memory().gradients == 4 * trained  # whole, until all packs are through
    assert memory(several).inputs - memory().inputs == 2 * 1536 * 3 * 72000 // 4  # the vision tower's output
    many = replace(load, packs=99, rank_patches=99 * 72000)
    assert memory(many).inputs - memory().inputs == KEPT_ON_DEVICE  # and no more than that
    assert memory(activation_checkpointing=ActivationCheckpointing(0)).activations > 10 * memory().activations
    assert memory(freeze_vision=False).optimizer > memory().optimizer
    assert memory(world_size=64).total < memory().total
    assert memory(vocabulary=200_000).weights - memory().weights == 2 * (200_000 - 151_936) * 1536 // 8
    assert memory(world_size=1).gathered == 0


def test_parts_by_hand() -> None:
    """On the 2B's sizes, where a part that is small in the measured models is not."""
    config = released(1536, 28, 12, 2, 8960)
    text, vision = text_shape(config), vision_shape(config)
    fused = 2 * 8 * 1536 + 2 * (2 * 1536 + 2 * 2 * 256) + 4 * 12 + 4 * 2 * 8960  # each attended row counted twice here
    assert text_layer_bytes(text, 1, 2, 2, fused=True) == fused
    assert text_layer_bytes(text, 1, 2, 2, fused=False) == fused + 2 * (1536 + 2 * 2 * (1536 - 256))
    block = 2 * (4 * 1280 + 6 * 1280 + 3 * 5120) + 4 * 16
    assert vision_block_bytes(vision, 1, 2, fused=True) == block
    options: dict[str, Any] = {"width": 2, "checkpointing": ActivationCheckpointing(0), "fused_attention": True}
    load = Load(1, 1000, 1000, 4000, 4000, 14, 14)
    frozen, trained = (activation_bytes(config, load, freeze_vision=f, **options) for f in (True, False))
    assert trained.peak - frozen.peak == 4000 * (32 * block + 4 * 2 * 1280) - 2 * 1536 * 1000
    weights = parameters(config, 0, freeze_vision=True)
    small = sum(weight.numel for weight in weights if weight.numel <= 100_000)
    zero3 = tiny_estimate(config, shipped("zero3"), NOTHING, world_size=8, precision="bf16")
    assert zero3.gathered == 2 * (small + 10**9) and small > 0
