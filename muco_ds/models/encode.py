"""Dialogues -> embeddings without gradients: packed by token budget, shared out over the ranks, results in input order.

Shape suffixes: N embeddings of all dialogues, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.collator import Packer
from muco_ds.data.images import ImageError, read_size
from muco_ds.data.schema import QUERY, Dialogue, ImageRef, PackedBatch, Side
from muco_ds.distributed import env
from muco_ds.distributed.gather import gather_rows
from muco_ds.errors import UserError


@torch.no_grad()
def encode_dialogues(
    model: Callable[[PackedBatch], torch.Tensor],
    packer: Packer,
    dialogues: Sequence[Dialogue],
    *,
    pack_tokens: int,
    device: torch.device,
    shared: bool,
    progress: str | None = None,
    mark_broken: bool = False,
) -> torch.Tensor:
    """Embeddings of every turn of every dialogue, [N, D] float32 on the CPU, in order, the same on every rank.

    Turns are isolated: several questions about one picture share it and are otherwise encoded as if alone.

    Args:
        shared: every rank calls this with the same dialogues; each encodes a share, all make equally many forwards
            (ZeRO-3 needs that). False: this process encodes all of them by itself.
        progress: description of a progress bar on rank 0; None for none.
        mark_broken: rows of a dialogue with a picture that can't be used are NaN; else that is an error.
    Raises:
        UserError: on every rank, naming a picture that can't be used.
    """
    packs = split_by_tokens(packer, dialogues, pack_tokens, mark_broken)
    world_size, rank = (env.world_size(), env.rank()) if shared else (1, 0)
    rounds = range(-(-len(packs) // world_size))
    parts: list[torch.Tensor] = []
    for round_index in tqdm(rounds, desc=progress, unit="pack", disable=progress is None or not env.is_main()):
        # In the last round ranks without a pack of their own repeat the first, so that none is missing in a collective.
        mine = [packs[i] if (i := round_index * world_size + r) < len(packs) else packs[0] for r in range(world_size)]
        # A rank that left alone would leave the others waiting in the model.
        with env.agreement() if shared else nullcontext():
            pack = _packed(packer, [dialogues[i] for i in mine[rank]], mark_broken)
        emb_ED = model(pack.to(device)).float()
        if pack.replaced_images:
            broken_E = [_is_broken(packer, dialogues[i]) for i in mine[rank] for _ in dialogues[i].turns]
            emb_ED[torch.tensor(broken_E, device=emb_ED.device)] = torch.nan
        counts = [sum(len(dialogues[i].turns) for i in pack) for pack in mine]
        parts.append((gather_rows(emb_ED, counts) if shared else emb_ED).cpu())
    total = sum(len(dialogue.turns) for dialogue in dialogues)
    return torch.cat(parts)[:total]


def split_by_tokens(
    packer: Packer, dialogues: Sequence[Dialogue], pack_tokens: int, mark_broken: bool = False
) -> list[list[int]]:
    """Consecutive dialogues grouped into packs of at most `pack_tokens` (a longer one stands alone)."""
    texts = [turn for dialogue in dialogues for turn in dialogue.turns]
    counts = iter([len(ids) for ids in packer.template.encode_turns(texts)])
    packs: list[list[int]] = []
    room = 0
    for i, dialogue in enumerate(dialogues):
        text = np.array([sum(next(counts) for _ in dialogue.turns)])
        vision = np.array([sum(_vision_tokens(packer, image, mark_broken) for image in dialogue.images)])
        turns = np.array([len(dialogue.turns)])
        need = int(packer.template.count(text, turns, vision, np.array([False]))[0][0])
        if not packs or need > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(i)
        room -= need
    return packs


def _packed(packer: Packer, dialogues: list[Dialogue], replace_broken: bool) -> PackedBatch:
    try:
        return packer.pack([_side(dialogue) for dialogue in dialogues], replace_broken=replace_broken)
    except ImageError as error:
        raise UserError(str(error)) from error


def _vision_tokens(packer: Packer, image: ImageRef, replace_broken: bool) -> int:
    try:
        size = read_size(image) if isinstance(image, str) else image.size
        return packer.images.tokens(packer.images.grid(*size)) + 2
    except ImageError as error:
        if replace_broken:
            return 3  # the placeholder's one, with its start and end
        raise UserError(f"picture {image}: {error}") from error


def _is_broken(packer: Packer, dialogue: Dialogue) -> bool:
    try:
        for image in dialogue.images:
            packer.images.patches(image)
    except ImageError:
        return True
    return False


def _side(dialogue: Dialogue) -> Side:
    return Side(QUERY, dialogue, history=False, ids_k3=np.zeros((len(dialogue.turns), 3), np.int64))
