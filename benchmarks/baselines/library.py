"""sentence-transformers itself, training the same model: its own model class, loss and preprocessing, in a plain loop.

It takes pairs of single turns and masks no key, so it computes our loss where an example has one turn and every picture
is another: there its step is compared, elsewhere it can't do the job.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from muco_ds.config import RunConfig
from muco_ds.data.collator import Packer
from muco_ds.data.schema import QUERY, TARGET, Dialogue, Side
from muco_ds.export_st import write_processing, write_sentence_transformers
from muco_ds.flops import FlopsModel
from muco_ds.models.folder import Processing
from muco_ds.optim import build_optimizer

from baselines.stock import Stock, freeze, plain_linear, render, training_flops
from harness import Phases


@dataclass(frozen=True)
class LibraryForm:
    """`rows`: prompts of a batch of its gradient cache; 0: one batch a side, no cache."""

    rows: int = 0
    checkpointing: bool = False

    @property
    def label(self) -> str:
        return f"gradient cache, {self.rows} prompts a batch" if self.rows else "a side a batch"


def missing() -> str | None:
    """Why the library can't be run here; None if it can."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence_transformers is not installed"
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a wheel for another build of torch raises the second
        return f"its picture processor needs torchvision ({error})"
    return None


def export(stock: Stock, processing: Processing, folder: Path) -> None:
    """The model as a folder that sentence-transformers loads."""
    processing.save(folder, stock.model.config)
    stock.model.save_pretrained(folder)
    write_processing(folder, processing.settings, stock.model.config.model_type)
    write_sentence_transformers(folder, stock.model.config.text_config.hidden_size, processing.settings)


class LibrarySystem:
    """One global batch of single turns."""

    form = LibraryForm()

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        sides: Sequence[Side],
        packer: Packer,
        temperature: float,
        flops: FlopsModel,
        device: torch.device,
    ) -> None:
        from sentence_transformers import SentenceTransformer

        dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
        loaded: Any = SentenceTransformer(
            str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": dtype}
        )
        self.model = loaded.train()
        self._stock = self.model[0].model
        freeze(self._stock.visual)
        self.max_norm, self.temperature, self._flops = config.optim.max_grad_norm, temperature, flops
        self.optimizer = build_optimizer(self.model, config.optim)
        self._columns = [[_item(side) for side in sides if side.kind == kind] for kind in (QUERY, TARGET)]
        self._prompts = render(sides, packer, alone=True)
        self.use(LibraryForm())

    def use(self, form: LibraryForm) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )

        self.form, scale = form, 1 / self.temperature
        self.criterion: Any = MultipleNegativesRankingLoss(self.model, scale=scale)
        if form.rows:
            self.criterion = CachedMultipleNegativesRankingLoss(self.model, scale=scale, mini_batch_size=form.rows)
        self._features = self.prepare()

    def prepare(self) -> list[dict[str, Any]]:
        return [self.model.preprocess([_opened(item) for item in column]) for column in self._columns]

    @plain_linear()
    def backward(self) -> torch.Tensor:
        features = [
            {k: v.to(self.model.device) if isinstance(v, torch.Tensor) else v for k, v in column.items()}
            for column in self._features
        ]
        loss = self.criterion(features, torch.arange(self.pairs, device=self.model.device))
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> object:
        loss = self.backward()
        self.update()
        return loss

    def gradients(self) -> Mapping[str, torch.Tensor]:
        return {name: p.grad for name, p in self._stock.named_parameters() if p.grad is not None}

    @property
    def pairs(self) -> int:
        return len(self._columns[0])

    @property
    def tokens(self) -> int:
        return sum(len(prompt.ids_L) for prompt in self._prompts)

    @property
    def held_tokens(self) -> int:
        return sum(column["input_ids"].numel() for column in self._features)

    @property
    def padding(self) -> float:
        return 1 - self.tokens / self.held_tokens

    def flops(self) -> float:
        return training_flops(self._flops, self._prompts)

    def watch(self, phases: Phases) -> None:
        phases.watch(self._stock.visual, "vision")
        phases.watch(self._stock.language_model, "text_forward")
        phases.wrap(self, "update", "optimizer")


def _item(side: Side) -> dict[str, Any]:
    dialogue = side.dialogue
    assert isinstance(dialogue, Dialogue) and len(dialogue.turns) == 1
    return {"text": dialogue.turns[0], "image": list(dialogue.images)}


def _opened(item: dict[str, Any]) -> Any:
    if not item["image"]:
        return item["text"]
    return {"text": item["text"], "image": [Image.open(path).convert("RGB") for path in item["image"]]}
