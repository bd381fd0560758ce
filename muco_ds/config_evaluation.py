"""The config's section `evaluation`: benchmarks that are run while the model trains, a part of them at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from muco_ds.errors import UserError

_OF_EACH: dict[str, tuple[float, bool, float]] = {
    "every": (0, True, math.inf),
    "rows": (1, True, math.inf),
    "seconds": (0, False, math.inf),
}


@dataclass
class SuiteSchedule:
    """When a benchmark is run, on what, and how long it may stop the run.

    Args:
        every: Steps between evaluations, and one after the last step; 0: none.
        data: The benchmark's files, as for `launch/evaluate.py --data`.
        images: Folder that picture paths start from; null: where the benchmark has it.
        datasets: Only these data sets; null: all.
        rows: Only the first so many rows of each data set; null: all.
        seconds: The run goes on after this time; the data sets that are left come first at the next evaluation.
    """

    every: int = 0
    data: str | None = None
    images: str | None = None
    datasets: list[str] | None = None
    rows: int | None = None
    seconds: float = 600.0


@dataclass
class EvaluationOptions:
    """Benchmarks during training, beside the held-out rows of `validation`.

    Args:
        m3t: Rows in M3T's columns.
        mmeb: MMEB.
        mbeir: M-BEIR.
    """

    m3t: SuiteSchedule = field(default_factory=SuiteSchedule)
    mmeb: SuiteSchedule = field(default_factory=SuiteSchedule)
    mbeir: SuiteSchedule = field(default_factory=SuiteSchedule)

    def scheduled(self) -> dict[str, SuiteSchedule]:
        """Those that are to be run, by name."""
        schedules = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: schedule for name, schedule in schedules.items() if schedule.every}


RANGES = {
    f"evaluation.{suite.name}.{key}": bounds for suite in fields(EvaluationOptions) for key, bounds in _OF_EACH.items()
}
"""Dotted key -> (smallest allowed value, whether that value itself is allowed, largest allowed value)."""


def check_evaluation(evaluation: EvaluationOptions, task: str) -> None:
    """Raises UserError, naming the key and the cure."""
    for name, schedule in evaluation.scheduled().items():
        if schedule.data is None:
            raise UserError(
                f"evaluation.{name}.every is {schedule.every} but evaluation.{name}.data is null: name the files, or "
                "set every to 0"
            )
        if task == "coma_compress":
            raise UserError(
                f"evaluation.{name}.every is {schedule.every} but task.name is coma_compress, which gives no "
                "embeddings: set it to 0"
            )
