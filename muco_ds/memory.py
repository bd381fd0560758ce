"""Device memory of one rank, estimated from the configuration and the plan: does a run fit, before a GPU is taken.

What is counted follows what DeepSpeed 0.19, transformers 5.23 and autograd keep (each function says why). Weights,
gradients and optimizer states are exact; activations were compared with what autograd keeps on a CPU
(tests/unit/test_memory.py); the allowance is an assumption. None of it has been compared with a GPU.

Shape suffixes in formulas: T tokens of a pack, J key/value rows its segments attend to (T where turns are causal),
P patches, E pooled rows, K keys of all ranks, D hidden size, F its MLP, V and M those of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PretrainedConfig

from muco_ds.config_lora import LoraOptions
from muco_ds.families import FAMILIES, TextShape, VisionShape, text_shape, vision_shape
from muco_ds.models.embedder import KEPT_ON_DEVICE
from muco_ds.models.lora import adapted_layers, adapter_sizes

GIB = 2**30
NO_ADAPTER = LoraOptions()
_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
_CONTEXT = int(1.5 * GIB)  # CUDA context and kernels, cuBLAS and NCCL workspaces: usual sizes, not measured here
_FRAGMENTATION = 0.06  # of everything else: blocks that the allocator holds and cannot use, rounding
_LOSS_TILE = 8192 * 16384  # entries of the largest tile whose gradient the loss holds at a time


@dataclass(frozen=True)
class Weight:
    """One parameter: entries, and whether it is trained."""

    numel: int
    trained: bool


@dataclass(frozen=True)
class Load:
    """What a plan puts on the rank that has most of it."""

    packs: int
    tokens: int  # of the largest pack, as are the next two
    attended: int
    patches: int
    rank_patches: int  # of all packs of a rank, as is the next
    rank_rows: int
    keys: int  # of all ranks


@dataclass(frozen=True)
class Memory:
    """Bytes on the device by part; `host` is what the DeepSpeed JSON moves to the CPU and is not part of `total`."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # weights of other ranks that ZeRO-3 holds for a while
    inputs: int  # pixels and ids of the largest pack, and kept vision features
    embeddings: int
    logits: int
    activations: int
    update: int  # reduction of the largest gradient and the optimizer step, when activations are gone
    allowance: int
    host: int

    @property
    def total(self) -> int:
        kept = sum(
            getattr(self, f.name) for f in fields(self) if f.name not in ("activations", "logits", "update", "host")
        )
        return kept + max(self.activations + self.logits, self.update)


def estimate(
    backbone: PretrainedConfig,
    ds_config: dict[str, Any],
    load: Load,
    *,
    vocabulary: int,
    world_size: int,
    precision: str,
    freeze_vision: bool,
    activation_checkpointing: bool,
    fused_attention: bool = True,
    lora: LoraOptions = NO_ADAPTER,
    new_tokens: int = 0,
    matryoshka: Sequence[int] = (),
) -> Memory:
    """Memory of the rank that has most to do.

    Args:
        backbone: configuration of a supported backbone.
        ds_config: as `build_deepspeed_config` returns it.
        vocabulary: ids the tokenizer can produce.
        precision: "fp32" or "bf16".
        fused_attention: flash-attn or torch's varlen_attn in the text tower; else grouped SDPA.
        new_tokens: those whose rows are trained beside an adapter.
        matryoshka: smaller sizes of the embedding that the loss is taken over as well.
    """
    weights = parameters(backbone, vocabulary, freeze_vision, lora, new_tokens)
    width = _BYTES[precision]
    device, host = _states(weights, ds_config, width, world_size, several_packs=load.packs > 1)
    hidden = backbone.text_config.hidden_size
    activations = activation_bytes(
        backbone,
        load,
        width=width,
        freeze_vision=freeze_vision,
        checkpointing=activation_checkpointing,
        fused_attention=fused_attention,
        lora=lora,
    )
    parts = {
        **device,
        "gathered": _gathered(weights, ds_config, width, world_size),
        "inputs": _inputs(backbone, load, width, freeze_vision),
        "embeddings": embedding_bytes(hidden, load, [size for size in matryoshka if size < hidden]),
        "logits": 4 * min(_LOSS_TILE, load.rank_rows * load.keys),
        "activations": activations,
        "update": _update(weights, ds_config, width, world_size),
    }
    known = Memory(**parts, allowance=0, host=host)
    return Memory(**parts, allowance=_CONTEXT + int(_FRAGMENTATION * known.total), host=host)


