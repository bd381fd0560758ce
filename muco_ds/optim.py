"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from muco_ds.config import OptimOptions

VISION = ".visual."


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases (everything of one dimension) are not decayed.

    With `vision_lr` the vision tower has groups of its own. A group's "lr_ratio" is its learning rate by `options.lr`.
    Fused: one kernel for all parameters on CUDA, vectorised on a CPU, nothing to compile.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    vision_ratio = 1.0 if options.vision_lr is None else options.vision_lr / options.lr
    for ratio in dict.fromkeys((1.0, vision_ratio)):
        groups |= {(ratio, True): [], (ratio, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a partition is flat; the whole parameter's shape is kept beside it.
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            groups[vision_ratio if VISION in f".{name}" else 1.0, matrix].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": held, "weight_decay": options.weight_decay * matrix, "lr_ratio": ratio}
            for (ratio, matrix), held in groups.items()
            if held
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def learning_rate(step: int, max_steps: int, options: OptimOptions) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then constant or cosine to 0.

    A group's own is "lr_ratio" times that. A pure function of the step: nothing of it needs to be saved or restored.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(1, max_steps - options.warmup_steps)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))
