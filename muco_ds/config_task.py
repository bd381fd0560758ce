"""The config's sections that say which training stage this is, and what must agree between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from muco_ds.config_loss import LossOptions, TemperatureOptions
from muco_ds.errors import UserError

Seen = Literal["tokens", "prompt", "all", "nothing"]
"""What questions and answers of a conversation see of what comes before them."""


@dataclass
class TaskOptions:
    """The training objective.

    Args:
        name: Which objective: "muco" is the multi-turn pre-training stage, "finetune" the one on single pairs after it.
            "coma_compress" is CoMa's first stage, answers from compression tokens, "coma_match" its second, on pairs.
        query_history: Probability in [0, 1] that the turns of a query dialogue see the earlier ones (paper: 1).
        target_history: Probability in [0, 1] that the turns of a target dialogue see the earlier ones (paper: 1).
        negatives: Most hard negatives of a row (neg_text, neg_image_path) to use in a step, drawn anew in each pass.
        turns: Most turns of a row to use in a step, drawn anew in each pass; null: all of them (paper). Of a
            conversation, the first ones.
        turn_weights: Kind of turn (its place in its row, from 0) -> its weight in that draw, as in {0: 0.5, 5: 2}; 0:
            never used, with `turns: null` too. Kinds that are not named weigh 1.
        reconstruct: Fine-tuning's second embedding of each side, after the masked other side (paper: yes).
        compound: Keys of its four terms: direct and reconstructed together ("joint", paper) or by themselves
            ("separate", released code).
        answers_see: What questions and answers see of what comes before them: the compression "tokens" alone (CoMa
            paper), the summary "prompt" too, "all" (no compression), or "nothing" (to compare with).
        train_questions: Predict the questions as well as the answers (CoMa paper: no, its code: yes).
    """

    name: Literal["muco", "finetune", "coma_compress", "coma_match"] = "muco"
    query_history: float = 1.0
    target_history: float = 1.0
    negatives: int = 0
    turns: int | None = None
    turn_weights: dict[int, float] = field(default_factory=dict)
    reconstruct: bool = False
    compound: Literal["joint", "separate"] = "joint"
    answers_see: Seen = "tokens"
    train_questions: bool = False


@dataclass
class PromptOptions:
    """Wording of what is asked of the model beside the data's own texts.

    Args:
        after_query: Second turn of a query's dialogue, asks to reconstruct its target; "{counterpart}" stands for the
            target, masked.
        after_target: The same of a target's dialogue, about its query.
        compress_picture: Behind pictures, before the compression tokens.
        compress_text: The same where there is text alone.
    """

    after_query: str = (
        "Something that matches it, parts of it hidden:{counterpart}\nWork out the hidden parts and restate all of it."
    )
    after_target: str = (
        "A request that it matches, parts of it hidden:{counterpart}\nWork out the hidden parts and restate all of it."
    )
    compress_picture: str = "Sum up all of the picture in these tokens:"
    compress_text: str = "Sum up all of the text in these tokens:"


def check_task(
    task: TaskOptions, prompts: PromptOptions, compression_tokens: int, *, same_target: str, mask_same_image: bool
) -> None:
    """The keys of one stage mean nothing to another.

    Args:
        compression_tokens: those of the model.
        same_target, mask_same_image: those of the loss.
    Raises:
        UserError: naming the keys, their values and the cure.
    """
    if task.name.startswith("coma") and not compression_tokens:
        raise UserError(f"model.compression_tokens is 0 but task.name is {task.name}: set it (CoMa paper: 32)")
    if task.name != "coma_compress" and (task.answers_see, task.train_questions) != ("tokens", False):
        raise UserError(
            f"task.answers_see is {task.answers_see} and task.train_questions {str(task.train_questions).lower()} but "
            f"task.name is {task.name}, which has no answers: leave both out"
        )
    if task.name in ("muco", "coma_compress", "coma_match") and task.reconstruct:
        raise UserError(
            f"task.reconstruct is true but task.name is {task.name}: set task.name=finetune, or the first to false"
        )
    histories = (task.query_history, task.target_history)
    if task.name != "muco" and histories != (1, 1):
        why = {"finetune": "whose second turn always sees the first", "coma_compress": "whose turns always do"}
        raise UserError(
            f"task.query_history and task.target_history are {histories} but task.name is {task.name}, "
            f"{why.get(task.name, 'which has single turns')}: leave both at 1"
        )
    if task.name in ("finetune", "coma_match") and (task.turns is not None or task.turn_weights):
        raise UserError(
            f"task.turns and task.turn_weights choose among the turns of a row but task.name is {task.name}, whose "
            "rows are single pairs: leave both out"
        )
    if task.name == "coma_compress" and (task.turn_weights or task.negatives):
        raise UserError(
            "task.turn_weights and task.negatives mean nothing to task.name=coma_compress, which takes conversations "
            "from their start: leave both out"
        )
    for kind, weight in task.turn_weights.items():
        if not (kind >= 0 and 0 <= weight < math.inf):
            raise UserError(
                f"task.turn_weights holds {{{kind}: {weight}}}: a kind is a number from 0, its weight a finite number "
                "of at least 0"
            )
    _check_compound(task, same_target, mask_same_image)
    for key in ("after_query", "after_target"):
        prompt = getattr(prompts, key)
        if prompt.count("{counterpart}") != 1:
            raise UserError(f"prompts.{key} is {prompt!r}: it must hold {{counterpart}} exactly once")


def _check_compound(task: TaskOptions, same_target: str, mask_same_image: bool) -> None:
    """Fine-tuning's four terms, and what the loss does with equal targets."""
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


def check_compress(loss: LossOptions, temperature: TemperatureOptions, negatives: int | None) -> None:
    """Predicting answers is no InfoNCE: raises UserError where something of it was set."""
    if negatives is not None:
        raise UserError("curriculum.negatives is set but task.name is coma_compress, which has none: set it to null")
    for key, given, default in (("loss", loss, LossOptions()), ("temperature", temperature, TemperatureOptions())):
        for name, value in vars(given).items():
            if value != getattr(default, name):
                raise UserError(
                    f"{key}.{name} is {value} but task.name is coma_compress, whose loss is cross-entropy: leave it out"
                )
