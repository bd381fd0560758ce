"""Our step as the benchmark runs it, and what a preset puts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from muco_ds.build import Data, build_data
from muco_ds.config import BatchOptions, DataOptions, LossOptions, ModelOptions, OptimOptions, RunConfig, RunOptions
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.config_task import TaskOptions
from muco_ds.data.schema import Side, StepBatch
from muco_ds.data.stages.base import longest_rows
from muco_ds.models.recompute import recompute_layers
from muco_ds.trainer import Trainer

from baselines.padded import Form
from harness import Phases
from workloads import Pictures

TEMPERATURE = 0.05
WHOLE = 10**7
"""Tokens of a pack that holds any batch here."""


@dataclass(frozen=True)
class OurForm:
    """How our step is run: in how many packs (more than one: gradient cache), with activation checkpointing or not."""

    packs: int = 1
    checkpointing: bool = False

    @property
    def label(self) -> str:
        return ", ".join([f"packs: {self.packs}", *["checkpointing"] * self.checkpointing])


class System(Protocol):
    """One way to train on one global batch. `tokens` without padding; `held_tokens` in one graph at a time."""

    form: Any

    @property
    def pairs(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def held_tokens(self) -> int: ...

    @property
    def padding(self) -> float: ...

    def use(self, form: Any) -> None: ...

    def prepare(self) -> object:
        """What a loader's worker does for a step."""
        ...

    def backward(self) -> torch.Tensor:
        """Forward and backward; the loss."""
        ...

    def gradients(self) -> Mapping[str, torch.Tensor]:
        """By the stock model's names, between `backward` and `update`."""
        ...

    def update(self) -> None: ...

    def step(self) -> object:
        """One optimizer step, as it is timed."""
        ...

    def flops(self) -> float:
        """Model FLOPs of a step: both towers, forward and backward, of what the system feeds them, padding and
        recomputation left out."""
        ...

    def watch(self, phases: Phases) -> None:
        """Make vision, text forward, loss and optimizer phases of their own."""
        ...


@dataclass(frozen=True)
class Preset:
    """Model, precision and sizes; the forms that are tried for each system, those that need least memory first."""

    shape: str
    precision: Any
    short_side: int
    images: Mapping[str, int]
    repeats: int
    seed: int
    ours: tuple[OurForm, ...]
    padded: tuple[Form, ...]
    single: tuple[Form, ...]
    lora: LoraOptions = field(default_factory=LoraOptions)

    @property
    def pictures(self) -> Pictures:
        return Pictures.scaled(self.short_side)


_GPU_IMAGES = {"seven_turns": 24, "one_turn": 48, "text_only": 128, "pictures_both_sides": 24}
# Few, because each costs device time before anything is measured.
_GPU_OURS = (OurForm(2, True), OurForm(1, True), OurForm(1, False))
_GPU_PADDED = (Form(12, checkpointing=True), Form(12, cached=True), Form(12), Form())
_GPU_SINGLE = (Form(24, cached=True), Form(24, checkpointing=True), Form(24))

PRESETS = {
    # Pictures at 0.7 of the recipe's short side: 336 visual tokens at 4:3 in place of 690.
    "cpu": Preset(
        shape="small",
        precision="fp32",
        short_side=392,  # vision is a third of a step's FLOPs, as in the 2B model with M3T's pictures
        images={"seven_turns": 3, "one_turn": 3, "text_only": 3, "pictures_both_sides": 2},
        repeats=3,
        seed=8,  # padded, 7 % of it is padding, the mean of batches of 3; of batches of 24 it is 16 %
        ours=(OurForm(),),
        padded=tuple(Form(rows) for rows in (2, 1)),
        single=(Form(4),),  # faster than one prompt a batch, with which it was compared
    ),
    "cpu_tiny": Preset(
        shape="tiny",
        precision="fp32",
        short_side=224,
        images={"seven_turns": 6, "one_turn": 12, "text_only": 8, "pictures_both_sides": 6},
        repeats=5,
        seed=0,
        ours=(OurForm(),),
        padded=tuple(Form(rows) for rows in (0, 2, 1)),
        single=tuple(Form(rows) for rows in (14, 4, 1)),
    ),
    # For the test: it shows that everything runs, its numbers mean nothing.
    "toy": Preset(
        shape="tiny",
        precision="fp32",
        short_side=56,
        images={"seven_turns": 2, "one_turn": 2, "text_only": 2, "pictures_both_sides": 2},
        repeats=1,
        seed=0,
        ours=(OurForm(), OurForm(packs=2)),
        padded=(Form(), Form(1, cached=True)),
        single=(Form(4),),
    ),
    "h200_2b": Preset(
        shape="2b",
        precision="bf16",
        short_side=640,
        images=_GPU_IMAGES,
        repeats=7,
        seed=0,
        ours=_GPU_OURS,
        padded=_GPU_PADDED,
        single=_GPU_SINGLE,
    ),
}
PRESETS["h200_7b"] = replace(PRESETS["h200_2b"], shape="7b", lora=LoraOptions(rank=64, alpha=64))


