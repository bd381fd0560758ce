"""Held-out conversations: how well answers are predicted from compression tokens, and what the model says by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from muco_ds.data.collator import Collator, Packer
from muco_ds.data.loader import changed_row
from muco_ds.data.plan import Plan
from muco_ds.data.readers import RowError
from muco_ds.data.schema import QUERY, Conversation, PackedBatch, Side
from muco_ds.data.templates import END
from muco_ds.distributed import env
from muco_ds.eval.held_out import HeldOut

LONGEST_ANSWER = 48


class AnswerValidation:
    """Mean loss and perplexity over the predicted tokens of held-out rows, and a few answers.

    Args:
        plan: over the held-out rows; its first step is what is used of them.
        collator: of the same stage.
        answered: conversations whose first question the model answers in its own words, as many as fit one pack.
    Raises:
        UserError: a row that is not as it was indexed.
    """

    def __init__(self, plan: Plan, collator: Collator, answered: int = 4) -> None:
        self.packer, self.step = collator.packer, plan.step(0)
        tokens_A = plan.costs(self.step.samples_B[:answered], self.step.passes_B[:answered], 0).tokens_B
        fitting = max(1, int((np.cumsum(tokens_A + LONGEST_ANSWER) <= plan.pack_tokens).sum()))
        shown = range(min(fitting, len(tokens_A)))
        try:
            self.sides = {int(place): self._side(collator, place) for place in (*np.concatenate(self._packs), *shown)}
        except RowError as error:
            raise changed_row(error) from error
        chosen = [self.sides[place].dialogue for place in shown]
        self.answered = [dialogue for dialogue in chosen if isinstance(dialogue, Conversation)]

    @property
    def _packs(self) -> list[np.ndarray]:
        """This rank's, of places in the batch."""
        return self.step.packs[env.rank()]

    def _side(self, collator: Collator, place: int) -> Side:
        which = slice(place, place + 1)
        (side,) = collator.sides(self.step.samples_B[which], self.step.passes_B[which], 0)
        return side

    @torch.no_grad()
    def __call__(self, model: Callable[..., torch.Tensor], device: torch.device) -> HeldOut:
        """val/loss, val/perplexity and val/replaced_images (grey ones in place of what does not decode)."""
        totals = torch.zeros(2, device=device, dtype=torch.float64)
        for places in self._packs:
            pack = self.packer.pack([self.sides[int(place)] for place in places], replace_broken=True)
            totals[0] += model(pack.to(device)).double()
            totals[1] += pack.replaced_images
        total, replaced = env.sum_over_ranks(totals).tolist()
        loss = total / sum(rows.queries for rows in self.step.rows_per_rank)
        values = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0)), "val/replaced_images": replaced}
        answers = generate(model, self.packer, self.answered, device)
        return HeldOut(values, {"val/answers": _table(self.answered, answers)})


@torch.no_grad()
def generate(
    model: Callable[..., torch.Tensor],
    packer: Packer,
    conversations: Sequence[Conversation],
    device: torch.device,
    longest: int = LONGEST_ANSWER,
) -> list[str]:
    """Greedy answers to the first question of each conversation, of at most `longest` tokens. Collective.

    Every rank answers all of them: a forward takes all ranks under ZeRO-3. There is no cache of keys and values; that
    would be another attention than the one that is trained.
    """
    (end,) = packer.template.markup(END)
    answers: list[list[int]] = [[] for _ in conversations]
    ended = [False] * len(answers)
    for _ in range(longest):
        sides = [_continued(conversation, ids) for conversation, ids in zip(conversations, answers, strict=True)]
        pack: PackedBatch = packer.pack(sides, replace_broken=True).to(device)
        # Rank 0's choice for all: a tie may fall differently on another device.
        following = env.from_main(model(pack, predict=True).tolist())
        for i, token in enumerate(following):
            ended[i] |= token == end
            if not ended[i]:
                answers[i].append(token)
        if all(ended):
            break
    return [str(packer.template.tokenizer.decode(ids)) for ids in answers]


def _continued(conversation: Conversation, ids: list[int]) -> Side:
    asked = Conversation(
        questions=conversation.questions[:1],
        answers=(tuple(ids),),
        images=conversation.images,
        context=conversation.context,
        unfinished=True,
    )
    return Side(QUERY, asked, True, np.zeros((0, 3), np.int64))


def _table(conversations: Sequence[Conversation], answers: Sequence[str]) -> str:
    rows = [
        " | ".join(" ".join(str(text).replace("|", "\\|").split()) for text in (c.questions[0], answer, c.answers[0]))
        for c, answer in zip(conversations, answers, strict=True)
    ]
    lines = ["| question | from the tokens | true |", "|---|---|---|", *(f"| {row} |" for row in rows)]
    return "\n".join(lines)
