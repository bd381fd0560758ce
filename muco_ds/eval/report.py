"""A benchmark's results for people: a Markdown table and a plot, beside published rows."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muco_ds.eval.suite import Entry, label, scores_of
from muco_ds.files import replacing

log = logging.getLogger(__name__)

_COLOURS = ("#3b6fb6", "#d1782e", "#4c9a57", "#a2539c", "#7a6a4f")
_MARKERS = "o^sDv<>Px*"


@dataclass(frozen=True)
class Published:
    """Somebody's scores in per cent, by the names of the entries that they belong to, and where they are from."""

    name: str
    source: str
    scores: Mapping[str, float]


def write_report(
    folder: Path,
    title: str,
    results: Mapping[str, Entry],
    *,
    means: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    published: Sequence[Published],
    notes: Sequence[str] = (),
) -> None:
    """Write results.md and, where matplotlib is installed, results.png.

    Args:
        results: as of `Suite.results`; the first score of an entry is the one that is compared.
        means: names of the entries over several data sets, in order; those that are not there are left out.
        groups: of each data set, what it belongs to: the first is its colour.
        notes: what else is to be known.
    Raises:
        UserError: the folder can't be written.
    """
    means = [name for name in means if name in results]
    datasets = [name for name in results if name not in means]
    lines = [f"# {title}", "", *_notes(results, means), *(line for note in notes for line in ("", note))]
    lines += ["", *_comparison(results, means, published), ""]
    lines += ["## By data set", "", *_by_dataset(results, datasets, groups)]
    with replacing(folder / "results.md") as work:
        work.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        (folder / "results.png").unlink(missing_ok=True)  # of other scores than the table's
        log.warning("no plot: matplotlib is not installed")
    else:
        _plot(folder / "results.png", title, results, means, datasets, groups, published)


def _notes(results: Mapping[str, Entry], means: Sequence[str]) -> list[str]:
    overall = results[means[0]]
    notes = [f"{overall['version']}. Scores in per cent."]
    if missing := overall.get("missing"):
        notes += ["", f"Not scored: {', '.join(missing)}. Means of fewer data sets do not compare with published ones."]
    return notes


def _comparison(results: Mapping[str, Entry], means: Sequence[str], published: Sequence[Published]) -> list[str]:
    rows = [
        [f"**this model, {score}**", *(_percent(results[name].get(score)) for name in means)]
        for score in scores_of(results[means[0]])
    ]
    for other in published:
        scores = [f"{other.scores[name]:.1f}" if name in other.scores else "-" for name in means]
        rows.append([f"{other.name} ({other.source})", *scores])
    return _table(["", *(label(name, results[name]) for name in means)], rows)


def _by_dataset(
    results: Mapping[str, Entry], datasets: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> list[str]:
    scores = list(dict.fromkeys(score for name in datasets for score in scores_of(results[name])))
    counts = [key for key in ("queries", "candidates", "list_length", "left_out") if key in results[datasets[0]]]
    rows = []
    for name in datasets:
        entry = results[name]
        percents = [_percent(entry.get(key)) for key in (*scores, "chance")]
        rows.append([name, ", ".join(groups[name]), *percents, *(_count(entry.get(key)) for key in counts)])
    head = ["data set", "of", *scores, "chance", *(key.replace("_", " ") for key in counts)]
    return _table(head, rows, texts=2)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """`texts`: columns of words, the first ones."""
    aligned = ["---" if i < texts else "--:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, aligned, *rows)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _plot(
    path: Path,
    title: str,
    results: Mapping[str, Entry],
    means: Sequence[str],
    datasets: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    published: Sequence[Published],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(max(9.0, 0.32 * len(datasets)), 9.5), layout="constrained")
    _plot_means(top, results, means, published)
    _plot_datasets(bottom, results, datasets, groups)
    for axis in (top, bottom):
        axis.set_ylim(0, 100)
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    top.set_title(f"{title}, per cent", fontsize=11)
    figure.supxlabel(results[means[0]]["version"], fontsize=7)
    with replacing(path) as work:
        figure.savefig(work, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)


def _plot_means(axis: Any, results: Mapping[str, Entry], means: Sequence[str], published: Sequence[Published]) -> None:
    scores = {name: 100 * _first_score(results[name]) for name in means}
    bars = axis.bar(range(len(means)), scores.values(), 0.5, color="#b9c7dc", label="this model")
    axis.bar_label(bars, fmt="%.1f", label_type="center", fontsize=10)
    shift = 0.44 / max(1, len(published) - 1)
    for i, other in enumerate(published):
        found = [(at, other.scores[name]) for at, name in enumerate(means) if name in other.scores]
        axis.scatter(
            [at - 0.22 + i * shift for at, _ in found],
            [score for _, score in found],
            s=26,
            marker=_MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
            label=f"{other.name} ({other.source})",
            zorder=3,
        )
    axis.set_xticks(range(len(means)), [label(name, results[name]).replace(" (", "\n(") for name in means], fontsize=9)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _plot_datasets(
    axis: Any, results: Mapping[str, Entry], datasets: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> None:
    kinds = list(dict.fromkeys(groups[name][0] for name in datasets))
    for kind, colour in zip(kinds, _COLOURS * len(kinds), strict=False):
        places = [at for at, name in enumerate(datasets) if groups[name][0] == kind]
        axis.bar(places, [100 * _first_score(results[datasets[at]]) for at in places], 0.7, color=colour, label=kind)
    chances = [100 * results[name]["chance"] for name in datasets]
    axis.scatter(range(len(datasets)), chances, marker="_", s=60, color="black", label="chance", zorder=3)
    names = [" ".join((name, *groups[name][1:])) for name in datasets]
    axis.set_xlim(-0.6, max(len(datasets), 12) - 0.4)
    axis.set_xticks(range(len(datasets)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _first_score(entry: Entry) -> float:
    return next(iter(scores_of(entry).values()))