def run_config(folder: Path, preset: Preset, workload: str) -> RunConfig:
    """A run whose rate is below what float32 weights resolve: every repeat does the same work on the same weights."""
    rows, pictures = folder / workload, preset.pictures
    return RunConfig(
        run=RunOptions(name="step", dir=str(folder / "runs"), max_steps=1, precision=preset.precision),
        model=ModelOptions(
            str(folder / "model"),
            freeze_vision=True,
            activation_checkpointing=ActivationCheckpointing(0),
            lora=preset.lora,
        ),
        data=DataOptions(
            str(rows / "rows.parquet"),
            str(rows),
            min_pixels=pictures.min_pixels,
            max_pixels=pictures.max_pixels,
            short_side=pictures.short_side,
        ),
        batch=BatchOptions(images=preset.images[workload], pack_tokens=WHOLE),
        task=TaskOptions(name="muco", query_history=1.0, target_history=1.0),
        optim=OptimOptions(lr=1e-12, warmup_steps=0),
        loss=LossOptions(temperature=TEMPERATURE, same_target="keep"),
    )


class Ours:
    """The Trainer's own step, on a batch of any workload. `history`: turns see the earlier ones, or none."""

    def __init__(self, trainer: Trainer, config: RunConfig, *, history: bool) -> None:
        self.trainer, self.model = trainer, trainer.task.embedder.model
        seen = float(history)
        self.config = replace(config, task=replace(config.task, query_history=seen, target_history=seen))
        self._whole = self._open(WHOLE)
        self.use(OurForm())

    def _open(self, pack_tokens: int) -> Data:
        return build_data(replace(self.config, batch=replace(self.config.batch, pack_tokens=pack_tokens)))

    def use(self, form: OurForm) -> None:
        self.form = form
        self._data = self._whole
        if form.packs > 1:
            longest = int(longest_rows(self._whole.plan.stage).max())
            self._data = self._open(max(longest, int(self._whole.plan.step(0).tokens / form.packs * 1.05)))
        batch = self.prepare()
        self.batch = batch.pin_memory() if torch.cuda.is_available() else batch
        self._switch()

    def _switch(self) -> None:
        """Another of our systems shares the model."""
        recompute_layers(self.model, ActivationCheckpointing(float(self.form.checkpointing)), freeze_vision=True)

    def prepare(self) -> StepBatch:
        batch = self._data.steps(1)[0]
        assert isinstance(batch, StepBatch)
        return batch

    def sides(self) -> list[Side]:
        """The dialogues of the batch, which the baselines are given."""
        plan = self._whole.plan.step(0)
        return self._whole.collator.sides(plan.samples_B, plan.passes_B, 0)

    def step(self) -> object:
        self._switch()
        return self.trainer.train_step(self.batch)["loss"]

    def backward(self) -> torch.Tensor:
        self._switch()
        result = self.trainer.task.backward(self.trainer.engine, self.batch, TEMPERATURE)
        self._loss = result.stats["loss"]
        return self._loss

    def update(self) -> None:
        self.trainer.guard.step(self.trainer.engine, self.batch, self._loss)

    def gradients(self) -> Mapping[str, torch.Tensor]:
        return _Gradients({name: p for name, p in self.model.named_parameters() if p.requires_grad})

    @property
    def packer(self) -> Any:
        return self._data.packer

    @property
    def pairs(self) -> int:
        return self.batch.pairs

    @property
    def tokens(self) -> int:
        return int(self.batch.cost["llm_tokens"])

    @property
    def held_tokens(self) -> int:
        return max(pack.tokens for pack in self.batch.packs)

    @property
    def padding(self) -> float:
        return 0.0

    def flops(self) -> float:
        return self.batch.cost["flops"]

    def watch(self, phases: Phases) -> None:
        phases.watch(self.model.visual, "vision")
        phases.watch(self.model.language_model, "text_forward")
        phases.wrap(self.trainer.task, "loss", "gather_and_loss")
        phases.wrap(self.trainer.guard, "step", "optimizer")


class _Gradients(Mapping[str, torch.Tensor]):
    """Gradients of parameters that ZeRO-3 has partitioned, made whole one by one."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(self._parameters[name])

    def __iter__(self) -> Any:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
