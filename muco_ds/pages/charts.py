"""Line charts as numbers for inline SVG: a template draws them with the page's own colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 26
MOST_POINTS = 240
"""Of a line; more steps are drawn as the mean of neighbours, in the band of their smallest and largest value."""

MOST_TIPS = 60
DOTTED = 30
"""A line of at most so many points shows them."""

COLOURS = 8

Series = Sequence[tuple[int, float]]
"""(step, value), steps ascending."""


@dataclass(frozen=True)
class Line:
    """One series in the chart's coordinates; `band` is the outline of what its points are means of, '' = nothing."""

    label: str
    colour: int
    points: str
    dots: list[tuple[float, float]]
    band: str
    last: str


@dataclass(frozen=True)
class Chart:
    """A title, lines, ticks as (place, label), and tips as (left, width, text)."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    tips: list[tuple[float, float, str]]


def chart(title: str, series: Mapping[str, Series], *, percent: bool = False) -> Chart | None:
    """A chart of the series by label; None where none has a value, or they span what floats can't divide."""
    scale = 100.0 if percent else 1.0
    arrays = {
        label: (np.array([step for step, _ in points]), np.array([value for _, value in points]) * scale)
        for label, points in series.items()
        if points
    }
    if not arrays:
        return None
    x_axis = _Axis.of(np.concatenate([steps for steps, _ in arrays.values()]), LEFT, WIDTH - RIGHT, padded=False)
    y_axis = _Axis.of(np.concatenate([values for _, values in arrays.values()]), HEIGHT - BOTTOM, TOP, padded=True)
    if not 1e-300 < y_axis.high - y_axis.low < 1e300:
        return None
    unit = "%" if percent else ""
    lines = [
        _line(label, i % COLOURS, steps, values, x_axis, y_axis, unit)
        for i, (label, (steps, values)) in enumerate(arrays.items())
    ]
    tips = _tips(arrays, x_axis, unit)
    x_ticks = [(x_axis.place(tick), number(tick)) for tick in x_axis.ticks(5) if tick == int(tick)]
    ticks = y_axis.ticks(5)
    y_ticks = [(y_axis.place(tick), _tick(tick, ticks) + unit) for tick in ticks]
    return Chart(title, lines, x_ticks, y_ticks, tips)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: np.ndarray, start: float, end: float, *, padded: bool) -> _Axis:
        low, high = float(values.min()), float(values.max())
        if padded and 0 <= low < 0.35 * high:
            low = 0.0
        if low == high:
            margin = abs(low) / 2 or 1.0
            low, high = low - margin, high + margin
        elif padded:
            margin = 0.06 * (high - low)
            low, high = low - (margin if low else 0.0), high + margin
        return cls(low, high, start, end)

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers."""
        rough = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _line(
    label: str, colour: int, steps: np.ndarray, values: np.ndarray, x_axis: _Axis, y_axis: _Axis, unit: str
) -> Line:
    last = number(float(values[-1])) + unit
    parts = np.array_split(np.arange(len(steps)), min(len(steps), MOST_POINTS))
    at = [(x_axis.place(steps[part].mean()), y_axis.place(values[part].mean())) for part in parts]
    band = ""
    if len(parts) < len(steps):
        upper = [(x, y_axis.place(values[part].max())) for (x, _), part in zip(at, parts, strict=True)]
        lower = [(x, y_axis.place(values[part].min())) for (x, _), part in zip(at, parts, strict=True)]
        band = _points([*upper, *reversed(lower)])
    return Line(label, colour, _points(at), at if len(at) <= DOTTED else [], band, last)


def _tips(
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], axis: _Axis, unit: str
) -> list[tuple[float, float, str]]:
    """Strips side by side over the whole width, each with the values of its steps."""
    all_steps = np.unique(np.concatenate([steps for steps, _ in arrays.values()]))
    groups = np.array_split(all_steps, min(len(all_steps), MOST_TIPS))
    centres = [axis.place(float(group.mean())) for group in groups]
    edges = [axis.start, *((a + b) / 2 for a, b in pairwise(centres)), axis.end]
    tips = []
    for i, group in enumerate(groups):
        first, last = int(group[0]), int(group[-1])
        lines = [f"step {first}" if first == last else f"steps {first} to {last}"]
        for label, (steps, values) in arrays.items():
            inside = values[(steps >= first) & (steps <= last)]
            if len(inside):
                lines.append(f"{label}: {number(float(inside.mean()))}{unit}".removeprefix(": "))
        tips.append((round(edges[i], 1), round(edges[i + 1] - edges[i], 1), "\n".join(lines)))
    return tips


def _points(at: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in at)


def number(value: float) -> str:
    """The digits that matter, with k, M and G."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    for size, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if name == 'k' else size):.3g}{name}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _tick(value: float, ticks: Sequence[float]) -> str:
    """As many digits as tell the ticks apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value)
    largest = max(map(abs, ticks))
    if value == 0:
        return "0"
    if largest >= 1e4:
        return number(value)
    if largest < 1e-2:
        power = math.floor(math.log10(largest))
        return f"{value / 10.0**power:.3g}e{power}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0}f}"
