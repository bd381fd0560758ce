#!/usr/bin/env python3
"""Attention of the compression layout (CoMa's first stage) beside the causal layout of the same tokens.

    python benchmarks/compression_plan.py

A pack holds several dialogues: a picture with its prompt, K compression tokens, then questions and answers. Compression
layout: picture, prompt and tokens over themselves; questions and answers over the K tokens and themselves. Causal: one
segment per dialogue. Forward and backward of one layer's ``segment_attention``, taken in turn; the aim is a ratio
<= 1.05. The compression layout has less to do (``share_of_causal_pairs`` of the causal one's query-key pairs), but
gathers keys and values and has twice the segments.

On a CPU the SDPA backend in float32 with fewer heads (same ratio of query to key heads), on CUDA every backend that is
installed, in bfloat16 with the heads of Qwen2.5-VL-3B. Appends one JSON line per backend to
benchmarks/results/compression_plan.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muco_ds.data.segments import Segment, SegmentBuilder, SegmentPlan, causal
from muco_ds.models.attention import segment_attention

from harness import percentiles, provenance, record, sample

RESULTS = Path(__file__).parent / "results" / "compression_plan.jsonl"
HEADS = {"cpu": (4, 1, 64), "cuda": (16, 2, 128)}  # query heads, key heads, head dimension


def causal_plan(lengths: list[tuple[int, int, int]]) -> SegmentPlan:
    """``lengths``: rows of picture and prompt, compression tokens, questions and answers of each dialogue."""
    builder = SegmentBuilder()
    for parts in lengths:
        builder.add(causal(sum(parts)))
    return builder.build()


def compression_plan(lengths: list[tuple[int, int, int]]) -> SegmentPlan:
    builder = SegmentBuilder()
    for prefix, tokens, answers in lengths:
        seen = (prefix, prefix + tokens)
        builder.add([*causal(prefix + tokens), Segment(answers, context=seen)])
    return builder.build()


def pairs(plan: SegmentPlan) -> int:
    """Query-key pairs that a plan computes."""
    len_q, len_k = plan.cu_q_S1.diff().long(), plan.cu_k_S1.diff().long()
    return int((len_q * len_k - len_q * (len_q - 1) // 2).sum())


def draw_lengths(dialogues: int, picture: int, answers: int, tokens: int) -> list[tuple[int, int, int]]:
    """No two dialogues alike: pictures and answers of half to one and a half times the given lengths."""
    factors = np.random.default_rng(0).uniform(0.5, 1.5, (dialogues, 2))
    return [(round(picture * a), tokens, round(answers * b)) for a, b in factors]


def step(plan: SegmentPlan, backend: str, device: str) -> Callable[[], None]:
    """Forward and backward of one attention, as a call without arguments."""
    n_heads, n_kv_heads, dim = HEADS[device]
    n_rows = int(plan.cu_q_S1[-1])
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    leaves = [
        torch.randn(n_rows, heads, dim, generator=generator, device=device).to(dtype).requires_grad_()
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    ]
    plan = plan.map(lambda index: index.to(device))
    upstream_THd = torch.randn(leaves[0].shape, generator=generator, device=device).to(dtype)

    def run() -> None:
        q_THd, k_TGd, v_TGd = leaves
        out_THd = segment_attention(q_THd, k_TGd, v_TGd, plan, dim**-0.5, backend)
        torch.autograd.grad(out_THd, leaves, upstream_THd)

    return run


def measure(backend: str, device: str, lengths: list[tuple[int, int, int]], repeats: int) -> dict[str, Any]:
    plans = {"compression": compression_plan(lengths), "causal": causal_plan(lengths)}
    seconds = sample({name: step(plan, backend, device) for name, plan in plans.items()}, repeats, warmup=2)
    ratios = [a / b for a, b in zip(seconds["compression"], seconds["causal"], strict=True)]
    n_heads, n_kv_heads, dim = HEADS[device]
    return {
        "benchmark": f"compression_plan/{backend}",
        "shape": {
            "rows": int(plans["causal"].cu_q_S1[-1]),
            "lengths": lengths,
            **{"heads": n_heads, "kv_heads": n_kv_heads, "head_dim": dim},
        },
        "repeats": repeats,
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "compression_over_causal": percentiles(ratios),
        "share_of_causal_pairs": round(pairs(plans["compression"]) / pairs(plans["causal"]), 4),
        "aim": "p50 <= 1.05",
    }


def backends(device: str) -> list[str]:
    if device == "cpu":
        return ["sdpa"]
    installed = {"flash_attn": "flash_attn", "varlen": "torch.nn.attention.varlen"}
    return [name for name, module in installed.items() if importlib.util.find_spec(module)] + ["sdpa"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, help="default: 4 on a CPU, 12 on CUDA")
    parser.add_argument("--picture", type=int, default=1024, help="mean rows of picture and prompt")
    parser.add_argument("--answers", type=int, default=200, help="mean rows of questions and answers")
    parser.add_argument("--tokens", type=int, default=32, help="compression tokens K")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dialogues = args.dialogues or (12 if device == "cuda" else 4)
    lengths = draw_lengths(dialogues, args.picture, args.answers, args.tokens)
    for backend in backends(device):
        record(args.results, measure(backend, device, lengths, args.repeats) | provenance())


if __name__ == "__main__":
    main()
