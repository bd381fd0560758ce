#!/usr/bin/env python3
"""How well, and how fast, a step is planned: balance, fill and time for 8 to 1,024 ranks on M3T-like sizes.

    python benchmarks/plan.py [--steps 20]

Sizes: pictures with the aspect ratios of web photographs (four in ten 4:3, then 3:2, 3:4, 2:3, 1:1, 16:9 and a tail),
resized as in the pre-training recipe (short side 640, 256 to 1280 visual tokens); seven turns a picture: short class
names, four answers of a phrase or a sentence, one creative answer, one caption, and questions of a sentence with two
paraphrases. The shares and lengths are assumptions, M3T itself is not at hand. Costs are those of Qwen2-VL-2B with a
frozen vision tower, from its configuration alone.

For each number of ranks and each budget: `imbalance` (slowest rank over the mean, mean and worst of the steps),
`lockstep` (the same where all ranks wait for the slowest in every pack, as under ZeRO-3), `fill`, packs per rank,
milliseconds of a whole `Plan.step` and of `assign` alone. Below 16384 and 32768 stand the smallest budgets that
need no more packs than those. Appends one JSON line each to benchmarks/results/plan.jsonl; the table comes last.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from muco_ds.data.assign import assign, least_pack_tokens
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.index import QUESTION, SAMPLE, TURN, Index, Part
from muco_ds.data.joined import JoinedReader
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.data.templates import ChatTemplate
from muco_ds.flops import FlopsModel
from muco_ds.models.backbones import load_tokenizer
from muco_ds.models.demo_model import write_model

from harness import percentiles, provenance, record

SHORT_SIDE, MIN_PIXELS, MAX_PIXELS = 640, 256 * 28 * 28, 1280 * 28 * 28
ASPECTS = {4 / 3: 0.4, 3 / 2: 0.2, 3 / 4: 0.12, 2 / 3: 0.08, 1.0: 0.06, 16 / 9: 0.04}  # the rest: log-normal around 1
TARGET_TOKENS = ((2, 5), (3, 20), (3, 20), (3, 20), (3, 20), (20, 60), (20, 80))  # by turn: least, most
QUESTION_TOKENS = (8, 25)
# (ranks, images of the global batch): the paper's batch while a rank keeps 16 pictures, then 16 pictures a rank.
SIZES = [(8, 1024), (16, 1024), (64, 1024), (256, 1024), (256, 4096), (1024, 16384)]
BUDGETS = (16384, 32768)
RESULTS = Path(__file__).parent / "results" / "plan.jsonl"


def m3t_like_index(samples: int, seed: int) -> Index:
    """A length index that is never read from a file."""
    rng = np.random.default_rng(seed)
    named = rng.choice([*ASPECTS, 0.0], samples, p=[*ASPECTS.values(), 1 - sum(ASPECTS.values())])
    aspects = np.where(named > 0, named, np.exp(rng.normal(0, 0.35, samples))).clip(0.4, 2.5)
    patches = np.array([patch_count(float(aspect)) for aspect in aspects])
    turns = len(TARGET_TOKENS)
    sample_array, turn_array = np.zeros(samples, SAMPLE), np.zeros(samples * turns, TURN)
    sample_array["row"] = np.arange(samples)
    sample_array["turn_end"] = turns * np.arange(1, samples + 1)
    sample_array["query_images"] = 1
    sample_array["query_image_tokens"] = patches // 4
    sample_array["patches"], sample_array["patches_squared"] = patches, patches**2
    low, high = np.array(TARGET_TOKENS).T
    turn_array["target_tokens"] = rng.integers(np.tile(low, samples), np.tile(high, samples) + 1)
    turn_array["question_end"] = 2 * np.arange(1, samples * turns + 1)
    questions = rng.integers(*QUESTION_TOKENS, 2 * samples * turns).astype(QUESTION)
    parts = (Part("data.train", samples, 0),)
    return Index(Path("nowhere"), sample_array, turn_array, questions, 0, 0, "made up", parts)


def patch_count(aspect: float) -> int:
    short, long = SHORT_SIDE, round(SHORT_SIDE * max(aspect, 1 / aspect))
    high, wide = smart_resize(short, long, 28, MIN_PIXELS, MAX_PIXELS)
    return high * wide // 14**2


def flops_2b() -> FlopsModel:
    text = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536}
    config = Qwen2VLConfig(text_config={**text, "intermediate_size": 8960}, vision_config=vision)
    return FlopsModel.from_config(config, train_vision=False)


def template() -> ChatTemplate:
    """With the demo's tokenizer: only the lengths of the chat markup count here."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", row_texts(write_data(Path(folder) / "data", 20, 1, seed=0)), seed=0)
        return ChatTemplate(load_tokenizer(f"{folder}/model", "<|emb|>"), "<|emb|>")


