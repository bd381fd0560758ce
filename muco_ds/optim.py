"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from muco_ds.config import OptimOptions


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases (everything of one dimension) are not decayed.

    Fused: one kernel for all parameters on CUDA, vectorised on a CPU, nothing to compile.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Under ZeRO-3 a partition is flat; the whole parameter's shape is kept beside it.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def learning_rate(step: int, max_steps: int, options: OptimOptions) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then constant or cosine to 0.

    A pure function of the step, so nothing of it needs to be saved or restored.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(1, max_steps - options.warmup_steps)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))
