"""What a run's folder holds, read as far as it can be: of a run that goes on, one that was cut off, a copy of parts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator

from muco_ds.errors import UserError
from muco_ds.manifest import incomplete

SHOWN = 12
"""Pictures, and texts, of a tag that are read of a session: the last one and some before it."""

MOST_STEPS = 2**53
"""Beyond it a float skips whole numbers."""

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """A PNG, or a text in Markdown, that was written at a step."""

    step: int
    content: bytes | str


@dataclass(frozen=True)
class Session:
    """One start of the run: seconds since the epoch, of its begin and of each step that was logged."""

    start: float
    logged: list[tuple[int, float]]


@dataclass
class Run:
    """`problems`: what could not be read, for people."""

    folder: Path
    config: dict[str, Any]
    lines: list[Metrics]
    meta: dict[str, Any] | None = None
    shown: dict[str, list[Shown]] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(section(self.config, "run").get("name") or self.folder.resolve().name)

    def values(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the lines that have one."""
        found = ((line["step"], line.get(key)) for line in self.lines)
        return [(step, float(value)) for step, value in found if is_number(value)]


def is_number(value: Any) -> TypeGuard[float]:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond floats
        return False


def section(tree: Any, key: str) -> dict[str, Any]:
    """A mapping in a mapping; empty where there is none."""
    found = tree.get(key) if isinstance(tree, dict) else None
    return found if isinstance(found, dict) else {}


def read_run(folder: Path, evaluations: Sequence[Path]) -> Run:
    """Raises UserError: no run's folder, or no results where an evaluation was named."""
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        what = "holds neither config.yaml nor metrics.jsonl" if folder.is_dir() else "is no folder"
        raise UserError(f"'{folder}' {what}: give the folder of a run, runs/NAME")
    run = Run(folder, {}, [])
    run.config = _read_config(run)
    run.lines = _read_metrics(run)
    run.meta = _read_meta(run)
    _read_board(run)
    for path in evaluations:
        if not (path / "results.json").is_file():
            raise UserError(f"--evaluation: '{path}' holds no results.json: give an --output of launch/evaluate.py")
    found = sorted(path for path in folder.rglob("results.json") if "checkpoints" not in path.relative_to(folder).parts)
    named = {path.resolve(): path for path in (*found, *(path / "results.json" for path in evaluations))}
    for path in named.values():
        _read_results(run, path)
    run.problems += [
        f"{path.name}: the gradient was not finite too often in a row, and the run ended"
        for path in sorted(folder.glob("nonfinite_step_*.json"))
    ]
    if any((folder / "stacks").glob("*")):
        run.problems.append("stacks/: the run stood still at some time; the files there say where each rank was")
    return run


def _read_config(run: Run) -> dict[str, Any]:
    try:
        config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.problems.append("config.yaml is missing")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        run.problems.append(f"config.yaml can't be read ({type(error).__name__})")
        return {}
    return config if isinstance(config, dict) else {}


def _read_metrics(run: Run) -> list[Metrics]:
    """Lines by step. The last one may be cut: the run may be writing it."""
    try:
        written = (run.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    lines, bad = {}, 0
    for i, text in enumerate(written):
        try:
            line = json.loads(text)
            step = line["step"]
            if not is_number(step) or step != int(step) or abs(step) > MOST_STEPS:
                raise ValueError(f"step {step!r}")
            lines[int(step)] = line | {"step": int(step)}
        except (ValueError, KeyError, TypeError, RecursionError):
            bad += i + 1 < len(written)
    if bad:
        run.problems.append(f"metrics.jsonl: {bad} lines can't be read and are left out")
    return [lines[step] for step in sorted(lines)]


def _read_meta(run: Run) -> dict[str, Any] | None:
    for path in sorted((run.folder / "checkpoints").glob("step_*"), reverse=True):
        if path.suffix == ".tmp":
            continue
        problem = incomplete(path)
        if problem is None:
            try:
                return json.loads((path / "meta.json").read_text())
            except (OSError, ValueError, RecursionError):
                problem = "meta.json can't be read"
        run.problems.append(f"checkpoints/{path.name} is not complete: {problem}")
    return None


def _read_board(run: Run) -> None:
    """Pictures, texts and times from TensorBoard's files, one for each start of the run."""
    shown: dict[tuple[str, int], bytes | str] = {}
    last = run.lines[-1]["step"] if run.lines else 0
    for path in sorted((run.folder / "tb").glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        try:
            board = EventAccumulator(str(path), {IMAGES: SHOWN, TENSORS: SHOWN, SCALARS: 0}).Reload()
            tags = board.Tags()
            for tag in tags["images"]:
                shown |= {(tag, event.step): event.encoded_image_string for event in board.Images(tag)}
            for tag in set(tags["tensors"]) - {"config/text_summary"}:
                for event in board.Tensors(tag):
                    text = b"".join(event.tensor_proto.string_val).decode(errors="replace")
                    shown[tag.removesuffix("/text_summary"), event.step] = text
            logged = board.Scalars("train/loss") if "train/loss" in tags["scalars"] else []
            if logged:
                times = [(event.step, event.wall_time) for event in logged]
                run.sessions.append(Session(board.FirstEventTimestamp(), times))
        except Exception as error:  # TensorBoard's readers raise almost anything on a damaged file
            run.problems.append(f"tb/{path.name} can't be read ({type(error).__name__})")
    for (tag, step), content in sorted(shown.items(), key=lambda item: item[0]):
        if step <= last:  # else of a part that was cut off and is done again
            run.shown.setdefault(tag, []).append(Shown(step, content))


def _read_results(run: Run, path: Path) -> None:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        entries = {str(name): entry for name, entry in results.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        run.problems.append(f"{path} can't be read ({type(error).__name__})")
        return
    inside = path.is_relative_to(run.folder)
    run.evaluations.append((str(path.parent.relative_to(run.folder) if inside else path.parent), entries))
