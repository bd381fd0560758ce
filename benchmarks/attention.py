#!/usr/bin/env python3
"""Packed attention by a SegmentPlan beside a padded batch and beside flex attention, one layer, the same real rows.

    python benchmarks/attention.py

Layouts, of the same dialogues: `causal` (every row sees all before it), `isolated` (each of seven turns sees the
picture's rows and itself), `compression` (everything behind the compression tokens sees only these and itself).

Systems:

- a name of a backend: `segment_attention` with it, the gather of keys and values included;
- padded: dialogues padded to the longest, `scaled_dot_product_attention`: with a mask for each dialogue, or for
  `causal` by its own causal flag without one (padding stands behind), which is its fastest form;
- flex: torch's flex_attention, compiled, its BlockMask made from the plan (once a pack, so outside the times). It has
  no backward pass on a CPU: forward alone there.

Before anything is timed all outputs must agree. FLOPs are those of the plan's query-key pairs, 4 per pair, head and
dimension forward and 8 backward, for all systems: what padding or blocks compute beyond them is not counted. Shares are
of the measured rate of bare matrix products.

On a GPU the 2B model's heads in bfloat16 and every installed backend, on a CPU fewer heads in float32. Appends one JSON
line per layout to benchmarks/results/attention.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from muco_ds.data.segments import Segment, SegmentBuilder, SegmentPlan, causal, isolated
from muco_ds.models.attention import segment_attention

from ceilings import matmul
from compression_plan import backends, pairs
from harness import percentiles, provenance, record, sample

RESULTS = Path(__file__).parent / "results" / "attention.jsonl"
HEADS = {"cpu": (4, 1, 64), "cuda": (12, 2, 128)}  # query heads, key heads, head dimension
TURNS, TOKENS = 7, 32
Attend = Callable[..., torch.Tensor]


def draw(dialogues: int, picture: int, turn: int) -> list[tuple[int, list[int]]]:
    """Rows of each dialogue's picture and of its turns: half to one and a half times the given means."""
    rng = np.random.default_rng(0)
    return [
        (round(picture * rng.uniform(0.5, 1.5)), np.round(turn * rng.uniform(0.5, 1.5, TURNS)).astype(int).tolist())
        for _ in range(dialogues)
    ]


def segments(layout: str, prefix: int, turns: list[int]) -> list[Segment]:
    if layout == "isolated":
        return isolated(prefix, turns)
    if layout == "compression":
        tokens = min(TOKENS, prefix)
        return [*causal(prefix), Segment(sum(turns), context=(prefix - tokens, prefix))]
    return causal(prefix + sum(turns))


def plan_of(layout: str, lengths: list[tuple[int, list[int]]]) -> SegmentPlan:
    builder = SegmentBuilder()
    for prefix, turns in lengths:
        builder.add(segments(layout, prefix, turns))
    return builder.build()


class Padded:
    """Dialogues as rows of a batch. `flag`: causal by SDPA's own flag."""

    def __init__(self, layout: str, lengths: list[tuple[int, list[int]]], device: str) -> None:
        rows = [prefix + sum(turns) for prefix, turns in lengths]
        self.shape = (len(rows), max(rows))
        places = [i * max(rows) + np.arange(n) for i, n in enumerate(rows)]
        self.place_T = torch.from_numpy(np.concatenate(places)).to(device)
        self.flag = layout == "causal"
        self.mask_B1LL = None
        if not self.flag:
            mask = torch.eye(max(rows), dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no NaN
            for i, (prefix, turns) in enumerate(lengths):
                mask[i, : rows[i], : rows[i]] = plan_of(layout, [(prefix, turns)]).dense_mask()
            self.mask_B1LL = mask[:, None].to(device)

    def pad(self, x_THd: torch.Tensor) -> torch.Tensor:
        """[B, H, L, d], made once: a padded model's states are padded everywhere."""
        batch, longest = self.shape
        padded = x_THd.new_zeros(batch * longest, *x_THd.shape[1:]).index_copy(0, self.place_T, x_THd)
        return padded.unflatten(0, (batch, longest)).transpose(1, 2).contiguous()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Grouped heads have a fused kernel on a GPU without a mask only.
        grouped = self.flag and q.is_cuda
        if not grouped:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask_B1LL, is_causal=self.flag, enable_gqa=grouped
        )

    def unpad(self, out: torch.Tensor) -> torch.Tensor:
        return out.transpose(1, 2).flatten(0, 1)[self.place_T]


