#!/usr/bin/env python3
"""What a run will be like, before any GPU is taken.

    python tools/preflight.py --config RECIPE --ranks 64 [--gpu_memory 80] [--steps 50] [--json] [--section.key VALUE]

Opens (or builds) the length index, plans steps spread over the run for that many ranks, and reports steps, balance,
fill and the estimated memory of the fullest rank. Exit status 0: fits, 1: does not fit, 2: an error in the input.
Memory is an estimate from the configuration (muco_ds/memory.py says how); the proof is train.py --dry_run on the GPUs.

    python tools/preflight.py --config RECIPE --ranks 64 --tune [--tries 6] [--output FILE]

Runs a few short steps of one rank's share on this machine's device, with the packs and the activation checkpointing
that promise most, prints what was measured, and writes the fastest that fits a rank of the planned run as a recipe for
a second --config. Times leave out what the ranks send each other. Exit status 1: nothing fits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # indexing forks; the tokenizer's threads would not survive

from muco_ds.config import RunConfig, check_paths
from muco_ds.config_cli import parse_args
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.versions import check_versions

PARTS = {
    "weights": "weights",
    "gradients": "gradients, with their buckets",
    "optimizer": "optimizer, with master weights",
    "gathered": "weights gathered from other ranks",
    "inputs": "pixels, ids, kept vision features",
    "embeddings": "embeddings and keys, or states",
    "activations": "activations of the largest pack",
    "logits": "logits of the loss, beyond those",
    "update": "instead of those two, at the update",
    "allowance": "allowance: context, fragmentation",
    "total": "total",
}


def split_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This tool's own options, and the rest, which is a training run's command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, required=True, help="GPUs of the planned run")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="of one GPU, in GiB (default: 80)")
    parser.add_argument("--steps", type=int, default=50, help="how many steps to plan at most (default: 50)")
    parser.add_argument("--tune", action="store_true", help="find batch.pack_tokens and model.activation_checkpointing")
    parser.add_argument("--tries", type=int, default=6, help="how many settings --tune tries at most (default: 6)")
    parser.add_argument("--output", help="where --tune writes the settings, as a recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    own, rest = parser.parse_known_args(argv)
    for name in ("ranks", "gpu_memory", "steps", "tries"):
        if not getattr(own, name) > 0:
            raise UserError(f"--{name} {getattr(own, name)}: give more than 0")
    if own.output and not own.tune:
        raise UserError("--output is where --tune writes its settings: add --tune")
    if own.output and not Path(own.output).resolve().parent.is_dir():
        raise UserError(f"--output {own.output}: there is no such folder")
    return own, rest


def tuning_table(tree: dict) -> str:
    gib = 2**30
    lines = [
        f"for {tree['ranks']} ranks of {tree['gpu_memory_gib']:g} GiB, one rank's share of a batch on this device; GiB",
        "packs  pack_tokens  text  vision  estimated  measured here  needed there  pairs/s a GPU",
    ]
    for trial in tree["trials"]:
        candidate, measured = trial["candidate"], trial["measured"]
        shares = candidate["checkpointing"]
        vision = "-" if shares["vision"] is None else f"{shares['vision']:.2f}"
        line = f"{candidate['packs']:5}  {candidate['pack_tokens']:11}  {shares['text']:.2f}  {vision:>6}"
        line += f"  {candidate['estimated'] / gib:9.2f}"
        if measured is None:
            lines.append(f"{line}  out of memory")
            continue
        line += f"  {measured['peak'] / gib:13.2f}  {trial['needed'] / gib:12.2f}  {trial['pairs_per_s']:13.1f}"
        lines.append(line if trial["fits"] else f"{line}  too large")
    if tree["best"] is None:
        return "\n".join([*lines, "nothing fits: more --ranks, or deepspeed=ds_configs/zero3_offload.json"])
    return "\n".join([*lines, "best: " + " ".join(f"--{key} {value}" for key, value in tree["best"].items())])


def run_tuning(config: RunConfig, own: argparse.Namespace, rest: list[str]) -> int:
    from muco_ds.tune import run_try, snippet, tune

    tuning = tune(config, own.ranks, own.gpu_memory, own.steps, own.tries, run_try)
    tree = tuning.as_json()
    print(json.dumps(tree) if own.json else tuning_table(tree))
    if tuning.best is None:
        return 1
    if own.output:
        recipe = rest[rest.index("--config") + 1] if "--config" in rest else "RECIPE"
        Path(own.output).write_text(snippet(tuning, recipe), encoding="utf-8")
    return 0


def table(tree: dict) -> str:
    planned, gib = tree["planned"], 2**30
    mean = {name: sum(step[name] for step in planned) / len(planned) for name in planned[0] if name != "load"}
    used = sorted({step["packs"] for step in planned})
    largest = max(step["load"]["tokens"] for step in planned)
    imbalance, fill = tree["imbalance"], tree["pack_fill"]
    lines = [
        f"rows            {tree['rows']} usable, {tree['bad_rows']} bad",
        f"steps           {tree['steps']} in the run, {tree['steps_per_epoch']} an epoch; {len(planned)} looked at",
        f"a step          {tree['images']} images, {mean['pairs']:.0f} pairs, {mean['llm_tokens']:.0f} tokens, "
        f"{mean['vit_patches']:.0f} patches, {mean['tflop']:.4g} TFLOP on {tree['ranks']} ranks",
        f"packs a rank    {' or '.join(map(str, used))}, largest {largest} tokens (pack_tokens={tree['pack_tokens']})",
        f"imbalance       mean {imbalance['mean']:.4f}, worst {imbalance['worst']:.4f} (slowest rank over the mean)",
        f"fill            mean {fill['mean']:.4f}, worst {fill['worst']:.4f} (of the packs' token budget)",
        "memory of the fullest rank, estimated, GiB",
        *(f"  {text:36} {tree['memory'][name] / gib:9.3f}" for name, text in PARTS.items()),
    ]
    if tree["memory"]["host"]:
        lines.append(f"  {'on the host, per rank':36} {tree['memory']['host'] / gib:9.3f}")
    lines.append(f"  {'its part of a checkpoint':36} {tree['memory']['checkpoint'] / gib:9.3f} (and on the host)")
    lines.append(f"{'fits' if tree['fits'] else 'does not fit'} {tree['gpu_memory_gib']:g} GiB")
    return "\n".join([*lines, *(f"advice: {line}" for line in tree["advice"])])


@exit_on_user_error()
def main() -> int:
    own, rest = split_args(sys.argv[1:])
    config = parse_args(rest).config
    check_versions()
    check_paths(config)
    if own.tune:
        return run_tuning(config, own, rest)
    from muco_ds.preflight import preflight  # imports take seconds; a typo in the command line should not

    tree = preflight(config, own.ranks, own.gpu_memory, own.steps, progress=True).as_json()
    print(json.dumps(tree) if own.json else table(tree))
    return 0 if tree["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
