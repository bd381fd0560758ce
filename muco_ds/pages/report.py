"""report.html of a run: one file that needs nothing else, neither a network nor a script."""

from __future__ import annotations

import base64
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from jinja2 import Environment, PackageLoader, StrictUndefined

from muco_ds.config import RunConfig
from muco_ds.eval.suite import scores_of
from muco_ds.metrics import CONTRASTIVE_KEYS, METRIC_KEYS
from muco_ds.pages import charts
from muco_ds.pages.charts import COLOURS, Chart, chart, number
from muco_ds.pages.run_folder import Run, Shown, is_number, section

RUNNING_S = 600.0
"""A run whose last line is younger counts as one that goes on."""

# Title -> (keys of the lines, whether they are shares).
TRAINING = {
    "loss": (("loss",), False),
    "in-batch top 1": (("in_batch_top1",), True),
    "similarity: positive, hardest negative": (("pos_sim", "hardest_neg_sim"), False),
    "learning rate": (("lr",), False),
    "gradient norm": (("grad_norm",), False),
    "temperature": (("temperature",), False),
    "masked row/key entries": (
        ("masked_frac", "same_image_frac", "same_target_frac", "false_negative_frac", "extra_positive_frac"),
        True,
    ),
}
SPEED = {
    "pairs per second": (("pairs_per_s",), False),
    "tokens per second": (("tokens_per_s",), False),
    "MFU": (("mfu",), True),
    "waiting for data": (("data_wait_frac",), True),
    "seconds of a step": (("step_s_p50", "step_s_p90", "step_s_max"), False),
    "seconds that the slowest rank is late": (("slowest_late_s",), False),
    "peak memory, GiB": (("peak_mem_gib",), False),
    "resident memory, GiB": (("resident_gib",), False),
    "fill of packs": (("pack_fill",), True),
    "imbalance of ranks (largest / mean)": (("imbalance",), False),
}
WORK = ("pairs", "images", "negatives", "llm_tokens", "vit_patches")
COUNTERS = ("replaced_images", "skipped_steps", "step", "epoch")
NULL_BY_DESIGN = CONTRASTIVE_KEYS | {"mfu", "grad_norm"}  # grad_norm: of a skipped step, which is counted