def flex_mask(plan: SegmentPlan, device: str) -> Any:
    """BlockMask of a packed row: each row sees its segment up to itself, and its segment's context."""
    from torch.nn.attention.flex_attention import create_block_mask

    cu_q, cu_k = plan.cu_q_S1.long(), plan.cu_k_S1.long()
    len_q, len_k = cu_q.diff(), cu_k.diff()
    kv_index = torch.arange(int(cu_q[-1])) if plan.kv_index_J is None else plan.kv_index_J
    first = kv_index[cu_k[:-1]]  # a context is one stretch of rows
    stop = first + len_k - len_q
    given = (cu_q[:-1], first, stop)
    start_T, context_T, stop_T = (x.repeat_interleave(len_q).int().to(device) for x in given)

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return ((kv >= start_T[q]) & (kv <= q)) | ((kv >= context_T[q]) & (kv < stop_T[q]))

    rows = int(cu_q[-1])
    return create_block_mask(mask_mod, None, None, rows, rows, device=device)


class Leaves:
    """q, k and v of a pack, and its systems: name -> (attend, its own leaves, its own gradient, to packed rows)."""

    def __init__(self, layout: str, lengths: list[tuple[int, list[int]]], device: str) -> None:
        self.plan = plan_of(layout, lengths)
        self.on_device = self.plan.map(lambda tensor: tensor.to(device))
        self.padded = Padded(layout, lengths, device)
        heads, kv_heads, self.dim = HEADS[device]
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        rows = int(self.plan.cu_q_S1[-1])
        q, k, v, upstream = (
            torch.randn(rows, n, self.dim, generator=generator, device=device).to(dtype)
            for n in (heads, kv_heads, kv_heads, heads)
        )
        self.packed, self.upstream = [x.requires_grad_() for x in (q, k, v)], upstream
        self.batched = [self.padded.pad(x.detach()).requires_grad_() for x in (q, k, v)]
        self.flexed = [x.detach().transpose(0, 1)[None].contiguous() for x in (q, k, v)]
        if device == "cuda":
            self.flexed = [x.requires_grad_() for x in self.flexed]

    def systems(self, names: list[str], device: str) -> dict[str, tuple[Attend, list[torch.Tensor], torch.Tensor]]:
        """Each with its inputs in its own form, and the gradient of its output."""
        made: dict[str, tuple[Attend, list[torch.Tensor], torch.Tensor]] = {}
        scale = self.dim**-0.5
        for name in names:
            if name == "padded":
                made[name] = self.padded.attend, self.batched, self.padded.pad(self.upstream)
            elif name == "flex":
                from torch.nn.attention.flex_attention import flex_attention

                mask, compiled = flex_mask(self.plan, device), torch.compile(flex_attention, dynamic=False)
                attend = _keyword(compiled, block_mask=mask, enable_gqa=True, scale=scale)
                made[name] = attend, self.flexed, self.upstream.transpose(0, 1)[None].contiguous()
            else:
                attend = _keyword(segment_attention, plan=self.on_device, scale=scale, backend=name)
                made[name] = attend, self.packed, self.upstream
        return made

    def packed_out(self, name: str, out: torch.Tensor) -> torch.Tensor:
        if name == "padded":
            return self.padded.unpad(out)
        return out[0].transpose(0, 1) if name == "flex" else out


