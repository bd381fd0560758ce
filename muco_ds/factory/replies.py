"""From a model's reply to texts that can be trained on, or to the reason why it can't be used."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

TURNS = ("classification", "global_1", "global_2", "local_1", "local_2", "creative", "retrieval")
"""M3T's turns, in its order."""

LEAST_QUESTIONS, MOST_QUESTIONS = 3, 5
"""Turns of a conversation (CoMa, arXiv 2511.08480)."""

QUESTION_CHARACTERS, ANSWER_CHARACTERS, CAPTION_CHARACTERS = 400, 1000, 4000

# What stands for a picture or for a special token in our formats, and what models leak of their own.
_MARKUP = re.compile(r"<\|[^<>]*\|>|</?(?:image|think)>", re.IGNORECASE)
_NO_TEXT = ("Cc", "Cs")  # control characters, and halves of surrogate pairs, which no file takes as UTF-8
_WORD = re.compile(r"\w+")


class NonsenseError(ValueError):
    """A reply that can't be used. The message says why, in words that the model can act on."""


def json_object(reply: str) -> dict[str, Any]:
    """The last JSON object in a text: before it stand greetings, code fences and thoughts."""
    decoder = json.JSONDecoder()
    found: dict[str, Any] | None = None
    at = reply.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value
        at = reply.find("{", end)
    if found is None:
        raise NonsenseError("it holds no complete JSON object")
    return found


def checked_text(value: Any, what: str, limit: int) -> str:
    """A text of at most `limit` characters with something to read in it. `what` names it in the reason."""
    if not isinstance(value, str):
        raise NonsenseError(f"{what} is missing or no text")
    text = " ".join(value.split())
    if not _WORD.search(text):
        raise NonsenseError(f"{what} is empty")
    if len(text) > limit:
        raise NonsenseError(f"{what} has {len(text)} characters, at most {limit} are allowed")
    if markup := _MARKUP.search(text):
        raise NonsenseError(f"{what} contains {markup.group()}")
    if any(unicodedata.category(letter) in _NO_TEXT for letter in text):
        raise NonsenseError(f"{what} contains characters that are no text")
    return text


def caption(data: dict[str, Any]) -> str:
    """The caption of {"caption": ...}."""
    return checked_text(data.get("caption"), "the caption", CAPTION_CHARACTERS)


def pairs(data: dict[str, Any], paraphrases: int) -> tuple[list[list[str]], list[str]]:
    """Questions (`paraphrases` of each) and answers of M3T's seven turns. More paraphrases are cut off."""
    questions, answers = [], []
    for turn in TURNS:
        entry = data.get(turn)
        if not isinstance(entry, dict) or not isinstance(entry.get("questions"), list):
            raise NonsenseError(f'"{turn}" is missing, or is not {{"questions": [...], "answer": ...}}')
        wordings = [checked_text(text, f'a question of "{turn}"', QUESTION_CHARACTERS) for text in entry["questions"]]
        if len(wordings) < paraphrases:
            raise NonsenseError(f'"{turn}" has {len(wordings)} questions, not {paraphrases}')
        questions.append(wordings[:paraphrases])
        answers.append(checked_text(entry.get("answer"), f'the answer of "{turn}"', ANSWER_CHARACTERS))
    _differ((text for wordings in questions for text in wordings), answers)
    return questions, answers


def questions(data: dict[str, Any]) -> list[str]:
    """Three to five questions of {"questions": [...]}."""
    given = data.get("questions")
    if not isinstance(given, list) or not LEAST_QUESTIONS <= len(given) <= MOST_QUESTIONS:
        raise NonsenseError(f'"questions" is not a list of {LEAST_QUESTIONS} to {MOST_QUESTIONS} texts')
    texts = [checked_text(text, "a question", QUESTION_CHARACTERS) for text in given]
    _differ(texts, [])
    return texts


def answer(data: dict[str, Any], asked: list[str], given: list[str]) -> str:
    """The answer of {"answer": ...}: neither one of the questions nor an answer `given` before."""
    text = checked_text(data.get("answer"), "the answer", ANSWER_CHARACTERS)
    _differ(asked, [*given, text])
    return text


def _differ(questions: Iterable[str], answers: Iterable[str]) -> None:
    """No question twice, no answer twice, and no answer that is a question; case and punctuation do not count."""
    seen: dict[str, str] = {}
    for kind, texts in (("question", questions), ("answer", answers)):
        for text in texts:
            words = " ".join(_WORD.findall(text.casefold()))
            if words in seen:
                both = f"twice as {kind}" if seen[words] == kind else "as question and as answer"
                raise NonsenseError(f'"{text}" stands there {both}')
            seen[words] = kind