def embedding_bytes(hidden: int, load: Load, smaller: Sequence[int]) -> int:
    """Rows and keys in float32, their gradients, and the padded buffer through which keys and gradients travel.

    The loss keeps the prefixes of every smaller size at unit length. In the backward pass one size at a time has their
    gradients, by way of their lengths, and that of rows or of keys in a tensor of the whole width. Autograd was seen to
    need 85 % of this on a CPU (2,000 rows, 3,000 keys, sizes 256 and 768 of 1,536).
    """
    entries = hidden * (2 * load.rank_rows + 3 * load.keys)
    if smaller:
        entries += (sum(smaller) + 3 * max(smaller)) * (load.rank_rows + load.keys)
        entries += hidden * max(load.rank_rows, load.keys)
    return 4 * entries


def parameters(
    backbone: PretrainedConfig,
    vocabulary: int,
    freeze_vision: bool,
    lora: LoraOptions = NO_ADAPTER,
    new_tokens: int = 0,
) -> list[Weight]:
    """Every parameter, counted on the meta device, where tensors have no content."""
    with torch.device("meta"):
        model = FAMILIES[backbone.model_type].model(backbone)
    rows = max(vocabulary, backbone.text_config.vocab_size)
    weights = []
    for name, parameter in model.named_parameters():
        numel = parameter.numel()
        trained = lora.rank == 0 and not (freeze_vision and name.startswith("visual."))
        if name.endswith("embed_tokens.weight"):  # the table grows where the tokenizer has more ids
            numel = rows * parameter.shape[1]
            trained = trained or lora.train_embeddings == "all"
        weights.append(Weight(numel, trained))
    if lora.rank:
        sizes = [size for _, layer in adapted_layers(model, lora) for size in adapter_sizes(layer, lora)]
        if lora.train_embeddings == "new" and new_tokens:
            sizes.append(new_tokens * backbone.text_config.hidden_size)
        weights += [Weight(size, trained=True) for size in sizes]
    return weights


