"""What autograd keeps of a pack, and what is needed beside it, in bytes: the towers' activations, the vocabulary head.

Compared with what autograd keeps on a CPU (tests/unit/test_memory.py).

Shape suffixes in formulas: T tokens of a pack, J key/value rows its segments attend to (T where turns are causal),
P patches, E pooled rows, K keys of all ranks, N rows that predict a token, V rows of the vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.families import TextShape, VisionShape, reads_last_layer, text_shape, vision_shape
from muco_ds.losses.linear_cross_entropy import chunk_rows

NO_ADAPTER = LoraOptions()


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
    predicted: int = 0  # rows of a pack that the vocabulary head predicts from
    read: int = 0  # rows of a pack that the last text layer is asked for
    read_attended: int = 0  # key/value rows that these attend to


@dataclass(frozen=True)
class Activations:
    """Bytes of the towers: `kept` at the end of their forward pass, and the most at any moment."""

    kept: int
    peak: int


def activation_bytes(
    backbone: PretrainedConfig,
    load: Load,
    *,
    width: int,
    freeze_vision: bool,
    checkpointing: ActivationCheckpointing,
    fused_attention: bool,
    lora: LoraOptions = NO_ADAPTER,
) -> Activations:
    """What is held for the backward pass of the largest pack, and the most, with the buffers of the layer at work.

    Of a layer that is recomputed its input, of any other all that autograd keeps. Recomputing, the backward pass needs
    one layer's worth more, at a time when the layers above have let go of theirs. The text tower goes first, when what
    the vision tower keeps is still there. A frozen vision tower keeps nothing but must get through one block at a time
    before the text tower begins.
    """
    text, vision = text_shape(backbone), vision_shape(backbone)
    text_layer = text_layer_bytes(text, load.tokens, load.attended, width, fused_attention)
    adapted = text.adapted(lora.targets)
    text_layer += adapter_bytes(adapted, load.tokens, width, lora) - unneeded_bytes(text, load.tokens, width, lora)
    last_layer = text_layer
    if reads_last_layer(backbone):
        last_layer = last_layer_bytes(text, load, width, fused_attention)
        last_layer += adapter_bytes(adapted, load.read, width, lora) - unneeded_bytes(text, load.read, width, lora)
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
        vision_kept, vision_peak = feature_bytes(vision, load.patches, width), max(2 * block_inputs + mlp, positions)
    else:
        recomputed = checkpointing.vision_layers(vision.depth)
        vision_kept = recomputed * block_inputs + (vision.depth - recomputed) * block + merger
        vision_peak = vision_kept + (block if recomputed == vision.depth else 0) + mlp
    recomputed = checkpointing.text_layers(text.layers)
    below = vision_kept + rotary + recomputed * layer_inputs
    whole = (text.layers - 1 - recomputed) * text_layer
    # The backward pass has done with the last layer when it comes to the others, and with all of these when it
    # recomputes.
    at_work = max(whole, text_layer if recomputed else 0) + text_working
    return Activations(below + whole + last_layer, max(below + whole + last_layer, below + at_work, vision_peak))


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


def feature_bytes(vision: VisionShape, patches: int, width: int) -> int:
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


def last_layer_bytes(text: TextShape, load: Load, width: int, fused: bool) -> int:
    """Kept by the last decoder layer, which is asked for the read rows alone: as any other by these, and of all rows
    the first norm's, and the norm's of the keys."""
    norms = (4 + 2 * width) * text.hidden * load.tokens
    if text.normed_heads:
        norms += (4 + width) * text.keys * load.tokens
    return norms + text_layer_bytes(text, load.read, load.read_attended, width, fused)


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


@dataclass(frozen=True)
class Head:
    """A vocabulary head [V, D] and what is trained of it.

    Args:
        tied: it is the embedding table.
        trained: its whole weight has a gradient; else at most some rows do.
        rows: some rows of a tied table are trained, which goes by way of a copy of all and of the copy's gradient.
    """

    vocabulary: int
    hidden: int
    tied: bool
    trained: bool
    rows: bool

    @property
    def numel(self) -> int:
        return self.vocabulary * self.hidden

    def state_bytes(self, predicted: int, width: int, *, trained_norm: bool) -> int:
        """From the head's forward pass to its backward: the states' gradients, and what the final norm keeps.

        That is its input in float32 and, for its weight's gradient, the normalised rows.
        """
        return predicted * self.hidden * (width + 4 + (width if trained_norm else 0))

    def working_bytes(self, predicted: int, width: int, reduction: int) -> int:
        """Most beside what the towers keep, while the head is at work.

        Forward: the states, a chunk of float32 logits and in half precision its copy, the weight's gradient in float32
        and in half precision its copy, with trained rows the whole weight with these in it. Backward: gradients of
        states and weight twice, before and after they are scaled, then `reduction` bytes for one that is reduced now.
        Liger's kernel, where it runs, has chunks as large as the states instead.
        """
        half = width if width < 4 else 0
        chunk = min(predicted, chunk_rows(self.vocabulary)) * self.vocabulary * (4 + half)
        copied = width * self.numel if self.rows else 0
        gradient = width * self.numel if self.trained or self.rows else 0
        summed = (4 + half) * self.numel if gradient else 0
        forward = width * self.hidden * predicted + chunk + summed + copied
        backward = width * self.hidden * predicted + 2 * gradient
        return max(forward, backward, reduction)

    def held_bytes(self, width: int) -> int:
        """Through the backward pass of the towers: a tied table's gradient waits for that of the embedded tokens."""
        return width * self.numel if self.tied and self.trained else 0
