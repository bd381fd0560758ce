#!/usr/bin/env python3
"""Scaling on paper: what ZeRO moves in a step against what the GPUs compute, for 8 to 1,024 of them.

    python benchmarks/scaling.py [--utilisation 0.5] [--write]

Prints the tables of docs/scaling.md, which says what they mean; --write puts them there. No number here was measured
on a GPU: `--utilisation`, executed FLOPs over the peak of one GPU, is an assumption until benchmarks/step.py has run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import Qwen2VLConfig

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.families import text_shape
from muco_ds.flops import PEAK_BF16_FLOPS, FlopsModel
from muco_ds.memory import GIB, estimate, parameters
from muco_ds.memory_activations import Load
from muco_ds.sizing import choices, least

from harness import ROOT

DOCUMENT = ROOT / "docs" / "scaling.md"
UTILISATION = 0.5
PEAK = PEAK_BF16_FLOPS["H100"]  # and H200
NODE = 8

# Bytes a second that a GPU receives in a large collective: what NCCL counts on for Hopper's NVLink; between nodes,
# eight adapters of 400 Gb/s at 90 %.
WITHIN, BETWEEN = 360e9, 0.9 * NODE * 50e9
# Seconds: NCCL's constants for a ring with LL128, of a collective, of a step over NVLink and of one over the network.
START, HOP, NETWORK_HOP = 14.0e-6, 1.9e-6, 4.0e-6

PREFETCH, BUCKET_3, BUCKET_2 = 5e7, 5e7, 2e8  # elements in a collective: ds_configs/zero3.json and zero2.json

# An example: means of the M3T-like sizes of benchmarks/plan.py, seven turns.
PATCHES, QUERY_TOKENS, TARGET_TOKENS, TURNS = 2869, 918, 226, 7
EVERYTHING = ActivationCheckpointing()
PACK_TOKENS = 40960  # of the pre-training recipes
ROOM = 72 * GIB  # of a GPU of 80 GB, with a tenth left
SIZES = [(8, 1024), (32, 1024), (64, 1024), (256, 1024), (1024, 1024), (256, 4096), (1024, 16384)]  # GPUs, images


@dataclass(frozen=True)
class Setup:
    """A model and what is trained of it; the vision tower is frozen, as in the recipes."""

    name: str
    backbone: Qwen2VLConfig
    lora: LoraOptions
    pack_tokens: int

    def __post_init__(self) -> None:
        weights = parameters(self.backbone, 0, True, self.lora, new_tokens=2)
        vision = sum(weight.numel for weight in parameters(self.backbone, 0, True) if not weight.trained)
        everything = sum(weight.numel for weight in weights)
        object.__setattr__(self, "vision", vision)
        object.__setattr__(self, "text", everything - vision)
        object.__setattr__(self, "trained", sum(weight.numel for weight in weights if weight.trained))

    vision: int = 0
    text: int = 0  # with its adapter
    trained: int = 0

    @property
    def hidden(self) -> int:
        return text_shape(self.backbone).hidden


@dataclass(frozen=True)
class Step:
    """Seconds and bytes of a step on one GPU."""

    compute: float
    moved: dict[str, float]
    gathers: dict[str, float]
    reduced: dict[str, float]
    keys: float
    packs: int

    def seconds(self, scheme: str) -> float:
        """Gathers hide behind compute; of one pack so does the reduction, of several it comes at the end."""
        if self.packs == 1:
            return max(self.compute, self.gathers[scheme] + self.reduced[scheme]) + self.keys
        return max(self.compute, self.gathers[scheme]) + self.reduced[scheme] + self.keys


def qwen2_vl(hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> Qwen2VLConfig:
    text = {"hidden_size": hidden, "num_hidden_layers": 28, "num_attention_heads": heads, "vocab_size": vocabulary}
    text |= {"num_key_value_heads": kv_heads, "intermediate_size": inner}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": hidden}
    return Qwen2VLConfig(text_config=text, vision_config=vision)


def setups() -> list[Setup]:
    """Those of launch/recipes/muco_*.yaml, and the same trained in full."""
    adapter = LoraOptions(rank=64, alpha=64, dropout=0.1, dora=True)
    small, large = qwen2_vl(1536, 12, 2, 8960, 151_936), qwen2_vl(3584, 28, 4, 18944, 152_064)
    return [
        Setup("2B, adapter", small, adapter, PACK_TOKENS),
        Setup("7B, adapter", large, adapter, PACK_TOKENS),
        Setup("2B, in full", small, LoraOptions(), PACK_TOKENS),
        Setup("7B, in full", large, LoraOptions(), PACK_TOKENS),
    ]


def collective(numel_bytes: float, count: float, ranks: int) -> float:
    """Seconds of all-gathers or reduce-scatters of so many bytes in `count` calls, in rings over all ranks."""
    nodes = max(1, ranks // NODE)
    speed = WITHIN if nodes == 1 else min(WITHIN, BETWEEN)
    hops = (ranks - nodes) * HOP + (nodes - 1) * NETWORK_HOP
    return numel_bytes * (ranks - 1) / ranks / speed + math.ceil(count) * (START + hops)


def gathers(numel: int, ranks: int) -> float:
    return collective(2 * numel, numel / PREFETCH, ranks)


def step(setup: Setup, ranks: int, images: int, utilisation: float) -> Step:
    """A step as muco_ds runs it: pass one and pass two of the gradient cache where a rank has several packs."""
    tokens = (QUERY_TOKENS + TARGET_TOKENS) * images / ranks
    packs = math.ceil(tokens / setup.pack_tokens)
    text_gathers, vision_gathers = (3 * packs, packs) if packs > 1 else (2, 1)
    bytes_3 = 2 * (text_gathers * setup.text + vision_gathers * setup.vision)
    within, everywhere = min(ranks, NODE), ranks
    one = {size: (gathers(setup.text, size), gathers(setup.vision, size)) for size in (within, everywhere)}
    zero3 = text_gathers * one[everywhere][0] + vision_gathers * one[everywhere][1]
    # The first gather after an update comes from all ranks and leaves a second copy in the node for the others.
    hpz = sum(one[everywhere]) + (text_gathers - 1) * one[within][0] + (vision_gathers - 1) * one[within][1]
    gradient, update = 4 * setup.trained, 2 * setup.trained
    reduce_3 = collective(gradient, setup.trained / BUCKET_3, ranks)
    reduce_2 = collective(gradient, setup.trained / BUCKET_2, ranks) + collective(
        update, setup.trained / BUCKET_2, ranks
    )
    keys = 2 * collective(4 * setup.hidden * TURNS * images, 1, ranks)
    return Step(
        compute=executed_flops(setup, images / ranks, packs) / (utilisation * PEAK),
        moved={"ZeRO-2": gradient + update, "ZeRO-3": bytes_3 + gradient, "hpZ": bytes_3 + gradient},
        gathers={"ZeRO-2": 0.0, "ZeRO-3": zero3, "hpZ": hpz},
        reduced={"ZeRO-2": reduce_2, "ZeRO-3": reduce_3, "hpZ": reduce_3},
        keys=keys,
        packs=packs,
    )


def executed_flops(setup: Setup, examples: float, packs: int) -> float:
    """With everything that is computed twice: text layers recomputed, all but the last; pass one of several packs."""
    model = FlopsModel.from_config(setup.backbone, train_vision=False, lora=setup.lora)
    tokens, pairs = QUERY_TOKENS + TARGET_TOKENS, (QUERY_TOKENS**2 + TARGET_TOKENS**2) / 2
    layers = text_shape(setup.backbone).layers
    read = 2 * TURNS  # rows that the last layer is asked for
    linear, attention = (model.per_token + model.adapter_per_token) * tokens, model.per_token_pair * pairs
    spared = (model.per_unread + model.adapter_per_unread) * (tokens - read)
    again = linear * (layers - 1) / layers + attention + (linear + attention - spared if packs > 1 else 0.0)
    return examples * (model.training(tokens, pairs, PATCHES, PATCHES**2, read=read) + again)


def table(rows: list[list[object]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in body]
    return "\n".join(["| " + " | ".join(map(str, head)) + " |", "|" + "---|" * len(head), *lines])


def sizes_table(all_setups: list[Setup]) -> str:
    rows: list[list[object]] = [
        ["", "text tower, M", "vision tower, M", "trained, M", "a gather of both, GB", "gradient, fp32, GB"]
    ]
    for setup in all_setups:
        counts = [f"{count / 1e6:,.0f}" for count in (setup.text, setup.vision, setup.trained)]
        gathered, gradient = 2 * (setup.text + setup.vision), 4 * setup.trained
        rows.append([setup.name, *counts, f"{gathered / 1e9:.1f}", f"{gradient / 1e9:.2f}"])
    return table(rows)


def step_table(setup: Setup, utilisation: float) -> str:
    """`kept`: share of the compute alone that is left of the step's speed."""
    head: list[object] = ["GPUs", "images", "packs", "compute, ms", "keys, ms"]
    rows = [[*head, "ZeRO-2: GB", "ms", "kept", "ZeRO-3: GB", "ms", "kept", "hpZ: ms", "kept", "ZeRO-3 bound by"]]
    for ranks, images in SIZES:
        found = step(setup, ranks, images, utilisation)
        cells: list[object] = [f"{ranks:,}", f"{images:,}", found.packs, f"{1e3 * found.compute:,.0f}"]
        cells.append(f"{1e3 * found.keys:.1f}")
        for scheme in ("ZeRO-2", "ZeRO-3", "hpZ"):
            moving = found.gathers[scheme] + found.reduced[scheme]
            kept = f"{100 * found.compute / found.seconds(scheme):.0f} %"
            moved = [] if scheme == "hpZ" else [f"{found.moved[scheme] / 1e9:.1f}"]
            cells += [*moved, f"{1e3 * moving:,.0f}", kept]
        rows.append([*cells, bound(setup, found, ranks)])
    return table(rows)


