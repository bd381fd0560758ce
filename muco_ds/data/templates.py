"""Dialogues as tokens: the backbone's chat format, with one pooled token per turn.

A turn is `user: text` answered by an assistant message that is just the pool token, or the compression tokens where a
model has them. The template "plain" leaves the chat format out: a turn is its text and the tokens (CoMa's matching).
"muco" is the chat format as the released MuCo code writes it, with a newline behind every picture list and every text.
Pictures always come first. Two layouts exist, drawn per dialogue (`task.query_history`, `task.target_history`):

- `history` (causal): the turns follow each other, each sees all before it;
- isolated: the prefix up to the pictures is written once and each turn continues it by itself, at positions that
  restart after the prefix, exactly as in its own single-turn prompt.

Shape suffixes: L tokens of one dialogue, k turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from muco_ds.data.schema import Turn
from muco_ds.data.segments import Segment, causal, isolated
from muco_ds.data.vision import Grid

SYSTEM_PROMPT = "You are a helpful assistant."
"""The system text of the Qwen2-VL chat template."""

END = "<|im_end|>"
MASK = "<|mask|>"
COMPRESSION_TOKEN = "<|ctoken_pad_{}|>"
"""Compression token number so and so, by the name that CoMa's released code gives it."""
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"

TemplateName = Literal["chat", "plain", "muco"]


@dataclass(frozen=True)
class Rendered:
    """One dialogue as tokens, who sees whom, and the rows that are read.

    `emb_rows` are the (last) pooled row of each turn; of a conversation, the rows that predict `labels`.
    """

    ids_L: np.ndarray  # int64
    positions_4L: np.ndarray  # int64: text, t, h, w
    emb_rows: np.ndarray  # int64
    segments: list[Segment]
    labels: np.ndarray | None = None  # int64


