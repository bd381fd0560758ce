#!/usr/bin/env python3
"""The contrastive loss: speed beside the dense form and beside bare matrix products, and memory.

    python benchmarks/info_nce.py

- cpu_speed: forward and backward of 4,096 rows against 4,096 keys, tiled beside dense; the aim is a ratio <= 1.3.
- cpu_memory: 65,536 rows against 65,536 keys, tiled: growth of the peak memory beside the dense logits' bytes.
- cuda: 65,536 x 65,536 x 1,536 in bfloat16 by the kernels: peak memory beyond inputs and gradients (aim: < 5 % of the
  dense float32 logits), and the rate of forward and backward beside torch.matmul of the same shapes (aim: >= 60 %).
  Only useful operations count, on both sides: three products, 6 R K D. Recomputed logits do not.
- keys: 4,096 rows (512 on a CPU) against 4k to 1M keys (64k on a CPU): ours, dense where its matrices fit, and
  `chunked`: dense for some rows at a time, recomputed in the backward pass (torch.utils.checkpoint), the plain way to
  bound memory. Forward and backward, as a share of the rate of bare matrix products, and the growth of memory.

Appends one JSON line per measurement to benchmarks/results/info_nce.jsonl. Without a CUDA GPU the last is skipped.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from muco_ds.losses import InfoNCE, RowIds, info_nce, info_nce_dense

from ceilings import matmul
from harness import peak_growth, percentiles, provenance, record, sample

RESULTS = Path(__file__).parent / "results" / "info_nce.jsonl"
PARTS = ["cpu_speed", "cpu_memory", "cuda", "keys"]
KEYS = [2**12, 2**14, 2**16, 2**18, 2**20]
TEMPERATURE = 0.2
"""Of the part `keys`: random rows have a loss above zero there, which can be compared."""
CHUNK_ENTRIES = 2**26
"""Logits of a chunk: 256 MiB in float32, several times that in all."""
DENSE_BYTES_PER_ENTRY = 24
"""Of the dense form at its peak: logits in both types, softmax, its gradient, masks."""
Batch = tuple[torch.Tensor, torch.Tensor, RowIds, RowIds]


def make_batch(size: int, dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Batch:
    """Seven turns per picture, every text its own; queries near their targets."""
    generator = torch.Generator(device).manual_seed(0)
    target_ND, noise_ND = torch.randn(2, size, dim, generator=generator, device=device).unbind()
    query_ND = F.normalize(noise_ND.add_(target_ND), dim=-1).to(dtype).requires_grad_()
    number_N = torch.arange(size, device=device)
    ids = RowIds(number_N // 7, number_N, number_N)
    return query_ND, F.normalize(target_ND, dim=-1).to(dtype).requires_grad_(), ids, ids


def step(loss: Callable[..., InfoNCE], batch: Batch) -> Callable[[], None]:
    """Forward and backward, as a call without arguments."""

    def run() -> None:
        batch[0].grad = batch[1].grad = None
        loss(*batch).loss_sum.backward()

    return run


def cpu_speed(size: int, dim: int, repeats: int) -> dict[str, Any]:
    batch = make_batch(size, dim)
    seconds = sample({"tiled": step(info_nce, batch), "dense": step(info_nce_dense, batch)}, repeats)
    ratios = [tiled / dense for tiled, dense in zip(seconds["tiled"], seconds["dense"], strict=True)]
    return {
        "benchmark": "info_nce/cpu_speed",
        "shape": {"rows": size, "keys": size, "dim": dim, "dtype": "float32"},
        "repeats": repeats,
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "tiled_over_dense": percentiles(ratios),
        "aim": "p50 <= 1.3",
    }


def peak_bytes() -> int:
    """The process's peak resident memory so far."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def grow(size: int, dim: int, threads: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(threads)
    step(info_nce, make_batch(128, dim))()  # libraries and thread pools are there before the count begins
    batch = make_batch(size, dim)
    before = peak_bytes()
    seconds = sample({"tiled": step(info_nce, batch)}, repeats=1, warmup=0)["tiled"][0]
    queue.put((peak_bytes() - before, seconds))


