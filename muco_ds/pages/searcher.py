"""Queries to hits: a model that embeds what is asked, and the collection that is searched.

Shape suffixes: D embedding size.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from muco_ds.data.decode import ImageError, StoredPicture, decode, read_size
from muco_ds.errors import UserError
from muco_ds.models.embedder import Embedder
from muco_ds.pages.collection import Collection, Hit

SAME = 0.9
"""Cosine above which an embedding is the one that was stored; bf16 beside fp32 stays above 0.99."""

MAX_TEXT = 4000
"""Characters of a question, and of an instruction: attention's memory on a CPU grows with their square."""

MAX_PIXELS = 50_000_000
"""Of a picture that is dropped: a file of a few KB may decode to much more."""

KEPT_PIXELS = 2**22
"""To which a larger one is shrunk, unless the model looks at more."""

PREVIEW = 192


@dataclass(frozen=True)
class Dropped:
    """A picture that a visitor gave, and what is shown of it."""

    picture: Image.Image
    preview: Image.Image


@dataclass(frozen=True)
class Query:
    """What is asked, in words, by a picture or both."""

    text: str = ""
    picture: Image.Image | None = None
    instruction: str = ""

    def item(self) -> dict[str, Any]:
        """What `Embedder.encode` takes. Raises UserError for a query without content, or with too much of it."""
        if not self.text.strip() and self.picture is None:
            raise UserError("Type a question or drop a picture.")
        if max(len(self.text), len(self.instruction)) > MAX_TEXT:
            raise UserError(f"A question or an instruction may have {MAX_TEXT:,} characters: shorten it.")
        item = {"text": self.text.strip(), "instruction": self.instruction.strip(), "image": self.picture}
        return {key: value for key, value in item.items() if value}


@dataclass(frozen=True)
class Answer:
    """Hits, best first, and the seconds it took; `encode_s` is None where nothing was encoded."""

    hits: list[Hit]
    encode_s: float | None
    search_s: float


class Searcher:
    """Thread-safe: one query is encoded at a time.

    Raises:
        UserError: the model is not the one that wrote the embeddings.
    """

    def __init__(self, embedder: Embedder, collection: Collection) -> None:
        self._embedder, self.collection = embedder, collection
        self._lock, self._decoding = threading.Lock(), threading.Lock()
        assert embedder.packer is not None, "from_pretrained"
        self._kept_pixels = max(KEPT_PIXELS, embedder.packer.images.limits.max_pixels)
        self._dim = collection.rows.width
        if self._dim > embedder.sizes[-1]:
            raise UserError(
                f"--embeddings have {self._dim} components but the model gives {embedder.sizes[-1]}: "
                "give the --model that wrote them"
            )
        self._check_same()

    def dropped(self, name: str, content: bytes) -> Dropped:
        """A visitor's picture from the bytes of its file. Raises ImageError."""
        file = StoredPicture(name, partial(BytesIO, content))
        width, height = read_size(file)
        if width * height > MAX_PIXELS:
            raise ImageError(f"has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
        with self._decoding:  # one large picture at a time
            picture = decode(file)
            if (scale := math.sqrt(self._kept_pixels / (width * height))) < 1:
                picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        preview = picture.copy()
        preview.thumbnail((PREVIEW, PREVIEW))
        return Dropped(picture, preview)

    def search(self, query: Query, count: int, *, pictured: bool | None = None) -> Answer:
        """Encode and search. Raises UserError for a query without content."""
        item = query.item()
        with self._lock:  # a device's memory is sized for one forward
            start = time.perf_counter()
            query_D = self._embedder.encode([item], dim=self._dim)[0]
            encode_s = time.perf_counter() - start
        return self._nearest(query_D, count, pictured, None, encode_s)

    def like(self, row: int, count: int, *, pictured: bool | None = None) -> Answer:
        """The items nearest to one of them, without itself."""
        return self._nearest(self.collection.embedding(row), count, pictured, row, None)

    def _nearest(
        self, query_D: np.ndarray, count: int, pictured: bool | None, without: int | None, encode_s: float | None
    ) -> Answer:
        start = time.perf_counter()
        hits = self.collection.search(query_D, count, pictured=pictured, without=without)
        return Answer(hits, encode_s, time.perf_counter() - start)

    def _check_same(self) -> None:
        """An item encoded again must be what is stored; else scores would mean nothing, and nobody would see it."""
        row = self.collection.first_usable()
        if row is None:
            raise UserError("--embeddings: every row is zero: no item could be encoded")
        dialogue = self.collection.dialogue(row)
        place = self.collection.hit(row, 0.0).place
        try:
            found_D = self._embedder.encode_turns(dialogue.images, [str(dialogue.turns[0])], dim=self._dim)[0]
        except (ImageError, UserError) as error:
            raise UserError(f"{place}: {error}: give the --images folder of encode.py") from error
        cosine = float(found_D @ self.collection.embedding(row))
        if cosine < SAME:
            raise UserError(
                f"--embeddings: {place} has another embedding by this model (cosine {cosine:.2f}): "
                "give the --model, --input and --images that they were made with"
            )
