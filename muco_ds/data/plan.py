"""The plan: (seed, step) -> which examples, on which rank, in which pack.

A pure function that every rank evaluates for all ranks, so no communication is needed to agree, a restart needs only
the step number, and the global batch of a step is the same set of examples whatever the number of ranks.

Shape suffixes: B examples of the global batch, N turns of those examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from muco_ds.data import draws
from muco_ds.data.assign import assign
from muco_ds.data.index import Index
from muco_ds.data.mixture import Mixture
from muco_ds.data.schema import RowCounts
from muco_ds.data.templates import ChatTemplate
from muco_ds.errors import UserError
from muco_ds.flops import FlopsModel

SCANNED_SAMPLES = 65536  # of the index at a time, so that a scan of millions needs little memory


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
    tokens: int  # of the global batch, as are the next two
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


class Plan:
    """Plans steps over an index.

    Args:
        mixture: which examples each step takes.
        pack_tokens: token budget of a pack.
        query_history, target_history: probability that the turns of that side see the earlier ones.
    Raises:
        UserError: fewer examples in a batch than ranks, an example larger than a pack.
    """

    def __init__(
        self,
        index: Index,
        template: ChatTemplate,
        flops: FlopsModel,
        mixture: Mixture,
        *,
        seed: int,
        pack_tokens: int,
        world_size: int,
        query_history: float,
        target_history: float,
    ) -> None:
        self.index, self.template, self.flops, self.mixture = index, template, flops, mixture
        self.seed, self.pack_tokens, self.world_size = seed, pack_tokens, world_size
        self.query_history, self.target_history = query_history, target_history
        if mixture.images < world_size:
            raise UserError(
                f"batch.images={mixture.images} is less than {world_size} ranks: raise it or use fewer ranks"
            )
        self._check_longest()

    def step(self, step: int) -> StepPlan:
        samples_B, passes_B = self.mixture.batch(step)
        costs = self.costs(samples_B, passes_B)
        packs = assign(costs.flops_B, costs.tokens_B, self.world_size, self.pack_tokens)
        assignment = [np.concatenate(rank) for rank in packs]
        turns_B = self.turn_counts(samples_B)
        rank_flops = np.array([costs.flops_B[rank].sum() for rank in assignment])
        return StepPlan(
            step=step,
            samples_B=samples_B,
            passes_B=passes_B,
            packs=packs,
            rows_per_rank=[RowCounts(int(turns_B[rank].sum()), int(turns_B[rank].sum())) for rank in assignment],
            tokens=int(costs.tokens_B.sum()),
            patches=int(costs.patches_B.sum()),
            flops=float(rank_flops.sum()),
            pack_fill=float(costs.tokens_B.sum() / (self.world_size * len(packs[0]) * self.pack_tokens)),
            imbalance=float(rank_flops.max() / rank_flops.mean()),
        )

    def costs(self, samples_B: np.ndarray, passes_B: np.ndarray) -> Costs:
        """Tokens, patches and training FLOPs of examples with their pass's draw of paraphrases and histories."""
        data = self.index.samples[samples_B]
        turns_B = self.turn_counts(samples_B)
        owner_N = np.repeat(np.arange(len(samples_B)), turns_B)
        turn_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(turns_B) - turns_B, turns_B)
        rows_N = (data["turn_end"] - turns_B)[owner_N] + turn_N
        ends_N = self.index.turns["question_end"][rows_N]
        starts_N = np.where(rows_N > 0, self.index.turns["question_end"][rows_N - 1], 0)
        chosen_N = draw_paraphrases(self.seed, passes_B[owner_N], samples_B[owner_N], turn_N, ends_N - starts_N)
        texts = {
            "query": self.index.question_tokens[starts_N + chosen_N].astype(np.int64),
            "target": self.index.turns["target_tokens"][rows_N].astype(np.int64),
        }
        history = draw_histories(self.seed, passes_B, samples_B, self.query_history, self.target_history)
        tokens_B = np.zeros(len(samples_B), np.int64)
        pairs_B = np.zeros(len(samples_B))
        for side, text_N in texts.items():
            vision_B = vision_tokens(data, side)
            text_B = np.bincount(owner_N, text_N, len(samples_B)).astype(np.int64)
            length_B, prefix_B = self.template.count(text_B, turns_B, vision_B, history[side])
            # Isolated turns: each attends to the prefix and to itself; its own newline is too small to matter here.
            turn_len_N = text_N + len(self.template.tail)
            isolated_N = turn_len_N * prefix_B[owner_N] + turn_len_N**2 / 2
            isolated_B = prefix_B**2 / 2 + np.bincount(owner_N, isolated_N, len(samples_B))
            tokens_B += length_B
            pairs_B += np.where(history[side], length_B**2 / 2, isolated_B)
        flops_B = self.flops.training(tokens_B, pairs_B, data["patches"], data["patches_squared"])
        return Costs(tokens_B, flops_B, data["patches"])

    def turn_counts(self, samples_B: np.ndarray) -> np.ndarray:
        """Turns of each sample, int64 [B]."""
        ends = self.index.samples["turn_end"]
        return ends[samples_B] - np.where(samples_B > 0, ends[samples_B - 1], 0)

    def _check_longest(self) -> None:
        """No example may exceed a pack in any epoch's draw."""
        histories = self.query_history, self.target_history
        for start, tokens_B in scan_longest(self.index, self.template, *histories):
            worst = int(tokens_B.argmax())
            if tokens_B[worst] > self.pack_tokens:
                raise UserError(
                    f"{self.index.name(start + worst)} needs up to {tokens_B[worst]} tokens but batch.pack_tokens="
                    f"{self.pack_tokens}: raise batch.pack_tokens, lower data.max_pixels, or shorten the row"
                )


