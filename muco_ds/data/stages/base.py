"""What a training stage is to the data side: how an example becomes dialogues.

A stage says it twice: for many examples at once as numbers, from the length index alone (`sizes`), which is what the
plan works with, and for one example as dialogues to pack (`sides`), which is what the collator works with. The two must
agree: on the number of pooled rows of each kind always, because ranks rely on it, and on tokens to the last one.

Shape suffixes: B examples, G dialogues of one kind, N turns of those dialogues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from muco_ds.data.index import Index
from muco_ds.data.schema import NEGATIVE, QUERY, Side
from muco_ds.data.templates import ChatTemplate

SCANNED_SAMPLES = 65536  # of the index at a time, so that a scan of millions needs little memory


@dataclass(frozen=True)
class Dialogues:
    """Dialogues of one kind as numbers. Every turn is a pooled row."""

    kind: int  # QUERY, TARGET or NEGATIVE
    owner_G: np.ndarray  # int64: which example each belongs to
    history_G: np.ndarray  # bool: its turns see the earlier ones
    vision_G: np.ndarray  # int64: tokens of its pictures, each with its start and end
    dialogue_N: np.ndarray  # int64: which dialogue each turn belongs to, ascending
    text_N: np.ndarray  # int64: tokens of each turn's text


@dataclass(frozen=True)
class Layout:
    """The dialogues that examples become, and what their pictures give the vision tower."""

    dialogues: Sequence[Dialogues]
    patches_B: np.ndarray
    patches_squared_B: np.ndarray  # sum over pictures of patches^2: the vision tower's attention


@dataclass(frozen=True)
class Sizes:
    """What B examples put into packs."""

    tokens_B: np.ndarray  # int64
    attention_B: np.ndarray  # float64: query/key pairs
    repeated_B: np.ndarray  # int64: key/value rows beyond the tokens, as each isolated turn attends to its prefix again
    read_attended_B: np.ndarray  # int64: key/value rows that the read rows attend to, about
    rows_B3: np.ndarray  # int64: pooled rows, queries, targets, negatives
    predicted_B: np.ndarray  # int64: tokens that the vocabulary head predicts
    pairs_B: np.ndarray  # int64: of a query and its target, or a question and its answer
    patches_B: np.ndarray  # int64
    patches_squared_B: np.ndarray  # sum over pictures of patches^2: the vision tower's attention
    span: int = 1  # rows that are read for a pooled one

    @property
    def read_B(self) -> np.ndarray:
        """Rows that the last text layer is asked for; int64."""
        return self.rows_B3.sum(1) * self.span


class Stage(Protocol):
    """The data half of a training stage; `muco_ds.tasks` holds the other half, its loss."""

    index: Index
    template: ChatTemplate

    def sizes(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Sizes:
        """What samples in their passes, which a step takes, put into packs."""
        ...

    def sides(self, sample: int, number: int, step: int) -> list[Side]:
        """The dialogues of a sample in its pass `number`, which a step takes.

        Raises:
            RowError: the row can't be used any more.
        """
        ...

    def longest(self, start: int, stop: int) -> np.ndarray:
        """Most tokens that each of the samples start .. stop can need in any pass and step; int64."""
        ...


def measure(layout: Layout, template: ChatTemplate, forms: int = 1) -> Sizes:
    """Sizes of examples that become these dialogues, each query and target in so many forms."""
    examples = len(layout.patches_B)
    sizes = Sizes(
        tokens_B=np.zeros(examples, np.int64),
        attention_B=np.zeros(examples),
        repeated_B=np.zeros(examples, np.int64),
        read_attended_B=np.zeros(examples, np.int64),
        rows_B3=np.zeros((examples, NEGATIVE + 1), np.int64),
        predicted_B=np.zeros(examples, np.int64),
        pairs_B=np.zeros(examples, np.int64),
        patches_B=layout.patches_B,
        patches_squared_B=layout.patches_squared_B,
        span=len(template.pooled_ids),
    )
    for part in layout.dialogues:
        size = len(part.owner_G)
        text_G = np.bincount(part.dialogue_N, part.text_N, size).astype(np.int64)
        turns_G = np.bincount(part.dialogue_N, minlength=size)
        length_G, prefix_G = template.count(text_G, turns_G, part.vision_G, part.history_G)
        length_G = length_G - len(template.newline) * _without_newline(part)
        # Isolated turns: each attends to the prefix and to itself; its own newline is too small to matter here.
        turn_len_N = part.text_N + len(template.tail)
        isolated_N = turn_len_N * prefix_G[part.dialogue_N] + turn_len_N**2 / 2
        isolated_G = prefix_G**2 / 2 + np.bincount(part.dialogue_N, isolated_N, size)
        np.add.at(sizes.tokens_B, part.owner_G, length_G)
        np.add.at(sizes.attention_B, part.owner_G, np.where(part.history_G, length_G**2 / 2, isolated_G))
        np.add.at(sizes.repeated_B, part.owner_G, np.where(part.history_G, 0, turns_G * prefix_G))
        # The read row of a causal dialogue's turn sees all before it: a mean of half of the turns, and the prefix.
        seen_G = turns_G * prefix_G + (length_G - prefix_G) * np.where(part.history_G, turns_G + 1, 2) // 2
        np.add.at(sizes.read_attended_B, part.owner_G, seen_G)
        np.add.at(sizes.rows_B3[:, part.kind], part.owner_G, turns_G)
    sizes.pairs_B[:] = sizes.rows_B3[:, QUERY] // forms
    return sizes


def tokens_of(dialogues: Sequence[Dialogues], examples: int, template: ChatTemplate) -> np.ndarray:
    """Tokens alone of so many examples that become these dialogues: int64 [B]."""
    no_pictures_B = np.zeros(examples, np.int64)
    return measure(Layout(dialogues, no_pictures_B, no_pictures_B), template).tokens_B


def _without_newline(part: Dialogues) -> np.ndarray:
    """Per dialogue, turns that `ChatTemplate.count` gives a newline after a picture though they have no text: [G]."""
    first_N = np.diff(part.dialogue_N, prepend=-1) > 0
    history_N = part.history_G[part.dialogue_N]
    bare_N = (part.text_N == 0) & (part.vision_G[part.dialogue_N] > 0) & (first_N | ~history_N)
    return np.bincount(part.dialogue_N, bare_N, len(part.owner_G)).astype(np.int64)


def vision_tokens(data_B: np.ndarray, side: str) -> np.ndarray:
    """Tokens of the pictures of a side ("query", "target") of index samples, each with its start and end."""
    return data_B[f"{side}_image_tokens"].astype(np.int64) + 2 * data_B[f"{side}_images"]


def lengths(ends: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Lengths of slices of a ragged table, given by their ends, at some positions."""
    return ends[positions] - np.where(positions > 0, ends[positions - 1], 0)


def ragged(starts_B: np.ndarray, lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All rows of slices: (which slice, place within it, row), each int64."""
    owner_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    lane_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
    return owner_N, lane_N, starts_B[owner_N] + lane_N


def longest_rows(stage: Stage) -> np.ndarray:
    """Most tokens that each sample can need in any pass; int64."""
    return np.concatenate([stage.longest(*part) for part in scans(stage.index)])


def scans(index: Index) -> Iterator[tuple[int, int]]:
    """(start, stop) of samples that are looked at together."""
    return pairwise([*range(0, len(index), SCANNED_SAMPLES), len(index)])
