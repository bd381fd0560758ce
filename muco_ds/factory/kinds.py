"""The two kinds of rows, and the requests that make one of a picture."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from muco_ds.factory import replies
from muco_ds.factory.endpoint import Endpoint, Message, assistant, user
from muco_ds.factory.failures import PictureError
from muco_ds.factory.prompts import Prompts, fill

T = TypeVar("T")

SHOWN_REPLY = 2000
"""Characters of an unusable reply that the model is shown when it is asked again."""


@dataclass
class Author:
    """Asks for one picture's texts.

    Args:
        sees: Model that sees the picture.
        writes: Model that makes questions and answers of a caption.
        prompts: Wording of the requests.
        paraphrases: Wordings of each question in M3T's rows.
        from_caption: Whether M3T's pairs are written from the caption, and not from the picture.
        retries: How often a request is repeated after a reply that can't be used.
    """

    sees: Endpoint
    writes: Endpoint
    prompts: Prompts
    paraphrases: int
    from_caption: bool
    retries: int
    asked_again: int = 0

    async def m3t_row(self, name: str, picture: str) -> dict[str, Any]:
        """A picture's caption and M3T's turns. `picture`: its data URL. Raises PictureError and UserError."""
        caption = await self._ask(self.sees, [user(self.prompts.caption, picture)], replies.caption)
        request = fill(self.prompts.pairs, paraphrases=self.paraphrases)
        if self.from_caption:
            message = user(f"{fill(self.prompts.description, caption=caption)}\n\n{request}")
        else:
            message = user(request, picture)
        questions, answers = await self._ask(
            self.writes if self.from_caption else self.sees,
            [message],
            lambda data: replies.pairs(data, self.paraphrases),
        )
        return {"image": name, "caption": caption, "questions": questions, "answers": answers}

    async def conversation(self, name: str, picture: str) -> dict[str, Any]:
        """A row of CoMa's JSONL. `picture`: its data URL. Raises PictureError and UserError."""
        request = fill(self.prompts.questions, least=replies.LEAST_QUESTIONS, most=replies.MOST_QUESTIONS)
        questions = await self._ask(self.sees, [user(request, picture)], replies.questions)
        history: list[Message] = []
        answers: list[str] = []
        for question in questions:
            asked = user(fill(self.prompts.answer, question=question), None if history else picture)
            answer = await self._ask(
                self.sees, [*history, asked], lambda data: replies.answer(data, questions, answers)
            )
            answers.append(answer)
            history += [asked, assistant(answer)]
        turns = []
        for question, answer in zip(questions, answers, strict=True):
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        return {"id": name, "image": name, "conversations": turns}

    async def _ask(self, model: Endpoint, messages: list[Message], check: Callable[[dict[str, Any]], T]) -> T:
        """What `check` makes of the reply; a reply that can't be used is shown to the model with the reason."""
        request = [{"role": "system", "content": self.prompts.system}, *messages]
        objection: list[Message] = []
        for attempt in range(self.retries + 1):
            reply = ""
            try:
                reply = await model.reply([*request, *objection])
                return check(replies.json_object(reply))
            except replies.NonsenseError as error:
                if attempt == self.retries:
                    raise PictureError("nonsense", f"{error} (asked {attempt + 1} times)") from error
                self.asked_again += 1
                # A reply that was cut off is not at hand: asked as before, it may come out shorter.
                again = user(fill(self.prompts.again, reason=error))
                objection = [assistant(reply[:SHOWN_REPLY]), again] if reply else []
        raise AssertionError("unreachable")


Kind = Callable[[Author, str, str], Awaitable[dict[str, Any]]]

KINDS: dict[str, Kind] = {"m3t": Author.m3t_row, "conversations": Author.conversation}
