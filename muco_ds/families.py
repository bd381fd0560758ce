"""What differs between the supported families of backbones; nothing else in the package tells them apart.

Shape suffixes in comments: P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, Qwen2_5_VLModel, Qwen2VLModel, Qwen3VLModel


@dataclass(frozen=True)
class TextShape:
    """Sizes of the text tower."""

    hidden: int
    inner: int  # of the MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    normed_heads: bool  # queries and keys pass a norm of their own, head by head

    @property
    def queries(self) -> int:
        """Width of a row's queries, and of what attention returns."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of a row's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's linear layers."""
        attention = [(self.hidden, self.queries), *[(self.hidden, self.keys)] * 2, (self.queries, self.hidden)]
        return [*attention, *[(self.hidden, self.inner)] * 2, (self.inner, self.hidden)]

    @property
    def key_linears(self) -> list[tuple[int, int]]:
        """Those of `linears` that make keys and values."""
        return self.linears[1:3]

    def adapted(self, targets: str) -> list[tuple[int, int]]:
        """Those of `linears` that `model.lora.targets` names."""
        return {"tokens": [], "attention": self.linears[:4]}.get(targets, self.linears)

    def adapted_keys(self, targets: str) -> list[tuple[int, int]]:
        """Those of `key_linears` that `model.lora.targets` names."""
        return [] if targets == "tokens" else self.key_linears


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision tower, and what its layers are made of."""

    width: int
    inner: int  # of the MLP
    depth: int
    heads: int
    out: int  # width of what it hands to the text tower
    merge: int  # patches that become one token
    pixels: int  # values of a patch
    gated: bool  # SwiGLU and float32 RMSNorm; else a plain MLP and LayerNorm
    activation_tensors: int  # inner tensors that the plain MLP's activation function keeps, or SwiGLU
    window_layers: int = 0  # layers that attend inside windows of `window_patches`
    window_patches: int = 0
    deep: int = 0  # feature maps of earlier layers, each with a merger, for the first layers of the text tower
    position_taps: int = 0  # learned position embeddings that are interpolated for a patch

    @property
    def features(self) -> int:
        """How many tensors [N, D] it hands to the text tower."""
        return 1 + self.deep

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's linear layers."""
        mlp = [*[(self.width, self.inner)] * (2 if self.gated else 1), (self.inner, self.width)]
        return [(self.width, 3 * self.width), (self.width, self.width), *mlp]

    @property
    def merger_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a merger, which works on `merge` patches at a time."""
        merged = self.merge * self.width
        return [(merged, merged), (merged, self.out)]


@dataclass(frozen=True)
class Family:
    """One family: its stock class, the stock processors that exported folders name, and its sizes."""

    model: type[PreTrainedModel]
    processor: str
    video_processor: str
    vision: Callable[[PretrainedConfig], VisionShape]
    normed_heads: bool = False


def text_shape(config: PretrainedConfig) -> TextShape:
    """Sizes of the text tower of a backbone's configuration."""
    text = config.text_config
    return TextShape(
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        normed_heads=FAMILIES[config.model_type].normed_heads,
    )


def vision_shape(config: PretrainedConfig) -> VisionShape:
    """Sizes of the vision tower of a backbone's configuration."""
    return FAMILIES[config.model_type].vision(config)


def reads_last_layer(config: PretrainedConfig) -> bool:
    """Whether the last text layer may be asked for some rows alone (`models.last_layer`): not where vision features are
    added behind it."""
    return text_shape(config).layers > vision_shape(config).deep


def _qwen2_vl(config: PretrainedConfig) -> VisionShape:
    vision = config.vision_config
    return VisionShape(
        width=vision.embed_dim,
        inner=int(vision.embed_dim * vision.mlp_ratio),
        depth=vision.depth,
        heads=vision.num_heads,
        out=vision.hidden_size,
        merge=vision.spatial_merge_size**2,
        pixels=_pixels(vision),
        gated=False,
        activation_tensors=3,  # quick-GELU: before, gate, after
    )


def _qwen2_5_vl(config: PretrainedConfig) -> VisionShape:
    vision = config.vision_config
    return _since_qwen2_5(
        vision,
        gated=True,
        activation_tensors=4,  # SwiGLU: gate, its activation, up, their product
        window_layers=vision.depth - len(vision.fullatt_block_indexes),
        window_patches=(vision.window_size // vision.patch_size) ** 2,
    )


def _qwen3_vl(config: PretrainedConfig) -> VisionShape:
    vision = config.vision_config
    return _since_qwen2_5(
        vision,
        gated=False,
        activation_tensors=2,  # GELU: before, after
        deep=len(vision.deepstack_visual_indexes),
        position_taps=4,  # bilinear
    )


def _since_qwen2_5(vision: PretrainedConfig, **own: Any) -> VisionShape:
    """With the sizes that go by the same names since then."""
    return VisionShape(
        width=vision.hidden_size,
        inner=vision.intermediate_size,
        depth=vision.depth,
        heads=vision.num_heads,
        out=vision.out_hidden_size,
        merge=vision.spatial_merge_size**2,
        pixels=_pixels(vision),
        **own,
    )


def _pixels(vision: PretrainedConfig) -> int:
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


FAMILIES = {
    "qwen2_vl": Family(Qwen2VLModel, "Qwen2VLProcessor", "Qwen2VLVideoProcessor", _qwen2_vl),
    "qwen2_5_vl": Family(Qwen2_5_VLModel, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", _qwen2_5_vl),
    "qwen3_vl": Family(Qwen3VLModel, "Qwen3VLProcessor", "Qwen3VLVideoProcessor", _qwen3_vl, normed_heads=True),
}
"""By `model_type` of config.json."""
