#!/usr/bin/env python3
"""Renders benchmarks/results/*.jsonl as tables and plots into docs/performance.md and docs/images.

    python benchmarks/report.py

The newest line of each benchmark, shape and device is shown. Only the part of docs/performance.md between its two
markers is written. Plots need matplotlib (`pip install -e .[dev]`); without it they stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from harness import ROOT
from report_tables import EXTRA, TABLES, Entry, Row, Table, generic

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- begin: benchmarks/report.py -->", "<!-- end: benchmarks/report.py -->"
GPU_WORDS = ("NVIDIA", "AMD Instinct")


def newest(lines: list[Entry], table: Table) -> list[Entry]:
    """Of lines that tell of the same thing on the same device, the last; in the order in which things first came."""
    found: dict[str, Entry] = {}
    for line in lines:
        key = [line["benchmark"], line["device"], *(line.get(name) for name in table.identity)]
        found[json.dumps(key, sort_keys=True)] = line
    return list(found.values())


def read(results: Path) -> dict[str, list[Entry]]:
    """The lines to be shown, by file; those of a listed benchmark first, in that order."""
    names = [path.stem for path in sorted(results.glob("*.jsonl"))]
    order = [name for name in TABLES if name in names] + [name for name in names if name not in TABLES]
    entries = {}
    for name in order:
        text = (results / f"{name}.jsonl").read_text(encoding="utf-8")
        entries[name] = newest([json.loads(line) for line in text.splitlines()], table_of(name))
    return entries


def table_of(name: str) -> Table:
    return TABLES.get(name) or Table(name.replace("_", " ").capitalize(), f"benchmarks/{name}.py.", generic)


def render(rows: list[Row]) -> str:
    """Markdown; rows of different columns follow each other as tables of their own."""
    blocks: list[list[Row]] = []
    for row in rows:
        if blocks and list(blocks[-1][0]) == list(row):
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return "\n\n".join(_block(block) for block in blocks)


def _block(rows: list[Row]) -> str:
    headers = list(rows[0])
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    lines += [f"| {' | '.join(row[header].replace('|', '/') for header in headers)} |" for row in rows]
    return "\n".join(lines)


def origins(entries: list[Entry]) -> str:
    """Where the numbers come from, each source once."""
    lines: dict[str, None] = {}
    for entry in entries:
        versions = ", ".join(f"{name} {entry['versions'][name]}" for name in ("torch", "transformers"))
        lines[
            f"`{entry['command']}` on {entry['device']}, {entry['threads']} thread(s), {versions}, "
            f"commit {entry['commit']}, {entry['date'][:10]}"
        ] = None
    return "\n".join(f"- {line}" for line in lines)


def section(name: str, entries: list[Entry]) -> str:
    table = table_of(name)
    parts = [f"### {table.title}", table.about, render([row for entry in entries for row in table.rows(entry)])]
    if name in EXTRA:
        extra = EXTRA[name]
        parts += [f"**{extra.title}.** {extra.about}", render([row for e in entries for row in extra.rows(e)])]
    if name == "step":
        parts += [f"![{title}](images/{file})" for file, title in PLOTS.items()]
    skipped = [f"- {e['benchmark']}, {what}: {why}" for e in entries for what, why in e.get("skipped", {}).items()]
    if skipped:
        parts.append("Left out:\n\n" + "\n".join(skipped))
    return "\n\n".join([*parts, origins(entries)])


def generated(results: Path = RESULTS) -> str:
    """The generated part of the page."""
    entries = read(results)
    without_gpu = [f"`{name}`" for name, lines in entries.items() if not any(_on_gpu(line["device"]) for line in lines)]
    missing = f"No line of these was measured on a GPU yet: {', '.join(without_gpu)}." if without_gpu else ""
    return "\n\n".join([part for part in (missing, *(section(*item) for item in entries.items())) if part])


def _on_gpu(device: str) -> bool:
    return any(word in device for word in GPU_WORDS)


PLOTS = {
    "step_pairs.png": "Pairs per second by workload and system",
    "step_split.png": "Share of a step's time by phase, seven turns",
}
PHASES = ("vision", "text_forward", "backward", "gather_and_loss", "optimizer", "other")


def plot(entries: list[Entry], images: Path) -> None:
    """Bars of pairs per second, and of the phases of the main workload, a panel each model and device."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((entry["model"], entry["device"]) for entry in entries))
    drawn = {file: plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 3.6), squeeze=False) for file in PLOTS}
    for column, kind in enumerate(kinds):
        mine = [entry for entry in entries if (entry["model"], entry["device"]) == kind]
        _bars(drawn["step_pairs.png"][1][0][column], mine)
        main = [entry for entry in mine if entry["benchmark"] == "step/seven_turns"]
        _phases(drawn["step_split.png"][1][0][column], main)
        for _, axes in drawn.values():
            axes[0][column].set_title(f"{kind[0]}, {kind[1]}", fontsize=9)
    for file, (figure, _) in drawn.items():
        figure.suptitle(PLOTS[file], fontsize=10)
        figure.tight_layout()
        figure.savefig(images / file, dpi=110, metadata={"Software": None})
        plt.close(figure)


def _bars(axis, entries: list[Entry]) -> None:  # type: ignore[no-untyped-def]
    systems = list(dict.fromkeys(name for entry in entries for name in entry["systems"]))
    width = 0.8 / max(1, len(systems))
    for i, name in enumerate(systems):
        found = [(at, entry["systems"].get(name)) for at, entry in enumerate(entries)]
        places = [at + i * width for at, system in found if system]
        axis.bar(places, [system["pairs_per_s"] for _, system in found if system], width, label=name)
    labels = [entry["benchmark"].removeprefix("step/").replace("_", " ") for entry in entries]
    axis.set_xticks([at + 0.4 - width / 2 for at in range(len(entries))], labels, fontsize=7)
    axis.set_ylabel("pairs / s")
    axis.legend(fontsize=6)


def _phases(axis, entries: list[Entry]) -> None:  # type: ignore[no-untyped-def]
    for entry in entries:
        left = dict.fromkeys(entry["systems"], 0.0)
        for phase in PHASES:
            shares = {}
            for name, system in entry["systems"].items():
                split = system["split_seconds"]
                shares[name] = split[phase] / sum(split[p] for p in PHASES)
            axis.barh(list(shares), list(shares.values()), left=list(left.values()), label=phase.replace("_", " "))
            left = {name: left[name] + share for name, share in shares.items()}
        axis.legend(fontsize=6, ncol=6, loc="upper center", bbox_to_anchor=(0.5, -0.1))
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    args = parser.parse_args()
    text = args.page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{args.page}: needs one line '{BEGIN}' and one '{END}'", file=sys.stderr)
        return 1
    before, rest = text.split(BEGIN)
    page = f"{before}{BEGIN}\n\n{generated(args.results)}\n\n{END}{rest.split(END)[1]}"
    args.page.write_text(page, encoding="utf-8")
    steps = read(args.results).get("step", [])
    if not steps:
        print("no plots: there is no step.jsonl")
    elif importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
    else:
        plot(steps, args.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
