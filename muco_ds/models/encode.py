"""Dialogues -> embeddings without gradients: packed by token budget, shared out over the ranks, results in input order.

Three things go on at once: a thread reads the next window of dialogues, tokenises it and plans its packs; a few decode
the pictures of the next packs; the caller's computes.

Shape suffixes: N embeddings of a window's or of all dialogues, E of one pack, D embedding size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from muco_ds.data.collator import Packer
from muco_ds.data.images import ImageError, Patches
from muco_ds.data.schema import QUERY, Dialogue, PackedBatch, Side
from muco_ds.distributed import env
from muco_ds.distributed.gather import gather_rows
from muco_ds.errors import UserError
from muco_ds.models.encode_plan import Piece, Plan, plan_packs

WINDOW_DIALOGUES = 8192
"""Dialogues a rank plans at a time: enough to sort by length, few enough for their tokens to lie in memory."""

WINDOW_PIXELS = 2**28
"""Pixels of decoded pictures in a window that is read from an iterator: 0.8 GB, and two or three windows are alive."""

PACK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Token budget of a pack where none is given (docs/log.md)."""

_DECODERS = min(8, os.cpu_count() or 1)
_PACKS_AHEAD = 3

Model = Callable[[PackedBatch], torch.Tensor]
T = TypeVar("T")


def encode_dialogues(
    model: Model,
    packer: Packer,
    dialogues: Sequence[Dialogue],
    *,
    pack_tokens: int | None,
    device: torch.device,
    shared: bool,
    progress: str | None = None,
    mark_broken: bool = False,
) -> torch.Tensor:
    """Embeddings of every turn of every dialogue, [N, D] float32 on the CPU, in order, the same on every rank.

    Turns are isolated: several questions about one picture share it and are otherwise encoded as if alone. Nothing else
    depends on what is encoded together either.

    Args:
        pack_tokens: token budget of one forward; None: that of the device.
        shared: every rank calls this with the same dialogues; each encodes a share, all make equally many forwards
            (ZeRO-3 needs that). False: this process encodes all of them by itself.
        progress: description of a progress bar on rank 0; None for none.
        mark_broken: rows of a dialogue with a picture that can't be used are NaN; else that is an error.
    Raises:
        UserError: on every rank, naming a picture that can't be used.
    """
    size = WINDOW_DIALOGUES * (env.world_size() if shared else 1)
    windows = (dialogues[start : start + size] for start in range(0, max(len(dialogues), 1), size))
    total = sum(len(dialogue.turns) for dialogue in dialogues)
    with tqdm(total=total, desc=progress, unit="row", disable=progress is None or not env.is_main()) as bar:
        parts = encode_windows(
            model,
            packer,
            windows,
            pack_tokens=pack_tokens,
            device=device,
            shared=shared,
            mark_broken=mark_broken,
            progress=bar,
        )
        return torch.cat(list(parts))


def windows_of(dialogues: Iterable[Dialogue]) -> Iterator[list[Dialogue]]:
    """As many as one rank plans at a time, or fewer where their pictures are decoded already, until there are none."""
    window: list[Dialogue] = []
    pixels = 0
    for dialogue in dialogues:
        window.append(dialogue)
        pixels += sum(image.width * image.height for image in dialogue.images if isinstance(image, Image.Image))
        if len(window) == WINDOW_DIALOGUES or pixels >= WINDOW_PIXELS:
            yield window
            window, pixels = [], 0
    if window:
        yield window


def encode_windows(
    model: Model,
    packer: Packer,
    windows: Iterable[Sequence[Dialogue]],
    *,
    pack_tokens: int | None,
    device: torch.device,
    shared: bool,
    mark_broken: bool = False,
    progress: tqdm | None = None,
) -> Iterator[torch.Tensor]:
    """As `encode_dialogues`, window by window: [N, D] of each, for more dialogues than fit in memory.

    `windows` is read ahead, in another thread. Raises UserError for `pack_tokens` that are no number above 0, too.
    """
    if pack_tokens is not None and (not isinstance(pack_tokens, (int, np.integer)) or pack_tokens < 1):
        raise UserError(f"pack_tokens is {pack_tokens!r}: give a whole number, at least 1")
    pack_tokens = pack_tokens or PACK_TOKENS["cuda" if device.type == "cuda" else "cpu"]
    with ThreadPoolExecutor(1) as planner, ThreadPoolExecutor(_DECODERS) as decoders:
        crew = _Crew(packer, decoders, pack_tokens, shared, mark_broken, pin=device.type == "cuda")
        parts: list[torch.Tensor] = []
        order: list[int] = []
        for window_round in _ahead(crew.rounds(planner, windows), _PACKS_AHEAD):
            # A rank that left alone would leave the others waiting in the model.
            with env.agreement() if shared else nullcontext():
                pack, broken_E = window_round.pack.result()
            with torch.no_grad():
                emb_ED = model(pack.to(device)).float()
            if broken_E:
                emb_ED[torch.tensor(broken_E, device=emb_ED.device)] = torch.nan
            rows = window_round.rows
            parts.append(gather_rows(emb_ED, [len(of_rank) for of_rank in rows]) if shared else emb_ED)
            order += [row for of_rank in rows for row in of_rank]
            if progress is not None:
                progress.update(sum(map(len, rows)))
            if window_round.last:
                # One copy a window: a copy of each pack would wait for its forward before the next is launched.
                emb_ND = torch.cat(parts).cpu()
                found_ND = emb_ND.new_full((window_round.plan.rows, emb_ND.shape[1]), torch.nan)
                found_ND[torch.tensor(order, dtype=torch.int64)] = emb_ND
                yield found_ND
                parts, order = [], []


