"""Counter-based random draws: every draw is a pure function of (seed, epoch, sample, purpose, lane).

No generator state exists, so a draw is the same on any rank, in any worker, after any restart, and thousands of them
are one vectorised numpy expression. The mixer is splitmix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import numpy as np

(
    PARAPHRASE,
    TURN_ORDER,
    QUERY_HISTORY,
    TARGET_HISTORY,
    EPOCH_ORDER,
    MIXTURE,
    NEGATIVES,
    QUERY_COUNTERPART,
    TARGET_COUNTERPART,
    DROPOUT,
    TURNS,
    CURRICULUM,
    INSTRUCTION,
    POSITIVE,
) = range(14)
"""Purposes: two draws with different purposes are independent."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_u64(
    seed: int, epoch: np.ndarray | int, samples_N: np.ndarray, purpose: int, lanes_N: np.ndarray | int = 0
) -> np.ndarray:
    """Uniform uint64 for each sample (and lane, e.g. the turn). Shapes broadcast."""
    # Wrapping multiplication is the algorithm, not an accident; at least 1-d because scalars would warn.
    x = np.atleast_1d(np.asarray(seed % 2**64, dtype=np.uint64))
    for word in (epoch, purpose, samples_N, lanes_N):
        x = _mix(x + (np.atleast_1d(word).astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return x


def draw_uniform(
    seed: int, epoch: np.ndarray | int, samples_N: np.ndarray, purpose: int, lanes_N: np.ndarray | int = 0
) -> np.ndarray:
    """Uniform float64 in [0, 1)."""
    return (draw_u64(seed, epoch, samples_N, purpose, lanes_N) >> np.uint64(11)) * 2.0**-53


def permute(positions_N: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), chosen by (seed, epoch), sends `positions_N`.

    A Feistel network on the smallest even-bit domain that holds n, walked until it lands inside (cycle walking, Black
    and Rogaway 2002): a shuffle of billions of rows in constant memory, evaluated only where it is needed.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for round_index in range(6):
            mixed = draw_u64(seed, epoch, right, EPOCH_ORDER, round_index) & mask
            left, right = right, left ^ mixed
        return (left << np.uint64(half)) | right

    out = network(positions_N.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)
