"""Hard negatives of an example: which of them a pass brings along, as numbers and as dialogues.

Shape suffixes: B examples, M negatives of those examples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from muco_ds.data import draws
from muco_ds.data.index import Index
from muco_ds.data.readers import RowError
from muco_ds.data.schema import NEGATIVE, Dialogue, Record, Side
from muco_ds.data.stages import curriculum
from muco_ds.data.stages.base import Dialogues, Layout, lengths, ragged, tokens_of
from muco_ds.data.stages.curriculum import Limit, first_of_each
from muco_ds.data.templates import ChatTemplate

NO_ID = -1
"""Image and pair of a hard negative: no query has them, so only its target hash can mask it."""


class HardNegatives:
    """A limited number of an example's negatives, drawn anew in each pass; a negative is a dialogue of one turn."""

    def __init__(self, index: Index, template: ChatTemplate, seed: int, limit: Limit) -> None:
        self.index, self.template, self.seed, self.limit = index, template, seed, limit

    def add_to(self, layout: Layout, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Layout:
        """The layout with the negatives of these samples in their passes."""
        owner_M, row_M = self._drawn(samples_B, passes_B, step)
        data = self.index.negatives[row_M]
        patches_B, squared_B = (
            np.bincount(owner_M, data[name], len(samples_B)).astype(np.int64) for name in ("patches", "patches_squared")
        )
        return replace(
            layout,
            dialogues=[*layout.dialogues, _dialogues(data, owner_M)],
            patches_B=layout.patches_B + patches_B,
            patches_squared_B=layout.patches_squared_B + squared_B,
        )

    def sides(self, record: Record, sample: int, number: int, step: int) -> list[Side]:
        """Dialogues of the negatives of a sample in its pass `number`. Raises RowError when some are gone."""
        first, stop = self.index.negative_bounds(sample)
        if len(record.negatives) != stop - first:
            raise RowError(f"has {len(record.negatives)} negatives, {stop - first} were indexed")
        sides = []
        for row in self._drawn(np.array([sample]), np.array([number]), step)[1].tolist():
            negative = record.negatives[row - first]
            ids_13 = np.array([[NO_ID, NO_ID, self.index.negatives["target_hash"][row]]])
            sides.append(Side(NEGATIVE, Dialogue((negative.text,), negative.images), True, ids_13))
        return sides

    def longest(self, start: int, stop: int) -> np.ndarray:
        """Most tokens that negatives of samples start .. stop can add."""
        first = self.index.negative_bounds(start)[0]
        data = self.index.negatives[first : self.index.negative_bounds(stop - 1)[1]]
        counts_B = np.diff(self.index.samples["negative_end"][start:stop], prepend=first)
        tokens_M = tokens_of([_dialogues(data, np.arange(len(data)))], len(data), self.template)
        owner_M = np.repeat(np.arange(stop - start), counts_B)
        kept_M = first_of_each(owner_M, -tokens_M, self.limit.last)
        return np.bincount(owner_M[kept_M], tokens_M[kept_M], stop - start).astype(np.int64)

    def _drawn(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The negatives that are brought along: (whose, row in the index), examples in order."""
        counts_B = lengths(self.index.samples["negative_end"], samples_B)
        starts_B = self.index.samples["negative_end"][samples_B] - counts_B
        owner_M, lane_M, row_M = ragged(starts_B, counts_B)
        drawn_M = draws.draw_u64(self.seed, passes_B[owner_M], samples_B[owner_M], draws.NEGATIVES, lane_M)
        limit_B = self.limit.drawn(self.seed, samples_B, passes_B, step, curriculum.NEGATIVES)
        kept_M = first_of_each(owner_M, drawn_M, limit_B[owner_M])
        return owner_M[kept_M], row_M[kept_M]


def _dialogues(data_M: np.ndarray, owner_M: np.ndarray) -> Dialogues:
    return Dialogues(
        NEGATIVE,
        owner_M,
        np.ones(len(data_M), bool),
        data_M["image_tokens"].astype(np.int64) + 2 * data_M["images"],
        np.arange(len(data_M)),
        data_M["tokens"].astype(np.int64),
    )
