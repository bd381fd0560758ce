"""How a run does, told by what lies in its folder: of one that goes on, ended, stands still or is gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from muco_ds.distributed.signals import EXIT_REQUEUE
from muco_ds.ends import End, read_ends
from muco_ds.errors import UserError
from muco_ds.heartbeat import ENDED, FAILED, STAGES, heartbeat_path

RUNNING, FINISHED, SAVED = "running", "finished", "saved after a signal"
FAILED_RUN, STALLED, DEAD, UNKNOWN = "failed", "stalled", "dead", "unknown"
WELL = frozenset({RUNNING, FINISHED, SAVED})

SILENT_S = 30.0
"""Beyond three heartbeats: network disks show new files late."""
SHARE = 0.1
"""Of a step's time: waiting for data, or for the slowest rank, that is worth saying."""
_SKEW_S = 60.0
_NAMED = 5
_TAIL_BYTES = 2**20


@dataclass(frozen=True)
class Beat:
    """A rank's last heartbeat and its age in seconds by the file system's clock."""

    facts: dict[str, Any]
    age_s: float

    @property
    def rank(self) -> int:
        return int(self.facts["rank"])

    @property
    def phase(self) -> str:
        return str(self.facts["phase"])

    @property
    def silent(self) -> bool:
        return self.age_s > SILENT_S + 3 * float(self.facts.get("every_s") or 0)

    @property
    def over(self) -> bool:
        return self.phase in (ENDED, FAILED)

    @property
    def standing_s(self) -> float:
        """How long it has been at one place."""
        return float(self.facts["phase_s"]) + max(0.0, self.age_s)

    def stands(self, alone: bool) -> bool:
        """What it does takes far too long; `alone`, because another rank is silent: longer than usual."""
        patience = SILENT_S + 2 * float(self.facts["usual_step_s"] or 0)
        return not self.over and self.standing_s > (patience if alone else float(self.facts["late_s"]))

    @property
    def place(self) -> tuple[int, int]:
        """Sorts ranks of one run by how far they are."""
        return int(self.facts["step"] or 0), STAGES.index(self.phase) if self.phase in STAGES else 0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.facts['host']}, pid {self.facts['pid']})"


@dataclass
class Status:
    """What there is to say of a run. `verdict` is one of the words above, `why` one line.

    rate_now: steps a second, usual of the last twenty; rate_hour: of the last hour with all its pauses. Sizes in bytes.
    """

    folder: Path
    verdict: str = UNKNOWN
    why: str = ""
    hint: str = ""
    phase: str | None = None
    ranks: int | None = None
    hosts: list[str] = field(default_factory=list)
    step: int | None = None
    steps: int | None = None
    rate_now: float | None = None
    rate_hour: float | None = None
    remaining_s: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_age_s: float | None = None
    checkpoint_bytes: int | None = None
    free_bytes: int | None = None
    resident_gib: float | None = None
    peak_gpu_gib: float | None = None
    ends: list[End] = field(default_factory=list)
    stacks: dict[int, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        return self.verdict in WELL

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "well": self.well}, default=str)


def read_status(folder: Path) -> Status:
    """Reads whatever is there, half-written files too. Raises UserError: the folder is no run's."""
    marks = ("config.yaml", "metrics.jsonl", "health", "ends.jsonl", "checkpoints")
    if not any((folder / mark).exists() for mark in marks):
        what = f"holds none of {', '.join(marks)}" if folder.is_dir() else "is no folder"
        raise UserError(f"'{folder}' {what}: give the folder of a run, runs/NAME")
    now = _clock(folder)
    status = Status(folder, ends=read_ends(folder))
    beats = _read_beats(folder, now)
    lines = _read_metrics(folder / "metrics.jsonl")
    _judge(status, beats, now)
    _progress(status, beats, lines)
    _storage(status, now)
    _warn(status, beats, lines)
    return status


def _clock(folder: Path) -> float:
    """The file system's own now, where it can be asked: that of another machine than this one."""
    with suppress(OSError):
        with tempfile.TemporaryFile(dir=folder / "health") as file:
            file.write(b".")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    return time.time()


