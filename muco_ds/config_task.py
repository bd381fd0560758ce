"""The config's sections that say which training stage this is, and what must agree between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from muco_ds.errors import UserError


@dataclass
class TaskOptions:
    """The training objective.

    Args:
        name: Which objective: "muco" is the multi-turn pre-training stage, "finetune" the one on single pairs after it.
        query_history: Probability in [0, 1] that the turns of a query dialogue see the earlier ones (paper: 1).
        target_history: Probability in [0, 1] that the turns of a target dialogue see the earlier ones (paper: 1).
        negatives: Most hard negatives of a row (neg_text, neg_image_path) to use in a step, drawn anew in each pass.
        turns: Most turns of a row to use in a step, drawn anew in each pass; null: all of them (paper).
        turn_weights: Kind of turn (its place in its row, from 0) -> its weight in that draw, as in {0: 0.5, 5: 2}; 0:
            never used, with `turns: null` too. Kinds that are not named weigh 1.
        reconstruct: Fine-tuning's second embedding of each side, after the masked other side (paper: yes).
        compound: Keys of its four terms: direct and reconstructed together ("joint", paper) or by themselves
            ("separate", released code).
    """

    name: Literal["muco", "finetune"] = "muco"
    query_history: float = 1.0
    target_history: float = 1.0
    negatives: int = 0
    turns: int | None = None
    turn_weights: dict[int, float] = field(default_factory=dict)
    reconstruct: bool = False
    compound: Literal["joint", "separate"] = "joint"


@dataclass
class PromptOptions:
    """Wording of the turns that ask for a reconstruction; "{counterpart}" stands for the masked other side.

    Args:
        after_query: Second turn of a query's dialogue, about its target.
        after_target: Second turn of a target's dialogue, about its query.
    """

    after_query: str = (
        "Something that matches it, parts of it hidden:{counterpart}\nWork out the hidden parts and restate all of it."
    )
    after_target: str = (
        "A request that it matches, parts of it hidden:{counterpart}\nWork out the hidden parts and restate all of it."
    )


def check_task(task: TaskOptions, prompts: PromptOptions, *, same_target: str, mask_same_image: bool) -> None:
    """The keys of one stage mean nothing to another.

    Args:
        same_target, mask_same_image: those of the loss.
    Raises:
        UserError: naming the keys, their values and the cure.
    """
    if task.name == "muco" and task.reconstruct:
        raise UserError("task.reconstruct is true but task.name is muco: set task.name=finetune, or the first to false")
    histories = (task.query_history, task.target_history)
    if task.name == "finetune" and histories != (1, 1):
        raise UserError(
            f"task.query_history and task.target_history are {histories} but task.name is finetune, whose second turn "
            "always sees the first: leave both at 1"
        )
    if task.name == "finetune" and (task.turns is not None or task.turn_weights):
        raise UserError(
            "task.turns and task.turn_weights choose among the turns of a row but task.name is finetune, whose rows "
            "are single pairs: leave both out"
        )
    for kind, weight in task.turn_weights.items():
        if not (kind >= 0 and 0 <= weight < math.inf):
            raise UserError(
                f"task.turn_weights holds {{{kind}: {weight}}}: a kind is a number from 0, its weight a finite number "
                "of at least 0"
            )
    if task.compound == "separate" and not task.reconstruct:
        raise UserError("task.compound is separate but task.reconstruct is false: set the second to true")
    joint = task.reconstruct and task.compound == "joint"
    if joint and same_target == "positive":
        raise UserError(
            "task.compound is joint but loss.same_target is positive, by which the counterpart of each positive would "
            "be one as well: set loss.same_target=mask, or task.compound=separate"
        )
    if joint and same_target == "keep" and not mask_same_image:
        raise UserError(
            "task.compound is joint but loss.mask_same_image is false and loss.same_target is keep: change one, or "
            "the counterpart of each positive would be its negative"
        )
    for key, prompt in vars(prompts).items():
        if prompt.count("{counterpart}") != 1:
            raise UserError(f"prompts.{key} is {prompt!r}: it must hold {{counterpart}} exactly once")
