"""The plan: (seed, step) -> which examples, on which rank, in which pack.

A pure function that every rank evaluates for all ranks, so no communication is needed to agree, a restart needs only
the step number, and the global batch of a step is the same set of examples whatever the number of ranks.

Shape suffixes: B examples of the global batch, S samples of the index.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from muco_ds.data.assign import assign
from muco_ds.data.index import Index
from muco_ds.data.mixture import Mixture
from muco_ds.data.schema import RowCounts
from muco_ds.data.stages.base import Stage, longest_rows
from muco_ds.errors import UserError
from muco_ds.flops import FlopsModel


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. `packs[rank]` lists that rank's packs, each an array of places in the global batch.

    Every rank has as many packs as the others; a rank with less work ends with empty ones.
    """

    step: int
    samples_B: np.ndarray  # int64 positions in the index
    passes_B: np.ndarray  # int64: how often the data set of each was gone through before; the epoch of its draws
    packs: list[list[np.ndarray]]
    rows_per_rank: list[RowCounts]
    pairs: int  # of the global batch, as are the next three
    tokens: int
    patches: int
    flops: float
    pack_fill: float  # share of the packs' token budget that is used
    imbalance: float  # cost of the slowest rank over the mean

    @property
    def images(self) -> int:
        return len(self.samples_B)

    def digest(self) -> int:
        """63 bits that differ when any rank would work on other examples, or on the same ones in other packs."""
        digest = hashlib.blake2b(str(self.step).encode(), digest_size=8)
        digest.update(self.samples_B.tobytes() + self.passes_B.tobytes())
        for rank in self.packs:
            for pack in rank:
                digest.update(len(pack).to_bytes(8, "little") + pack.astype(np.int64).tobytes())
        return int.from_bytes(digest.digest(), "little") >> 1


@dataclass(frozen=True)
class Costs:
    """What each of B examples costs."""

    tokens_B: np.ndarray
    flops_B: np.ndarray
    patches_B: np.ndarray
    attended_B: np.ndarray  # key/value rows: tokens, and the prefix again for each isolated turn
    read_B: np.ndarray  # rows that the last text layer is asked for
    read_attended_B: np.ndarray  # key/value rows that these attend to, about
    rows_B3: np.ndarray  # pooled rows: queries, targets, negatives
    predicted_B: np.ndarray  # tokens that the vocabulary head predicts
    pairs_B: np.ndarray


class Plan:
    """Plans steps over the index of a stage.

    Args:
        stage: what an example becomes.
        mixture: which examples each step takes.
        pack_tokens: token budget of a pack.
    Raises:
        UserError: an example larger than a pack.
    """

    def __init__(self, stage: Stage, flops: FlopsModel, mixture: Mixture, *, pack_tokens: int, world_size: int) -> None:
        self.stage, self.flops, self.mixture = stage, flops, mixture
        self.pack_tokens, self.world_size = pack_tokens, world_size
        self._check_longest()

    @property
    def index(self) -> Index:
        return self.stage.index

    def step(self, step: int) -> StepPlan:
        samples_B, passes_B = self.mixture.batch(step)
        costs = self.costs(samples_B, passes_B, step)
        packs = assign(costs.flops_B, costs.tokens_B, self.world_size, self.pack_tokens)
        assignment = [np.concatenate(rank) for rank in packs]
        rank_flops = np.array([costs.flops_B[rank].sum() for rank in assignment])
        return StepPlan(
            step=step,
            samples_B=samples_B,
            passes_B=passes_B,
            packs=packs,
            rows_per_rank=[RowCounts(*costs.rows_B3[rank].sum(0).tolist()) for rank in assignment],
            pairs=int(costs.pairs_B.sum()),
            tokens=int(costs.tokens_B.sum()),
            patches=int(costs.patches_B.sum()),
            flops=float(rank_flops.sum()),
            pack_fill=float(costs.tokens_B.sum() / (self.world_size * len(packs[0]) * self.pack_tokens)),
            imbalance=float(rank_flops.max() / rank_flops.mean()),
        )

    def costs(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Costs:
        """Tokens, patches and training FLOPs of examples with their pass's draws, in a step."""
        sizes = self.stage.sizes(samples_B, passes_B, step)
        flops_B = self.flops.training(
            sizes.tokens_B,
            sizes.attention_B,
            sizes.patches_B,
            sizes.patches_squared_B,
            predicted=sizes.predicted_B,
            read=sizes.read_B,
        )
        attended_B = sizes.tokens_B + sizes.repeated_B
        return Costs(
            tokens_B=sizes.tokens_B,
            flops_B=flops_B,
            patches_B=sizes.patches_B,
            attended_B=attended_B,
            read_B=sizes.read_B,
            read_attended_B=sizes.read_attended_B,
            rows_B3=sizes.rows_B3,
            predicted_B=sizes.predicted_B,
            pairs_B=sizes.pairs_B,
        )

    def _check_longest(self) -> None:
        """No example may exceed a pack in any epoch's draw, nor in the last of a curriculum's steps."""
        tokens_S = longest_rows(self.stage)
        too_long_S = np.flatnonzero(tokens_S > self.pack_tokens)
        if len(too_long_S):
            worst = int(too_long_S[tokens_S[too_long_S].argmax()])
            raise UserError(
                f"{self.index.name(worst)} needs up to {tokens_S[worst]} tokens but batch.pack_tokens="
                f"{self.pack_tokens}: raise batch.pack_tokens, lower data.max_pixels, or shorten the row"
            )


def spread_steps(steps: int, most: int) -> list[int]:
    """Up to `most` of a run's steps, evenly spread. The last is among them: there a curriculum is at its hardest."""
    return np.unique(np.linspace(steps - 1, 0, min(most, steps)).round().astype(int)).tolist()
