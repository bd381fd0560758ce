"""Multi-turn pre-training as data: a picture with its questions is one dialogue, their targets another.

Shape suffixes: B examples, N turns of those examples, k turns of one example.
"""

from __future__ import annotations

import numpy as np

from muco_ds.data import draws
from muco_ds.data.index import Index
from muco_ds.data.readers import Reader
from muco_ds.data.schema import QUERY, TARGET, Dialogue, Side, pair_ids
from muco_ds.data.stages.base import Dialogues, Layout, lengths, measure, ragged, vision_tokens
from muco_ds.data.stages.negatives import HardNegatives
from muco_ds.data.templates import ChatTemplate


class MuCoStage:
    """Draws paraphrases, the order of turns, and whether turns see each other.

    Args:
        query_history, target_history: probability that the turns of that side see the earlier ones.
        negatives: at most so many hard negatives of an example come along.
    """

    forms = 1

    def __init__(
        self,
        index: Index,
        reader: Reader,
        template: ChatTemplate,
        *,
        seed: int,
        query_history: float,
        target_history: float,
        negatives: int = 0,
    ) -> None:
        self.index, self.reader, self.template, self.seed = index, reader, template, seed
        self.query_history, self.target_history = query_history, target_history
        self.negatives = HardNegatives(index, template, seed, negatives)

    def layout(self, samples_B: np.ndarray, passes_B: np.ndarray) -> Layout:
        """The dialogues of samples with their pass's draw of paraphrases and histories."""
        data = self.index.samples[samples_B]
        turns_B = lengths(self.index.samples["turn_end"], samples_B)
        owner_N, turn_N, rows_N = ragged(data["turn_end"] - turns_B, turns_B)
        choices_N = lengths(self.index.turns["question_end"], rows_N)
        chosen_N = self._paraphrases(samples_B[owner_N], passes_B[owner_N], turn_N, choices_N)
        question_N = self.index.turns["question_end"][rows_N] - choices_N + chosen_N
        texts = {
            QUERY: self.index.question_tokens[question_N].astype(np.int64),
            TARGET: self.index.turns["target_tokens"][rows_N].astype(np.int64),
        }
        vision = {QUERY: vision_tokens(data, "query"), TARGET: vision_tokens(data, "target")}
        owner_B, history = np.arange(len(samples_B)), self._histories(samples_B, passes_B)
        dialogues = [Dialogues(kind, owner_B, history[kind], vision[kind], owner_N, texts[kind]) for kind in texts]
        layout = Layout(dialogues, data["patches"], data["patches_squared"])
        return self.negatives.add_to(layout, samples_B, passes_B)

    def sides(self, sample: int, number: int) -> list[Side]:
        """Query and target dialogue of a sample in its pass `number`, and its negatives."""
        data = self.index.samples[sample]
        record = self.reader.record(int(data["row"]))
        turn_k = np.arange(len(record.turns))
        sample_k, pass_k = np.full(len(turn_k), sample), np.full(len(turn_k), number)
        choices_k = np.array([len(turn.questions) for turn in record.turns])
        chosen_k = self._paraphrases(sample_k, pass_k, turn_k, choices_k)
        # One permutation for both sides; the picture precedes whichever turn comes first.
        order_k = np.argsort(draws.draw_u64(self.seed, number, sample_k, draws.TURN_ORDER, turn_k), kind="stable")
        turns = [record.turns[j] for j in order_k]
        ids_k3 = np.empty((len(turns), 3), np.int64)
        ids_k3[:, 0] = data["image_id"]
        ids_k3[:, 1] = pair_ids(sample, number, order_k)
        ids_k3[:, 2] = self.index.turns["target_hash"][slice(*self.index.turn_bounds(sample))][order_k]
        questions = tuple(turn.questions[chosen_k[j]] for turn, j in zip(turns, order_k, strict=True))
        targets = tuple(turn.target for turn in turns)
        history = self._histories(sample_k[:1], pass_k[:1])
        return [
            Side(QUERY, Dialogue(questions, record.query_images), bool(history[QUERY][0]), ids_k3),
            Side(TARGET, Dialogue(targets, record.target_images), bool(history[TARGET][0]), ids_k3),
            *self.negatives.sides(record, sample, number),
        ]

    def longest(self, start: int, stop: int) -> np.ndarray:
        """Most tokens of samples start .. stop in any pass: longest paraphrases, longest layout."""
        index, data = self.index, self.index.samples[start:stop]
        first_turn = index.turn_bounds(start)[0]
        first_question = index.question_bounds(first_turn)[0]
        turns_N = index.turns[first_turn : index.turn_bounds(stop - 1)[1]]
        owner_N = np.repeat(np.arange(len(data)), np.diff(data["turn_end"], prepend=first_turn))
        starts_N = np.concatenate(([first_question], turns_N["question_end"][:-1])) - first_question
        questions = index.question_tokens[first_question : turns_N["question_end"][-1]]
        sides = [
            (QUERY, np.maximum.reduceat(questions, starts_N), vision_tokens(data, "query"), self.query_history),
            (TARGET, turns_N["target_tokens"], vision_tokens(data, "target"), self.target_history),
        ]
        tokens_B = self.negatives.longest(start, stop)
        for kind, text_N, vision_B, probability in sides:
            layouts = [causal for causal, drawn in ((True, probability > 0), (False, probability < 1)) if drawn]
            owner_B = np.arange(len(data))
            counts = [
                measure(
                    [Dialogues(kind, owner_B, np.full(len(data), causal), vision_B, owner_N, text_N.astype(np.int64))],
                    len(data),
                    self.template,
                ).tokens_B
                for causal in layouts
            ]
            tokens_B += np.max(counts, axis=0)
        return tokens_B

    def _paraphrases(
        self, samples_N: np.ndarray, passes_N: np.ndarray, turns_N: np.ndarray, choices_N: np.ndarray
    ) -> np.ndarray:
        """Which paraphrase each turn uses in its pass."""
        drawn_N = draws.draw_u64(self.seed, passes_N, samples_N, draws.PARAPHRASE, turns_N)
        return (drawn_N % choices_N.astype(np.uint64)).astype(np.int64)

    def _histories(self, samples_B: np.ndarray, passes_B: np.ndarray) -> dict[int, np.ndarray]:
        """Per side, whether each example's turns see the earlier ones (causal) or not (isolated)."""
        return {
            QUERY: draws.draw_uniform(self.seed, passes_B, samples_B, draws.QUERY_HISTORY) < self.query_history,
            TARGET: draws.draw_uniform(self.seed, passes_B, samples_B, draws.TARGET_HISTORY) < self.target_history,
        }
