"""Broken and hostile pictures, one of each kind, written small: `write_all(folder)` gives their paths by name.

What is in GOOD decodes, to the size there; all others must be refused with one line. Nothing here may take more than a
few seconds or a few copies of the largest picture that is allowed (tests/unit/test_hostile_pictures.py).
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

SIZE = (48, 32)

GOOD: dict[str, tuple[int, int]] = dict.fromkeys(
    [
        *["animated.gif", "animated.webp", "animated.png", "several_pages.tif", "cmyk.jpg", "sixteen_bit.png"],
        *["palette_with_odd_transparency.png", "tiles.tif", "exif_loop.jpg", "exif_garbage.png", "polyglot.gif"],
        *["trailing_megabytes.jpg", "one_bit.png", "float.tif", "png_named.jpg", "link.png", "bilevel_fax.tif"],
        *["-rf \u202egpj.exe \n'\".png"],
    ],
    SIZE,
) | {
    # Allowed, and as large as allowed. What is missing is filled in, as browsers do.
    **{"bomb_of_pixels.png": (13_377, 13_377), "beyond_its_data.jpg": (12_000, 12_000)},
    **{"half_the_rows.png": SIZE, "bomb_of_rows.png": SIZE, "digits.ppm": SIZE},
}


def write_all(folder: Path) -> dict[str, Path]:
    """All kinds by their names, below a new folder. Pipes and links are among them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in (*_BYTES, *_MADE)}
    for name, content in _BYTES.items():
        paths[name].write_bytes(content())
    for name, make in _MADE.items():
        make(paths[name])
    return paths


def _picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    ramp = np.add.outer(np.arange(size[1]), 2 * np.arange(size[0])) % 256
    return Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1).astype(np.uint8)).convert(mode)