def _keyword(function: Callable[..., Any], **options: Any) -> Attend:
    return lambda q, k, v: function(q, k, v, **options)


def forward(attend: Attend, leaves: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return attend(*leaves)

    return run


def both(attend: Attend, leaves: list[torch.Tensor], upstream: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)


def measure(
    layout: str, lengths: list[tuple[int, list[int]]], names: list[str], device: str, repeats: int
) -> dict[str, Any]:
    leaves = Leaves(layout, lengths, device)
    skipped: dict[str, str] = {}
    systems: dict[str, Any] = {}
    outs: dict[str, torch.Tensor] = {}
    for name in names:
        started = time.perf_counter()
        try:
            systems |= leaves.systems([name], device)
            outs[name] = leaves.packed_out(name, forward(*systems[name][:2])()).float()
            if not (name == "flex" and device == "cpu"):
                both(*systems[name])()
        except Exception as error:  # a compiler's own errors: what it can't do is a line, not the end
            systems.pop(name, None)
            outs.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print(f"{layout}: {name} is skipped: {skipped[name]}", flush=True)
        print(f"{layout}: {name} ready after {time.perf_counter() - started:.1f} s", flush=True)
    ours = next(iter(outs))
    for name, out in outs.items():
        difference = float((out - outs[ours]).norm() / outs[ours].norm())
        assert difference < (2e-2 if device == "cuda" else 1e-5), f"{name} differs from {ours} by {difference:.1e}"
    work: dict[str, Callable[[], object]] = {f"{n} forward": forward(*s[:2]) for n, s in systems.items()}
    trained = [name for name in systems if not (name == "flex" and device == "cpu")]
    if "flex" in systems and device == "cpu":
        skipped["flex, backward"] = "flex attention has none on a CPU"
    work |= {f"{name} both": both(*systems[name]) for name in trained}
    product = matmul(torch.device(device))
    seconds = sample({**work, "matmul": product.run}, repeats, warmup=2)
    rate, flops = product.rate(seconds["matmul"]), 4.0 * pairs(leaves.plan) * HEADS[device][0] * HEADS[device][2]

    def share(name: str, count: float) -> float | None:
        return round(count / percentiles(seconds[name])["p50"] / rate, 4) if name in seconds else None

    heads, kv_heads, dim = HEADS[device]
    real = int(leaves.plan.cu_q_S1[-1])
    return {
        "benchmark": f"attention/{layout}",
        "shape": {"rows": real, "dialogues": len(lengths), "heads": heads, "kv_heads": kv_heads, "head_dim": dim},
        "repeats": repeats,
        "matmul_gflops": round(rate / 1e9, 1),
        "gflop": {"forward": round(flops / 1e9, 3), "both": round(3 * flops / 1e9, 3)},
        "padding": round(1 - real / (leaves.padded.shape[0] * leaves.padded.shape[1]), 3),
        "systems": {
            name: {
                "forward_seconds": percentiles(seconds[f"{name} forward"]),
                "seconds": percentiles(seconds[f"{name} both"]) if name in trained else None,
                "forward_share_of_matmul": share(f"{name} forward", flops),
                "share_of_matmul": share(f"{name} both", 3 * flops),
            }
            for name in systems
        },
        "skipped": skipped,
    }


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [*backends(device), "padded", "flex"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, help="default: 4 on a CPU, 12 on a GPU")
    parser.add_argument("--picture", type=int, default=736, help="mean rows of picture and prompt")
    parser.add_argument("--turn", type=int, default=64, help="mean rows of a turn")
    parser.add_argument("--systems", nargs="+", choices=names, default=names)
    parser.add_argument("--layouts", nargs="+", default=["causal", "isolated", "compression"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    lengths = draw(args.dialogues or (12 if device == "cuda" else 4), args.picture, args.turn)
    for layout in args.layouts:
        record(args.results, measure(layout, lengths, args.systems, device, args.repeats) | provenance())


if __name__ == "__main__":
    main()