@dataclass(frozen=True)
class _Round:
    """One forward on every rank: this rank's pack and its broken rows, and the rows of the window on each rank."""

    plan: Plan
    pack: Future[tuple[PackedBatch, list[int]]]
    rows: list[list[int]]
    last: bool


class _Crew:
    """Plans windows and builds this rank's packs, in the background."""

    def __init__(
        self,
        packer: Packer,
        decoders: ThreadPoolExecutor,
        pack_tokens: int,
        shared: bool,
        mark_broken: bool,
        pin: bool,
    ) -> None:
        self.packer, self.decoders, self.pack_tokens = packer, decoders, pack_tokens
        self.shared, self.mark_broken, self.pin = shared, mark_broken, pin
        # Made here because it is tokenised: tokenising is left to one thread at a time.
        self.spare = packer.spare()

    def rounds(self, planner: ThreadPoolExecutor, windows: Iterable[Sequence[Dialogue]]) -> Iterator[_Round]:
        """Every window's rounds; this rank's pack of a round is being built when it comes out."""
        world_size, rank = (env.world_size(), env.rank()) if self.shared else (1, 0)
        source = iter(windows)

        def next_plan() -> Plan | None:
            dialogues = next(source, None)
            if dialogues is None:
                return None
            return plan_packs(self.packer, dialogues, self.pack_tokens, self.mark_broken, self.decoders.map)

        def plans() -> Iterator[Future[Plan | None]]:
            while True:
                yield planner.submit(next_plan)

        for future in _ahead(plans(), 1):
            with env.agreement() if self.shared else nullcontext():
                plan = future.result()
            if plan is None:
                return
            packs = plan.packs or [[]]
            count = -(-len(packs) // world_size)
            for i in range(count):
                # A rank without a pack of its own in the last round still takes part in what is collective.
                members = [*packs[i * world_size : (i + 1) * world_size], *[[]] * world_size][:world_size]
                rows = [[row for piece in pack for row in piece.rows] for pack in members]
                yield _Round(plan, self._build(members[rank]), rows, last=i == count - 1)

    def _build(self, pieces: list[Piece]) -> Future[tuple[PackedBatch, list[int]]]:
        decode = self.packer.images.patches
        pictures = [[(image, self.decoders.submit(decode, image)) for image in piece.images] for piece in pieces]

        def build() -> tuple[PackedBatch, list[int]]:
            # Its pictures came into the queue before it: no thread waits for what stands behind itself.
            patches: list[Patches] = []
            broken: list[int] = []
            row = 0
            for piece, pictured in zip(pieces, pictures, strict=True):
                fine = True
                for image, future in pictured:
                    try:
                        patches.append(future.result())
                    except ImageError as error:
                        if not self.mark_broken:
                            raise UserError(f"picture {image}: {error}") from error
                        patches.append(self.packer.placeholder)
                        fine = False
                broken += [] if fine else range(row, row + len(piece.rows))
                row += len(piece.rows)
            sides = [_side(piece) for piece in pieces]
            pack = self.packer.pack(sides, replace_broken=False, patches=patches) if sides else self.spare
            return pack.pin_memory() if self.pin else pack, broken

        return self.decoders.submit(build)


def _side(piece: Piece) -> Side:
    dialogue = Dialogue(tuple(piece.turns), piece.images)
    return Side(QUERY, dialogue, history=False, ids_k3=np.zeros((len(piece.turns), 3), np.int64))


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, taken from their source `count` before they are given on."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