def bound(setup: Setup, found: Step, ranks: int) -> str:
    if found.gathers["ZeRO-3"] + (found.reduced["ZeRO-3"] if found.packs == 1 else 0) <= found.compute:
        return "compute"
    passes = 3 * found.packs if found.packs > 1 else 2
    waiting = passes * setup.text / PREFETCH * (collective(0, 1, ranks))
    return "latency" if waiting > 0.5 * found.gathers["ZeRO-3"] else "bandwidth"


def total_memory(setup: Setup, stage: int, pack_tokens: int, recomputed: ActivationCheckpointing = EVERYTHING) -> int:
    """Estimated bytes of the fullest of 64 ranks, one full pack each."""
    examples = pack_tokens / (QUERY_TOKENS + TARGET_TOKENS)
    patches, rows = int(PATCHES * examples), int(2 * TURNS * examples)
    return estimate(
        setup.backbone,
        json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text()),
        Load(1, pack_tokens, pack_tokens, patches, patches, rows, 64 * rows // 2, 0, rows, pack_tokens),
        vocabulary=0,
        world_size=64,
        precision="bf16",
        freeze_vision=True,
        activation_checkpointing=recomputed,
        lora=setup.lora,
        new_tokens=2,
    ).total


def memory_table(all_setups: list[Setup]) -> str:
    """GiB with the recipes' packs and everything recomputed; the largest packs, in steps of 4,096 tokens, that leave a
    tenth of 80 GB; the least share of the text layers with which the recipes' packs do."""
    rows: list[list[object]] = [
        ["", "ZeRO-2, GiB", "ZeRO-3, GiB", "largest pack: ZeRO-2", "ZeRO-3", "least recomputed: ZeRO-2"]
    ]
    for setup in all_setups:
        totals = [f"{total_memory(setup, stage, setup.pack_tokens) / GIB:.0f}" for stage in (2, 3)]
        sizes = range(4096, 2**19 + 1, 4096)
        largest = [
            sizes[bisect_right(sizes, ROOM, key=partial(total_memory, setup, stage)) - 1]  # type: ignore[arg-type]
            for stage in (2, 3)
        ]
        options = choices(ActivationCheckpointing(0), setup.backbone, freeze_vision=True)
        share = least(options, partial(total_memory, setup, 2, setup.pack_tokens), ROOM)
        assert share is not None
        rows.append([setup.name, *totals, *(f"{size:,}" for size in largest), f"{share.text:.2f}"])
    return table(rows)


