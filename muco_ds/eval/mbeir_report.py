"""M-BEIR's results as a Markdown table and a plot, beside the published ones."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muco_ds.eval.suite import Entry
from muco_ds.files import replacing

log = logging.getLogger(__name__)

OFFICIAL = "recall@official"
"""A cell's score: recall@5, of Fashion200K and FashionIQ recall@10. Of several cells, their plain mean."""

UNION = "@union"
GROUPS = ("single->single", "single->multi", "multi->single", "multi->multi")
MEANS = (*GROUPS, "overall")

POOL_TITLES = {"local": "local pools", "union": "union pool", "part": "parts of the pools"}

PUBLISHED = {
    "MuCo-2B, published": (49.1, 68.2, 41.6, 64.8, 51.6),
    "MuCo-7B, published": (54.0, 71.6, 47.4, 70.4, 56.6),
}
"""arXiv 2602.06393, in percent, in the order of `MEANS`."""


def write_report(results: Mapping[str, Entry], folder: Path) -> None:
    """mbeir.md and, with matplotlib, mbeir.png. Raises UserError where they can't be written."""
    with replacing(folder / "mbeir.md") as work:
        work.write_text(markdown(results), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no plot of the results: matplotlib is not installed")
        return
    with replacing(folder / "mbeir.png") as work:
        _plot(results, work)


def markdown(results: Mapping[str, Entry]) -> str:
    """Two tables in percent: each cell, and means beside the published ones."""
    columns = _columns(results)
    version = next(iter(results.values()))["version"]
    lines = [f"# M-BEIR\n\n{version}; recall in percent, ties count against the model.\n"]
    lines += [
        _row(["data set and task", "query -> candidate", "recall", *columns]),
        "|---|---|---|" + "--:|" * len(columns),
    ]
    for name in dict.fromkeys(name.removesuffix(UNION) for name, entry in results.items() if "task" in entry):
        entries = [results.get(name + end) for end in columns.values()]
        known = next(entry for entry in entries if entry is not None)
        lines.append(_row([name, known["task"], f"@{known['score'].removeprefix('recall@')}", *map(_percent, entries)]))
    lines += ["", _row(["mean over cells", *MEANS]), "|---|" + "--:|" * len(MEANS)]
    lines += [_row([label, *("" if x is None else f"{x:.1f}" for x in means)]) for label, means in _means(results)]
    lines += [_row([label, *(f"{value:.1f}" for value in values)]) for label, values in PUBLISHED.items()]
    left_out = sum(entry.get("left_out", 0) for entry in results.values())
    broken = sum(entry.get("broken_candidates", 0) for entry in results.values())
    notes = [f"{left_out} queries are left out, {broken} candidates have no usable picture and count as wrong ones."]
    if any("task" in entry and entry["pool"] == "part" for entry in results.values()):
        notes.append("Only a part of each pool was searched (--rows): these are no scores to be compared.")
    return "\n".join([*lines, "", *notes, ""])


def _columns(results: Mapping[str, Entry]) -> dict[str, str]:
    """Title of a column -> how its cells' names end."""
    ends = {name.endswith(UNION) for name, entry in results.items() if "task" in entry}
    overall = {end: results["overall" + (UNION if end and len(ends) > 1 else "")] for end in sorted(ends)}
    return {POOL_TITLES[mean["pool"]]: UNION * end for end, mean in overall.items()}


def _means(results: Mapping[str, Entry]) -> list[tuple[str, list[float | None]]]:
    found = []
    for end in ("", UNION):
        if (overall := results.get(f"overall{end}")) is not None:
            entries = [results.get(mean + end) for mean in MEANS]
            some = "" if overall["cells"] == 16 else f", {overall['cells']} of 16 cells"
            label = f"this model, {POOL_TITLES[overall['pool']]}{some}"
            found.append((label, [None if entry is None else 100 * entry[OFFICIAL] for entry in entries]))
    return found


def _plot(results: Mapping[str, Entry], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (cells, means) = plt.subplots(1, 2, figsize=(12, 6), width_ratios=[3, 2], layout="constrained")
    names = list(dict.fromkeys(name.removesuffix(UNION) for name, entry in results.items() if "task" in entry))
    columns = _columns(results)
    _bars(cells, names, [(t, [_score(results.get(name + end)) for name in names]) for t, end in columns.items()])
    cells.set_title("recall of each cell (@5, fashion @10), %")
    published: list[tuple[str, list[float | None]]] = [(label, [*values]) for label, values in PUBLISHED.items()]
    _bars(means, list(MEANS), _means(results) + published)
    means.set_title("means over cells, %")
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def _bars(axis: Any, names: list[str], series: list[tuple[str, list[float | None]]]) -> None:
    height = 0.8 / len(series)
    for place, (label, values) in enumerate(series):
        shift = (place - (len(series) - 1) / 2) * height
        known = [(row + shift, value) for row, value in enumerate(values) if value is not None]
        bars = axis.barh([at for at, _ in known], [value for _, value in known], height, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, 108)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncol=2)


def _score(entry: Entry | None) -> float | None:
    return None if entry is None else 100 * entry[OFFICIAL]


def _percent(entry: Entry | None) -> str:
    return "" if entry is None else f"{100 * entry[OFFICIAL]:.1f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