def new_plan(index: Index, chat: ChatTemplate, flops: FlopsModel, ranks: int, images: int, pack_tokens: int) -> Plan:
    mixture = Mixture([len(index)], [None], images=images, run=images, seed=0)
    stage = MuCoStage(index, JoinedReader([]), chat, seed=0, query_history=1.0, target_history=1.0)
    return Plan(stage, flops, mixture, pack_tokens=pack_tokens, world_size=ranks)


def lockstep(packs: list[list[np.ndarray]], flops_B: np.ndarray) -> float:
    """Time of a step whose packs are run side by side, over that of a perfectly even one."""
    flops = np.array([[flops_B[pack].sum() for pack in rank] for rank in packs])
    return float(flops.max(0).sum() / flops.sum(1).mean())


def measure(plan: Plan, steps: int) -> dict[str, Any]:
    plans, waits, step_ms, assign_ms = [], [], [], []
    for number in range(steps):
        start = time.perf_counter()
        step = plan.step(number)
        step_ms.append(1e3 * (time.perf_counter() - start))
        costs = plan.costs(step.samples_B, step.passes_B, number)
        start = time.perf_counter()
        assign(costs.flops_B, costs.tokens_B, plan.world_size, plan.pack_tokens)
        assign_ms.append(1e3 * (time.perf_counter() - start))
        plans.append(step)
        waits.append(lockstep(step.packs, costs.flops_B))
    imbalance = [step.imbalance for step in plans]
    fill = [step.pack_fill for step in plans]
    return {
        "packs": sorted({len(step.packs[0]) for step in plans}),
        "imbalance": round(float(np.mean(imbalance)), 4),
        "imbalance_worst": round(max(imbalance), 4),
        "lockstep": round(float(np.mean(waits)), 4),
        "fill": round(float(np.mean(fill)), 4),
        "fill_worst": round(min(fill), 4),
        "step_ms": percentiles(step_ms),
        "assign_ms": percentiles(assign_ms),
    }


def advised(plan: Plan, steps: int) -> int:
    """Smallest budget at which no step takes more packs than it does now."""
    budgets = []
    for number in range(steps):
        step = plan.step(number)
        tokens_B = plan.costs(step.samples_B, step.passes_B, number).tokens_B
        budgets.append(least_pack_tokens(tokens_B, plan.world_size, len(step.packs[0]), plan.pack_tokens))
    return max(budgets)


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [entry["ranks"], entry["images"], entry["pack_tokens"], ", ".join(map(str, entry["packs"]))]
    cells += [f"{entry[name]:.4f}" for name in ("imbalance", "imbalance_worst", "lockstep", "fill", "fill_worst")]
    cells += [f"{entry[name]['p50']:.1f}" for name in ("step_ms", "assign_ms")]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of the plan, fewer for large batches (default: 20)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    chat, flops = template(), flops_2b()
    rows = []
    for ranks, images in SIZES:
        steps = min(args.steps, max(2, 64 * 1024 // images))
        index = m3t_like_index(images * steps, seed=ranks)
        tight = [advised(new_plan(index, chat, flops, ranks, images, budget), steps) for budget in BUDGETS]
        for pack_tokens in sorted({*BUDGETS, *tight}):
            measured = measure(new_plan(index, chat, flops, ranks, images, pack_tokens), steps)
            shape = {"ranks": ranks, "images": images, "pack_tokens": pack_tokens}
            entry = {"benchmark": "plan", **shape, "repeats": steps, **measured, **provenance()}
            record(args.results, entry)
            rows.append(row(entry))
    print(
        "\n| ranks | images | pack_tokens | packs | imbalance | worst | lockstep | fill | worst | step ms | assign ms |"
    )
    print("|" + "--:|" * 11)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
