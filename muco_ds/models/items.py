"""What people give to be embedded, checked and turned into dialogues."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from muco_ds.data.decode import StoredPicture
from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError

Item = str | Image.Image | Mapping[str, Any]
"""A text, a picture, or any keys of {"text": str, "image": path, picture or list of them, "instruction": str}."""


def dialogue_of(item: Item, name: str) -> Dialogue:
    """One turn: the instruction, a newline and the text behind the pictures. Raises UserError: `name` and the cure."""
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, Image.Image):
        item = {"image": item}
    if not isinstance(item, Mapping) or not item.keys() <= {"text", "image", "instruction"}:
        raise UserError(f"{name}: give a text, a picture, or a dict with 'text', 'image', 'instruction'")
    image = item.get("image")
    given = [] if image is None else image if isinstance(image, (list, tuple)) else [image]
    images = tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in given)
    if not all(isinstance(one, (str, StoredPicture, Image.Image)) for one in images):
        raise UserError(f"{name}: 'image' must be a path, a picture or a list of them")
    parts = [part for part in (item.get("instruction"), item.get("text")) if part]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{name}: 'text' and 'instruction' must be strings")
    text = "\n".join(parts)
    if not text.strip() and not images:
        raise UserError(f"{name}: has neither text nor picture")
    return Dialogue((text,), images)
