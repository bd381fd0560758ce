"""Device memory of one rank, estimated from the configuration and the plan: does a run fit, before a GPU is taken.

What is counted follows what DeepSpeed 0.19, transformers 5.23 and autograd keep (each function says why). Weights,
gradients and optimizer states are exact; activations (muco_ds/memory_activations.py) were compared with what autograd
keeps on a CPU; the allowance is an assumption. None of it has been compared with a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.families import FAMILIES, vision_shape
from muco_ds.memory_activations import NO_ADAPTER, Activations, Head, Load, activation_bytes, feature_bytes
from muco_ds.models.embedder import KEPT_ON_DEVICE
from muco_ds.models.head import tied
from muco_ds.models.lora import adapted_layers, adapter_sizes

GIB = 2**30
_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
CONTEXT = int(1.5 * GIB)  # CUDA context and kernels, cuBLAS and NCCL workspaces: usual sizes, not measured here
_FRAGMENTATION = 0.06  # of everything else: blocks that the allocator holds and cannot use, rounding
_LOSS_TILE = 8192 * 16384  # entries of the largest tile whose gradient the loss holds at a time


@dataclass(frozen=True)
class Weight:
    """One parameter: entries, and whether it is trained."""

    numel: int
    trained: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on the device by part.

    Not part of `total`: `host`, what the DeepSpeed JSON moves to the CPU, and `checkpoint`, what the fullest rank adds
    to one, of which `checkpoint.background` keeps a copy on the host.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # weights of other ranks that ZeRO-3 holds for a while
    inputs: int  # pixels and ids of the largest pack, and kept vision features
    embeddings: int  # or states from which tokens are predicted
    activations: int
    logits: int  # beyond the activations; of a vocabulary head its weight's gradient too
    update: int  # reduction of the largest gradient and the optimizer step, when activations are gone
    allowance: int
    host: int
    checkpoint: int

    @property
    def total(self) -> int:
        apart = ("activations", "logits", "update", "host", "checkpoint")
        kept = sum(getattr(self, f.name) for f in fields(self) if f.name not in apart)
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
    activation_checkpointing: ActivationCheckpointing,
    fused_attention: bool = True,
    lora: LoraOptions = NO_ADAPTER,
    new_tokens: int = 0,
    matryoshka: Sequence[int] = (),
    predicts_tokens: bool = False,
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
        predicts_tokens: the loss is that of a vocabulary head, not of embeddings.
    """
    weights = parameters(backbone, vocabulary, freeze_vision, lora, new_tokens)
    head = vocabulary_head(backbone, vocabulary, lora, new_tokens) if predicts_tokens else None
    weights += [Weight(head.numel, head.trained)] if head is not None and not head.tied else []
    width = _BYTES[precision]
    device, host, optimizer = _states(weights, ds_config, width, world_size, several_packs=load.packs > 1)
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
        "inputs": _inputs(backbone, load, width, keep_features=freeze_vision and load.packs > 1 and head is None),
        "activations": activations.peak,
        "update": _update(weights, ds_config, width, world_size),
    }
    if head is None:
        parts["embeddings"] = embedding_bytes(backbone.text_config.hidden_size, load, matryoshka)
        parts["logits"] = 4 * min(_LOSS_TILE, load.rank_rows * load.keys)
    else:
        reduction = _reduction(head.numel, ds_config, width, world_size)
        parts["embeddings"] = head.state_bytes(load.predicted, width, trained_norm=not lora.rank)
        parts["logits"] = _head_bytes(head, load, width, activations, reduction)
        parts["update"] = max(parts["update"], 2 * head.held_bytes(width))
    written = _written(weights, ds_config, width, world_size, adapter=lora.rank > 0)
    known = Memory(**parts, allowance=0, host=host, checkpoint=optimizer + written)
    return replace(known, allowance=CONTEXT + int(_FRAGMENTATION * known.total))


