#!/usr/bin/env python3
"""Pooling, final norm and unit length (`ops.pool_normalize`) beside eager, as a share of the bandwidth of a copy.

    python benchmarks/pooler.py

- ours: the Triton kernels on a GPU, their twin in plain torch elsewhere;
- eager: the rows by index, the stock RMSNorm on them, float32, `torch.nn.functional.normalize`;
- compiled: eager through torch.compile (on a GPU only).

Layouts: `all rows` is what stands behind the last text layer in training (every row is pooled), `by index` a packed row
of which one row in eight is. Bytes are those that must move at least: forward, the pooled rows in and float32
embeddings out; backward, the embeddings' gradient and the rows in, and the gradient of all rows out. The aim is 80 % of
the copy's bandwidth, at sizes far beyond the caches; smaller ones show what a launch costs.

On a GPU bfloat16 rows of 1,536, on a CPU float32. Appends one JSON line per size to benchmarks/results/pooler.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from muco_ds.ops import pool_normalize

from ceilings import copy
from harness import percentiles, provenance, record, sample

RESULTS = Path(__file__).parent / "results" / "pooler.jsonl"
EPS = 1e-6
ROWS_PER_EMBEDDING = 8
Pool = Callable[..., torch.Tensor]


class Case:
    """One size: hidden states, rows to pool, and what the systems make of them."""

    def __init__(self, embeddings: int, dim: int, layout: str, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        rows = embeddings if layout == "all rows" else embeddings * ROWS_PER_EMBEDDING
        hidden_TD = torch.randn(rows, dim, generator=generator, device=device).to(dtype)
        self.norm = Qwen2VLRMSNorm(dim, EPS).to(device, dtype)
        self.leaves = [hidden_TD.requires_grad_(), self.norm.weight]
        self.upstream_ED = torch.randn(embeddings, dim, generator=generator, device=device)
        self.index_E = None
        if layout == "by index":
            self.index_E = torch.randperm(rows, generator=generator, device=device)[:embeddings]
        self.forward_bytes = embeddings * dim * (dtype.itemsize + 4)
        self.backward_bytes = embeddings * dim * (4 + dtype.itemsize) + rows * dim * dtype.itemsize

    def ours(self) -> torch.Tensor:
        return pool_normalize(self.leaves[0], self.index_E, self.leaves[1], EPS)

    def eager(self) -> torch.Tensor:
        rows_ED = self.leaves[0] if self.index_E is None else self.leaves[0][self.index_E]
        return F.normalize(self.norm(rows_ED).float(), dim=-1)

    def systems(self, device: torch.device) -> dict[str, Pool]:
        compiled = {"compiled": torch.compile(self.eager)} if device.type == "cuda" else {}
        return {"ours": self.ours, "eager": self.eager, **compiled}

    def forward(self, pool: Pool) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                pool()

        return run

    def both(self, pool: Pool) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(pool(), self.leaves, self.upstream_ED)

        return run

    def agree(self, systems: dict[str, Pool]) -> None:
        """Eager rounds the normalised state to the model's type; ours does not."""
        found = {}
        for name, pool in systems.items():
            emb_ED = pool()
            found[name] = [emb_ED.detach(), *torch.autograd.grad(emb_ED, self.leaves, self.upstream_ED)]
        for name, values in found.items():
            for got, want in zip(found["ours"], values, strict=True):
                limit = 2e-2 if self.leaves[0].dtype == torch.bfloat16 else 1e-4
                difference = float((got.float() - want.float()).norm() / want.float().norm())
                assert difference < limit, f"ours and {name} differ by {difference:.1e}"


def measure(embeddings: int, dim: int, layout: str, device: torch.device, repeats: int) -> dict[str, Any]:
    case, ceiling = Case(embeddings, dim, layout, device), copy(device)
    systems = case.systems(device)
    case.agree(systems)
    work = {f"{name} forward": case.forward(pool) for name, pool in systems.items()}
    work |= {f"{name} both": case.both(pool) for name, pool in systems.items()}
    seconds = sample({**work, "copy": ceiling.run}, repeats, warmup=3)
    bandwidth = ceiling.rate(seconds["copy"])
    found = {}
    for name in systems:
        forward, both = (percentiles(seconds[f"{name} {part}"]) for part in ("forward", "both"))
        moved = case.forward_bytes + case.backward_bytes
        found[name] = {
            "forward_seconds": forward,
            "seconds": both,
            "forward_share_of_copy": round(case.forward_bytes / forward["p50"] / bandwidth, 3),
            "share_of_copy": round(moved / both["p50"] / bandwidth, 3),
        }
    return {
        "benchmark": f"pooler/{layout}",
        "shape": {"embeddings": embeddings, "rows": len(case.leaves[0]), "dim": dim},
        "dtype": str(case.leaves[0].dtype).removeprefix("torch."),
        "form": "kernels" if device.type == "cuda" else "torch twin",
        "repeats": repeats,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "bytes": {"forward": case.forward_bytes, "backward": case.backward_bytes},
        "systems": found,
        "aim": "share_of_copy >= 0.8 on a GPU where rows are many",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=int, nargs="+", help="default: 1,792 and on a GPU 16,384 and 131,072")
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU: the torch twin is timed; the kernels run in Triton's interpreter in tests only, untimed")
    sizes = args.embeddings or ([1792, 16384, 131072] if device.type == "cuda" else [1792])
    for layout in ("all rows", "by index"):
        for size in sizes:
            record(args.results, measure(size, args.dim, layout, device, args.repeats) | provenance())


if __name__ == "__main__":
    main()
