"""Padded batches, one forward each: the released MuCo's two, the same tuned, and every turn as a prompt of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from muco_ds.data.collator import Packer
from muco_ds.data.schema import QUERY, Side
from muco_ds.flops import FlopsModel

from baselines.stock import Padded, Prompt, Stock, dense_info_nce, pad, plain_linear, render, training_flops
from harness import Phases


@dataclass(frozen=True)
class Form:
    """How a system runs a step.

    `rows`: prompts of a padded batch, at most (0: all of a side); `sort`: by length first; `cached`: two passes (Gao et
    al. 2021, arXiv 2101.06983), so that one batch's activations are held at a time.
    """

    rows: int = 0
    sort: bool = True
    checkpointing: bool = False
    cached: bool = False
    as_released: bool = False

    @property
    def label(self) -> str:
        size = f"{self.rows} prompts a batch" if self.rows else "a side a batch"
        extras = [("checkpointing", self.checkpointing), ("gradient cache", self.cached)]
        return ", ".join([size, *(name for name, on in extras if on)])


RELEASED = Form(sort=False, checkpointing=True, as_released=True)


class PaddedSystem:
    """One global batch, trained on as a `Form` says."""

    def __init__(
        self, stock: Stock, sides: Sequence[Side], packer: Packer, temperature: float, flops: FlopsModel, *, alone: bool
    ) -> None:
        self.stock, self.temperature = stock, temperature
        self._render = partial(render, sides, packer, alone=alone)
        self._flops = flops
        self.use(RELEASED)

    def use(self, form: Form) -> None:
        self.form = form
        self.batches, self.prompts = self.prepare()
        if torch.cuda.is_available():
            self.batches = [batch.pin_memory() for batch in self.batches]
        self._kind_E = torch.tensor([p.kind for p in self.prompts for _ in p.pooled], device=self.stock.device)
        ids_E3 = torch.cat([torch.from_numpy(p.ids_k3) for p in self.prompts])
        self._ids_E3 = ids_E3.to(self.stock.device)

    def prepare(self) -> tuple[list[Padded], list[Prompt]]:
        """What a loader does for a step: decode, tokenise, pad. The prompts come in the batches' order."""
        parts: list[list[Prompt]] = []
        prompts = self._render()
        for kind in sorted({prompt.kind for prompt in prompts}):
            side = [prompt for prompt in prompts if prompt.kind == kind]
            if self.form.sort:
                side.sort(key=lambda prompt: len(prompt.ids_L))
            size = self.form.rows or len(side)
            parts += [side[i : i + size] for i in range(0, len(side), size)]
        batches = [pad(part, self.stock.image_token, as_released=self.form.as_released) for part in parts]
        return batches, [prompt for part in parts for prompt in part]

    def step(self) -> object:
        loss = self.backward()
        self.update()
        return loss

    def update(self) -> None:
        self.stock.update()

    def gradients(self) -> Mapping[str, torch.Tensor]:
        return self.stock.gradients()

    @plain_linear()
    def backward(self) -> torch.Tensor:
        """Forward and backward of the whole batch; returns the loss."""
        self.stock.checkpoint(self.form.checkpointing)
        forwards = [partial(self.stock.embed, batch) for batch in self.batches]
        if self.form.cached:
            return self._cached(forwards)
        loss = self.loss(torch.cat([forward() for forward in forwards]))
        loss.backward()
        return loss.detach()

    def loss(self, emb_ED: torch.Tensor) -> torch.Tensor:
        return dense_info_nce(emb_ED, self._kind_E, self._ids_E3, self.temperature)

    def _cached(self, forwards: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        with torch.no_grad():
            kept = [forward().requires_grad_() for forward in forwards]
        loss = self.loss(torch.cat(kept))
        loss.backward()
        for forward, emb_ED in zip(forwards, kept, strict=True):
            forward().backward(emb_ED.grad)
        return loss.detach()

    @property
    def tokens(self) -> int:
        return sum(batch.real for batch in self.batches)

    @property
    def held_tokens(self) -> int:
        sizes = [batch.ids_BL.numel() for batch in self.batches]
        return max(sizes) if self.form.cached else sum(sizes)

    def flops(self) -> float:
        return training_flops(self._flops, self.prompts)

    def watch(self, phases: Phases) -> None:
        phases.watch(self.stock.model.visual, "vision")
        phases.watch(self.stock.model.language_model, "text_forward")
        phases.wrap(self, "loss", "gather_and_loss")
        phases.wrap(self.stock, "update", "optimizer")

    @property
    def padding(self) -> float:
        """Share of all positions that hold nothing."""
        return 1 - self.tokens / sum(batch.ids_BL.numel() for batch in self.batches)

    @property
    def pairs(self) -> int:
        return sum(len(prompt.pooled) for prompt in self.prompts if prompt.kind == QUERY)
