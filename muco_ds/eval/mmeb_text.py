"""What a row of MMEB says to the model, by the name of a convention.

`muco`, for models of this project and MuCo's: texts as the released MuCo evaluation feeds them, runs of newlines made
one and placeholders removed. It ends every text with a newline and puts one behind the picture; here the model's own
template decides on white space at the ends, as it did in training. Candidates are the same where text and picture are
(that evaluation, which builds on VLM2Vec's, goes by the names below; ours counts against the model if anything).

`vlm2vec`: texts to the character as VLM2Vec's evaluation composes them, newlines included, and candidates named as it
names them: by their text, by the picture alone (t2i: of two captions of one picture the first stands for both), or by
picture and caption (i2i). What a dialogue can't carry: the chat format stands around the text, pictures come first and
have one newline behind them, and a placeholder without a picture is left out, where VLM2Vec keeps a bare token.

Rows of TIGER-Lab/MMEB-eval hold final texts: both conventions start from these, and candidates are the same where text
and picture are, as in that evaluation.

Sources: TIGER-AI-Lab/VLM2Vec, src/data/eval_dataset and, for ready texts, branch v1; naver-ai/muco, eval_mmeb.py.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import Literal, NamedTuple, get_args

from muco_ds.data.schema import Dialogue, Turn
from muco_ds.data.templates import IMAGE_PAD, VISION_END, VISION_START, ChatTemplate
from muco_ds.eval.mmeb_datasets import MMEBDataset
from muco_ds.eval.mmeb_files import READY, MMEBRow

Convention = Literal["muco", "vlm2vec"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

_PLACEHOLDER = "<|image_1|>"
_MARK = re.compile(rf"<\|image_\d+\|>|{re.escape(VISION_START + IMAGE_PAD + VISION_END)}|{re.escape(IMAGE_PAD)}")
_NEWLINES = re.compile(r"\n+")


class Composed(NamedTuple):
    """A query or a candidate: VLM2Vec's text, where its picture is (path as in the row, '' = none) and its name."""

    text: str
    image: str = ""
    name: Hashable = None


def query_of(row: MMEBRow, dataset: MMEBDataset, publication: str) -> Composed:
    """What is asked."""
    if publication == READY:
        return Composed(row.query_text, row.query_image)
    instruction = row.query_instruction
    if dataset.parser == "t2i":
        text = f"{instruction.replace(_PLACEHOLDER, IMAGE_PAD)} {row.query_text}\n"
        return Composed(text + "\n" if dataset.name == "VisDial" else text)
    instruction = instruction.replace(_PLACEHOLDER, "")
    if dataset.parser in ("qa", "i2i"):
        instruction = "\n" + instruction.strip()
    return Composed(_pictured(instruction, row.query_text) + "\n", row.query_image)


def candidates_of(row: MMEBRow, dataset: MMEBDataset, publication: str) -> Iterator[Composed]:
    """What the row offers, the right one first."""
    pairs = list(zip(row.captions, row.images, strict=True))
    if publication == READY:
        yield from (Composed(text, image, (text, image)) for text, image in pairs)
    elif dataset.parser not in ("t2i", "i2i"):
        yield from (Composed(text, name=text) for text, _ in pairs)
    else:
        instruction = row.target_instruction.replace(_PLACEHOLDER, "")
        captioned = bool(row.captions[0].strip())  # WebQA, EDIS, RefCOCO-Matching; the first speaks for all
        by_picture = dataset.parser == "t2i"
        ending = "\n" if captioned or by_picture else ""
        for caption, image in pairs:
            text = _pictured(f"{instruction} {caption}" if captioned else instruction) + ending
            yield Composed(text, image, image if by_picture else f"{image}:" + caption.strip('"'))


def _pictured(instruction: str, text: str = "") -> str:
    return f"{IMAGE_PAD} {instruction}{' ' if text else ''}{text}".replace(" \n", "\n")


class Wording:
    """Texts of a convention as turns. Turns and names of one convention go together."""

    def __init__(self, convention: Convention, template: ChatTemplate) -> None:
        self.convention, self._template = convention, template
        self._turns: dict[tuple[str, bool], Turn] = {}

    def turn(self, composed: Composed) -> Turn:
        """The user turn beside `composed.image`, which the template puts first, with a newline behind it."""
        given = composed.text, bool(composed.image)
        if given not in self._turns:
            self._turns[given] = self._turn(*given)
        return self._turns[given]

    def _turn(self, text: str, pictured: bool) -> Turn:
        if self.convention == "muco":
            return _MARK.sub("", _NEWLINES.sub("\n", text)).strip()
        text = _MARK.sub("", text)
        return tuple(self._template.encode_exactly(text.removeprefix("\n") if pictured else text))

    def key(self, composed: Composed, dialogue: Dialogue) -> Hashable:
        """Equal where two candidates are one; `dialogue` is what was made of it."""
        return dialogue if self.convention == "muco" else composed.name