def render(run: Run) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("muco_ds.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    first, more = held_out(run)
    return template.render(
        run=run,
        state=state(run),
        facts=facts(run),
        tiles=tiles(run),
        warnings=warnings(run),
        curves=first + _charts(run, TRAINING),
        speed=_charts(run, SPEED),
        work=_charts(run, {key: ((key,), False) for key in (*WORK, *_others(run))}) + more,
        spent=time_spent(run),
        examples=examples(run),
        evaluations=[Table.of(name, entries) for name, entries in run.evaluations],
        options=options(run.config),
        written=time.strftime("%Y-%m-%d %H:%M"),
        geometry=charts,
    )


def state(run: Run) -> str:
    """How far the run is, in a few words."""
    if not run.lines:
        return "no step was logged yet"
    last, end = run.lines[-1]["step"], section(run.config, "run").get("max_steps")
    if is_number(end) and last >= end:
        return f"finished after {last:,} steps"
    whole = f" of {end:,}" if is_number(end) else ""
    if not run.sessions:
        return f"step {last:,}{whole}"
    written = run.sessions[-1].logged[-1][1]
    if time.time() - written < RUNNING_S:
        return f"running: step {last:,}{whole}"
    return f"step {last:,}{whole}, last line of {time.strftime('%Y-%m-%d %H:%M', time.localtime(written))}"


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run is, from its configuration and its newest checkpoint."""
    config, meta = run.config, run.meta or {}
    train = section(config, "data").get("train")
    sources = [str(entry.get("path")) if isinstance(entry, dict) else str(entry) for entry in _listed(train)]
    found = {
        "task": section(config, "task").get("name"),
        "model": section(config, "model").get("path"),
        "data": ", ".join(sources),
        "rows": section(meta, "data").get("rows"),
        "examples a step": section(config, "batch").get("images"),
        "precision": section(config, "run").get("precision"),
        "ranks": meta.get("world_size"),
        "ZeRO stage": meta.get("zero_stage"),
        "checkpoint": f"step {meta['step']}" if "step" in meta else None,
    }
    if run.sessions:
        found["started"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.sessions[0].start))
        found["starts"] = len(run.sessions) if len(run.sessions) > 1 else None
    found |= section(meta, "versions")
    return [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in found.items() if value]


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(name, figure, note) of what one asks first."""
    found = []
    if loss := run.values("loss"):
        found.append(("loss", number(loss[-1][1]), f"at first {number(loss[0][1])}"))
    for title, series in _held_out_series(run):
        if "overall" not in series and len(series) > 1:
            continue  # a data set does not stand for the others
        overall = series.get("overall") or next(iter(series.values()))
        if "precision" in title or "recall" in title:
            step, best = max(overall, key=lambda point: point[1])
            found.append((title, _percent(overall[-1][1]), f"best {_percent(best)} at step {step:,}"))
        elif "perplexity" in title or "loss" in title:
            step, best = min(overall, key=lambda point: point[1])
            found.append((title, number(overall[-1][1]), f"best {number(best)} at step {step:,}"))
    for key, name, percent in (
        ("pairs_per_s", "pairs/s", False),
        ("tokens_per_s", "tokens/s", False),
        ("mfu", "MFU", True),
        ("data_wait_frac", "waiting for data", True),
    ):
        if values := [value for _, value in run.values(key)]:
            median = statistics.median(values)
            found.append((name, _percent(median) if percent else number(median), "median"))
    if memory := run.values("peak_mem_gib"):
        found.append(("peak memory", f"{max(value for _, value in memory):.1f} GiB", "the largest of the ranks"))
    return found


def warnings(run: Run) -> list[str]:
    """What somebody who trusts the run should know."""
    found = list(run.problems)
    if skipped := max([value for _, value in run.values("skipped_steps")], default=0):
        found.append(f"{skipped:.0f} steps were skipped: their gradient was not finite")
    if replaced := sum(value for _, value in run.values("replaced_images")):
        found.append(f"{replaced:.0f} pictures could not be decoded and were replaced by grey ones")
    for key in sorted({key for line in run.lines for key in line}):
        steps = [line["step"] for line in run.lines if key in line and line[key] is None]
        always = len(steps) == sum(key in line for line in run.lines)
        if steps and not (key in NULL_BY_DESIGN and (always or key == "grad_norm")):
            found.append(f"{key} was not finite in {len(steps)} lines, first at step {steps[0]:,}")
    return found


def held_out(run: Run) -> tuple[list[Chart], list[Chart]]:
    """Charts of what is measured beside the training, validation and benchmarks; those of further data sets apart."""
    first: list[Chart] = []
    more: list[Chart] = []
    for title, series in _held_out_series(run):
        labels = sorted(series, key=lambda label: label != "overall")
        for start in range(0, len(labels), COLOURS):
            part = {label: series[label] for label in labels[start : start + COLOURS]}
            name = title if len(labels) <= COLOURS else f"{title}, {start + 1} to {start + len(part)} of {len(labels)}"
            if made := chart(name, part, percent="precision" in title or "recall" in title):
                (more if start else first).append(made)
    return first, more


def _held_out_series(run: Run) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """`val/turn_1/precision@1` belongs to "val precision@1" as "turn_1"; `val/loss` to "val loss"."""
    groups: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key in dict.fromkeys(key for line in run.lines for key in line if "/" in key):
        first, *middle, last = key.split("/")
        values = run.values(key)
        if values and (last not in COUNTERS or any(value for _, value in values)):
            groups.setdefault(f"{first} {last}", {})["/".join(middle)] = values
    return list(groups.items())


def _charts(run: Run, wanted: Mapping[str, tuple[tuple[str, ...], bool]]) -> list[Chart]:
    made = []
    for title, (keys, percent) in wanted.items():
        series = {key if len(keys) > 1 else "": run.values(key) for key in keys}
        # A reason that never masks anything only hides the others.
        telling = {key: points for key, points in series.items() if any(value for _, value in points)}
        made.append(chart(title, telling or dict(list(series.items())[:1]), percent=percent))
    return [one for one in made if one is not None]


def _others(run: Run) -> list[str]:
    """Keys of a task's own."""
    known = {*METRIC_KEYS, *CONTRASTIVE_KEYS, *COUNTERS}
    return sorted({key for line in run.lines for key in line if "/" not in key} - known)


@dataclass(frozen=True)
class Part:
    """A share of the time, 0 to 1."""

    name: str
    share: float
    seconds: str


def time_spent(run: Run) -> list[Part]:
    """Where the time of all starts went, estimated: a line gives the rate of its window, TensorBoard's files the clock.

    Steps of a window are taken to hold as many pairs as its last.
    """
    by_step = {line["step"]: line for line in run.lines}
    steps_s = waited_s = total_s = 0.0
    before = 0
    for session in run.sessions:
        total_s += session.logged[-1][1] - session.start
        for step, _ in session.logged:
            line = by_step.get(step, {})
            rate, pairs, wait = line.get("pairs_per_s"), line.get("pairs"), line.get("data_wait_frac")
            if is_number(rate) and is_number(pairs) and is_number(wait) and rate and step > before:
                window_s = (step - before) * pairs / rate
                waited_s += window_s * wait
                steps_s += window_s * (1 - wait)
            before = step
    whole = max(total_s, steps_s + waited_s)
    if not whole:
        return []
    parts = {
        "steps": steps_s,
        "waiting for data": waited_s,
        "validation, checkpoints and start": whole - steps_s - waited_s,
    }
    return [Part(name, seconds / whole, duration(seconds)) for name, seconds in parts.items()]


@dataclass(frozen=True)
class Example:
    """A picture as a data URI, or a table of texts (its first row the head), of a step."""

    step: int
    picture: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


def examples(run: Run) -> list[tuple[str, list[Example]]]:
    """Newest first, of each tag: the newest, one of the middle and the first."""
    found = []
    for tag, shown in run.shown.items():
        chosen = dict.fromkeys([len(shown) - 1, len(shown) // 2, 0])
        found.append((tag, [_example(shown[i]) for i in chosen]))
    return found


def _example(shown: Shown) -> Example:
    if isinstance(shown.content, bytes):
        return Example(shown.step, picture="data:image/png;base64," + base64.b64encode(shown.content).decode())
    return Example(shown.step, rows=tuple(_cells(line) for line in shown.content.splitlines() if not _is_rule(line)))


def _cells(line: str) -> tuple[str, ...]:
    """Of a row of a Markdown table; of any other line, itself."""
    if not line.startswith("|"):
        return (line,)
    return tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1])


def _is_rule(line: str) -> bool:
    return bool(re.fullmatch(r"[|\-: ]+", line.strip()))


@dataclass(frozen=True)
class Table:
    """Results of an evaluation: (name, scores with their shares of the whole, other cells) a row."""

    title: str
    scores: list[str]
    others: list[str]
    rows: list[tuple[str, list[tuple[str, float]], list[str]]]

    @classmethod
    def of(cls, title: str, entries: dict[str, dict[str, Any]]) -> Table:
        scores = list(dict.fromkeys(name for entry in entries.values() for name in scores_of(entry)))
        others = list(dict.fromkeys(name for entry in entries.values() for name in entry if name not in scores))
        rows = [
            (
                name,
                [(_percent(entry.get(key)), entry[key] if is_number(entry.get(key)) else 0.0) for key in scores],
                [_percent(entry.get(key)) if key == "chance" else _plain(entry.get(key, "")) for key in others],
            )
            for name, entry in entries.items()
        ]
        return cls(title, scores, others, rows)


@dataclass(frozen=True)
class Option:
    """A key of the configuration; `default` is None where it has none or differs in nothing."""

    key: str
    value: str
    changed: bool
    default: str | None


def options(config: dict[str, Any]) -> list[Option]:
    """All keys, in order."""
    defaults = _defaults(RunConfig)
    found = []
    for key, value in _flat(config):
        default = defaults.get(key, MISSING)
        changed = value != default
        told = _plain(default) if changed and default is not MISSING else None
        found.append(Option(key, _plain(value), changed, told))
    return found


def _defaults(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default, of the keys that have one."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for item in fields(cls):
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            found |= _defaults(hints[item.name], f"{key}.")  # type: ignore[arg-type]
        elif item.default is not MISSING:
            found[key] = item.default
        elif item.default_factory is not MISSING:
            found[key] = item.default_factory()
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found += _flat(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
    return found


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _percent(value: Any) -> str:
    if not is_number(value):
        return "" if value is None else str(value)
    return f"{value * 100:.1f} %" if value >= 0.01 or value == 0 else f"{value * 100:.2g} %"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