def _written(weights: list[Weight], ds_config: dict[str, Any], width: int, world_size: int, *, adapter: bool) -> int:
    """Bytes of weights in a checkpoint beside the optimizer's: rank 0's whole; under ZeRO-3 a part of the frozen."""
    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        return 0 if adapter else sum(-(-weight.numel // world_size) for weight in weights if not weight.trained) * width
    return sum(weight.numel for weight in weights if weight.trained or not adapter) * width


def _head_bytes(head: Head, load: Load, width: int, activations: Activations, reduction: int) -> int:
    """What a vocabulary head adds to the peak of the activations.

    Of a single pack the gradient of a head of its own is reduced at once, by `reduction` bytes; several packs' wait.
    """
    at_once = head.trained and not head.tied and load.packs == 1
    working = head.working_bytes(load.predicted, width, reduction if at_once else 0)
    return max(head.held_bytes(width), activations.kept + working - activations.peak)


def embedding_bytes(hidden: int, load: Load, smaller: Sequence[int]) -> int:
    """Rows and keys in float32, their gradients, and the padded buffer through which keys and gradients travel.

    The loss keeps the prefixes of every smaller size at unit length. In the backward pass one size at a time has their
    gradients, by way of their lengths, and that of rows or of keys in a tensor of the whole width. Autograd was seen to
    need 85 % of this on a CPU (2,000 rows, 3,000 keys, sizes 256 and 768 of 1,536).
    """
    entries = hidden * (2 * load.rank_rows + 3 * load.keys)
    if smaller := [size for size in smaller if size < hidden]:
        entries += (sum(smaller) + 3 * max(smaller)) * (load.rank_rows + load.keys)
        entries += hidden * max(load.rank_rows, load.keys)
    return 4 * entries


def vocabulary_head(
    backbone: PretrainedConfig, vocabulary: int, lora: LoraOptions = NO_ADAPTER, new_tokens: int = 0
) -> Head:
    """The head by which tokens are predicted, and what is trained of it (`models.head`, `build.build_task`)."""
    text, shared = backbone.text_config, tied(backbone)
    return Head(
        vocabulary=max(vocabulary, text.vocab_size),
        hidden=text.hidden_size,
        tied=shared,
        trained=not lora.rank or (shared and lora.train_embeddings == "all"),
        rows=bool(shared and lora.rank and lora.train_embeddings == "new" and new_tokens),
    )


def parameters(
    backbone: PretrainedConfig,
    vocabulary: int,
    freeze_vision: bool,
    lora: LoraOptions = NO_ADAPTER,
    new_tokens: int = 0,
) -> list[Weight]:
    """Every parameter, counted on the meta device, where tensors have no content."""
    key = (backbone.to_json_string(), vocabulary, freeze_vision, repr(lora), new_tokens)
    if key not in _counted:  # a tenth of a second, and advice asks many times
        _counted[key] = _count(backbone, vocabulary, freeze_vision, lora, new_tokens)
    return list(_counted[key])


_counted: dict[tuple[str, int, bool, str, int], list[Weight]] = {}


def _count(
    backbone: PretrainedConfig, vocabulary: int, freeze_vision: bool, lora: LoraOptions, new_tokens: int
) -> list[Weight]:
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
) -> tuple[dict[str, int], int, int]:
    """Weights, gradients and optimizer states: bytes on the device by part, on the host, and of the optimizer's alone.

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
    optimizer = states["optimizer"]
    offloaded = []
    if _offloaded(zero, "offload_param"):
        offloaded.append("weights")
    if _offloaded(zero, "offload_optimizer"):
        offloaded += ["optimizer", "gradients"]
    host = sum(states.pop(part) for part in offloaded)
    states |= dict.fromkeys(offloaded, 0)
    states["gradients"] += waiting + _buckets(zero, ds_config, stage, width)
    return states, host, optimizer


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
    reduction = _reduction(max(trained), ds_config, width, world_size)
    copied = 0
    if stage > 0 and not _offloaded(zero, "offload_optimizer"):
        copied = min(
            -(-sum(trained) // world_size), int(zero.get("sub_group_size", 1e9)) if stage == 3 else sum(trained)
        )
    return max(reduction, 4 * copied)


def _reduction(numel: int, ds_config: dict[str, Any], width: int, world_size: int) -> int:
    """A gradient larger than any bucket, and the copies from which it is reduced."""
    copies = 2 * _communicated(ds_config, width) if world_size > 1 else 0
    return numel * (_accumulated(ds_config, width) + copies)


def _inputs(backbone: PretrainedConfig, load: Load, width: int, *, keep_features: bool) -> int:
    """A pack is on the device while it is worked on: its pictures as bytes, and what the vision tower reads of them.

    Of a frozen tower's output, kept from pass one to pass two of several packs, `KEPT_ON_DEVICE` bytes stay there.
    """
    vision = vision_shape(backbone)
    ids = 8 * 6 * load.tokens  # token id, four positions, one index
    pictures = vision.pixels * load.patches // backbone.vision_config.temporal_patch_size
    kept = min(KEPT_ON_DEVICE, feature_bytes(vision, load.rank_patches, width))
    return pictures + width * vision.pixels * load.patches + ids + (kept if keep_features else 0)
