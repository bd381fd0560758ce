"""How each benchmark's result lines become rows of a table. A file that is not listed gets `generic` rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]
Row = dict[str, str]
"""Cells by their column's header, in the columns' order."""

PROVENANCE = ("command", "device", "threads", "versions", "commit", "date")
UNSHOWN = ("benchmark", "aim", "repeats", *PROVENANCE)


@dataclass(frozen=True)
class Table:
    """`identity`: keys whose values, with the device, tell lines apart: of those alike the newest is shown."""

    title: str
    about: str
    rows: Callable[[Entry], list[Row]]
    identity: tuple[str, ...] = ("shape",)


def number(value: Any) -> str:
    """Three significant digits; thousands whole; "–" where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def median(spread: Any) -> str:
    """p50 with p20 to p80 behind it, or a number as it is."""
    if not isinstance(spread, dict):
        return number(spread)
    return f"{number(spread['p50'])} ({number(spread['p20'])}–{number(spread['p80'])})"


def described(shape: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in shape.items() if not isinstance(value, list))


def generic(entry: Entry) -> list[Row]:
    """One row: what is not provenance, nested dicts by dotted names, percentiles as a median, lists left out."""
    return [{"what": entry["benchmark"], **dict(_flat("", {k: v for k, v in entry.items() if k not in UNSHOWN}))}]


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if name == "shape":
            yield "shape", described(value)
        elif isinstance(value, dict) and "p50" not in value:
            yield from _flat(f"{prefix}{name}.", value)
        elif not isinstance(value, list):
            yield prefix + name, median(value)


def step(entry: Entry) -> list[Row]:
    """A row a system."""
    rows = []
    for name, system in entry["systems"].items():
        ratio, processor = entry.get(f"ratio_{name}"), entry.get(f"processor_ratio_{name}")
        rows.append(
            {
                "workload": entry["benchmark"].removeprefix("step/"),
                "model": entry["model"],
                "system": name,
                "form": system["form"],
                "pairs/s": number(system["pairs_per_s"]),
                "images/s": number(system["images_per_s"]),
                "tokens/s": number(system["tokens_per_s"]),
                "padding": number(system["padding"]),
                "seconds": median(system["seconds"]),
                "times ours": median(ratio),
                "times ours, processor": median(processor),
                "MFU": number(system["mfu"]),
                "of matmul": number(system["share_of_matmul"]),
                "memory, GiB": number(system["peak_growth_gib"]),
            }
        )
    return rows


def step_split(entry: Entry) -> list[Row]:
    """Milliseconds of the phases, a row a system."""
    return [
        {
            "workload": entry["benchmark"].removeprefix("step/"),
            "model": entry["model"],
            "system": name,
            **{phase.replace("_", " "): number(round(1e3 * s)) for phase, s in system["split_seconds"].items()},
        }
        for name, system in entry["systems"].items()
    ]


def gradient_cache(entry: Entry) -> list[Row]:
    return [
        {
            "checkpointing": number(entry["activation_checkpointing"]),
            "packs": number(entry["packs"]),
            "one pack, s": median(entry["seconds"]["one pack"]),
            "several packs, s": median(entry["seconds"]["cache"]),
            "vision forward, s": median(entry["seconds"]["vision"]),
            "step ratio": number(entry["ratio_step"]),
            "ratio without vision": number(entry["ratio_text"]),
            "vision calls a pack": number(entry["vision_calls_per_pack"]),
        }
    ]


def plan(entry: Entry) -> list[Row]:
    return [
        {
            "ranks": number(entry["ranks"]),
            "images": number(entry["images"]),
            "pack_tokens": number(entry["pack_tokens"]),
            "packs": ", ".join(map(str, entry["packs"])),
            **{name: f"{entry[name]:.4f}" for name in ("imbalance", "imbalance_worst", "lockstep", "fill")},
            "step, ms": median(entry["step_ms"]),
            "assign, ms": median(entry["assign_ms"]),
        }
    ]


def attention(entry: Entry) -> list[Row]:
    """A row a system; seconds in milliseconds."""
    return [
        {
            "layout": entry["benchmark"].removeprefix("attention/"),
            "rows": number(entry["shape"]["rows"]),
            "heads": f"{entry['shape']['heads']}/{entry['shape']['kv_heads']} of {entry['shape']['head_dim']}",
            "padding": number(entry["padding"]),
            "system": name,
            "forward, ms": _milliseconds(system["forward_seconds"]),
            "of matmul": number(system["forward_share_of_matmul"]),
            "and backward, ms": _milliseconds(system["seconds"]),
            "of matmul, both": number(system["share_of_matmul"]),
        }
        for name, system in entry["systems"].items()
    ]


