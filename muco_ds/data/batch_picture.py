"""A picture of one packed batch: its tokens by role, who attends to whom, and the dialogues it was made of."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from muco_ds.data.images import decode
from muco_ds.data.schema import QUERY, Conversation, Dialogue, PackedBatch, Side, Turn
from muco_ds.data.templates import ChatTemplate

ROLES = {
    "chat format": (176, 182, 190),
    "picture": (242, 158, 56),
    "question": (66, 133, 244),
    "target": (52, 168, 83),
    "pooled token": (200, 30, 60),
}
_CHAT, _PICTURE, _QUESTION, _TARGET, _POOLED = range(len(ROLES))
_PALETTE = np.array(list(ROLES.values()), np.uint8)
_PLOT, _BAR, _PAD, _TEXT_WIDTH, _THUMB = 900, 18, 16, 640, 84
_KINDS = ("query", "target", "hard negative")
_INK, _FAINT = (33, 37, 41), (120, 126, 133)


def batch_picture(batch: PackedBatch, sides: list[Side], template: ChatTemplate) -> Image.Image:
    """Draw a pack and the sides it was packed from.

    The square shows the attention plan: a coloured cell means that the row's token sees the column's token, in the
    colour of what is seen. The bars beside and above it show every token's role.
    """
    role_T = _roles(batch, sides, template)
    mask_TT = batch.segments.dense_mask().numpy()
    pixels = np.where(mask_TT[..., None], _PALETTE[role_T][None], np.uint8(255)).astype(np.uint8)
    plot = Image.fromarray(pixels).resize((_PLOT, _PLOT), Image.Resampling.BOX if len(role_T) > _PLOT else 0)
    panel = _dialogues(batch, sides, template)
    height = max(_PLOT + _BAR + 3 * _PAD + 60, panel.height + 2 * _PAD)
    canvas = Image.new("RGB", (_PLOT + _BAR + _TEXT_WIDTH + 4 * _PAD, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(16)
    left, top = _PAD + _BAR + 4, _PAD + 28 + _BAR + 4
    draw.text((left, _PAD), f"{batch.tokens} tokens in one row: who sees whom", fill=_INK, font=font)
    bar = Image.fromarray(_PALETTE[role_T][None].astype(np.uint8))
    canvas.paste(bar.resize((_PLOT, _BAR), 0), (left, top - _BAR - 4))
    canvas.paste(bar.rotate(-90, expand=True).resize((_BAR, _PLOT), 0), (_PAD, top))
    canvas.paste(plot, (left, top))
    draw.rectangle((left - 1, top - 1, left + _PLOT, top + _PLOT), outline=_FAINT)
    x = left
    for name, colour in ROLES.items():
        draw.rectangle((x, top + _PLOT + 12, x + 14, top + _PLOT + 26), fill=colour)
        draw.text((x + 20, top + _PLOT + 9), name, fill=_INK, font=font)
        x += 44 + int(draw.textlength(name, font=font))
    canvas.paste(panel, (left + _PLOT + 2 * _PAD, _PAD))
    return canvas


def _roles(batch: PackedBatch, sides: list[Side], template: ChatTemplate) -> np.ndarray:
    """Role of each token: texts are found again by walking the dialogues in the order they were packed."""
    ids_T = batch.input_ids_T.numpy()
    role_T = np.full(len(ids_T), _CHAT)
    role_T[ids_T == template.image_pad] = _PICTURE
    if batch.labels_E is not None:
        for start, stop in batch.segments.cu_q_S1.unfold(0, 2, 1)[1::2].tolist():
            role_T[start:stop] = _QUESTION
        role_T[batch.emb_index_E.numpy() + 1] = _TARGET
        role_T[np.isin(ids_T, template.pooled_ids)] = _POOLED
        return role_T
    pooled = sorted(batch.emb_index_E.tolist())
    texts = [(side.kind, turn) for side in sides if isinstance(side.dialogue, Dialogue) for turn in side.dialogue.turns]
    for (kind, turn), row in zip(texts, pooled, strict=True):
        length = len(template.encode_turns([turn])[0])
        end = row - len(template.tail) + 1
        role_T[end - length : end] = _QUESTION if kind == QUERY else _TARGET
    role_T[np.subtract.outer(pooled, range(batch.span)).ravel()] = _POOLED
    return role_T


def _dialogues(batch: PackedBatch, sides: list[Side], template: ChatTemplate) -> Image.Image:
    """The text panel: per dialogue its picture, layout and turns."""
    font, small = ImageFont.load_default(16), ImageFont.load_default(14)
    canvas = Image.new("RGB", (_TEXT_WIDTH, sum(_height(side) for side in sides) + 40), "white")
    draw = ImageDraw.Draw(canvas)
    read = f"{batch.counts.queries} query and {batch.counts.targets} target embeddings"
    if batch.labels_E is not None:
        read = f"{batch.counts.queries} predicted tokens"
    fill = f"{read}, {batch.patches} picture patches"
    draw.text((0, 0), fill, fill=_INK, font=font)
    y = 36
    for side in sides:
        query = side.kind == QUERY
        layout = "each turn sees all before it" if side.history else "each turn sees the prefix and itself"
        title = f"{_KINDS[side.kind]} dialogue: {layout}"
        if isinstance(side.dialogue, Conversation):
            title = "conversation: compressed, then answered"
        colour = ROLES["question" if query else "target"]
        draw.rectangle((0, y, 5, y + _height(side) - 14), fill=colour)
        draw.text((14, y), title, fill=_INK, font=font)
        x = 14
        for ref in side.dialogue.images:
            thumb = decode(ref)
            thumb.thumbnail((_THUMB, _THUMB))
            canvas.paste(thumb, (x, y + 26))
            x += _THUMB + 10
        for n, line in enumerate(_lines(side.dialogue)):
            text = textwrap.shorten(template.shown(line), (_TEXT_WIDTH - x) // 8, placeholder=" ...")
            draw.text((x, y + 26 + 18 * n), text, fill=_INK, font=small)
        y += _height(side)
    return canvas


def _height(side: Side) -> int:
    return 46 + max(18 * len(_lines(side.dialogue)), _THUMB if side.dialogue.images else 0)


def _lines(dialogue: Dialogue | Conversation) -> list[Turn]:
    if isinstance(dialogue, Dialogue):
        return list(dialogue.turns)
    turns = zip(dialogue.questions, dialogue.answers, strict=True)
    return [*([dialogue.context] if dialogue.context else []), *(text for turn in turns for text in turn)]
