"""Examples -> one PackedBatch: every dialogue, both sides, one row, no padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from muco_ds.data.compression import ConversationTemplate
from muco_ds.data.images import ImageError, ImagePipeline, Patches
from muco_ds.data.readers import RowError
from muco_ds.data.schema import QUERY, Conversation, Dialogue, PackedBatch, RowCounts, Side, Turn
from muco_ds.data.segments import SegmentBuilder
from muco_ds.data.stages.base import Stage
from muco_ds.data.templates import ChatTemplate, Rendered
from muco_ds.data.vision import Grid, VisionLayout


class Packer:
    """Renders dialogues into one row. Shared by training, validation and inference, so they can't drift apart.

    Args:
        conversations: renders those, in a stage that has them.
    """

    def __init__(
        self,
        template: ChatTemplate,
        images: ImagePipeline,
        vision: VisionLayout,
        conversations: ConversationTemplate | None = None,
    ) -> None:
        self.template, self.images, self.vision, self.conversations = template, images, vision, conversations
        self.placeholder = images.placeholder()

    def pack(self, sides: list[Side], *, replace_broken: bool, patches: Iterable[Patches] | None = None) -> PackedBatch:
        """Pack dialogues in the given order. None at all give a pack of a few tokens and no pooled row.

        Args:
            replace_broken: put a small grey picture where one does not decode, and count it; else raise an
                ImageError that names it.
            patches: those of all pictures in their order, where they have been made already.
        """
        if not sides:
            return self.spare(conversation=self.conversations is not None)
        text_ids = iter(self.template.encode_turns([text for side in sides for text in _texts(side.dialogue)]))
        row = _Row()
        made = None if patches is None else iter(patches)
        for side in sides:
            pictures = [
                next(made) if made is not None else self._picture(ref, row, replace_broken)
                for ref in side.dialogue.images
            ]
            texts = [next(text_ids) for _ in _texts(side.dialogue)]
            rendered = self._render(side, texts, [picture.grid for picture in pictures])
            row.pooled[side.kind].append(row.segments.rows + rendered.emb_rows)
            row.ids[side.kind].append(side.ids_k3)
            row.segments.add(rendered.segments)
            row.tokens.append(rendered.ids_L)
            row.positions.append(rendered.positions_4L)
            row.pictures += pictures
            if rendered.labels is not None:
                row.labels.append(rendered.labels)
        return self._finish(row)

    def _render(self, side: Side, texts: list[list[int]], grids: list[Grid]) -> Rendered:
        dialogue, merge_size = side.dialogue, self.images.merge_size
        if isinstance(dialogue, Dialogue):
            return self.template.render(texts, grids, merge_size, side.history)
        assert self.conversations is not None
        context, *turns = texts
        questions, answers = turns[0::2], turns[1::2]
        return self.conversations.render(context, questions, answers, grids, merge_size, unfinished=dialogue.unfinished)

    def spare(self, *, conversation: bool = False) -> PackedBatch:
        """What a rank works on while others have one pack more: next to nothing, but a forward like any other.

        Args:
            conversation: the others' packs are of conversations.
        """
        filler = Side(QUERY, Dialogue(("-",)), history=True, ids_k3=np.zeros((1, 3), np.int64))
        batch = self.pack([filler], replace_broken=False)
        return replace(
            batch,
            emb_index_E=batch.emb_index_E[:0],
            ids_E3=batch.ids_E3[:0],
            counts=RowCounts(0, 0),
            labels_E=torch.zeros(0, dtype=torch.int64) if conversation else None,
        )

    def _picture(self, ref, row: _Row, replace_broken: bool) -> Patches:  # type: ignore[no-untyped-def]
        try:
            return self.images.patches(ref)
        except ImageError as error:
            if not replace_broken:
                raise ImageError(f"picture {ref}: {error}") from error
            row.replaced += 1
            return self.placeholder

    def _finish(self, row: _Row) -> PackedBatch:
        pictures = row.pictures or [self.placeholder]
        grids = [picture.grid for picture in pictures]
        ids_T, segments, span = np.concatenate(row.tokens), row.segments.build(), len(self.template.pooled_ids)
        emb_index_E = np.concatenate([rows for kind in row.pooled for rows in kind])
        rows_Q = emb_index_E if row.labels else (emb_index_E[:, None] + np.arange(1 - span, 1)).reshape(-1)
        return PackedBatch(
            input_ids_T=torch.from_numpy(ids_T),
            position_ids_41T=torch.from_numpy(np.concatenate(row.positions, axis=1))[:, None],
            segments=segments,
            pixels_PY=torch.from_numpy(np.concatenate([picture.pixels_PY for picture in pictures])),
            palette_CV=torch.from_numpy(self.images.palette_CV),
            grid_thw_I3=torch.tensor(grids),
            vision=self.vision.inputs(grids),
            has_images=bool(row.pictures),
            image_rows_N=torch.from_numpy(np.flatnonzero(ids_T == self.template.image_pad)),
            read_rows_Q=torch.from_numpy(rows_Q),
            read_segments=segments.of_rows(rows_Q),
            emb_index_E=torch.from_numpy(emb_index_E),
            ids_E3=torch.from_numpy(np.concatenate([ids for kind in row.ids for ids in kind])),
            counts=RowCounts(*(sum(map(len, kind)) for kind in row.pooled)),
            replaced_images=row.replaced,
            span=span,
            labels_E=torch.from_numpy(np.concatenate(row.labels)) if row.labels else None,
        )


@dataclass
class _Row:
    """A pack under construction; `pooled` and `ids` are kept apart by kind: queries, targets, negatives."""

    segments: SegmentBuilder = field(default_factory=SegmentBuilder)
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    pictures: list[Patches] = field(default_factory=list)
    pooled: tuple[list[np.ndarray], ...] = field(default_factory=lambda: ([], [], []))
    ids: tuple[list[np.ndarray], ...] = field(default_factory=lambda: ([], [], []))
    labels: list[np.ndarray] = field(default_factory=list)
    replaced: int = 0


def _texts(dialogue: Dialogue | Conversation) -> list[Turn]:
    """All texts of a dialogue, in a fixed order."""
    if isinstance(dialogue, Dialogue):
        return list(dialogue.turns)
    turns = zip(dialogue.questions, dialogue.answers, strict=True)
    return [dialogue.context, *(text for turn in turns for text in turn)]


class Collator:
    """Sample positions of one pack of a step -> PackedBatch, with their pass's draws."""

    def __init__(self, stage: Stage, packer: Packer) -> None:
        self.stage, self.packer = stage, packer

    def __call__(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> PackedBatch:
        return self.packer.pack(self.sides(samples_B, passes_B, step), replace_broken=True)

    def sides(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> list[Side]:
        """The dialogues of these samples, in packing order."""
        sides: list[Side] = []
        for sample, number in zip(samples_B.tolist(), passes_B.tolist(), strict=True):
            try:
                sides += self.stage.sides(sample, number, step)
            except RowError as error:
                raise RowError(f"{self.stage.index.name(sample)}: {error}") from error
        return sides
