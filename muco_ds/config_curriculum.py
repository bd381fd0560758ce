"""The config's section `curriculum`: a task that starts easy and reaches what `task` says step by step."""

from __future__ import annotations

from dataclasses import dataclass

from muco_ds.config_task import TaskOptions
from muco_ds.errors import UserError

RANGES: dict[str, tuple[float, bool, float]] = {
    "curriculum.steps": (0, True, float("inf")),
    "curriculum.turns": (1, True, float("inf")),
    "curriculum.negatives": (0, True, float("inf")),
}
"""Dotted key -> (smallest allowed value, whether that value itself is allowed, largest allowed value)."""


@dataclass
class CurriculumOptions:
    """From easy to hard: numbers that grow on a line from these, at step 0, to those of `task`.

    In between a limit of 2.3 is 3 for three rows in ten, drawn anew in each pass, and 2 for the others.

    Args:
        steps: Optimizer steps until `task.turns` and `task.negatives` are reached; 0: they hold from the start (paper).
        turns: Most turns of a row at the start; null: `task.turns`.
        negatives: Most hard negatives of a row at the start; null: `task.negatives`.
    """

    steps: int = 0
    turns: int | None = None
    negatives: int | None = None


def check_curriculum(curriculum: CurriculumOptions, task: TaskOptions) -> None:
    """Raises UserError, naming the keys, their values and the cure, where the way to the task is none."""
    starts = [name for name in ("turns", "negatives") if getattr(curriculum, name) is not None]
    if curriculum.steps == 0:
        if starts:
            raise UserError(f"curriculum.{starts[0]} is set but curriculum.steps is 0: set the steps, or it to null")
        return
    if not starts:
        raise UserError(
            f"curriculum.steps is {curriculum.steps} but curriculum.turns and curriculum.negatives are null: set where "
            "to start, or steps to 0"
        )
    if curriculum.turns is not None and task.name in ("finetune", "coma_match"):
        raise UserError(
            f"curriculum.turns is {curriculum.turns} but task.name is {task.name}, whose rows are single pairs: set it "
            "to null"
        )
    for name in ("turns", "negatives"):
        start, end = getattr(curriculum, name), getattr(task, name)
        if start is not None and end is None:
            raise UserError(f"curriculum.{name} is {start} but task.{name} is null: set it to the number to end with")
        if start is not None and start > end:
            raise UserError(
                f"curriculum.{name} is {start}, above task.{name}, {end}, where it ends: it must go from easy to hard"
            )
