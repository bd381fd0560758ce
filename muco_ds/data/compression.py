"""Conversations as tokens for CoMa's first stage (arXiv 2511.08480): compress, then answer from what was compressed.

    pictures, context, summary prompt, K compression tokens | user: question, assistant: answer, user: ...

The part behind the bar is one segment of its own. What it sees of the part before, besides itself, is `answers_see`:
the compression tokens alone (CoMa), so that they must hold all that the answers need.

Shape suffixes: L tokens of one conversation, B conversations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muco_ds.config_task import Seen
from muco_ds.data.segments import Segment, causal
from muco_ds.data.templates import END, ChatTemplate, Rendered, Writer
from muco_ds.data.vision import Grid


class ConversationTemplate:
    """Renders conversations and counts their tokens without rendering.

    Args:
        chat: with compression tokens.
        picture_prompt, text_prompt: what asks for a summary, behind pictures or behind text alone.
        answers_see: compression tokens; these and the summary prompt; also the pictures and the context; none of it.
        train_questions: predict every token behind the compression tokens, not the answers alone.
    """

    def __init__(
        self,
        chat: ChatTemplate,
        *,
        picture_prompt: str,
        text_prompt: str,
        answers_see: Seen = "tokens",
        train_questions: bool = False,
    ) -> None:
        assert chat.compression_tokens
        self.chat, self.answers_see, self.train_questions = chat, answers_see, train_questions
        self._tokens = chat.pooled_ids
        self._prompts = {True: chat.encode_texts([picture_prompt])[0], False: chat.encode_texts([text_prompt])[0]}
        self._user = chat.markup("<|im_start|>user\n")
        self._assistant = chat.markup(f"{END}\n<|im_start|>assistant\n")
        self._end = chat.markup(END)

    def render(
        self,
        context_ids: list[int],
        question_ids: Sequence[list[int]],
        answer_ids: Sequence[list[int]],
        grids: Sequence[Grid],
        merge_size: int,
        *,
        unfinished: bool = False,
    ) -> Rendered:
        """Tokens, positions, attention, and which rows predict what.

        Args:
            unfinished: the last answer goes on: nothing ends it, and its last row alone is asked for the next token.
        """
        writer = Writer()
        for grid in grids:
            self.chat.write_picture(writer, grid, merge_size)
        prompt = self._prompts[bool(grids)]
        if context_ids:
            writer.text([*(self.chat.newline if grids else []), *context_ids])
        start_of_prompt = writer.rows
        writer.text([*(self.chat.newline if grids or context_ids else []), *prompt])
        first_token = writer.rows
        writer.text(self._tokens)
        compressed = writer.rows
        predicted: list[tuple[int, int]] = []
        for j, (question, answer) in enumerate(zip(question_ids, answer_ids, strict=True)):
            writer.text([*(self.chat.newline if j else []), *self._user, *question, *self._assistant])
            first = writer.rows
            writer.text([*answer, *self._end])
            predicted.append((first, writer.rows))
        ids_L, positions_4L = writer.ids(), writer.positions()
        if unfinished:
            ids_L, positions_4L = ids_L[: -len(self._end)], positions_4L[:, : -len(self._end)]
            labels, rows = np.zeros(1, np.int64), np.array([len(ids_L) - 1])  # not known yet
        else:
            if self.train_questions:
                predicted = [(compressed, len(ids_L))]
            targets = np.concatenate([np.arange(*bounds) for bounds in predicted])
            labels, rows = ids_L[targets], targets - 1
        seen = {"tokens": first_token, "prompt": start_of_prompt, "all": 0, "nothing": compressed}[self.answers_see]
        segments = [*causal(compressed), Segment(len(ids_L) - compressed, context=(seen, compressed))]
        return Rendered(ids_L, positions_4L, rows, segments, labels)

    def compressed_tokens(self, context_B: np.ndarray, vision_B: np.ndarray) -> np.ndarray:
        """Tokens of the first part, int64 [B], from those of the context and of pictures with start and end."""
        newline = len(self.chat.newline)
        prompt_B = np.where(vision_B > 0, len(self._prompts[True]), len(self._prompts[False]))
        newlines_B = newline * (
            ((vision_B > 0) & (context_B > 0)).astype(np.int64) + ((vision_B > 0) | (context_B > 0))
        )
        return vision_B + context_B + prompt_B + newlines_B + len(self._tokens)

    def seen_tokens(self, context_B: np.ndarray, vision_B: np.ndarray) -> np.ndarray:
        """How many tokens of the first part the second sees."""
        compressed_B = self.compressed_tokens(context_B, vision_B)
        if self.answers_see == "tokens":
            return np.full_like(compressed_B, len(self._tokens))
        if self.answers_see == "prompt":
            before_B = vision_B + context_B + len(self.chat.newline) * ((vision_B > 0) & (context_B > 0))
            return compressed_B - before_B
        return compressed_B if self.answers_see == "all" else np.zeros_like(compressed_B)

    def answer_tokens(
        self, question_B: np.ndarray, answer_B: np.ndarray, turns_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of the second part, how many of them are predicted), int64 [B], from sums over turns."""
        each = len(self._user) + len(self._assistant) + len(self._end)
        tokens_B = question_B + answer_B + turns_B * each + (turns_B - 1) * len(self.chat.newline)
        return tokens_B, tokens_B if self.train_questions else answer_B + turns_B * len(self._end)
