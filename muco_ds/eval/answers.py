"""Held-out conversations: how well answers are predicted from compression tokens, and what the model says by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from muco_ds.data.collator import Packer
from muco_ds.data.plan import Plan
from muco_ds.data.schema import QUERY, Conversation, PackedBatch, Side
from muco_ds.data.stages.compress import CompressStage
from muco_ds.data.templates import END
from muco_ds.distributed import env
from muco_ds.eval.held_out import HeldOut

LONGEST_ANSWER = 48


class AnswerValidation:
    """Mean loss and perplexity over the predicted tokens of held-out rows, and a few answers.

    Args:
        plan: over the held-out rows; its first step is what is used of them.
        answered: conversations whose first question the model answers in its own words.
    """

    def __init__(self, plan: Plan, packer: Packer, answered: int = 4) -> None:
        assert isinstance(plan.stage, CompressStage)
        self.packer, self.step, stage = packer, plan.step(0), plan.stage
        self.sides = {
            int(sample): stage.sides(int(sample), 0, 0)[0]
            for packs in (self.step.packs[env.rank()], [np.arange(min(answered, self.step.images))])
            for sample in self.step.samples_B[np.concatenate(packs)]
        }
        chosen = [self.sides[int(sample)].dialogue for sample in self.step.samples_B[:answered]]
        self.answered = [dialogue for dialogue in chosen if isinstance(dialogue, Conversation)]

    @torch.no_grad()
    def __call__(self, model: Callable[..., torch.Tensor], device: torch.device) -> HeldOut:
        total = torch.zeros((), device=device, dtype=torch.float64)
        for pack in self.step.packs[env.rank()]:
            sides = [self.sides[int(sample)] for sample in self.step.samples_B[pack]]
            total += model(self.packer.pack(sides, replace_broken=True).to(device)).double()
        loss = env.sum_over_ranks(total).item() / sum(rows.queries for rows in self.step.rows_per_rank)
        values = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
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
