"""Packs on their way to the device: the next one crosses while one is worked on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from muco_ds.data.schema import PackedBatch


@cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: memory that was used on one stream is not given to another."""
    return torch.cuda.Stream(device)


class Crossing:
    """The packs of a step on the device. Asked for in turn, again and again as a gradient cache does, each is there.

    Copies run on a stream of their own, from pinned memory; without CUDA a pack is copied when it is asked for.

    Args:
        count: packs of the step.
        rounds: how often all of them will be asked for.
        pack_of: the pack of a number as it is to be copied; asked as late as its copy begins.
    """

    def __init__(
        self, count: int, pack_of: Callable[[int], PackedBatch], device: torch.device, *, rounds: int = 1
    ) -> None:
        self._count, self._pack_of, self._device = count, pack_of, device
        self._left = count * rounds
        self._stream = _stream_of_copies(device) if device.type == "cuda" and count > 1 else None
        self._begun: tuple[int, PackedBatch] | None = None

    def __getitem__(self, number: int) -> PackedBatch:
        """On the device, as far as what is queued on the current stream from now on can tell."""
        if self._stream is None:
            return self._pack_of(number).to(self._device)
        if self._begun is None or self._begun[0] != number:
            self._begin(number)
        assert self._begun is not None
        pack, current = self._begun[1], torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        self._left -= 1
        if self._left > 0:
            self._begin((number + 1) % self._count)

        def used(tensor: torch.Tensor) -> torch.Tensor:
            # Its memory was taken on the stream of copies, where it must not be given away while it is read here.
            tensor.record_stream(current)
            return tensor

        return pack.map(used)

    def _begin(self, number: int) -> None:
        with torch.cuda.stream(self._stream):
            self._begun = number, self._pack_of(number).to(self._device)
