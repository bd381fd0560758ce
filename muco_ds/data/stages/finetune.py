"""Fine-tuning on single pairs as data (MuCo, arXiv 2602.06393): each side is a dialogue with two embeddings.

The first turn is the side itself, and all there is at test time. The second holds the counterpart, masked, and asks to
reconstruct and restate it: with probability 1/2 the whole counterpart is one mask token, else each word is masked with
probability 1/2 and neighbouring masks become one. Pictures of a counterpart are replaced by their caption.

Shape suffixes: B examples, N words of their counterparts, or turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muco_ds.data import draws
from muco_ds.data.index import Index
from muco_ds.data.readers import Reader, RowError
from muco_ds.data.schema import QUERY, TARGET, Dialogue, Side, Turn, pair_ids
from muco_ds.data.stages.base import Dialogues, Layout, Sizes, measure, ragged, tokens_of, vision_tokens
from muco_ds.data.stages.curriculum import NO_NEGATIVES, Limit
from muco_ds.data.stages.negatives import HardNegatives
from muco_ds.data.templates import ChatTemplate

COUNTERPART = "{counterpart}"
"""Where a prompt takes the masked counterpart."""

_PURPOSES = {QUERY: draws.QUERY_COUNTERPART, TARGET: draws.TARGET_COUNTERPART}


class FineTuneStage:
    """Draws masks.

    Args:
        reader: one that reads captions (`PairReader`).
        reconstruct: with the second turn; without it, each side is a single turn.
        after_query, after_target: text of the second turn of that side's dialogue, around COUNTERPART.
        negatives: how many hard negatives of an example come along, each a single turn.
    """

    def __init__(
        self,
        index: Index,
        reader: Reader,
        template: ChatTemplate,
        *,
        seed: int,
        reconstruct: bool,
        after_query: str,
        after_target: str,
        negatives: Limit = NO_NEGATIVES,
    ) -> None:
        self.index, self.reader, self.template, self.seed = index, reader, template, seed
        self.forms = 2 if reconstruct else 1
        parts = {QUERY: after_query.split(COUNTERPART), TARGET: after_target.split(COUNTERPART)}
        self._around = {kind: [template.encode_exactly(text) for text in texts] for kind, texts in parts.items()}
        self.negatives = HardNegatives(index, template, seed, negatives)

    def sizes(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Sizes:
        """What samples in their passes, which a step takes, put into packs."""
        return measure(self.layout(samples_B, passes_B, step), self.template, self.forms)

    def layout(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Layout:
        """The dialogues of samples with their pass's masks."""
        masked = {}
        if self.forms > 1:
            masked = {kind: self._masked_tokens(kind, samples_B, passes_B) for kind in (QUERY, TARGET)}
        data = self.index.samples[samples_B]
        layout = Layout(self._dialogues(samples_B, masked), data["patches"], data["patches_squared"])
        return self.negatives.add_to(layout, samples_B, passes_B, step)

    def sides(self, sample: int, number: int, step: int) -> list[Side]:
        """Query and target dialogue of a sample in its pass `number`, and its negatives."""
        data = self.index.samples[sample]
        record = self.reader.record(int(data["row"]))
        if len(record.turns) != 1 or record.captions is None:
            raise RowError("is no single pair")
        (turn,), restated = record.turns, record.restated()
        ids_k3 = np.empty((self.forms, 3), np.int64)
        ids_k3[:, 0] = data["image_id"]
        ids_k3[:, 1] = pair_ids(sample, number, np.arange(self.forms))
        ids_k3[:, 2] = self.index.turns["target_hash"][self.index.turn_bounds(sample)[0]]
        sides = []
        for kind, text, images, counterpart in (
            (QUERY, turn.questions[0], record.query_images, restated[1]),
            (TARGET, turn.target, record.target_images, restated[0]),
        ):
            turns: list[Turn] = [text]
            if self.forms > 1:
                turns.append(self._reconstruction(kind, sample, number, counterpart))
            sides.append(Side(kind, Dialogue(tuple(turns), images), True, ids_k3))
        return [*sides, *self.negatives.sides(record, sample, number, step)]

    def longest(self, start: int, stop: int) -> np.ndarray:
        """Most tokens of samples start .. stop in any pass: nothing masked, the longest negatives."""
        samples_B = np.arange(start, stop)
        unmasked = {}
        for kind in (QUERY, TARGET) if self.forms > 1 else ():
            starts_B, counts_B = self._words(kind, samples_B)
            owner_N, _, row_N = ragged(starts_B, counts_B)
            words_B = np.bincount(owner_N, self.index.word_tokens[row_N], len(samples_B)).astype(np.int64)
            unmasked[kind] = np.maximum(words_B, 1)
        tokens_B = tokens_of(self._dialogues(samples_B, unmasked), len(samples_B), self.template)
        return tokens_B + self.negatives.longest(start, stop)

    def _dialogues(self, samples_B: np.ndarray, counterpart: dict[int, np.ndarray]) -> list[Dialogues]:
        """Both sides' dialogues, with so many tokens of the masked counterpart if there is a second turn."""
        data, owner_B = self.index.samples[samples_B], np.arange(len(samples_B))
        turn_B = data["turn_end"] - 1  # the only one
        own = {
            QUERY: self.index.question_tokens[self.index.turns["question_end"][turn_B] - 1],
            TARGET: self.index.turns["target_tokens"][turn_B],
        }
        dialogues = []
        for kind, side in ((QUERY, "query"), (TARGET, "target")):
            texts = [own[kind].astype(np.int64)]
            if counterpart:
                texts.append(counterpart[kind] + sum(map(len, self._around[kind])))
            dialogues.append(
                Dialogues(
                    kind,
                    owner_B,
                    np.ones(len(samples_B), bool),
                    vision_tokens(data, side),
                    np.repeat(owner_B, self.forms),
                    np.stack(texts, 1).reshape(-1),
                )
            )
        return dialogues

    def _reconstruction(self, kind: int, sample: int, number: int, counterpart: str) -> tuple[int, ...]:
        """The second turn of a side's dialogue, as token ids: in a text, a mask token would be inert."""
        words = self.template.encode_words(counterpart)
        hidden = self._hidden(kind, np.array([sample]), np.array([number]), np.array([len(words)]))[0]
        before, after = self._around[kind]
        return (*before, *masked_words(words, hidden.tolist(), self.template.mask), *after)

    def _masked_tokens(self, kind: int, samples_B: np.ndarray, passes_B: np.ndarray) -> np.ndarray:
        """Tokens of the masked counterpart in a side's second turn: int64 [B]."""
        starts_B, counts_B = self._words(kind, samples_B)
        owner_N, lane_N, row_N = ragged(starts_B, counts_B)
        hidden_N, owner_N = self._hidden(kind, samples_B, passes_B, counts_B)
        before_N = np.concatenate(([False], hidden_N[:-1])) & (lane_N > 0) if len(hidden_N) else hidden_N
        tokens_N = np.where(hidden_N, ~before_N, self.index.word_tokens[row_N])
        # Nothing to restate, neither text nor caption, is a counterpart hidden as a whole.
        return np.maximum(np.bincount(owner_N, tokens_N, len(samples_B)).astype(np.int64), 1)

    def _hidden(
        self, kind: int, samples_B: np.ndarray, passes_B: np.ndarray, counts_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether each word is masked, and whose word it is: [N]. The plan and the collator must agree."""
        purpose = _PURPOSES[kind]
        owner_N, lane_N, _ = ragged(np.zeros(len(counts_B), np.int64), counts_B)
        whole_B = draws.draw_uniform(self.seed, passes_B, samples_B, purpose) < 0.5
        drawn_N = draws.draw_uniform(self.seed, passes_B[owner_N], samples_B[owner_N], purpose, lane_N + 1) < 0.5
        return whole_B[owner_N] | drawn_N, owner_N

    def _words(self, kind: int, samples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first row in `word_tokens`, number) of the words of the counterparts of a side."""
        samples = self.index.samples
        query_end_B, target_end_B = samples["query_word_end"][samples_B], samples["target_word_end"][samples_B]
        if kind == QUERY:
            return query_end_B, target_end_B - query_end_B
        start_B = np.where(samples_B > 0, samples["target_word_end"][samples_B - 1], 0)
        return start_B, query_end_B - start_B


def masked_words(words: Sequence[Sequence[int]], hidden: Sequence[bool], mask: int) -> list[int]:
    """Token ids of words of which the hidden are masked, neighbours by one mask; no word at all is one mask."""
    ids: list[int] = []
    for i, (word, is_hidden) in enumerate(zip(words, hidden, strict=True)):
        if not is_hidden:
            ids += word
        elif i == 0 or not hidden[i - 1]:
            ids.append(mask)
    return ids or [mask]
