"""What flows through the data side: records, dialogues, packed batches.

Shape suffixes: T rows (tokens) of a pack, E pooled rows, P image patches, Y bytes of a patch, C colours, V the 256
values of a byte, I images, S segments, J gathered key/value rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from muco_ds.data.decode import StoredPicture
from muco_ds.data.segments import SegmentPlan
from muco_ds.data.vision import VisionInputs

ImageRef = str | StoredPicture | Image.Image
"""A picture by its path, inside another file, or already decoded."""

TURNS_PER_SAMPLE = 1024
"""A sample may hold at most this many turns; see `pair_ids`."""


Turn = str | tuple[int, ...]
"""A user turn: its text, or token ids where it holds a special token, which in a text would be inert."""


@dataclass(frozen=True)
class Dialogue:
    """One side of an example: pictures (always rendered first) and one or more user turns."""

    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Pictures and text to be compressed, and questions that must be answered from what was compressed.

    `unfinished`: the last answer is to be continued by its next token.
    """

    questions: tuple[str, ...]
    answers: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    context: str = ""
    unfinished: bool = False


QUERY, TARGET, NEGATIVE = range(3)
"""Kinds of dialogues, and of the rows pooled from them."""


@dataclass(frozen=True)
class Side:
    """One dialogue on its way into a pack. `ids_k3`: image_id, pair_id, target_hash of each turn.

    A conversation's turns have no rows of their own; `history` and ids mean nothing to it.
    """

    kind: int
    dialogue: Dialogue | Conversation
    history: bool
    ids_k3: np.ndarray


@dataclass(frozen=True)
class RecordTurn:
    """A turn as a data set stores it: paraphrases of the question, one target, the kind of turn."""

    questions: tuple[str, ...]
    target: str
    kind: int


@dataclass(frozen=True)
class Negative:
    """A wrong target: a text, pictures or both."""

    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One row of a data set before anything is drawn. Image paths are absolute.

    `captions`: of the query's and of the target's pictures, '' = none; None where the reader reads none.
    `context`: text that belongs to the query's pictures, or stands in their place, in a conversation about them.
    """

    row: int
    turns: tuple[RecordTurn, ...]
    query_images: tuple[str, ...] = ()
    target_images: tuple[str, ...] = ()
    negatives: tuple[Negative, ...] = ()
    captions: tuple[str, str] | None = None
    context: str = ""

    @property
    def lacks_caption(self) -> bool:
        """Whether a picture would be restated without a word about it."""
        pictured = (self.query_images, self.target_images)
        return self.captions is not None and any(
            images and not caption for images, caption in zip(pictured, self.captions, strict=True)
        )

    def restated(self) -> tuple[str, str]:
        """The only query and target in words, pictures replaced by their captions; '' where there are none."""
        assert self.captions is not None and len(self.turns) == 1
        turn = self.turns[0]
        sides = (
            (self.query_images, self.captions[0], turn.questions[0]),
            (self.target_images, self.captions[1], turn.target),
        )
        query, target = (
            f"Image description: {caption}\n{text}" if images and caption else text for images, caption, text in sides
        )
        return query, target


@dataclass(frozen=True)
class RowCounts:
    """How many pooled rows of each side a rank holds; known on every rank from the plan, without communication.

    Of conversations, the tokens to be predicted are counted as queries.
    """

    queries: int
    targets: int
    negatives: int = 0

    @property
    def keys(self) -> int:
        return self.targets + self.negatives


@dataclass(frozen=True)
class PackedBatch:
    """One pack: every dialogue of its examples, all sides, in one row without padding.

    `emb_index_E` lists the rows to pool: all query turns first, then all targets, then all negatives (`counts`).
    Where a turn is read through several tokens, that is the last of its `span` rows. `read_rows_Q` lists all of these
    rows, turn by turn in the same order, and `read_segments` what they attend to: the last text layer is asked for them
    alone. A pack from which nothing is pooled reads some row all the same.
    `ids_E3` holds image_id, pair_id and target_hash of each pooled row. A pack without pictures carries one dummy
    picture (`has_images` False) so that the vision tower runs exactly once on every rank.

    A pack of conversations has `labels_E`, and `emb_index_E` lists the rows whose states predict them; it has no ids.
    """

    input_ids_T: torch.Tensor  # int64
    position_ids_41T: torch.Tensor  # int64: text position, then mRoPE t, h, w
    segments: SegmentPlan
    pixels_PY: torch.Tensor  # uint8: a patch's pixels row by row, in the tower's order of patches
    palette_CV: torch.Tensor  # float32: what a byte stands for, by colour (`ops.patches`)
    grid_thw_I3: torch.Tensor  # int64
    vision: VisionInputs
    has_images: bool
    image_rows_N: torch.Tensor  # int64: where a picture's tokens stand
    read_rows_Q: torch.Tensor  # int64
    read_segments: SegmentPlan
    emb_index_E: torch.Tensor  # int64
    ids_E3: torch.Tensor  # int64
    counts: RowCounts
    replaced_images: int = 0
    span: int = 1
    labels_E: torch.Tensor | None = None  # int64

    def to(self, device: torch.device) -> PackedBatch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """With this done to every tensor."""
        moved: dict[str, Any] = {
            f.name: function(getattr(self, f.name))
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        for name in ("segments", "read_segments", "vision"):
            moved[name] = getattr(self, name).map(function)
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def patches(self) -> int:
        return self.pixels_PY.shape[0] if self.has_images else 0


def pair_ids(sample: int, number: int, turns_k: np.ndarray) -> np.ndarray:
    """int64 ids of a sample's pairs in its pass `number`: two passes of a small data set may meet in one batch."""
    return ((number % 2**16) * 2**37 + sample) * TURNS_PER_SAMPLE + turns_k


def by_side(
    emb_parts: Sequence[torch.Tensor], packs: Sequence[PackedBatch]
) -> tuple[torch.Tensor, torch.Tensor, RowCounts]:
    """Pooled rows of several packs in the order of one: queries, targets, negatives.

    Returns: (emb_ED, ids_E3, counts), ids on the embeddings' device, wherever the packs are.
    """
    sizes = [(pack.counts.queries, pack.counts.targets, pack.counts.negatives) for pack in packs]
    emb_sides = zip(*(emb.split(size) for emb, size in zip(emb_parts, sizes, strict=True)), strict=True)
    ids_sides = zip(*(pack.ids_E3.split(size) for pack, size in zip(packs, sizes, strict=True)), strict=True)
    emb_ED = torch.cat([part for side in emb_sides for part in side])
    ids_E3 = torch.cat([part for side in ids_sides for part in side]).to(emb_ED.device, non_blocking=True)
    return emb_ED, ids_E3, RowCounts(*(sum(size) for size in zip(*sizes, strict=True)))


@dataclass(frozen=True)
class StepBatch:
    """What one rank works through in one optimizer step, and what it knows of the other ranks."""

    step: int
    epoch: int
    packs: list[PackedBatch]
    plan_digest: int  # of the whole step's plan: equal on every rank, or they are about to do different things
    rows_per_rank: list[RowCounts]
    samples: np.ndarray  # index positions of this rank's examples, for messages
    images: int  # of the global batch
    pairs: int  # of the global batch
    cost: dict[str, float] = field(default_factory=dict)  # plan statistics: pack_fill, imbalance, flops, ...

    def pin_memory(self) -> StepBatch:
        return replace(self, packs=[pack.pin_memory() for pack in self.packs])
