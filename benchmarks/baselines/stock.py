"""The stock model with its optimizer, and padded batches of prompts: what all baselines are made of.

Shape suffixes: B prompts of a batch, L positions of the longest, E pooled rows, D hidden size, P patches, C values of a
patch, I pictures, R queries, K targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from muco_ds.config import RunConfig
from muco_ds.data.collator import Packer
from muco_ds.data.images import ImagePipeline, Patches
from muco_ds.data.schema import QUERY, Dialogue, Side
from muco_ds.families import FAMILIES
from muco_ds.flops import FlopsModel
from muco_ds.models.backbones import load_config, new_rows
from muco_ds.models.lora import add_adapter
from muco_ds.ops.patches import patch_values
from muco_ds.optim import build_optimizer


@dataclass(frozen=True)
class Picture:
    """What the stock image processor makes of one: pixels_PC float32, and its grid (t, h, w)."""

    pixels_PC: np.ndarray
    grid: tuple[int, int, int]


def _as_stock(patches: Patches, images: ImagePipeline) -> Picture:
    frames, palette_CV = images.processor.temporal_patch_size, torch.from_numpy(images.palette_CV)
    values_PC = patch_values(torch.from_numpy(patches.pixels_PY), palette_CV, frames, torch.float32)
    return Picture(values_PC.numpy(), patches.grid)


@dataclass(frozen=True)
class Prompt:
    """One sequence as the chat template gives it. `kind`, `pooled` and `ids_k3`: side, places and ids of its rows."""

    kind: int
    ids_L: np.ndarray  # int64
    positions_3L: np.ndarray  # int64
    pictures: list[Picture]
    pooled: np.ndarray  # int64
    ids_k3: np.ndarray

    @property
    def patches(self) -> list[int]:
        return [len(picture.pixels_PC) for picture in self.pictures]


def render(sides: Sequence[Side], packer: Packer, *, alone: bool) -> list[Prompt]:
    """Dialogues as prompts; `alone`: each turn by itself, with its own copy of the dialogue's pictures."""
    prompts = []
    for side in sides:
        dialogue = side.dialogue
        assert isinstance(dialogue, Dialogue)
        turns = [(i, i + 1) for i in range(len(dialogue.turns))] if alone else [(0, len(dialogue.turns))]
        texts = packer.template.encode_turns(dialogue.turns)
        pictures = [_as_stock(packer.images.patches(ref), packer.images) for ref in dialogue.images]
        grids = [picture.grid for picture in pictures]
        for first, stop in turns:
            made = packer.template.render(texts[first:stop], grids, packer.images.merge_size, history=True)
            ids_k3 = side.ids_k3[first:stop]
            prompts.append(Prompt(side.kind, made.ids_L, made.positions_4L[1:], pictures, made.emb_rows, ids_k3))
    return prompts


def training_flops(flops: FlopsModel, prompts: Sequence[Prompt]) -> float:
    """Model FLOPs of a step over these prompts, without padding."""
    lengths = [len(prompt.ids_L) for prompt in prompts]
    patches = [count for prompt in prompts for count in prompt.patches]
    squares = [sum(size**2 for size in sizes) for sizes in (lengths, patches)]
    return flops.training(sum(lengths), squares[0] / 2, sum(patches), squares[1])


@dataclass(frozen=True)
class Padded:
    """A padded batch. `positions_3BL` None: the model works them out by itself; `mask_BL` None: padding stands behind
    every real token, so that causal attention needs no mask."""

    ids_BL: torch.Tensor
    mask_BL: torch.Tensor | None
    positions_3BL: torch.Tensor | None
    picture_BL: torch.Tensor  # int32, 1 = a token of a picture
    pixels_PC: torch.Tensor | None
    grid_thw_I3: torch.Tensor | None
    prompt_E: torch.Tensor
    place_E: torch.Tensor
    real: int

    def to(self, device: torch.device) -> Padded:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Padded:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Padded:
        moved: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def pad(prompts: Sequence[Prompt], image_token: int, *, as_released: bool) -> Padded:
    """`as_released`: mask and positions are left to the model; else there is no mask and the positions are given."""
    longest = max(len(prompt.ids_L) for prompt in prompts)
    ids_BL = np.zeros((len(prompts), longest), np.int64)
    mask_BL = np.zeros_like(ids_BL)
    positions_3BL = np.zeros((3, *ids_BL.shape), np.int64)
    for row, prompt in enumerate(prompts):
        ids_BL[row, : len(prompt.ids_L)] = prompt.ids_L
        mask_BL[row, : len(prompt.ids_L)] = 1
        positions_3BL[:, row, : len(prompt.ids_L)] = prompt.positions_3L
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    pixels_PC = np.concatenate([picture.pixels_PC for picture in pictures]) if pictures else None
    return Padded(
        ids_BL=torch.from_numpy(ids_BL),
        mask_BL=torch.from_numpy(mask_BL) if as_released else None,
        positions_3BL=None if as_released else torch.from_numpy(positions_3BL),
        picture_BL=torch.from_numpy((ids_BL == image_token).astype(np.int32)),
        pixels_PC=None if pixels_PC is None else torch.from_numpy(pixels_PC),
        grid_thw_I3=torch.tensor([picture.grid for picture in pictures]) if pictures else None,
        prompt_E=torch.tensor([row for row, prompt in enumerate(prompts) for _ in prompt.pooled]),
        place_E=torch.tensor([place for prompt in prompts for place in prompt.pooled]),
        real=int(mask_BL.sum()),
    )


