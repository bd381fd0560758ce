"""What hypothesis makes up for the readers: odd values, columns of any type, valid files with damage.

MUCO_DS_FUZZ=5000 python -m pytest tests/unit/test_fuzz_*.py makes so many examples of each test, anew each time;
without it they are few and always the same.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_EXAMPLES = int(os.environ.get("MUCO_DS_FUZZ", "0"))

fuzz = settings(
    max_examples=_EXAMPLES or 25,
    derandomize=not _EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

ODD_TEXTS = [
    *[
        "",
        " ",
        "\n",
        "\0",
        "a\0b",
        "../x.png",
        "/etc/passwd",
        "0.png",
        "a/" * 200,
        "x" * 300,
        "x" * 40_000,
        "\u202e",
        "é",
    ],
    *[
        "<|image_1|>\n",
        "<image>",
        "<|emb|>",
        "<|im_end|>",
        "[",
        "['a', None]",
        "[" * 3000,
        "['a', ['b']]",
        "[1]",
        "[()]",
    ],
    *[
        '{"query": "q"}',
        "{",
        "null",
        "1:2",
        "4:17",
        "9999:1",
        "-1:0",
        "1:1:1",
        "http://127.0.0.1/x.png",
        "\ud800",
        "0 0 1 1",
    ],
]

texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
"""Half a character, which JSON can say and parquet can't, is among them."""

clean_texts = texts.filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**400]),
    st.floats(),
    texts,
)

values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=10,
)

_COLUMN_TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "string": (pa.string(), clean_texts),
    "large_string": (pa.large_string(), clean_texts),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["a", "0.png", ""])),
    "strings": (pa.list_(pa.string()), st.lists(st.none() | clean_texts, max_size=9)),
    "lists": (pa.list_(pa.list_(pa.string())), st.lists(st.none() | st.lists(clean_texts, max_size=3), max_size=9)),
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "double": (pa.float64(), st.floats()),
    "ints": (pa.list_(pa.int32()), st.lists(st.integers(0, 9), max_size=3)),
    "bool": (pa.bool_(), st.booleans()),
    "binary": (pa.binary(), st.binary(max_size=9)),
    "null": (pa.null(), st.none()),
    "struct": (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), st.just({"bytes": b"x", "path": "0.png"})),
    "turns": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        st.lists(st.fixed_dictionaries({"role": clean_texts, "content": st.none() | clean_texts}), max_size=4),
    ),
    "map": (pa.map_(pa.string(), pa.string()), st.just([("a", "b")])),
    "time": (pa.timestamp("us"), st.integers(0, 10**9)),
    "decimal": (pa.decimal128(9, 2), st.none()),
}


@st.composite
def tables(draw: st.DrawFn, usual: dict[str, Any], rows: int = 3) -> pa.Table:
    """A table of `usual` values by their columns, in which a few columns have another type, are gone or are new."""
    columns: dict[str, pa.Array] = {}
    changed = draw(st.lists(st.sampled_from([*usual, "extra"]), min_size=1, max_size=3, unique=True))
    for name in [*usual, "extra"]:
        if name not in changed:
            if name in usual:
                columns[name] = pa.array([usual[name]] * rows)
        elif kind := draw(st.sampled_from([None, *_COLUMN_TYPES])):
            dtype, strategy = _COLUMN_TYPES[kind]
            cells = draw(st.lists(st.none() | strategy, min_size=rows, max_size=rows))
            columns[name] = pa.array(cells, dtype)
    return pa.table(columns) if columns else pa.table({"nothing": [None] * rows})


@st.composite
def objects(draw: st.DrawFn, usual: dict[str, Any]) -> Any:
    """A JSON object like `usual`, with a few values of any kind somewhere in it; or anything else."""
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    made = json.loads(json.dumps(usual))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = made
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(values)
            break
    return made


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with bits flipped, bytes replaced, a piece cut out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["flip", "byte", "cut", "out", "double", "zeros"]))
        length = draw(st.integers(1, 40))
        if how == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and data:
            data[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[place:]
        elif how == "out":
            del data[place : place + length]
        elif how == "double":
            data[place:place] = data[place : place + length]
        elif how == "zeros":
            data[place : place + length] = bytes(length)
    return bytes(data)


def lines(objects: list[Any]) -> bytes:
    """JSON lines, with what JSON alone does not allow as Python writes it: NaN, half a character as an escape."""
    return b"".join(json.dumps(value).encode() + b"\n" for value in objects)
