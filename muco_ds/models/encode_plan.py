"""Which turns are encoded together: behind one beginning where they begin alike, beside turns of like length.

Shape suffixes: N turns of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from muco_ds.data.collator import Packer
from muco_ds.data.decode import loaded
from muco_ds.data.images import ImageError, read_size
from muco_ds.data.schema import Dialogue, ImageRef
from muco_ds.errors import UserError

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Turns that share their beginning (pictures, or none), as token ids, and the rows of their embeddings."""

    images: tuple[ImageRef, ...]
    turns: list[Ids] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """The packs of a window of dialogues. Of `rows` rows, those of pictures without a usable header are in no pack."""

    packs: list[list[Piece]]
    rows: int


def plan_packs(
    packer: Packer,
    dialogues: Sequence[Dialogue],
    pack_tokens: int,
    mark_broken: bool,
    each: Callable[..., Iterable] = map,
) -> Plan:
    """Packs of at most `pack_tokens`, longest turns first; a turn that is longer stands alone.

    Turns are isolated, so dialogues with the same pictures, and all without pictures, go behind one beginning. Like
    lengths together waste little where attention pads its segments, and rounds cost the ranks alike.

    Args:
        mark_broken: leave dialogues out that have a picture without a usable header; else that is an error.
        each: `map`, or a thread pool's.
    Raises:
        UserError: names the picture.
    """
    texts = [turn for dialogue in dialogues for turn in dialogue.turns]
    ids_N = [tuple(ids) for ids in packer.template.encode_turns(texts)]
    groups: dict[tuple, tuple[tuple[ImageRef, ...], list[int]]] = {}
    row = 0
    for dialogue in dialogues:
        key = tuple(_key(image) for image in dialogue.images)
        groups.setdefault(key, (dialogue.images, []))[1].extend(range(row, row + len(dialogue.turns)))
        row += len(dialogue.turns)
    vision = _vision_tokens(packer, [image for images, _ in groups.values() for image in images], each, mark_broken)
    beginnings = [
        _Beginning.of(packer, images, rows, ids_N, [next(vision) for _ in images]) for images, rows in groups.values()
    ]
    fine = [beginning for beginning in beginnings if beginning is not None]
    fine.sort(key=lambda beginning: (bool(beginning.images), beginning.tokens), reverse=True)
    return Plan(_filled(fine, ids_N, pack_tokens), row)


@dataclass(frozen=True)
class _Beginning:
    """What dialogues share, and their turns: rows by falling length."""

    images: tuple[ImageRef, ...]
    prefix: int  # tokens
    rows: list[int]
    own: list[int]  # tokens of each row

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.own)

    @classmethod
    def of(
        cls,
        packer: Packer,
        images: tuple[ImageRef, ...],
        rows: list[int],
        ids_N: list[Ids],
        vision: list[int | None],
    ) -> _Beginning | None:
        """None where a picture can't be used, or nothing is asked."""
        if None in vision or not rows:
            return None
        rows = sorted(rows, key=lambda row: -len(ids_N[row]))
        text = np.array([len(ids_N[row]) for row in rows])
        ones = np.ones_like(text)
        whole, prefix = packer.template.count(text, ones, ones * sum(filter(None, vision)), ones < 0)
        return cls(images, int(prefix[0]), rows, (whole - prefix).tolist())


def _filled(beginnings: Sequence[_Beginning], ids_N: list[Ids], pack_tokens: int) -> list[list[Piece]]:
    """Next fit. Turns about pictures stay together if they can: each further piece would encode the pictures again."""
    packs: list[list[Piece]] = []
    room = 0
    for beginning in beginnings:
        piece: Piece | None = None
        together = beginning.tokens if beginning.images else 0
        for row, own in zip(beginning.rows, beginning.own, strict=True):
            need = max(own if piece else beginning.prefix + own, 0 if piece else together)
            if not packs or need > room:
                packs.append([])
                piece, room = None, pack_tokens
            if piece is None:
                piece = Piece(beginning.images)
                packs[-1].append(piece)
                room -= beginning.prefix
            piece.turns.append(ids_N[row])
            piece.rows.append(row)
            room -= own
    return packs


def _vision_tokens(
    packer: Packer, images: list[ImageRef], each: Callable[..., Iterable], mark_broken: bool
) -> Iterator[int | None]:
    """Tokens of each picture with its start and end, from its header; None for one that can't be used."""

    def tokens(image: ImageRef) -> int | ImageError:
        try:
            size = loaded(image).size if isinstance(image, Image.Image) else read_size(image)
            return packer.images.tokens(packer.images.grid(*size)) + 2
        except ImageError as error:
            return error

    distinct = {_key(image): image for image in images}  # threads must not read one object at a time
    found = dict(zip(distinct, each(tokens, distinct.values()), strict=True))
    for image in images:
        count = found[_key(image)]
        if not isinstance(count, ImageError):
            yield count
        elif mark_broken:
            yield None
        else:
            raise UserError(f"picture {image}: {count}") from count


def _key(image: ImageRef) -> str | int:
    """Equal where it is the same path or object: nobody compares pixels."""
    return image if isinstance(image, str) else id(image)
