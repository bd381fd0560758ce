"""The loss's part of a run's configuration. "Paper" is MuCo unless another is named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from muco_ds.errors import UserError


@dataclass
class LossOptions:
    """InfoNCE.

    Args:
        temperature: Divisor of the cosine similarities (paper: 0.02); `temperature.schedule` may make it change.
        symmetric: Add the loss of targets against queries (paper: off in pre-training).
        mask_same_image: Leave out keys of the query's own image, its positive apart (paper: on).
        same_target: Keys whose text equals the positive's up to case and white space: "mask" leaves them out,
            "positive" makes them positives as well, "keep" counts them as any other.
        false_negative_margin: Leave out keys that are nearer to the query than its positive by more than this (cosine;
            Qwen3-Embedding paper: 0.1); null: none.
        key_exchange: How a rank meets the other ranks' keys: "gather" all of them, pass them round in a "ring", or
            "auto": a ring where gathering would take more than 1 GiB. The loss is the same.
        matryoshka: Smaller sizes of the embedding that shall be usable as well, such as [64, 256]: the loss is the mean
            over that many leading components and over all of them (arXiv 2205.13147); null: only all.
    """

    temperature: float = 0.02
    symmetric: bool = False
    mask_same_image: bool = True
    same_target: Literal["mask", "positive", "keep"] = "mask"
    false_negative_margin: float | None = None
    key_exchange: Literal["auto", "gather", "ring"] = "auto"
    matryoshka: list[int] | None = None


@dataclass
class TemperatureOptions:
    """How the temperature of a step follows from `loss.temperature`.

    Args:
        schedule: "fixed" is `loss.temperature` at every step; "annealed" comes down, or up, to it from `start`;
            "learned" starts from it.
        start: Annealed: the temperature of the first step.
        steps: Annealed: `loss.temperature` is reached after this many steps, each changing it by the same factor.
        lr: Learned: learning rate of Adam for the temperature's logarithm, so about the largest relative change of a
            step.
        min: Learned: the temperature never falls below (CLIP paper: 0.01).
        max: Learned: the temperature never rises above.
    """

    schedule: Literal["fixed", "annealed", "learned"] = "fixed"
    start: float = 0.1
    steps: int = 1000
    lr: float = 1e-3
    min: float = 0.01
    max: float = 0.1

    def check(self, temperature: float) -> None:
        """Raises UserError where `loss.temperature` lies outside of the bounds that learning keeps."""
        if self.schedule == "learned" and not (self.min <= temperature <= self.max):
            bounds = f"temperature.min, {self.min}, and temperature.max, {self.max}"
            raise UserError(f"loss.temperature is {temperature}, not between {bounds}: learning starts there; move one")


RANGES: dict[str, tuple[float, bool, float]] = {
    "loss.temperature": (0, False, math.inf),
    "loss.false_negative_margin": (0, True, 2),
    "temperature.start": (0, False, math.inf),
    "temperature.steps": (1, True, math.inf),
    "temperature.lr": (0, False, math.inf),
    "temperature.min": (0, False, math.inf),
    "temperature.max": (0, False, math.inf),
}
"""As in `muco_ds.config`: dotted key -> (smallest value, whether that itself is allowed, largest)."""
