#!/usr/bin/env python3
"""Prints the lines of a folder of result files as one short table: what, system, milliseconds, what it comes to.

python benchmarks/short_table.py FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHARES = {
    "share_of_matmul": "of matmul",
    "share_of_copy": "of copy",
    "forward_share_of_matmul": "of matmul forward",
    "forward_share_of_copy": "of copy forward",
    "mfu": "MFU",
}
Row = tuple[str, str, str, str]


def rows_of(entry: dict[str, Any]) -> list[Row]:
    """A row a system; of a benchmark without systems, a row for each measurement with percentiles."""
    shape = entry.get("shape", {})
    counts = [f"{value} {name}" for name in ("rows", "keys", "embeddings") if (value := shape.get(name)) is not None]
    what = " ".join([entry["benchmark"], *([entry["model"]] if "model" in entry else []), *counts])
    if "systems" not in entry:
        return [(what, name, *_cells(value)) for name, value in _spreads("", entry)]
    rows = []
    for name, system in entry["systems"].items():
        comes_to = [f"{system['pairs_per_s']:.1f} pairs/s"] if "pairs_per_s" in system else []
        comes_to += [f"{system[key]:.1%} {label}" for key, label in SHARES.items() if system.get(key) is not None]
        ratio = entry.get(f"ratio_{name}")
        comes_to += [f"ours is {ratio['p50']:.2f} times as fast"] if ratio else []
        seconds = system["seconds"] or system["forward_seconds"]
        rows.append((what, name, f"{1e3 * seconds['p50']:.4g} ms", ", ".join(comes_to)))
    return rows


def _cells(spread: dict[str, float]) -> tuple[str, str]:
    return "", f"{spread['p50']:.4g} ({spread['p20']:.4g} to {spread['p80']:.4g})"


def _spreads(prefix: str, values: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    found: list[tuple[str, dict[str, float]]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += [(prefix + name, value)] if "p50" in value else _spreads(f"{prefix}{name}.", value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    for file in sorted(args.folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            rows += rows_of(entry)
            skipped = entry.get("skipped", {}).items()
            rows += [(entry["benchmark"], what, "", f"skipped: {why[:80]}") for what, why in skipped]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())


if __name__ == "__main__":
    main()