def packs_table(all_setups: list[Setup], utilisation: float) -> str:
    """What several packs cost on the papers' 32 GPUs: compute, and what ZeRO-3 gathers."""
    rows: list[list[object]] = [["", "pack_tokens", "packs", "compute, ms", "ZeRO-3: GB", "ms"]]
    for setup in all_setups[:2]:
        for pack_tokens in (8192, 16384, 32768, 40960):
            found = step(replace(setup, pack_tokens=pack_tokens), 32, 1024, utilisation)
            gathered = 1e3 * found.gathers["ZeRO-3"]
            moved = f"{found.moved['ZeRO-3'] / 1e9:.0f}"
            rows.append(
                [setup.name, f"{pack_tokens:,}", found.packs, f"{1e3 * found.compute:,.0f}", moved, f"{gathered:.0f}"]
            )
    return table(rows)


def keys_table(all_setups: list[Setup], utilisation: float) -> str:
    """What overlapping the exchange of keys with the rest of pass one could save at most."""
    rows: list[list[object]] = [["", "GPUs", "keys, MB", "gather, ms", "of the step under ZeRO-2"]]
    for setup in all_setups[:2]:
        for ranks in (8, 64, 256):
            found = step(setup, ranks, 1024, utilisation)
            size, gather = 4 * setup.hidden * TURNS * 1024, found.keys / 2
            share = gather / found.seconds("ZeRO-2")
            rows.append([setup.name, ranks, f"{size / 1e6:.0f}", f"{1e3 * gather:.2f}", f"{100 * share:.2f} %"])
    return table(rows)


def tables(utilisation: float) -> dict[str, str]:
    """By the name that docs/scaling.md has for each."""
    found = setups()
    each = {f"step {setup.name}": step_table(setup, utilisation) for setup in found}
    return {
        "sizes": sizes_table(found),
        **each,
        "packs": packs_table(found, utilisation),
        "memory": memory_table(found),
        "keys": keys_table(found, utilisation),
    }


def rendered(document: str, found: dict[str, str]) -> str:
    """The document with every table between `<!-- table: NAME -->` and `<!-- end -->` replaced."""
    for name, text in found.items():
        pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        document, count = pattern.subn(lambda match: f"{match[1]}{text}\n{match[2]}", document)  # noqa: B023
        assert count == 1, name
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilisation", type=float, default=UTILISATION)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = tables(args.utilisation)
    for name, text in found.items():
        print(f"{name}\n{text}\n")
    if args.write:
        path = Path(DOCUMENT)
        path.write_text(rendered(path.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
