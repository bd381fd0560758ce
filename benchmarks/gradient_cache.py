#!/usr/bin/env python3
"""What the gradient cache costs: one step in several packs against the same step in one, the vision tower frozen.

    python benchmarks/gradient_cache.py [--packs 4] [--repeats 7]

Both sides are the Trainer's own step on the same global batch (the losses are compared), under ZeRO-3, with and without
activation checkpointing. The vision forward alone is timed beside them: `ratio_text` is what is left of each step
without it, the text tower's share. A second vision forward would show there, and its calls are counted as well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from muco_ds.config import BatchOptions, DataOptions, LossOptions, ModelOptions, OptimOptions, RunConfig, RunOptions
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.schema import StepBatch
from muco_ds.distributed import env
from muco_ds.models.demo_model import write_model
from muco_ds.trainer import Trainer

from harness import ROOT, percentiles, provenance, record, sample

IMAGES = 12


def write_inputs(folder: Path) -> None:
    """Rendered scenes and a Qwen2-VL large enough that its matrix products are most of a step."""
    rows = write_data(folder / "data", 64, 1, seed=0)
    write_model(folder / "model", row_texts(rows), seed=0)
    config = AutoConfig.from_pretrained(folder / "model")
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 384, 1024, 4
    text.num_attention_heads, text.num_key_value_heads = 6, 2
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
    text.head_dim, text.layer_types = 64, ["full_attention"] * text.num_hidden_layers
    vision.hidden_size, vision.embed_dim, vision.depth, vision.num_heads = 384, 256, 4, 4
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder / "model")


def run_config(folder: Path, checkpointing: float, pack_tokens: int) -> RunConfig:
    return RunConfig(
        run=RunOptions(name="cache", dir=str(folder / "runs"), max_steps=1, precision="fp32"),
        model=ModelOptions(str(folder / "model"), activation_checkpointing=ActivationCheckpointing(checkpointing)),
        data=DataOptions(
            str(folder / "data" / "train.parquet"), str(folder / "data" / "images"), min_pixels=3136, max_pixels=7056
        ),
        batch=BatchOptions(images=IMAGES, pack_tokens=pack_tokens),
        optim=OptimOptions(lr=1e-9, warmup_steps=0),  # weights stay: every repeat does the same work
        loss=LossOptions(temperature=0.05),
    )


class Side:
    """A Trainer with its batch."""

    def __init__(self, folder: Path, checkpointing: float, pack_tokens: int) -> None:
        self.trainer = Trainer(run_config(folder, checkpointing, pack_tokens), env.start())
        batch = self.trainer.data.steps(1)[0]
        assert isinstance(batch, StepBatch)
        self.batch = batch
        self.vision_calls = 0
        self.trainer.task.embedder.model.visual.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.vision_calls += 1

    def step(self) -> float:
        return float(self.trainer.train_step(self.batch)["loss"])

    def vision(self) -> None:
        """The vision forward of the whole batch and nothing else."""
        for pack in self.batch.packs:
            self.trainer.task.embedder.features(pack)


def measure(folder: Path, checkpointing: float, packs: int, repeats: int) -> dict:
    one = Side(folder, checkpointing, pack_tokens=10**6)
    several = Side(folder, checkpointing, int(one.batch.cost["llm_tokens"] / packs * 1.05))
    assert len(one.batch.packs) == 1 and len(several.batch.packs) == packs, len(several.batch.packs)
    losses = one.step(), several.step()
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0], losses
    several.vision_calls = 0
    several.step()
    calls = several.vision_calls
    times = sample({"one pack": one.step, "cache": several.step, "vision": one.vision}, repeats)
    spread = {name: percentiles(values) for name, values in times.items()}
    vision = spread["vision"]["p50"]
    text = {name: spread[name]["p50"] - vision for name in ("one pack", "cache")}
    return {
        "benchmark": "gradient_cache",
        "activation_checkpointing": checkpointing,  # share of the text tower's layers
        "packs": packs,
        "images": IMAGES,
        "llm_tokens": int(one.batch.cost["llm_tokens"]),
        "vit_patches": int(one.batch.cost["vit_patches"]),
        "seconds": spread,
        "ratio_step": round(spread["cache"]["p50"] / spread["one pack"]["p50"], 3),
        "ratio_text": round(text["cache"] / text["one pack"], 3),
        "vision_calls_per_pack": calls / packs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        for checkpointing in (0.0, 1.0):
            found = measure(Path(name), checkpointing, args.packs, args.repeats)
            record(ROOT / "benchmarks" / "results" / "gradient_cache.jsonl", {**found, **provenance()})
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
