"""How many parts a picture's file is made of, counted before Pillow is let in. Pixels are not looked at.

Pillow keeps each part in memory, and joins some by copying all that came before: hours for a few million of them.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

MAX_PARTS = 1000
"""Segments and stray bytes before the pixels of a JPEG, extensions before those of a GIF. Pictures have some ten."""

MAX_CHUNKS = 2**17
"""Of a PNG: a large one whose pixels come by the kilobyte has that many. Also pieces of a GIF's extensions."""

MAX_VALUES = 2**20
"""Numbers in one entry of a TIFF: one for each strip or tile."""

_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_TIFF_PLAIN = (1, 2, 6, 7)  # not made into Python's numbers


def too_many_parts(file: BinaryIO, size: int, *, whole: bool) -> str | None:
    """What is too much in a file of `size` bytes, or None; `whole`: also behind a PNG's first pixels. Rewinds it."""
    file.seek(0)
    head = file.read(16)
    problem = None
    if head.startswith(b"\xff\xd8\xff"):
        problem = _jpeg(file)
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        problem = _png(file, whole)
    elif head.startswith((b"GIF87a", b"GIF89a")):
        problem = _gif(file, head[10])
    elif head.startswith((b"II", b"MM")):
        problem = _tiff(file, head, size)
    file.seek(0)
    return problem


def _jpeg(file: BinaryIO) -> str | None:
    file.seek(2)
    for _ in range(MAX_PARTS):
        byte = file.read(1)
        if byte != b"\xff":
            if not byte:
                return None
            continue
        marker = file.read(1)
        if marker in (b"", b"\xda"):
            return None
        if marker == b"\xff":
            file.seek(-1, 1)
        elif marker != b"\0" and not b"\xd0" <= marker <= b"\xd9":  # these have no length
            file.seek(max(int.from_bytes(file.read(2), "big") - 2, 0), 1)
    return f"more than {MAX_PARTS} segments before its pixels"


def _png(file: BinaryIO, whole: bool) -> str | None:
    file.seek(8)
    for _ in range(MAX_CHUNKS):
        header = file.read(8)
        if len(header) < 8 or header[4:] == b"IEND" or (header[4:] == b"IDAT" and not whole):
            return None
        file.seek(int.from_bytes(header[:4], "big") + 4, 1)
    return f"more than {MAX_CHUNKS} chunks"


def _gif(file: BinaryIO, flags: int) -> str | None:
    file.seek(13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0))
    pieces = 0
    for _ in range(MAX_PARTS):
        byte = file.read(1)
        if byte in (b"", b";", b","):
            return None
        if byte != b"!":
            continue
        file.seek(1, 1)
        while (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], 1)
            pieces += 1
            if pieces > MAX_CHUNKS:
                return f"extensions of more than {MAX_CHUNKS} pieces"
    return f"more than {MAX_PARTS} extensions before its pixels"


def _tiff(file: BinaryIO, head: bytes, size: int) -> str | None:
    order = "<" if head.startswith(b"II") else ">"
    entry, place, counted = ("HHQQ", "Q", "Q") if 43 in head[2:4] else ("HHII", "I", "H")
    start = 8 if place == "Q" else 4
    (offset,) = struct.unpack_from(order + place, head.ljust(16, b"\0"), start)
    if offset >= size:
        return None
    file.seek(offset)
    width = struct.calcsize(order + counted)
    (entries,) = struct.unpack(order + counted, file.read(width).ljust(width, b"\0"))
    if entries > 2**16:
        return f"{entries} entries in its directory"
    width = struct.calcsize(order + entry)
    table = file.read(entries * width)
    held = 0
    for _, kind, count, _ in struct.iter_unpack(order + entry, table[: len(table) // width * width]):
        if kind not in _TIFF_PLAIN and kind in _TIFF_BYTES and count > MAX_VALUES:
            return f"an entry of {count} numbers: more than {MAX_VALUES}"
        held += _TIFF_BYTES.get(kind, 0) * count
    # What lies in the file once is counted by more than one entry.
    return f"entries of {held} bytes in a file of {size}" if held > size else None