def scan_longest(
    index: Index, template: ChatTemplate, query_history: float, target_history: float
) -> Iterator[tuple[int, np.ndarray]]:
    """`longest_tokens` of the whole index: (first sample, tokens) of one part after the other."""
    for start in range(0, len(index), SCANNED_SAMPLES):
        stop = min(start + SCANNED_SAMPLES, len(index))
        yield start, longest_tokens(index, template, start, stop, query_history, target_history)


def longest_tokens(
    index: Index, template: ChatTemplate, start: int, stop: int, query_history: float, target_history: float
) -> np.ndarray:
    """Most tokens that samples start .. stop can need in any epoch: longest paraphrases, longest layout; int64."""
    data = index.samples[start:stop]
    first_turn = index.turn_bounds(start)[0]
    first_question = index.question_bounds(first_turn)[0]
    turns_N = index.turns[first_turn : index.turn_bounds(stop - 1)[1]]
    turns_B = np.diff(data["turn_end"], prepend=first_turn)
    owner_N = np.repeat(np.arange(len(data)), turns_B)
    starts_N = np.concatenate(([first_question], turns_N["question_end"][:-1])) - first_question
    questions = index.question_tokens[first_question : turns_N["question_end"][-1]]
    texts = {
        "query": (np.maximum.reduceat(questions, starts_N), query_history),
        "target": (turns_N["target_tokens"], target_history),
    }
    tokens_B = np.zeros(len(data), np.int64)
    for side, (text_N, history) in texts.items():
        text_B = np.bincount(owner_N, text_N, len(data)).astype(np.int64)
        layouts = [np.array(causal) for causal, drawn in ((True, history > 0), (False, history < 1)) if drawn]
        counts = [template.count(text_B, turns_B, vision_tokens(data, side), layout)[0] for layout in layouts]
        tokens_B += np.max(counts, axis=0)
    return tokens_B


def vision_tokens(data_B: np.ndarray, side: str) -> np.ndarray:
    """Tokens of the pictures of a side, each with its start and end."""
    return data_B[f"{side}_image_tokens"].astype(np.int64) + 2 * data_B[f"{side}_images"]


def draw_paraphrases(
    seed: int, passes_N: np.ndarray | int, samples_N: np.ndarray, turns_N: np.ndarray, choices_N: np.ndarray
) -> np.ndarray:
    """Which paraphrase each turn uses in this pass; the plan (for lengths) and the collator (for text) must agree."""
    drawn_N = draws.draw_u64(seed, passes_N, samples_N, draws.PARAPHRASE, turns_N)
    return (drawn_N % choices_N.astype(np.uint64)).astype(np.int64)


def draw_histories(
    seed: int, passes_B: np.ndarray | int, samples_B: np.ndarray, query_history: float, target_history: float
) -> dict[str, np.ndarray]:
    """Per side, whether each example's turns see the earlier ones (causal) or not (isolated)."""
    return {
        "query": draws.draw_uniform(seed, passes_B, samples_B, draws.QUERY_HISTORY) < query_history,
        "target": draws.draw_uniform(seed, passes_B, samples_B, draws.TARGET_HISTORY) < target_history,
    }
