"""What DeepSpeed would write, copied to host memory instead: training goes on while it is written from there."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muco_ds.errors import UserError


@dataclass
class State:
    """One file to be: its path below the checkpoint's folder, what `torch.save` is to write, bytes of its tensors."""

    name: str
    tree: Any
    size: int


class Snapshots:
    """Copies, into the same memory each time: one copy of a rank's weights and optimizer states, page-locked on CUDA.

    The last snapshot must have been written before the next is taken.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    @contextmanager
    def instead_of_writing(self, engine: Any, root: Path, *, copied: bool = True) -> Iterator[list[State]]:
        """Inside, what the engine would save below `root` goes into the list, which is valid after the block.

        Args:
            copied: false: no copies but the engine's own tensors, to be written before they change.
        """
        recorder = _Recorder(root, self._buffers if copied else None)
        writer, engine.checkpoint_engine = engine.checkpoint_engine, recorder
        try:
            yield recorder.states
        finally:
            engine.checkpoint_engine = writer
        if recorder.on_gpu:
            torch.cuda.synchronize()  # the copies were only queued; and what is not copied is read by another thread


class _Recorder:
    """Stands where DeepSpeed (0.19.8) has a CheckpointEngine, and has the methods that `save_checkpoint` calls."""

    def __init__(self, root: Path, buffers: list[torch.Tensor] | None) -> None:
        self.root, self.buffers, self.used = root, buffers, 0
        self.states: list[State] = []
        self.on_gpu = False

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        copied: dict[tuple, torch.Tensor] = {}
        tree = self._copy(state_dict, copied)
        size = sum(tensor.nbytes for tensor in copied.values())
        self.states.append(State(str(Path(path).relative_to(self.root)), tree, size))

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return self.buffers is None  # DeepSpeed need not clone: a copy never drags a larger storage along

    def _copy(self, tree: Any, copied: dict[tuple, torch.Tensor]) -> Any:
        if isinstance(tree, torch.Tensor):
            # Tied weights are one tensor in the file, too.
            key = (tree.data_ptr(), tree.dtype, tree.shape, tree.stride()) if tree.numel() else (id(tree),)
            if key not in copied:
                copied[key] = self._copy_tensor(tree.detach())
            return copied[key]
        if isinstance(tree, dict):
            result = copy.copy(tree)  # with attributes, such as a state dict's metadata
            for name, value in tree.items():
                result[name] = self._copy(value, copied)
            return result
        if isinstance(tree, (list, tuple)):
            values = [self._copy(value, copied) for value in tree]
            return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
        return copy.deepcopy(tree)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.device.type == "cuda"
        self.on_gpu |= pinned
        if self.buffers is None:
            return tensor
        if self.used == len(self.buffers) or not _fits(self.buffers[self.used], tensor):
            buffer = _new(tensor, pinned)
            self.buffers[self.used : self.used + 1] = [buffer]
        buffer = self.buffers[self.used]
        self.used += 1
        return buffer.copy_(tensor, non_blocking=pinned)


def _new(tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    except RuntimeError as error:
        raise UserError(
            f"no host memory for a copy of {tensor.nbytes / 1e9:.1f} GB of weights or optimizer states: set "
            "checkpoint.background=false, or give the job more memory"
        ) from error


def _fits(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
