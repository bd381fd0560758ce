"""What people give to be embedded, checked and turned into dialogues."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from muco_ds.data.decode import ImageError, StoredPicture
from muco_ds.data.schema import Dialogue, ImageRef
from muco_ds.errors import UserError

Picture = ImageRef | os.PathLike[str] | np.ndarray
"""A path, a picture, or its pixels as uint8 [H, W] or [H, W, 3] (RGB) or [H, W, 4] (RGBA)."""

Item = str | os.PathLike[str] | Image.Image | np.ndarray | Mapping[str, Any]
"""A text (a string is never a path), a picture, or any keys of {"text": str, "image": Picture or list of them,
"instruction": str}."""

_KEYS = {"text", "image", "instruction"}


def dialogues_of(items: Iterable[Item], instruction: str | None = None) -> Iterator[Dialogue]:
    """A dialogue of each item as it comes, by `dialogue_of`. Raises UserError, at once for what is no list of items."""
    if isinstance(items, (str, Mapping, Image.Image, np.ndarray, os.PathLike)) or not isinstance(items, Iterable):
        raise UserError(f"items: a {type(items).__name__} is no list of items: put it into one, [item]")
    if not isinstance(instruction, str | None):
        raise UserError(f"instruction: must be a string, not {type(instruction).__name__}")
    return (dialogue_of(item, f"item {i}", instruction) for i, item in enumerate(items))


def dialogue_of(item: Item, name: str, instruction: str | None = None) -> Dialogue:
    """One turn: the instruction, a newline and the text behind the pictures. Raises UserError: `name` and the cure.

    Args:
        instruction: for an item without its own.
    """
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, (Image.Image, np.ndarray, os.PathLike)):
        item = {"image": item}
    if not isinstance(item, Mapping) or not item.keys() <= _KEYS:
        raise UserError(f"{name}: give a text, a picture, or a dict with 'text', 'image', 'instruction'")
    images = pictures_of(item.get("image"), f"{name}: 'image'")
    own = item.get("instruction")
    parts = [part for part in (instruction if own is None else own, item.get("text")) if part is not None]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{name}: 'text' and 'instruction' must be strings")
    text = "\n".join(filter(None, parts))
    _check_characters(text, name)
    if not text.strip() and not images:
        raise UserError(f"{name}: has neither text nor picture")
    return Dialogue((text,), images)


def asked(image: Picture | Sequence[Picture], questions: Iterable[str]) -> Dialogue:
    """Questions about pictures, each a turn. Raises UserError."""
    images = pictures_of(image, "image")
    questions = questions if isinstance(questions, str) else tuple(questions)  # a generator is read but once
    if isinstance(questions, str) or not all(isinstance(question, str) for question in questions):
        raise UserError("questions: must be a list of strings")
    for i, question in enumerate(questions):
        _check_characters(question, f"questions: {i}")
    if not images and not all(question.strip() for question in questions):
        raise UserError("questions: one has neither text nor picture")
    return Dialogue(questions, images)


def _check_characters(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: {text[error.start]!r} is half a character: decode the text anew") from error


def pictures_of(given: Any, name: str) -> tuple[ImageRef, ...]:
    """Pictures as the rest of the package takes them. Raises UserError: `name` and the cure."""
    pictures = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
    return tuple(_picture(one, name) for one in pictures)


def _picture(given: Any, name: str) -> ImageRef:
    if isinstance(given, (str, StoredPicture, Image.Image)):
        return given
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    if not isinstance(given, np.ndarray):
        raise UserError(f"{name} must be a path, a picture, an array or a list of them, not {type(given).__name__}")
    if given.dtype != np.uint8 or given.ndim not in (2, 3) or given.shape[2:] not in ((), (3,), (4,)) or not given.size:
        raise UserError(
            f"{name}: an array of {given.dtype} {list(given.shape)} is no picture: give uint8 values from 0 to 255, "
            "[height, width], or [height, width, 3] in RGB"
        )
    return Image.fromarray(given.copy())  # whoever fills the array anew must not change what waits to be encoded


def first_problem(dialogue: Dialogue, look: Callable[[Any], object]) -> tuple[str, str] | None:
    """The first picture that `look` (`decode`, `read_size`) can't use, and why."""
    for image in dialogue.images:
        try:
            look(image)
        except ImageError as error:
            return str(image), str(error)
    return None
