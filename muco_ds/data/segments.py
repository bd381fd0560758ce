"""SegmentPlan: one description of who attends to whom that covers every stage (docs/design.md).

The query rows are cut into consecutive segments. Segment s attends, causally and aligned to the bottom right, to the
key/value rows `kv_index[cu_k[s]:cu_k[s+1]]`: its last query row sees its last key row. That is what an ordinary
flash-attention varlen call computes, so no mask tensor is ever built. The vision tower's plans are not causal: there
every row of a segment sees all of its keys.

Shape suffixes: T rows of the pack, Q query rows (T of them, or a choice), S segments (S1 = S + 1), R runs of
consecutive rows, J gathered key/value rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class SegmentPlan:
    """Attention layout of one packed row, of some of its rows, or of the patches of its pictures.

    `kv_index_J` is None when every segment attends to exactly its own rows, so that no gather is needed.
    `max_q` and `max_k` are Python ints because a tensor would cost a device sync in every layer.
    """

    kv_index_J: torch.Tensor | None  # int64
    cu_q_S1: torch.Tensor  # int32
    cu_k_S1: torch.Tensor  # int32
    max_q: int
    max_k: int
    causal: bool = True
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # per-backend, shared by all layers

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SegmentPlan:
        return replace(
            self,
            kv_index_J=None if self.kv_index_J is None else function(self.kv_index_J),
            cu_q_S1=function(self.cu_q_S1),
            cu_k_S1=function(self.cu_k_S1),
            cache={},
        )

    def of_rows(self, rows_Q: np.ndarray) -> SegmentPlan:
        """What the given rows attend to, they alone being asked: rows of a causal plan on the CPU, in any order."""
        assert self.causal and len(rows_Q)
        cu_q, cu_k = self.cu_q_S1.numpy().astype(np.int64), self.cu_k_S1.numpy().astype(np.int64)
        segment_Q = np.searchsorted(cu_q, rows_Q, side="right") - 1
        # Consecutive rows of a segment stay together: bottom right alignment gives each its own keys.
        breaks = (np.diff(rows_Q) != 1) | (np.diff(segment_Q) != 0)
        cu_run = np.concatenate(([0], np.flatnonzero(breaks) + 1, [len(rows_Q)]))
        last_R = cu_run[1:] - 1
        segment_R = segment_Q[last_R]
        behind_R = cu_q[segment_R + 1] - 1 - rows_Q[last_R]  # rows of the segment that a run does not reach
        starts_R, k_lengths_R = cu_k[segment_R], np.diff(cu_k)[segment_R] - behind_R
        gathered_J = np.repeat(starts_R - _starts(k_lengths_R), k_lengths_R) + np.arange(k_lengths_R.sum())
        kv_index_J = torch.from_numpy(gathered_J)
        return SegmentPlan(
            kv_index_J=kv_index_J if self.kv_index_J is None else self.kv_index_J[kv_index_J],
            cu_q_S1=torch.from_numpy(cu_run.astype(np.int32)),
            cu_k_S1=_cumulative(k_lengths_R),
            max_q=int(np.diff(cu_run).max()),
            max_k=int(k_lengths_R.max()),
        )

    def dense_mask(self, keys: int | None = None) -> torch.Tensor:
        """The same plan as a bool mask [Q, keys], True = attends; `keys` are all rows, default Q. For tests and
        pictures only: it is quadratic."""
        cu_q, cu_k = self.cu_q_S1.tolist(), self.cu_k_S1.tolist()
        total = cu_q[-1]
        kv_index = torch.arange(total) if self.kv_index_J is None else self.kv_index_J.cpu()
        mask = torch.zeros(total, total if keys is None else keys, dtype=torch.bool)
        for s in range(len(cu_q) - 1):
            kv = kv_index[cu_k[s] : cu_k[s + 1]]
            len_q, len_k = cu_q[s + 1] - cu_q[s], len(kv)
            allowed = torch.ones(len_q, len_k, dtype=torch.bool)
            if self.causal:
                allowed = allowed.tril(len_k - len_q)
            mask[cu_q[s] : cu_q[s + 1]] = mask[cu_q[s] : cu_q[s + 1]].index_put(
                (torch.arange(len_q)[:, None], kv[None, :]), allowed
            )
        return mask


@dataclass(frozen=True)
class Segment:
    """So many consecutive rows of a dialogue. They see each other, causally, and rows `context` of the dialogue."""

    rows: int
    context: tuple[int, int] = (0, 0)


def causal(rows: int) -> list[Segment]:
    """Every row sees all before it."""
    return [Segment(rows)]


def isolated(prefix: int, turns: Sequence[int]) -> list[Segment]:
    """A shared prefix (0: none) and turns of the given lengths; each turn sees the prefix and itself."""
    return [*(causal(prefix) if prefix else []), *(Segment(rows, context=(0, prefix)) for rows in turns)]


@dataclass
class SegmentBuilder:
    """Collects the segments of a pack, dialogue by dialogue."""

    q_lengths: list[int] = field(default_factory=list)
    kv_parts: list[list[tuple[int, int]]] = field(default_factory=list)  # row ranges each segment attends to
    rows: int = 0
    gathers: bool = False

    def add(self, segments: Sequence[Segment]) -> None:
        """The segments of one dialogue, in the order of its rows."""
        first = self.rows
        for segment in segments:
            start, stop = (first + row for row in segment.context)
            context = [(start, stop)] if stop > start else []
            self.gathers |= bool(context)
            self.q_lengths.append(segment.rows)
            self.kv_parts.append([*context, (self.rows, self.rows + segment.rows)])
            self.rows += segment.rows

    def build(self) -> SegmentPlan:
        k_lengths = [sum(stop - start for start, stop in parts) for parts in self.kv_parts]
        kv_index = None
        if self.gathers:
            ranges = [np.arange(start, stop) for parts in self.kv_parts for start, stop in parts]
            kv_index = torch.from_numpy(np.concatenate(ranges))
        return SegmentPlan(
            kv_index_J=kv_index,
            cu_q_S1=_cumulative(self.q_lengths),
            cu_k_S1=_cumulative(k_lengths),
            max_q=max(self.q_lengths),
            max_k=max(k_lengths),
        )


def separate(lengths: Sequence[int] | np.ndarray) -> SegmentPlan:
    """Stretches of these lengths, each seeing all of itself: pictures, or windows of them."""
    cu_S1, longest = _cumulative(lengths), int(max(lengths))
    return SegmentPlan(None, cu_S1, cu_S1, longest, longest, causal=False)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _cumulative(lengths: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