def _read_beats(folder: Path, now: float) -> list[Beat]:
    """By rank; those of the newest start alone."""
    found = []
    for path in sorted(heartbeat_path(folder, 0).parent.glob("rank_*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            beat = Beat(json.loads(path.read_text(encoding="utf-8")), now - path.stat().st_mtime)
            # A file of another form is passed over here, not where it is used.
            _ = beat.rank, beat.place, beat.silent, beat.stands(True), beat.stands(False), str(beat)
            _ = beat.facts["started"], beat.facts["error"]
            found.append(beat)
    if not found:
        return []
    started = min(found, key=lambda beat: beat.age_s).facts["started"]
    return [beat for beat in found if beat.facts["started"] == started]


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The last lines, of a file that may be long, or cut anywhere."""
    lines = []
    with suppress(OSError):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            written = file.read().splitlines()
        for text in written:
            with suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def _judge(status: Status, beats: list[Beat], now: float) -> None:
    """The verdict, its reason, and where to look."""
    before = min((int(beat.facts.get("ends_before") or 0) for beat in beats), default=0)
    ends = status.ends[before:]
    speaking = [beat for beat in beats if not beat.silent]
    if ends:
        _say_end(status, ends)
    elif failed := [beat for beat in beats if beat.phase == FAILED]:
        status.verdict = FAILED_RUN
        status.why = f"{failed[0]}: {failed[0].facts.get('error')}"
    elif beats and all(beat.over for beat in beats):
        status.verdict = FINISHED if beats[0].facts.get("finished") else SAVED
        status.why = "all steps are done" if status.verdict == FINISHED else "start it again to go on"
    elif not beats:
        status.why = "no heartbeat: it has not begun, or an older version wrote this folder"
    elif not speaking:
        age = min(beat.age_s for beat in beats)
        status.verdict, status.why = DEAD, f"no rank was heard for {span(age)}, and none said that it ended"
        status.hint = (
            f"killed, or its machines are gone: see the scheduler, {status.folder / 'logs'}, and start it again"
        )
    elif any(beat.stands(alone=len(speaking) < len(beats)) for beat in speaking):
        _say_stalled(status, beats, speaking, now)
    else:
        status.verdict = RUNNING
        latest = max(speaking, key=lambda beat: beat.place)
        status.why = f"{latest.phase} for {span(latest.standing_s)}"


def _say_end(status: Status, ends: list[End]) -> None:
    """The first end of a start is the cause; what other ranks say later follows from it."""
    end = ends[0]
    status.verdict = {0: FINISHED, EXIT_REQUEUE: SAVED}.get(end.status, FAILED_RUN)
    status.why = f"{end.cause} (rank {end.rank}, {end.time})"
    if status.verdict == FAILED_RUN:
        status.hint = f"details in {status.folder / 'logs'}"
    elif status.verdict == SAVED:
        status.hint = "start it again to go on, where no scheduler does"


def _say_stalled(status: Status, beats: list[Beat], speaking: list[Beat], now: float) -> None:
    silent = [beat for beat in beats if beat.silent]
    longest = max(speaking, key=lambda beat: beat.standing_s)
    status.verdict, status.why = STALLED, f"{longest.phase} for {span(longest.standing_s)}"
    last = min(speaking, key=lambda beat: beat.place).place
    behind = [beat for beat in speaking if beat.place == last]
    if silent:
        status.why += f"; not heard for {span(min(beat.age_s for beat in silent))}: {named(silent)}"
    elif len(behind) < len(speaking):
        status.why += f"; behind the others ({behind[0].phase}, step {behind[0].facts['step']}): {named(behind)}"
    status.stacks = _read_stacks(status.folder / "stacks", now - longest.standing_s)
    status.hint = f"where each rank stands is in {status.folder / 'stacks'}" if status.stacks else ""


def named(beats: list[Beat]) -> str:
    more = f" and {len(beats) - _NAMED} more" if len(beats) > _NAMED else ""
    return ", ".join(str(beat) for beat in beats[:_NAMED]) + more


def _read_stacks(folder: Path, since: float) -> dict[int, list[str]]:
    """By rank: the innermost frames of the main thread, where they were written `since` then."""
    stacks = {}
    for path in sorted(folder.glob("rank_*.txt")):
        with suppress(OSError, ValueError):
            if path.stat().st_mtime < since:
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            main = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.M)[-1]  # the last of a dump
            frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', main)
            if frames:
                own = [f for f in frames if f"muco_ds{os.sep}" in f[0]]
                shown = dict.fromkeys([*frames[:1], *own[:2]])
                stacks[int(path.stem.removeprefix("rank_"))] = [
                    f"{os.sep.join(Path(file).parts[-2:])}:{line} {function}" for file, line, function in shown
                ]
    return stacks


def _progress(status: Status, beats: list[Beat], lines: list[dict[str, Any]]) -> None:
    config = _read_config(status.folder)
    status.last = lines[-1] if lines else {}
    status.step = status.last.get("step")
    status.steps = config.get("max_steps")
    for line in reversed(lines):
        if found := {key: value for key, value in line.items() if "/" in key}:
            status.validation = {"step": line["step"], **found}
            break
    if not beats:
        return
    first = beats[0].facts
    status.phase, status.ranks = beats[0].phase, first.get("world_size")
    status.hosts = sorted({str(beat.facts["host"]) for beat in beats})
    status.steps = first.get("steps") or status.steps
    done = [beat.facts["step"] for beat in beats if beat.facts["step"] is not None]
    status.step = max(done, default=status.step)
    usual, hour = first.get("usual_step_s"), first.get("last_hour")
    status.rate_now = 1 / usual if usual else None
    status.rate_hour = hour["steps"] / hour["seconds"] if hour and hour["seconds"] else None
    rate = status.rate_hour or status.rate_now
    if status.verdict == RUNNING and rate and status.steps and status.step is not None:
        status.remaining_s = max(0, status.steps - status.step) / rate
    for key in ("resident_gib", "peak_gpu_gib"):
        values = [beat.facts[key] for beat in beats if beat.facts.get(key) is not None]
        setattr(status, key, max(values, default=None))


def _read_config(folder: Path) -> dict[str, Any]:
    """The section `run` of the saved configuration."""
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if isinstance(config, dict) and isinstance(config.get("run"), dict):
            return config["run"]
    return {}


def _storage(status: Status, now: float) -> None:
    for path in sorted((status.folder / "checkpoints").glob("step_*[0-9]"), reverse=True):  # none without its name yet
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            manifest = path / "manifest.json"  # written last
            status.checkpoint_bytes = sum(json.loads(manifest.read_text())["files"].values())
            status.checkpoint = path.name
            status.checkpoint_age_s = max(0.0, now - manifest.stat().st_mtime)
            break
    with suppress(OSError):
        status.free_bytes = shutil.disk_usage(status.folder).free


def _warn(status: Status, beats: list[Beat], lines: list[dict[str, Any]]) -> None:
    last, warn = status.last, status.warnings.append
    if status.verdict == RUNNING and (silent := [beat for beat in beats if beat.silent]):
        warn(f"not heard for {span(min(beat.age_s for beat in silent))}, though steps go on: {named(silent)}")
    if ahead := [beat for beat in beats if beat.age_s < -_SKEW_S]:
        warn(f"clocks differ by {span(-min(beat.age_s for beat in ahead))}: {named(ahead)}")
    missing = (status.ranks or 0) - len(beats)
    if beats and missing > 0:
        warn(f"{missing} of {status.ranks} ranks have not been heard since the start")
    if last.get("skipped_steps"):
        warn(f"{last['skipped_steps']} steps were skipped: the gradient was not finite")
    if replaced := sum(int(line.get("replaced_images") or 0) for line in lines):
        warn(f"{replaced} broken pictures were replaced")
    if (share := last.get("data_wait_frac") or 0) > SHARE:
        warn(f"{share:.0%} of the time goes into waiting for data: raise data.workers")
    late, usual = last.get("slowest_late_s") or 0, last.get("step_s_p50") or 0
    if late > SHARE * usual > 0:
        host = next((f" ({b.facts['host']})" for b in beats if b.rank == last.get("slowest_rank")), "")
        warn(f"rank {last.get('slowest_rank')}{host} is {late:.2f} s late to each step of {usual:.2f} s")
    free, needed = status.free_bytes, status.checkpoint_bytes
    if free is not None and needed and free < 2 * needed:
        warn(f"{free / 1e9:.1f} GB are free, the next checkpoint takes {needed / 1e9:.1f}")
    crashes = [end for end in status.ends if end.status not in (0, EXIT_REQUEUE)]
    if len(crashes) > 1 and crashes[-1].cause == crashes[-2].cause:
        warn(f"it ended in the same way before: {crashes[-1].cause}")


def span(seconds: float) -> str:
    """Seconds, as people say it: 12 s, 3 min, 2 h 05 min, 3 d 4 h."""
    minutes = int(seconds // 60)
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
