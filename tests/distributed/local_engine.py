"""What tasks need of a DeepSpeed engine, without one: gradients stay those of this rank's own backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class LocalEngine:
    """Runs a module; `reductions` counts how often gradients would have been averaged over the ranks."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.reductions = 0
        self.optimizer = self
        self._held = False

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.module(*args, **options)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.reductions += not self._held

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        self._held = True
        yield
        self._held = False
        self.reductions += 1

    def _coalesce_grad_reduction(self) -> None:  # by which a ZeRO optimizer is known to be able to
        raise NotImplementedError
