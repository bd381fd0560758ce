"""Multi-turn pre-training as data: a picture with its questions is one dialogue, their targets another.

Shape suffixes: B examples, N turns of those examples, k turns of one example.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from muco_ds.data import draws
from muco_ds.data.index import Index
from muco_ds.data.readers import Reader, RowError
from muco_ds.data.schema import QUERY, TARGET, TURNS_PER_SAMPLE, Dialogue, Side, pair_ids
from muco_ds.data.stages import curriculum
from muco_ds.data.stages.base import Dialogues, Layout, Sizes, lengths, measure, ragged, scans, tokens_of, vision_tokens
from muco_ds.data.stages.curriculum import ALL_TURNS, NO_NEGATIVES, Limit, first_of_each
from muco_ds.data.stages.negatives import HardNegatives
from muco_ds.data.templates import ChatTemplate
from muco_ds.errors import UserError


class MuCoStage:
    """Draws turns, their order, paraphrases, and whether turns see each other.

    Args:
        query_history, target_history: probability that the turns of that side see the earlier ones.
        turns: how many turns of an example are used.
        turn_weights: kind of turn -> its weight where turns are left out, 0 = never used; others weigh 1.
        negatives: how many hard negatives of an example come along.
    Raises:
        UserError: a row of which no turn is ever used.
    """

    def __init__(
        self,
        index: Index,
        reader: Reader,
        template: ChatTemplate,
        *,
        seed: int,
        query_history: float,
        target_history: float,
        turns: Limit = ALL_TURNS,
        turn_weights: Mapping[int, float] | None = None,
        negatives: Limit = NO_NEGATIVES,
    ) -> None:
        self.index, self.reader, self.template, self.seed = index, reader, template, seed
        self.query_history, self.target_history = query_history, target_history
        self.turns, weights = turns, turn_weights or {}
        self._weight_of_kind = np.array([weights.get(kind, 1.0) for kind in range(TURNS_PER_SAMPLE)])
        self.negatives = HardNegatives(index, template, seed, negatives)
        if not self._weight_of_kind.all():
            self._check_rows()

    def sizes(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Sizes:
        """What samples in their passes, which a step takes, put into packs."""
        return measure(self.layout(samples_B, passes_B, step), self.template)

    def layout(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> Layout:
        """The dialogues of samples with their pass's draw of turns, paraphrases and histories."""
        data = self.index.samples[samples_B]
        owner_N, turn_N, rows_N = self._drawn(samples_B, passes_B, step)
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
        return self.negatives.add_to(layout, samples_B, passes_B, step)

    def sides(self, sample: int, number: int, step: int) -> list[Side]:
        """Query and target dialogue of a sample in its pass `number`, and its negatives."""
        data = self.index.samples[sample]
        record = self.reader.record(int(data["row"]))
        first, stop = self.index.turn_bounds(sample)
        if len(record.turns) != stop - first:
            raise RowError(f"has {len(record.turns)} turns, {stop - first} were indexed")
        sample_1, pass_1 = np.array([sample]), np.array([number])
        _, turn_k, rows_k = self._drawn(sample_1, pass_1, step)
        turns = [record.turns[j] for j in turn_k]
        choices_k = np.array([len(turn.questions) for turn in turns])
        chosen_k = self._paraphrases(sample_1, pass_1, turn_k, choices_k)
        ids_k3 = np.empty((len(turns), 3), np.int64)
        ids_k3[:, 0] = data["image_id"]
        ids_k3[:, 1] = pair_ids(sample, number, turn_k)
        ids_k3[:, 2] = self.index.turns["target_hash"][rows_k]
        questions = tuple(turn.questions[chosen] for turn, chosen in zip(turns, chosen_k, strict=True))
        targets = tuple(turn.target for turn in turns)
        history = self._histories(sample_1, pass_1)
        return [
            Side(QUERY, Dialogue(questions, record.query_images), bool(history[QUERY][0]), ids_k3),
            Side(TARGET, Dialogue(targets, record.target_images), bool(history[TARGET][0]), ids_k3),
            *self.negatives.sides(record, sample, number, step),
        ]

    def longest(self, start: int, stop: int) -> np.ndarray:
        """Most tokens of samples start .. stop in any pass: longest turns and paraphrases, longest layout.

        A turn without text, beside a picture, is counted as one of a token and a newline: the longest turns are then
        simply those with the longest texts.
        """
        index, data = self.index, self.index.samples[start:stop]
        first_turn = index.turn_bounds(start)[0]
        first_question = index.question_bounds(first_turn)[0]
        turns_N = index.turns[first_turn : index.turn_bounds(stop - 1)[1]]
        owner_N = np.repeat(np.arange(len(data)), np.diff(data["turn_end"], prepend=first_turn))
        starts_N = np.concatenate(([first_question], turns_N["question_end"][:-1])) - first_question
        questions = index.question_tokens[first_question : turns_N["question_end"][-1]]
        query_N = np.maximum(np.maximum.reduceat(questions, starts_N), 1).astype(np.int64)
        target_N = np.maximum(turns_N["target_tokens"], 1).astype(np.int64)
        used_N = np.flatnonzero(self._weight_of_kind[turns_N["kind"]] > 0)
        longest_N = used_N[first_of_each(owner_N[used_N], -(query_N + target_N)[used_N], self.turns.last)]
        sides = [
            (QUERY, query_N, vision_tokens(data, "query"), self.query_history),
            (TARGET, target_N, vision_tokens(data, "target"), self.target_history),
        ]
        tokens_B, owner_B = self.negatives.longest(start, stop), np.arange(len(data))
        for kind, text_N, vision_B, probability in sides:
            layouts = [causal for causal, drawn in ((True, probability > 0), (False, probability < 1)) if drawn]
            counts = []
            for causal in layouts:
                history_B = np.full(len(data), causal)
                side = Dialogues(kind, owner_B, history_B, vision_B, owner_N[longest_N], text_N[longest_N])
                counts.append(tokens_of([side], len(data), self.template))
            tokens_B += np.max(counts, axis=0)
        return tokens_B

    def _drawn(
        self, samples_B: np.ndarray, passes_B: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The turns that are used, as they follow each other: (whose, place in its row, row in the index), int64 [N].

        Weighted sampling without replacement: the lowest of exponential draws with the weights as rates (Efraimidis and
        Spirakis 2006). Both sides show the turns in one order; the picture precedes whichever comes first.
        """
        turns_B = lengths(self.index.samples["turn_end"], samples_B)
        owner_N, turn_N, rows_N = ragged(self.index.samples["turn_end"][samples_B] - turns_B, turns_B)
        weight_N = self._weight_of_kind[self.index.turns["kind"][rows_N]]
        used = weight_N > 0
        owner_N, turn_N, rows_N, weight_N = owner_N[used], turn_N[used], rows_N[used], weight_N[used]
        drawn = self.seed, passes_B[owner_N], samples_B[owner_N]
        key_N = -np.log1p(-draws.draw_uniform(*drawn, draws.TURNS, turn_N)) / weight_N
        limit_B = self.turns.drawn(self.seed, samples_B, passes_B, step, curriculum.TURNS)
        kept_N = first_of_each(owner_N, key_N, limit_B[owner_N])
        order_N = np.lexsort((draws.draw_u64(*drawn, draws.TURN_ORDER, turn_N)[kept_N], owner_N[kept_N]))
        shown_N = kept_N[order_N]
        return owner_N[shown_N], turn_N[shown_N], rows_N[shown_N]

    def _check_rows(self) -> None:
        """Every row has a turn that is used. Raises UserError naming the first that has none."""
        for start, stop in scans(self.index):
            kinds_N, owner_N = _kinds(self.index, start, stop)
            without = np.bincount(owner_N, self._weight_of_kind[kinds_N], stop - start) == 0
            if without.any():
                worst = int(without.argmax())
                kinds = ", ".join(map(str, np.unique(kinds_N[owner_N == worst]).tolist()))
                raise UserError(
                    f"{self.index.name(start + worst)}: task.turn_weights is 0 for all of its turns (kinds {kinds}): "
                    "give one of them some weight, or remove the row"
                )

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


def check_kinds(index: Index, turn_weights: Mapping[int, float]) -> None:
    """Some row has each kind of turn that is given a weight. Raises UserError naming the first that none has."""
    unseen = set(turn_weights)
    for start, stop in scans(index) if unseen else ():
        unseen -= set(np.unique(_kinds(index, start, stop)[0]).tolist())
    if unseen:
        raise UserError(
            f"task.turn_weights names kind {min(unseen)} but no row of data.train has such a turn: a turn's kind is "
            "its place in its row, from 0; remove it"
        )


def _kinds(index: Index, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(kind, whose) of the turns of samples start .. stop: [N]."""
    first_turn = index.turn_bounds(start)[0]
    turns_B = np.diff(index.samples["turn_end"][start:stop], prepend=first_turn)
    kinds_N = np.asarray(index.turns["kind"][first_turn : index.turn_bounds(stop - 1)[1]])
    return kinds_N, np.repeat(np.arange(stop - start), turns_B)
