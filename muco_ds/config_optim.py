"""The section `optim`. "Paper" is MuCo unless another is named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RANGES: dict[str, tuple[float, bool, float]] = {
    "optim.lr": (0, False, math.inf),
    "optim.vision_lr": (0, False, math.inf),
    "optim.warmup_steps": (0, True, math.inf),
    "optim.weight_decay": (0, True, math.inf),
    "optim.beta1": (0, True, 1 - 1e-9),
    "optim.beta2": (0, True, 1 - 1e-9),
    "optim.eps": (0, False, math.inf),
    "optim.max_grad_norm": (0, True, math.inf),
    "optim.max_skipped": (1, True, math.inf),
}


@dataclass
class OptimOptions:
    """AdamW and its schedule.

    Args:
        lr: Peak learning rate (paper: 5e-5).
        vision_lr: That of a trained vision tower, on the same schedule; null: `lr`.
        warmup_steps: Steps of linear warm-up from 0 to `lr`.
        schedule: After the warm-up: "constant" (paper) or "cosine" down to 0 at the last step.
        weight_decay: Decoupled decay of matrices; never applied to norms and biases (CoMa paper: 0).
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        max_grad_norm: Gradients are scaled down to this global L2 norm; 0: no clipping.
        max_skipped: A step whose gradient is not finite is skipped; the run ends at this many in a row.
    """

    lr: float = 5e-5
    vision_lr: float | None = None
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    max_skipped: int = 5
