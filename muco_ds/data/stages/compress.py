"""CoMa's first stage as data (arXiv 2511.08480): pictures, and conversations about them that compression must allow.

Shape suffixes: B examples, N turns of those examples.
"""

from __future__ import annotations

import numpy as np

from muco_ds.data.compression import ConversationTemplate
from muco_ds.data.index import Index
from muco_ds.data.readers import Reader, RowError
from muco_ds.data.schema import QUERY, Conversation, Side
from muco_ds.data.stages import curriculum
from muco_ds.data.stages.base import Sizes, lengths, ragged, vision_tokens
from muco_ds.data.stages.curriculum import ALL_TURNS, Limit

_NO_IDS = np.zeros((0, 3), np.int64)


class CompressStage:
    """Conversations as they stand: in their order, since a question may refer to the answers before it.

    Args:
        turns: how many turns of a conversation are used, the first of them.
    """

    def __init__(
        self, index: Index, reader: Reader, conversations: ConversationTemplate, *, seed: int, turns: Limit = ALL_TURNS
    ) -> None:
        self.index, self.reader, self.conversations, self.seed, self.turns = index, reader, conversations, seed, turns
        self.template = conversations.chat

    def sizes(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Sizes:
        """What samples in their passes, which a step takes, put into packs."""
        return self._sizes(samples_B, self._turns(samples_B, passes_B, step))

    def sides(self, sample: int, number: int, step: int) -> list[Side]:
        """The conversation of a sample in its pass `number`. Raises RowError when it is not as it was indexed."""
        record = self.reader.record(int(self.index.samples["row"][sample]))
        first, stop = self.index.turn_bounds(sample)
        if len(record.turns) != stop - first:
            raise RowError(f"has {len(record.turns)} turns, {stop - first} were indexed")
        (used,) = self._turns(np.array([sample]), np.array([number]), step)
        turns = record.turns[:used]
        conversation = Conversation(
            questions=tuple(turn.questions[0] for turn in turns),
            answers=tuple(turn.target for turn in turns),
            images=record.query_images,
            context=record.context,
        )
        return [Side(QUERY, conversation, True, _NO_IDS)]

    def longest(self, start: int, stop: int) -> np.ndarray:
        """Most tokens of samples start .. stop in any pass and step: all turns that may be used."""
        samples_B = np.arange(start, stop)
        turns_B = lengths(self.index.samples["turn_end"], samples_B)
        return self._sizes(samples_B, np.minimum(turns_B, self.turns.last)).tokens_B

    def _turns(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> np.ndarray:
        """How many turns of each example are used: int64 [B]."""
        turns_B = lengths(self.index.samples["turn_end"], samples_B)
        return np.minimum(turns_B, self.turns.drawn(self.seed, samples_B, passes_B, step, curriculum.TURNS))

    def _sizes(self, samples_B: np.ndarray, turns_B: np.ndarray) -> Sizes:
        data, turns = self.index.samples[samples_B], self.index.turns
        starts_B = data["turn_end"] - lengths(self.index.samples["turn_end"], samples_B)
        owner_N, _, row_N = ragged(starts_B, turns_B)
        # A question is its first paraphrase.
        question_N = self.index.question_tokens[turns["question_end"][row_N] - lengths(turns["question_end"], row_N)]
        question_B, answer_B = (
            np.bincount(owner_N, tokens_N, len(samples_B)).astype(np.int64)
            for tokens_N in (question_N, turns["target_tokens"][row_N])
        )
        context_B, vision_B = data["context_tokens"].astype(np.int64), vision_tokens(data, "query")
        compressed_B = self.conversations.compressed_tokens(context_B, vision_B)
        seen_B = self.conversations.seen_tokens(context_B, vision_B)
        behind_B, predicted_B = self.conversations.answer_tokens(question_B, answer_B, turns_B)
        return Sizes(
            tokens_B=compressed_B + behind_B,
            attention_B=compressed_B**2 / 2 + behind_B * seen_B + behind_B**2 / 2,
            repeated_B=seen_B,
            read_attended_B=turns_B * seen_B + behind_B * (turns_B + 1) // 2,
            rows_B3=np.stack([predicted_B, np.zeros_like(predicted_B), np.zeros_like(predicted_B)], 1),
            predicted_B=predicted_B,
            pairs_B=turns_B,
            patches_B=data["patches"],
            patches_squared_B=data["patches_squared"],
        )