def cpu_memory(size: int, dim: int) -> dict[str, Any]:
    # In a process of its own: a peak is never lowered again.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=grow, args=(size, dim, torch.get_num_threads(), queue))
    process.start()
    growth, seconds = queue.get()
    process.join()
    return {
        "benchmark": "info_nce/cpu_memory",
        "shape": {"rows": size, "keys": size, "dim": dim, "dtype": "float32"},
        "repeats": 1,
        "seconds": round(seconds, 2),
        "peak_growth_bytes": growth,
        "of_which_gradients": 2 * 4 * size * dim,
        "dense_logits_bytes": 4 * size * size,
        "share_of_dense_logits": round(growth / (4 * size * size), 5),
    }


def cuda(size: int, dim: int, repeats: int) -> dict[str, Any]:
    batch = make_batch(size, dim, torch.bfloat16, "cuda")
    query_RD, key_KD = batch[0].detach(), batch[1].detach()
    fused = step(info_nce, batch)
    fused()  # compiles
    batch[0].grad = batch[1].grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    fused()
    gradients = 2 * (query_RD.numel() + key_KD.numel())
    beyond = torch.cuda.max_memory_allocated() - held - gradients
    logits_RK = query_RD @ key_KD.T

    def products() -> None:
        torch.matmul(query_RD, key_KD.T, out=logits_RK)
        torch.matmul(logits_RK, key_KD)
        torch.matmul(logits_RK.T, query_RD)

    def forward() -> None:
        with torch.no_grad():
            info_nce(*batch)

    seconds = sample({"loss": fused, "loss_forward": forward, "matmul": products}, repeats, warmup=2)
    operations = 6 * size * size * dim
    ratios = [matmul / loss for loss, matmul in zip(seconds["loss"], seconds["matmul"], strict=True)]
    return {
        "benchmark": "info_nce/cuda",
        "shape": {"rows": size, "keys": size, "dim": dim, "dtype": "bfloat16"},
        "repeats": repeats,
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "tflops": {name: percentiles([operations / s / 1e12 for s in seconds[name]]) for name in ("loss", "matmul")},
        "share_of_matmul_rate": percentiles(ratios),
        "peak_bytes_beyond_inputs_and_gradients": beyond,
        "dense_logits_bytes": 4 * size * size,
        "share_of_dense_logits": round(beyond / (4 * size * size), 5),
        "aim": "share_of_matmul_rate p50 >= 0.6, share_of_dense_logits < 0.05",
    }


def between(rows: int, keys: int, dim: int, device: str) -> Batch:
    """Rows whose positives are the first keys; a CPU's are float32, a GPU's bfloat16."""
    query_KD, key_KD, _ids, ids = make_batch(keys, dim, torch.bfloat16 if device == "cuda" else torch.float32, device)
    return query_KD.detach()[:rows].requires_grad_(), key_KD, ids.rows(0, rows), ids


def dense(
    query_RD: torch.Tensor, key_KD: torch.Tensor, query_ids: RowIds, key_ids: RowIds, *, temperature: float
) -> InfoNCE:
    """As people write it: products in the inputs' type, masks and softmax on a float32 matrix, no statistics."""
    own_RK = query_ids.pair_id_N[:, None] == key_ids.pair_id_N
    masked_RK = query_ids.image_id_N[:, None] == key_ids.image_id_N
    masked_RK = (masked_RK | (query_ids.target_hash_N[:, None] == key_ids.target_hash_N)) & ~own_RK
    logits_RK = (query_RD @ key_KD.T).float() / temperature
    label_R = own_RK.int().argmax(1)
    loss_sum = F.cross_entropy(logits_RK.masked_fill_(masked_RK, -torch.inf), label_R, reduction="sum")
    return InfoNCE(loss_sum, len(query_RD), {})


