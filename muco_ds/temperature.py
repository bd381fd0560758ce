"""The temperature of each step: fixed, annealed or learned.

A learned temperature is one number that all ranks hold a copy of, beside the engine, whose partitions and gradient
cache know nothing of it. Its logarithm is trained, so that a step changes it by a factor, and held within bounds after
each step, as in CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from muco_ds.config_loss import TemperatureOptions
from muco_ds.distributed import env


class Temperature:
    """What the similarities of a step are divided by.

    Args:
        options: how it changes.
        target: `loss.temperature`.
        device: that of the loss; the learned one is never read back while training.
    """

    def __init__(self, options: TemperatureOptions, target: float, device: torch.device) -> None:
        self.options, self.target = options, target
        self._used: float | torch.Tensor = target
        self.log: nn.Parameter | None = None
        if options.schedule == "learned":
            self.log = nn.Parameter(torch.tensor(math.log(target), device=device))
            self.adam = torch.optim.Adam([self.log], lr=options.lr)

    def at(self, step: int) -> float | torch.Tensor:
        """For the loss of a step, counted from 0: a float, or a 0-d tensor with a gradient where it is learned."""
        if self.log is not None:
            learned = self.log.exp()
            self._used = learned.detach()
            return learned
        if self.options.schedule == "annealed":
            left = max(0.0, 1 - step / self.options.steps)
            self._used = self.target * (self.options.start / self.target) ** left
        return self._used

    @property
    def used(self) -> float:
        """What `at` said last."""
        return float(self._used)

    def step(self, *, taken: bool) -> None:
        """After the backward of a step: learn from it, or forget it where the engine did not take it. Collective.

        Each rank's loss is W times its part of the global mean (`tasks`), and depends on the temperature through its
        own rows alone: the gradient of the mean is the average of the ranks'.
        """
        if self.log is None:
            return
        if taken:
            assert self.log.grad is not None, "the loss did not use the temperature"
            env.sum_over_ranks(self.log.grad).div_(env.world_size())
            self.adam.step()
            with torch.no_grad():
                self.log.clamp_(math.log(self.options.min), math.log(self.options.max))
        self.adam.zero_grad()

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, for `restore`: the same on every rank, exact as JSON."""
        if self.log is None:
            return {}
        moments = {name: float(value) for name, value in self.adam.state[self.log].items()}
        return {"log": float(self.log.detach()), **moments}

    def restore(self, state: dict[str, float]) -> None:
        if self.log is None:
            return
        with torch.no_grad():
            self.log.fill_(state["log"])
        moments = {name: torch.tensor(value) for name, value in state.items() if name != "log"}
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})