def _states(
    weights: list[Weight], ds_config: dict[str, Any], width: int, world_size: int, *, several_packs: bool
) -> tuple[dict[str, int], int]:
    """Weights, gradients and optimizer states: bytes on the device by part, and bytes on the host.

    - Stage 3 splits each parameter on its own, rounded up; stages 1 and 2 split all trained ones together.
    - Adam keeps two float32 moments of the trained ones. ZeRO keeps a float32 master copy, of float32 weights as well.
    - Reduced gradients are kept in `grad_accum_dtype`, split from stage 1 on (stage 1 also keeps them whole). On their
      way they lie in one bucket (stages 1 and 2 with overlap_comm: two).
    - With several packs, gradients wait whole on every rank, in that type too, until all packs are through
      (`coalesce_grad_reduction`).
    """
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    trained = [weight.numel for weight in weights if weight.trained]
    everything, ours = sum(weight.numel for weight in weights), sum(trained)
    share = ours
    if stage == 3:
        everything = sum(-(-weight.numel // world_size) for weight in weights)
        share = sum(-(-numel // world_size) for numel in trained)
    elif stage > 0:
        share = -(-ours // world_size)
    accumulated = _accumulated(ds_config, width)
    master = 4 * share if stage > 0 else 0
    reduced = accumulated * share if stage > 0 else 0
    waiting = (accumulated if several_packs else 0) * ours
    if stage == 0:
        waiting = 4 * ours
    elif stage == 1:
        waiting = accumulated * ours
    states = {"weights": width * everything, "gradients": reduced, "optimizer": 8 * share + master}
    offloaded = []
    if _offloaded(zero, "offload_param"):
        offloaded.append("weights")
    if _offloaded(zero, "offload_optimizer"):
        offloaded += ["optimizer", "gradients"]
    host = sum(states.pop(part) for part in offloaded)
    states |= dict.fromkeys(offloaded, 0)
    states["gradients"] += waiting + _buckets(zero, ds_config, stage, width)
    return states, host


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _buckets(zero: dict[str, Any], ds_config: dict[str, Any], stage: int, width: int) -> int:
    """Buffers through which gradients are reduced: allocated whole, however small the model."""
    if stage == 0 or not zero.get("contiguous_gradients", True):
        return 0
    size = int(zero.get("reduce_bucket_size", 5e8))
    if stage == 3:
        return size * _communicated(ds_config, width)
    return size * width * (2 if zero.get("overlap_comm", False) else 1)


def _accumulated(ds_config: dict[str, Any], width: int) -> int:
    return _BYTES[ds_config.get("data_types", {}).get("grad_accum_dtype") or ("fp32" if width == 4 else "bf16")]


def _communicated(ds_config: dict[str, Any], width: int) -> int:
    return _BYTES[ds_config.get("communication_data_type") or ("fp32" if width == 4 else "bf16")]


def _gathered(weights: list[Weight], ds_config: dict[str, Any], width: int, world_size: int) -> int:
    """Whole weights under ZeRO-3: small ones stay, of the others as many as `stage3_max_live_parameters` allows.

    That many are really held, because what is used again within `stage3_max_reuse_distance` is not released. One rank
    holds everything already.
    """
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage", 0) < 3 or (world_size == 1 and not _offloaded(zero, "offload_param")):
        return 0
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    small = sum(weight.numel for weight in weights if weight.numel <= threshold)
    large = [weight.numel for weight in weights if weight.numel > threshold]
    # The limit stops prefetching; the module that is running gets its weights in any case.
    live = max(int(zero.get("stage3_max_live_parameters", 1e9)), max(large, default=0))
    return width * (small + min(sum(large), live))


def _update(weights: list[Weight], ds_config: dict[str, Any], width: int, world_size: int) -> int:
    """What comes after the activations: the last gradient is that of the embedding table, larger than any bucket, and
    is reduced from copies of its own; the step then flattens gradients into a float32 copy."""
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    trained = [weight.numel for weight in weights if weight.trained]
    largest = max(trained)
    copies = 2 * _communicated(ds_config, width) if world_size > 1 else 0
    reduction = largest * (_accumulated(ds_config, width) + copies)
    copied = 0
    if stage > 0 and not _offloaded(zero, "offload_optimizer"):
        copied = min(
            -(-sum(trained) // world_size), int(zero.get("sub_group_size", 1e9)) if stage == 3 else sum(trained)
        )
    return max(reduction, 4 * copied)


def _inputs(backbone: PretrainedConfig, load: Load, width: int, freeze_vision: bool) -> int:
    """A pack is on the device while it is worked on; float32 pixels are most of it. Of a frozen tower's output, which
    is kept from pass one to pass two where there are several packs, `KEPT_ON_DEVICE` bytes stay there."""
    vision = vision_shape(backbone)
    ids = 8 * 6 * load.tokens  # token id, four positions, one index
    cast = width * vision.pixels * load.patches if width < 4 else 0
    kept = min(KEPT_ON_DEVICE, _features(vision, load.rank_patches, width))
    return 4 * vision.pixels * load.patches + cast + ids + (kept if freeze_vision and load.packs > 1 else 0)


def activation_bytes(
    backbone: PretrainedConfig,
    load: Load,
    *,
    width: int,
    freeze_vision: bool,
    checkpointing: bool,
    fused_attention: bool,
    lora: LoraOptions = NO_ADAPTER,
) -> int:
    """Most that is held at once for the backward pass of the largest pack, with the buffers of the layer at work.

    Without checkpointing everything that autograd keeps; with it the input of each layer and one layer's worth at a
    time. The text tower goes first in the backward pass, when what the vision tower keeps is still there. A frozen
    vision tower keeps nothing but must get through one block at a time before the text tower begins.
    """
    text, vision = text_shape(backbone), vision_shape(backbone)
    text_layer = text_layer_bytes(text, load.tokens, load.attended, width, fused_attention)
    adapted = text.adapted(lora.targets)
    text_layer += adapter_bytes(adapted, load.tokens, width, lora) - unneeded_bytes(text, load.tokens, width, lora)
    text_working = 3 * width * text.inner * load.tokens  # gradients of the three inner MLP tensors
    if lora.dora:  # to find the rows' lengths: the update, scaled, and added to the weight
        text_working += 3 * width * max((inputs * outputs for inputs, outputs in adapted), default=0)
    rotary = 2 * width * load.tokens * text.head_dim
    layer_inputs = width * text.hidden * load.tokens
    block = vision_block_bytes(vision, load.patches, width, fused_attention)
    block += adapter_bytes(vision.linears, load.patches, width, lora)
    mlp = 3 * width * load.patches * vision.inner
    block_inputs = width * vision.width * load.patches
    merger = (4 + 3 * vision.deep) * block_inputs  # the input of an earlier block's merger is that of the next block
    # Position embeddings as looked up, times their float32 weights.
    positions = vision.position_taps * (width + 4) * vision.width * load.patches
    if freeze_vision:
        vision_kept, vision_peak = _features(vision, load.patches, width), max(2 * block_inputs + mlp, positions)
    elif checkpointing:
        vision_kept = vision.depth * block_inputs + merger
        vision_peak = vision_kept + block + mlp
    else:
        vision_kept = vision_peak = vision.depth * block + merger
    text_kept = text.layers * layer_inputs + text_layer if checkpointing else text.layers * text_layer
    return max(rotary + text_kept + text_working + vision_kept, vision_peak)


def adapter_bytes(linears: list[tuple[int, int]], rows: int, width: int, lora: LoraOptions) -> int:
    """Kept beside a layer for the adapters of its linear layers (inputs, outputs).

    What the first of the two small matrices gives; with dropout its input once more, and what was left out, in a byte;
    with DoRA both outputs, of the weight and of the update, for the gradient of the lengths.
    """
    if not lora.rank:
        return 0
    dropout, outputs = (width + 1 if lora.dropout else 0), (2 * width if lora.dora else 0)
    return rows * sum(width * lora.rank + dropout * inputs + outputs * output for inputs, output in linears)


def unneeded_bytes(text: TextShape, tokens: int, width: int, lora: LoraOptions) -> int:
    """Of `text_layer_bytes`, inputs of weights that have no gradient beside an adapter, and are not kept for them.

    Those of the norms' own weights, and of linear layers without an update.
    """
    if not lora.rank:
        return 0
    unneeded = 2 * text.hidden + (text.queries + text.keys if text.normed_heads else 0)
    if lora.targets in ("attention", "tokens"):
        unneeded += text.hidden + text.inner
    if lora.targets == "tokens":
        unneeded += text.hidden
    return width * unneeded * tokens


def _features(vision: VisionShape, patches: int, width: int) -> int:
    return width * vision.out * vision.features * patches // vision.merge


def text_layer_bytes(text: TextShape, tokens: int, attended: int, width: int, fused: bool) -> int:
    """Kept by one decoder layer.

    - RMSNorm, twice: its input in float32 (in fp32 the residual stream itself), the normalised row, and the row times
      the weight, which is the input of the projections.
    - Norms of queries and keys, where there are any: the same, except that what comes out is not kept.
    - Attention: rotated queries, keys and values of the rows attended to, the output (input of the last projection),
      and one float32 log-sum-exp a head. Grouped SDPA repeats keys and values to all heads and keeps its output apart
      from that of the regrouping.
    - SwiGLU: gate, its activation, up, and their product.
    """
    key_values = text.keys if fused else text.queries
    norms = 2 * (4 + 2 * width) * text.hidden * tokens
    if text.normed_heads:
        norms += (4 + width) * (text.queries + text.keys) * tokens
    outputs = 2 if fused else 3
    attention = width * (outputs * text.queries * tokens + 2 * key_values * attended) + 4 * text.heads * tokens
    return norms + attention + 4 * width * text.inner * tokens


def vision_block_bytes(vision: VisionShape, patches: int, width: int, fused: bool) -> int:
    """Kept by one block of the vision tower.

    LayerNorm keeps its input and output (float32 RMSNorm in Qwen2.5-VL: as in the text tower), attention the joint
    projection (values are a view of it), rotated queries and keys, and the output, twice where pictures are joined
    after SDPA; the MLP its inner tensors.
    """
    size = vision.width
    norms = 2 * (4 + 2 * width) * size if vision.gated else 2 * 2 * width * size
    attention = width * size * (3 + 2 + (1 if fused else 2)) + 4 * vision.heads
    return patches * (norms + attention + vision.activation_tensors * width * vision.inner)