def pooler(entry: Entry) -> list[Row]:
    return [
        {
            "layout": entry["benchmark"].removeprefix("pooler/"),
            "embeddings": number(entry["shape"]["embeddings"]),
            "rows": number(entry["shape"]["rows"]),
            "system": f"{name} ({entry['form']})" if name == "ours" else name,
            "forward, ms": _milliseconds(system["forward_seconds"]),
            "of copy": number(system["forward_share_of_copy"]),
            "and backward, ms": _milliseconds(system["seconds"]),
            "of copy, both": number(system["share_of_copy"]),
        }
        for name, system in entry["systems"].items()
    ]


def info_nce(entry: Entry) -> list[Row]:
    """Of the sweep over keys a row a system."""
    if "systems" not in entry:
        return generic(entry)
    return [
        {
            "rows": number(entry["shape"]["rows"]),
            "keys": number(entry["shape"]["keys"]),
            "dim": number(entry["shape"]["dim"]),
            "form": name,
            "forward and backward, ms": _milliseconds(system["seconds"]),
            "of matmul": number(system["share_of_matmul"]),
            "memory, MiB": number(None if (grown := system["peak_growth_bytes"]) is None else grown / 2**20),
        }
        for name, system in entry["systems"].items()
    ]


def _milliseconds(spread: dict[str, float] | None) -> str:
    return median(None if spread is None else {name: 1e3 * seconds for name, seconds in spread.items()})


TABLES = {
    "step": Table(
        "The training step",
        "Optimizer steps side by side in one process, same weights, same global batch, losses and gradients compared. "
        "“times ours”: theirs over ours in seconds, median of the rounds (p20–p80); “processor”: the same in seconds "
        "on a processor, which other programs on the machine don't lengthen. Memory: growth during a step beyond "
        "weights and optimizer states. “of matmul”: model FLOPs a second over those of bare matrix products.",
        step,
        ("model", "images"),
    ),
    "gradient_cache": Table(
        "Gradient cache", "A step in several packs against the same step in one, vision tower frozen.", gradient_cache,
        ("activation_checkpointing", "packs"),
    ),
    "plan": Table(
        "Planning a step", "Balance, fill and time of the plan on M3T-like sizes.", plan,
        ("ranks", "images", "pack_tokens"),
    ),
    "ceilings": Table("Ceilings", "What the device does at best: matrix products, copies.", generic, ("dtype",)),
    "info_nce": Table(
        "The contrastive loss",
        "Tiled or fused against dense, and against `chunked`: dense for some rows at a time, recomputed in backward.",
        info_nce,
    ),
    "linear_cross_entropy": Table(
        "The vocabulary head", "Cross-entropy without whole logits against dense.", generic, ("shape", "table", "form")
    ),
    "compression_plan": Table("Attention of compression", "Segments that see the tokens alone.", generic),
    "attention": Table(
        "Packed attention",
        "A SegmentPlan's attention by backend, a padded batch by SDPA, and flex attention; the same real rows, outputs "
        "compared. FLOPs of the plan's query-key pairs for all, over the rate of bare matrix products.",
        attention,
    ),
    "pooler": Table(
        "Pooling", "Final norm and unit length of pooled rows; least bytes that must move, over those of a plain copy.",
        pooler,
    ),
    "encode": Table("Inference", "Against sentence-transformers.", generic, ("preset", "dtype", "rows")),
    "overhead": Table(
        "Watching a run",
        "Guards, heartbeat, meter and log as shares of a step of the demo; a heartbeat's of the seconds between two.",
        generic, ("ranks",),
    ),
    "checkpoint": Table(
        "Checkpoints",
        "How long training waits (waited) for what is written beside it; in the foreground; DeepSpeed's own.",
        generic, ("millions",),
    ),
    "input": Table("The input side", "Decode, resize and patch layout.", generic),
}  # fmt: skip
EXTRA = {
    "step": Table("Where a step's time goes", "Milliseconds of a step in which every phase is waited for.", step_split)
}
