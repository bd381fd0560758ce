"""Wording of the requests that make turns of pictures; ours, and any part of it can be replaced by a YAML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import Template

import yaml

from muco_ds.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """One text a request. `$name` stands for a value, `$$` for a dollar sign.

    Args:
        system: What every request begins with.
        caption: Asks for {"caption": ...} of the picture that is sent with it.
        description: How a caption takes the picture's place; `$caption`.
        pairs: Asks for M3T's seven turns, with `$paraphrases` wordings of each question.
        questions: Asks for {"questions": [...]} about the picture; `$least` to `$most` of them.
        answer: Asks for {"answer": ...} to `$question`.
        again: Follows a reply that can't be used; `$reason` says why.
    """

    system: str = "You write training data about pictures. You reply with one JSON object and nothing else."
    caption: str = (
        "Describe this picture for someone who can't see it, in four to eight sentences: the kind of place or scene, "
        "the main things and people in it with their number, colour, material and position to each other, what "
        "happens, any writing that can be read, light and style. Say only what can be seen. "
        'Reply as {"caption": "..."}.'
    )
    description: str = "What a picture shows, in words:\n$caption"
    pairs: str = (
        "Write seven questions about this picture, each with its answer. All of them can be answered from what is "
        "shown and from nothing else, and no two of them have the same answer.\n"
        '- "classification": which category the picture, or its main thing, belongs to; the answer is the category in '
        "a few words.\n"
        '- "global_1", "global_2": two different sides of the picture as a whole, such as place, activity, season, '
        "mood, style or number.\n"
        '- "local_1", "local_2": one detail each, of different things: colour, position, material, writing, what '
        "somebody holds or wears.\n"
        '- "creative": a question that needs imagination or reasoning, such as what may happen next, a title, or what '
        "the picture could be used for.\n"
        '- "retrieval": a request to find the text that describes this picture; the answer is such a text, one or two '
        "sentences that fit this picture and hardly another.\n"
        "Word each question in $paraphrases ways that differ in more than a word and all have the same answer. An "
        "answer is a phrase or a sentence that names what it is about, so that it can be understood without the "
        'question; never "yes" or "no" alone. A question never contains its answer. Write as if the '
        'picture lay before you: no "in the description".\n'
        'Reply as {"classification": {"questions": ["...", "..."], "answer": "..."}, "global_1": {...}, "global_2": '
        '{...}, "local_1": {...}, "local_2": {...}, "creative": {...}, "retrieval": {...}}.'
    )
    questions: str = (
        "Write $least to $most questions about this picture, each about another visual element of it: things and "
        "people, their number, colour or position, what they do, the surroundings, writing, light or style. Together "
        "they should cover what matters in the picture. Each can be answered by looking, none by guessing, "
        "and none gives away the answer to another. "
        'Reply as {"questions": ["...", "..."]}.'
    )
    answer: str = (
        "$question\nAnswer from the picture, in one or two full sentences that name what they are about. "
        'Reply as {"answer": "..."}.'
    )
    again: str = "That reply can't be used: $reason. Reply again, with the JSON object that was asked for."

    @classmethod
    def from_yaml(cls, path: Path | None) -> Prompts:
        """The texts of a YAML file, ours for those it leaves out; without a file all ours.

        Raises:
            UserError: the file is missing or is no mapping of the names above to texts with their values.
        """
        if path is None:
            return cls()
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"--prompts: '{path}' can't be read as YAML ({line})") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(given, dict):
            raise UserError(f"--prompts: '{path}' is no mapping: give lines such as 'caption: ...'")
        for name, text in given.items():
            if name not in names:
                raise UserError(f"--prompts: '{path}' has '{name}': the texts are {', '.join(sorted(names))}")
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"--prompts: '{path}', {name}: give a text")
        prompts = cls(**given)
        prompts._check(path)
        return prompts

    def _check(self, path: Path) -> None:
        for name, text in asdict(self).items():
            values = {value: f"\0{value}\0" for value in VALUES.get(name, ())}
            try:
                filled = Template(text).substitute(values)
            except (KeyError, ValueError) as error:
                known = ", ".join(f"${value}" for value in values) or "no values"
                raise UserError(
                    f"--prompts: '{path}', {name}: {error}: this text has {known}; a dollar sign is $$"
                ) from error
            for value, mark in values.items():
                if value in REQUIRED and mark not in filled:
                    raise UserError(f"--prompts: '{path}', {name}: it needs ${value}, which the request is about")


VALUES = {
    "description": ("caption",),
    "pairs": ("paraphrases",),
    "questions": ("least", "most"),
    "answer": ("question",),
    "again": ("reason",),
}
REQUIRED = ("caption", "question")


def fill(text: str, **values: object) -> str:
    """A text with its values."""
    return Template(text).substitute({name: str(value) for name, value in values.items()})