class Stock:
    """The stock model without vocabulary head, its vision tower frozen, and AdamW on float32 weights.

    In bfloat16 the optimizer keeps a float32 copy of what is trained, as ours does.
    """

    model: Any

    def __init__(self, config: RunConfig, tokenizer: Any, device: torch.device) -> None:
        path = config.model.path
        dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
        backbone = load_config(path)
        self.device, self.image_token = device, backbone.image_token_id
        self.attention = _attention(dtype)
        self.model = FAMILIES[backbone.model_type].model.from_pretrained(
            path, dtype=dtype, attn_implementation=self.attention, key_mapping={r"^model\.visual\.": "visual."}
        )
        assert len(tokenizer) <= backbone.text_config.vocab_size, "the shapes leave rows for new tokens"
        freeze(self.model.visual)
        if config.model.lora.rank:
            add_adapter(self.model, config.model.lora, new_rows(tokenizer), config.run.seed)
        self.model.to(device).train()
        self.max_norm = config.optim.max_grad_norm
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.masters = {name: weight.detach().float().requires_grad_() for name, weight in self.trained.items()}
        if dtype == torch.float32:
            self.masters = self.trained
        self.optimizer = build_optimizer(_Weights(self.masters), config.optim)

    def checkpoint(self, on: bool) -> None:
        """Switch activation checkpointing."""
        if on:
            getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)()
        else:
            getattr(self.model, "activation_checkpointing_disable", self.model.gradient_checkpointing_disable)()

    def embed(self, batch: Padded) -> torch.Tensor:
        """emb_ED: the states of all tokens after the final norm, then those of `<|emb|>`, at unit length in float32."""
        batch = batch.to(self.device)
        pictures: dict[str, Any] = {}
        if batch.pixels_PC is not None:
            pictures = {"pixel_values": batch.pixels_PC, "image_grid_thw": batch.grid_thw_I3}
        if batch.positions_3BL is None and pictures:
            pictures["mm_token_type_ids"] = batch.picture_BL
        self.model.rope_deltas = None  # of an earlier batch
        hidden_BLD = self.model(
            input_ids=batch.ids_BL,
            attention_mask=batch.mask_BL,
            position_ids=batch.positions_3BL,
            use_cache=False,
            **pictures,
        ).last_hidden_state
        return F.normalize(hidden_BLD[batch.prompt_E, batch.place_E].float(), dim=-1)

    def update(self) -> None:
        """Clip, AdamW, no gradient left."""
        if self.masters is not self.trained:
            for name, weight in self.trained.items():
                self.masters[name].grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.trained:
            with torch.no_grad():
                torch._foreach_copy_(list(self.trained.values()), list(self.masters.values()))

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of everything trained, before `update`."""
        return {name: weight.grad for name, weight in self.trained.items() if weight.grad is not None}


def freeze(visual: Any) -> None:
    """No gradient of a vision tower's weights, and no graph: checkpointing's hooks would make it one of its inputs."""
    visual.requires_grad_(False)
    visual.forward = torch.no_grad()(visual.forward)


@contextmanager
def plain_linear() -> Iterator[None]:
    """torch's own linear layer: zero.Init puts a slower one that saves memory in its place, for the whole process."""
    patched = F.linear
    F.linear = torch._C._nn.linear
    try:
        yield
    finally:
        F.linear = patched


class _Weights(torch.nn.Module):
    """Gives parameters by the names they have in the model, which decide on weight decay."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self._weights.items())


def _attention(dtype: torch.dtype) -> str:
    """The newest FlashAttention that is installed, as ours takes it."""
    if dtype == torch.bfloat16 and torch.cuda.is_available():
        installed = {
            "flash_attention_3": is_flash_attn_3_available,
            "flash_attention_4": is_flash_attn_4_available,
            "flash_attention_2": is_flash_attn_2_available,
        }
        return next((name for name, available in installed.items() if available()), "sdpa")
    return "sdpa"


def dense_info_nce(
    emb_ED: torch.Tensor, kind_E: torch.Tensor, ids_E3: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean InfoNCE of queries against all targets, as one matrix; other targets of a query's picture are left out."""
    query_E = kind_E == QUERY
    query_RD, target_KD, query_R3, target_K3 = emb_ED[query_E], emb_ED[~query_E], ids_E3[query_E], ids_E3[~query_E]
    own_RK = query_R3[:, None, 1] == target_K3[None, :, 1]
    masked_RK = (query_R3[:, None, 0] == target_K3[None, :, 0]) & ~own_RK
    logits_RK = (query_RD @ target_KD.T / temperature).masked_fill(masked_RK, -torch.inf)
    return F.cross_entropy(logits_RK, own_RK.int().argmax(1))