def _saved(kind: str, picture: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (picture or _picture()).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes, *, bits: int = 8, colour: int = 2, before: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + _chunk(b"IDAT", zlib.compress(data, 9)) + _chunk(b"IEND", b"")


def _png_of(rows: int, before: bytes = b"") -> bytes:
    return _png(*SIZE, bytes((1 + 3 * SIZE[0]) * rows), before=before)


def _jpeg_sized(width: int, height: int) -> bytes:
    data = _saved("JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def _many_scans() -> bytes:
    """A progressive JPEG of 16 million pixels whose last scan comes again and again: hours for a decoder that obeys."""
    data = _saved("JPEG", Image.new("L", (4096, 4096)), progressive=True)
    last = data.rindex(b"\xff\xda")
    table = data.rindex(b"\xff\xc4", 0, last)
    return data[:-2] + data[table:-2] * 20_000 + b"\xff\xd9"


def _exif(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following)


def _tiff(*entries: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """One directory: (tag, type, count, value), with `data` from byte 4096 on."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)
    return head.ljust(4096, b"\0") + data


def _tiff_basics(width: int, height: int, compression: int) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]


def _huge_tiles() -> bytes:
    """16 x 16 pixels in one tile of 40,000 x 40,000."""
    tile = [(322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 4096), (325, 4, 1, 64)]
    return _tiff(*_tiff_basics(16, 16, 8), *tile, data=zlib.compress(bytes(1000)))


def _directory_loop() -> bytes:
    """A directory whose pictures are elsewhere and whose successor is itself."""
    data = bytearray(_tiff(*_tiff_basics(*SIZE, 1), (273, 4, 1, 2**31), (279, 4, 1, 2**31)))
    end = 10 + 12 * 7
    data[end : end + 4] = struct.pack("<I", 8)
    return bytes(data)


def _bmp(width: int, height: int, *, compression: int = 0, bits: int = 24, data: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    palette = bytes(4 * 256) if bits == 8 else b""
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def _gif_frame_beyond_screen() -> bytes:
    data = _saved("GIF")
    place = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1)) + 5
    return data[:place] + struct.pack("<HH", 65535, 65535) + data[place + 4 :]


def _webp_sized(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes([0x10, 0, 0, 0])
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body += _saved("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _text_chunks(count: int, size: int, key: bytes = b"note") -> bytes:
    return _chunk(b"zTXt", key + b"\0\0" + zlib.compress(bytes(size), 9)) * count


def _palette_with_odd_transparency() -> bytes:
    info = PngImagePlugin.PngInfo()
    picture = _picture().quantize(16)
    return _saved("PNG", picture, transparency=bytes(range(0, 250, 5))[:7], pnginfo=info)


def _exif_in_pieces() -> bytes:
    """A JPEG of 32 MB whose EXIF block comes ten bytes at a time: Pillow copies all of it for each."""
    data, piece = _saved("JPEG"), b"\xff\xe1" + struct.pack(">H", 18) + b"Exif\0\0" + bytes(10)
    return data[:2] + piece * 1_600_000 + data[2:]


def _comments() -> bytes:
    data = _saved("GIF")
    place = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:place] + b"!\xfe\x01c\0" * 5_000_000 + data[place:]


def _strips() -> bytes:
    """One entry names 4 million strips of the same few bytes."""
    count = 4_000_000
    strips = [(278, 4, 1, 1), (273, 4, count, 4096), (279, 4, count, 4096)]
    return _tiff(*_tiff_basics(*SIZE, 1), *strips, data=struct.pack("<I", 48) * count)


def _overlapping_entries() -> bytes:
    """Three hundred entries that hold the same megabyte."""
    held = [(40_000 + i, 7, 2**20, 4096) for i in range(300)]
    pixels = [(273, 4, 1, 4096), (278, 4, 1, SIZE[1]), (279, 4, 1, SIZE[0] * SIZE[1])]
    return _tiff(*_tiff_basics(*SIZE, 1), *pixels, *held, data=bytes(2**20))


def _several(kind: str, count: int) -> bytes:
    return _saved(kind, save_all=True, append_images=[_picture().rotate(5 * i) for i in range(count)])


_SVG = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg"'
_SVG += b' width="48" height="32"><image href="http://127.0.0.1/"/><text>&x;</text></svg>'

_BYTES: dict[str, Callable[[], bytes]] = {
    # Not what they say.
    "empty.png": lambda: b"",
    "zeros.jpg": lambda: bytes(4096),
    "text.jpg": lambda: b"no picture here\n" * 40,
    "page.jpg": lambda: b"<html><body>404 Not Found</body></html>",
    "drawing.svg": lambda: _SVG,
    "compressed_drawing.svgz": lambda: gzip.compress(_SVG),
    "postscript.eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n(/etc/passwd) (r) file\nshowpage\n",
    "document.pdf": lambda: b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(1)>>>>endobj\n%%EOF\n",
    "icon.ico": lambda: _saved("ICO"),
    "texture.dds": lambda: _saved("DDS"),
    "png_named.jpg": lambda: _saved("PNG"),
    # Cut and altered.
    "cut_header.png": lambda: _saved("PNG")[:20],
    "cut.png": lambda: _png(*SIZE, os.urandom((1 + 3 * SIZE[0]) * SIZE[1]))[:2000],
    "cut.jpg": lambda: _saved("JPEG", _picture(size=(400, 300)))[:3000],
    "cut.webp": lambda: _saved("WEBP", lossless=True)[:-200],
    "cut.gif": lambda: _saved("GIF")[:-300],
    "cut.tif": lambda: _saved("TIFF")[:200],
    "cut.bmp": lambda: _saved("BMP")[:-1000],
    "wrong_checksum.png": lambda: _saved("PNG").replace(b"IDAT", b"IDAU", 1),
    "no_pixels.png": lambda: _png(*SIZE, b""),
    "half_the_rows.png": lambda: _png_of(SIZE[1] // 2),
    # Headers that lie about the size.
    "zero_size.png": lambda: _png(0, 0, b""),
    "zero_height.jpg": lambda: _jpeg_sized(SIZE[0], 0),
    "zero_size.gif": lambda: _saved("GIF").replace(struct.pack("<HH", *SIZE), bytes(4)),
    "negative_size.bmp": lambda: _bmp(-48, -(2**31), data=bytes(1000)),
    "huge.png": lambda: _png(60_000, 60_000, bytes(1000)),
    "largest.png": lambda: _png(2**31 - 1, 2**31 - 1, bytes(1000)),
    "huge.jpg": lambda: _jpeg_sized(65_500, 65_500),
    "huge.bmp": lambda: _bmp(2**30, 2**30, data=bytes(1000)),
    "huge.gif": lambda: _gif_frame_beyond_screen(),
    "huge.webp": lambda: _webp_sized(16_000, 16_000),
    "huge.ppm": lambda: b"P6 999999999 999999999 255\n" + bytes(1000),
    "huge.tif": lambda: _tiff(*_tiff_basics(2**30, 2**30, 1), (273, 4, 1, 4096), (279, 4, 1, 10), data=bytes(10)),
    "beyond_its_data.jpg": lambda: _jpeg_sized(12_000, 12_000),
    "thin.png": lambda: _png(20_000, 1, bytes(60_001)),
    # Decompression.
    "bomb_of_pixels.png": lambda: _png(13_377, 13_377, bytes(13_377 * (1 + 13_377 // 8 + 1)), bits=1, colour=0),
    "bomb_of_text.png": lambda: _png_of(SIZE[1], _text_chunks(1, 60_000_000)),
    "bomb_of_many_texts.png": lambda: _png_of(SIZE[1], _text_chunks(90, 1_000_000)),
    "bomb_of_profile.png": lambda: _png_of(SIZE[1], _chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(60_000_000), 9))),
    "bomb_of_exif.png": lambda: _png_of(
        SIZE[1], _chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"0" * 9**8))
    ),
    "bomb_of_rows.png": lambda: _png(*SIZE, bytes(60_000_000)),
    "bomb_of_scans.jpg": _many_scans,
    "bomb_of_tiles.tif": _huge_tiles,
    "bomb_of_strips.tif": lambda: _tiff(
        *_tiff_basics(*SIZE, 8), (278, 4, 1, 32), (273, 4, 2**28, 4096), (279, 4, 2**28, 4096), data=bytes(4096)
    ),
    "bomb_of_segments.jpg": _exif_in_pieces,
    "bomb_of_comments.gif": _comments,
    "bomb_of_chunks.png": lambda: _png_of(SIZE[1], _chunk(b"prVt", b"") * 2_000_000),
    "bomb_of_strip_numbers.tif": _strips,
    "overlapping_entries.tif": _overlapping_entries,
    "directory_loop.tif": _directory_loop,
    "bomb_of_runs.bmp": lambda: _bmp(13_000, 13_000, compression=1, bits=8, data=b"\xff\x00" * 300_000 + b"\0\1"),
    "bomb_of_digits.ppm": lambda: b"P3 12000 12000 255\n" + b"0 " * 4_500_000,
    "bomb_of_samples.ppm": lambda: b"P6 12000 12000 1000\n" + bytes(9_000_000),
    # Odd, but pictures.
    "animated.gif": lambda: _several("GIF", 30),
    "animated.webp": lambda: _several("WEBP", 10),
    "animated.png": lambda: _several("PNG", 10),
    "several_pages.tif": lambda: _several("TIFF", 10),
    "cmyk.jpg": lambda: _saved("JPEG", _picture("CMYK")),
    "sixteen_bit.png": lambda: _saved("PNG", Image.fromarray(np.full(SIZE[::-1], 100 << 8, np.uint16))),
    "one_bit.png": lambda: _saved("PNG", _picture("1")),
    "float.tif": lambda: _saved("TIFF", _picture("F")),
    "palette_with_odd_transparency.png": _palette_with_odd_transparency,
    "digits.ppm": lambda: b"P3 48 32 255\n" + b"9 " * (3 * 48 * 32),
    "tiles.tif": lambda: _tiff(
        *[(256, 4, 1, SIZE[0]), (257, 4, 1, SIZE[1]), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)],
        *[(322, 4, 1, 48), (323, 4, 1, 32), (324, 4, 1, 4096), (325, 4, 1, len(zlib.compress(bytes(48 * 32))))],
        data=zlib.compress(bytes(48 * 32)),
    ),
    "bilevel_fax.tif": lambda: _saved("TIFF", _picture("1"), compression="group4"),
    "exif_loop.jpg": lambda: _saved("JPEG", exif=_exif((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), following=8)),
    "exif_garbage.png": lambda: _png_of(SIZE[1], _chunk(b"eXIf", b"II*\0" + b"\xff" * 5000)),
    "polyglot.gif": lambda: _saved("GIF") + b"=1;alert(1);/*<script>alert(1)</script>*/" + gzip.compress(b"more"),
    "trailing_megabytes.jpg": lambda: _saved("JPEG") + bytes(5_000_000),
    "-rf \u202egpj.exe \n'\".png": lambda: _saved("PNG"),
}


def _too_many_bytes(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(_saved("PNG"))
        file.truncate(2**33)  # a hole: no disk is used


def _link(target: str | Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _linked_picture(path: Path) -> None:
    (path.parent / "target.png").write_bytes(_saved("PNG"))
    path.symlink_to("target.png")


_MADE: dict[str, Callable[[Path], None]] = {
    "gigabytes.png": _too_many_bytes,
    "pipe.png": lambda path: os.mkfifo(path),
    "folder.png": lambda path: path.mkdir(),
    "link.png": _linked_picture,
    "link_to_nothing.png": _link("not_here.png"),
    "link_to_itself.png": _link("link_to_itself.png"),
    "link_to_a_pipe.png": _link("pipe.png"),
    "link_to_endless_zeros.png": _link("/dev/zero"),
    "link_to_a_terminal.png": _link("/dev/tty"),
    "link_to_a_process.png": _link("/proc/self/environ"),
    "missing.png": lambda path: None,
    "x" * 300 + ".png": lambda path: None,
    "below_a_file.png": lambda path: path.write_bytes(b""),
}