class ChatTemplate:
    """Renders dialogues to token ids and positions, and counts their tokens without rendering.

    Text is tokenised alone and joined between special tokens. That equals tokenising the whole prompt because texts
    are stripped and Qwen's pre-tokeniser never joins a newline with what follows it. Special tokens inside a text are
    ordinary characters here: a row can't smuggle in a picture or an embedding position.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pool_token: str,
        *,
        compression_tokens: int = 0,
        template: TemplateName = "chat",
    ) -> None:
        self.tokenizer = tokenizer
        self.pool_token, self.compression_tokens = pool_token, compression_tokens
        tokens = [COMPRESSION_TOKEN.format(i) for i in range(compression_tokens)] or [pool_token]
        self.pooled_ids = self.markup("".join(tokens))
        assert len(self.pooled_ids) == len(tokens), "the tokenizer holds the pooled tokens"
        closing = "" if tokens == [END] else END
        chat, self.newlines = template != "plain", template == "muco"
        self.opening = self.markup(f"<|im_start|>system\n{SYSTEM_PROMPT}{END}\n<|im_start|>user\n") if chat else []
        self.tail = [*(self.markup(f"{END}\n<|im_start|>assistant\n") if chat else []), *self.pooled_ids]
        self.between = self.markup(f"{closing}\n<|im_start|>user\n") if chat else []
        self.newline = self.markup("\n")
        self.vision_start, self.image_pad, self.vision_end = self.markup(VISION_START + IMAGE_PAD + VISION_END)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each stripped text, special tokens not recognised.

        In the template "muco" only newlines are stripped and runs of them made one; one ends each text, which may be
        part of its last token.
        """
        stripped = [text.strip() for text in texts]
        if self.newlines:
            lines = (re.sub("\n+", "\n", text.strip("\n")) for text in texts)
            stripped = [f"{text}\n" if given else "" for text, given in zip(lines, stripped, strict=True)]
        return self._encode(stripped)

    def encode_turns(self, turns: Sequence[Turn]) -> list[list[int]]:
        """Token ids of each turn: a text's as `encode_texts` gives them, else its own."""
        encoded = iter(self.encode_texts([turn for turn in turns if isinstance(turn, str)]))
        return [next(encoded) if isinstance(turn, str) else list(turn) for turn in turns]

    def encode_words(self, text: str) -> list[list[int]]:
        """Token ids of each word, with a space before it; special tokens not recognised."""
        return self._encode([f" {word}" for word in text.split()])

    def encode_exactly(self, text: str) -> list[int]:
        """Token ids of a text with the white space at its ends; special tokens not recognised."""
        return self._encode([text])[0]

    def shown(self, turn: Turn) -> str:
        """A turn as text, for people."""
        return turn if isinstance(turn, str) else str(self.tokenizer.decode(list(turn)))

    @property
    def mask(self) -> int:
        """Id of the mask token, of a tokenizer that has it."""
        (mask,) = self.markup(MASK)
        return mask

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # the tokenizer's state is left alone: threads may render what is tokenised already
            return []
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        return [encoding.ids for encoding in encodings]

    def count(
        self, text_tokens_N: np.ndarray, turns_N: np.ndarray, vision_N: np.ndarray, history_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of N dialogues without rendering them: (all, of which prefix).

        `text_tokens_N` sums the texts of a dialogue, `vision_N` its pictures' tokens with start and end, `history_N`
        is bool. Equals `len(render(...).ids_L)`, or one newline a turn more where a turn beside a picture has no text
        (and the template is not "muco", which has that newline).
        """
        prefix_N = len(self.opening) + vision_N
        newlines_N = np.where(vision_N > 0, np.where(history_N, 1, turns_N), 0) * len(self.newline)
        separators_N = np.where(history_N, (turns_N - 1) * len(self.between), 0)
        return prefix_N + text_tokens_N + turns_N * len(self.tail) + newlines_N + separators_N, prefix_N

    def render(
        self,
        turn_ids: Sequence[list[int]],
        grids: Sequence[Grid],
        merge_size: int,
        history: bool,
    ) -> Rendered:
        """Tokens and positions of one dialogue: texts by their ids, pictures by their patch grids."""
        prefix = Writer()
        prefix.text(self.opening)
        for grid in grids:
            self.write_picture(prefix, grid, merge_size)
        if history:
            writer, emb_rows = prefix, []
            for j, ids in enumerate(turn_ids):
                if j:
                    writer.text(self.between)
                writer.text(self._turn(ids, after_image=bool(grids) and j == 0))
                emb_rows.append(writer.rows - 1)
            return Rendered(writer.ids(), writer.positions(), np.array(emb_rows, np.int64), causal(writer.rows))

        turns = []
        for ids in turn_ids:
            turn = prefix.continued()
            turn.text(self._turn(ids, after_image=bool(grids)))
            turns.append(turn)
        lengths = [turn.rows for turn in turns]
        return Rendered(
            ids_L=np.concatenate([prefix.ids(), *(turn.ids() for turn in turns)]),
            positions_4L=np.concatenate([prefix.positions(), *(turn.positions() for turn in turns)], axis=1),
            emb_rows=prefix.rows + np.cumsum(lengths) - 1,
            segments=isolated(prefix.rows, lengths),
        )

    def write_picture(self, writer: Writer, grid: Grid, merge_size: int) -> None:
        """Append a picture's tokens, between its start and end."""
        writer.text([self.vision_start])
        writer.image(self.image_pad, grid, merge_size)
        writer.text([self.vision_end])

    def _turn(self, text_ids: list[int], after_image: bool) -> list[int]:
        line = after_image and (text_ids or self.newlines)
        return [*(self.newline if line else []), *text_ids, *self.tail]

    def markup(self, text: str) -> list[int]:
        """Token ids of a text of our own, special tokens recognised."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


class Writer:
    """Appends tokens and their positions; mRoPE as in the stock `get_rope_index`, one dialogue at a time."""

    def __init__(self, text_position: int = 0, rope_position: int = 0) -> None:
        self.rows = 0
        self._ids: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._text_position, self._rope_position = text_position, rope_position

    def continued(self) -> Writer:
        return Writer(self._text_position, self._rope_position)

    def text(self, ids: list[int]) -> None:
        self._append(np.asarray(ids, np.int64), np.arange(self._rope_position, self._rope_position + len(ids)))
        self._rope_position += len(ids)

    def image(self, pad_id: int, grid: Grid, merge_size: int) -> None:
        t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
        thw = np.indices((t, h, w)).reshape(3, -1) + self._rope_position
        self._append(np.full(t * h * w, pad_id, np.int64), thw)
        self._rope_position += max(h, w)

    def _append(self, ids: np.ndarray, rope: np.ndarray) -> None:
        """Tokens, and their positions in each mRoPE row or in all three, [3, L] or [L]."""
        positions_4L = np.empty((4, len(ids)), np.int64)
        positions_4L[0] = np.arange(self._text_position, self._text_position + len(ids))
        positions_4L[1:] = rope
        self._ids.append(ids)
        self._positions.append(positions_4L)
        self._text_position += len(ids)
        self.rows += len(ids)

    def ids(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self._ids])

    def positions(self) -> np.ndarray:
        return np.concatenate([np.zeros((4, 0), np.int64), *self._positions], axis=1)