def chunked(
    query_RD: torch.Tensor, key_KD: torch.Tensor, query_ids: RowIds, key_ids: RowIds, *, temperature: float
) -> InfoNCE:
    """The dense form for as many rows at a time as make CHUNK_ENTRIES logits, recomputed in the backward pass."""
    rows = max(16, CHUNK_ENTRIES // len(key_KD))

    def part(query_rD: torch.Tensor, key_KD: torch.Tensor, start: int) -> torch.Tensor:
        ids = query_ids.rows(start, start + len(query_rD))
        return dense(query_rD, key_KD, ids, key_ids, temperature=temperature).loss_sum

    parts = [
        checkpoint(part, query_rD, key_KD, i * rows, use_reentrant=False)
        for i, query_rD in enumerate(query_RD.split(rows))
    ]
    return InfoNCE(torch.stack(parts).sum(), len(query_RD), {})


def check(losses: dict[str, Callable[..., InfoNCE]], batch: Batch) -> None:
    """The same loss and gradients, or an error."""
    limit = 3e-2 if batch[0].is_cuda else 1e-4  # dense logits are rounded to bfloat16
    found = {}
    for name, loss in losses.items():
        loss_sum = loss(*batch).loss_sum
        found[name] = [loss_sum.detach(), *torch.autograd.grad(loss_sum, batch[:2])]
    for name, values in found.items():
        for ours, theirs in zip(found["ours"], values, strict=True):
            difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            assert difference <= limit, f"{name} differs from ours by {difference:.1e}"


def keys_sweep(rows: int, keys: int, dim: int, device: str, repeats: int) -> dict[str, Any]:
    rows = min(rows, keys)
    batch, product = between(rows, keys, dim, device), matmul(torch.device(device))
    forms: dict[str, Callable[..., InfoNCE]] = {"ours": info_nce, "chunked": chunked, "dense": dense}
    losses: dict[str, Callable[..., InfoNCE]] = {
        name: partial(form, temperature=TEMPERATURE) for name, form in forms.items()
    }
    skipped, needed = {}, DENSE_BYTES_PER_ENTRY * rows * keys
    if needed > free_bytes(device):
        losses.pop("dense")
        skipped["dense"] = f"needs about {needed / 2**30:.0f} GiB"
        print(f"{keys} keys: dense is skipped: {skipped['dense']}", flush=True)
    check(losses, batch)
    growth = {name: peak_growth(step(loss, batch)) for name, loss in losses.items()}
    works: dict[str, Callable[[], object]] = {name: step(loss, batch) for name, loss in losses.items()}
    seconds = sample({**works, "matmul": product.run}, repeats)
    rate, flops = product.rate(seconds["matmul"]), 6.0 * rows * keys * dim
    return {
        "benchmark": "info_nce/keys",
        "shape": {"rows": rows, "keys": keys, "dim": dim, "dtype": str(batch[0].dtype).removeprefix("torch.")},
        "repeats": repeats,
        "matmul_gflops": round(rate / 1e9, 1),
        "systems": {
            name: {
                "seconds": percentiles(seconds[name]),
                "share_of_matmul": round(flops / percentiles(seconds[name])["p50"] / rate, 4),
                "peak_growth_bytes": growth[name],
            }
            for name in losses
        },
        "dense_logits_bytes": 4 * rows * keys,
        "skipped": skipped,
    }


def free_bytes(device: str) -> int:
    """Memory that may be used, with room left."""
    if device == "cuda":
        return int(0.8 * torch.cuda.mem_get_info()[0])
    return int(0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--rows", type=int, help="rows, and keys, of each measurement (default: as above)")
    parser.add_argument("--keys", type=int, nargs="+", help="of the part `keys` (default: as above)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    wanted = args.only or PARTS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "cpu_speed" in wanted:
        for dim in (256, 1536):
            record(args.results, cpu_speed(args.rows or 4096, dim, args.repeats) | provenance())
    if "cpu_memory" in wanted:
        record(args.results, cpu_memory(args.rows or 65536, 64) | provenance())
    if "cuda" in wanted:
        if torch.cuda.is_available():
            record(args.results, cuda(args.rows or 65536, 1536, args.repeats) | provenance())
        else:
            print("skipped, no CUDA GPU: 65,536 x 65,536 x 1,536 in bfloat16 (memory and rate of the kernels)")
    if "keys" in wanted:
        rows, dim = (4096, 1536) if device == "cuda" else (512, 256)
        for keys in args.keys or [size for size in KEYS if device == "cuda" or size <= 65536]:
            record(args.results, keys_sweep(args.rows or rows, keys, dim, device, args.repeats) | provenance())


if __name__ == "__main__":
    main()
