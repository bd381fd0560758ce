"""A picture of a few validation queries with their best answers, for TensorBoard."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from muco_ds.data.images import decode
from muco_ds.data.schema import Turn
from muco_ds.eval.m3t import M3TTask
from muco_ds.eval.retrieval import Ranking

_THUMB, _WIDTH, _MARGIN = 160, 760, 8
_RIGHT, _WRONG, _INK = (20, 120, 40), (180, 40, 30), (30, 30, 30)


def retrieval_picture(task: M3TTask, ranking: Ranking, queries: int = 6) -> np.ndarray:
    """uint8 [height, width, 3]: per query its picture, question, top answers (green where right) and the truth."""
    font = ImageFont.load_default(15)
    rows = [_row(task, ranking, i, font) for i in _spread(len(task.answers), queries)]
    return np.concatenate([np.asarray(row) for row in rows])


def _spread(total: int, count: int) -> list[int]:
    """Positions over the whole set that do not all fall on the same kind of turn."""
    return sorted({(i * total) // count + i for i in range(count) if (i * total) // count + i < total})


def _row(task: M3TTask, ranking: Ranking, i: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    record, question = task.questions()[i]
    canvas = Image.new("RGB", (_WIDTH, _THUMB + 2 * _MARGIN), "white")
    if record.query_images:
        thumb = decode(record.query_images[0])
        thumb.thumbnail((_THUMB, _THUMB))
        canvas.paste(thumb, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(canvas)
    lines = [(_shorten(question), _INK)]
    for index, score in zip(ranking.top_index_Qk[i].tolist(), ranking.top_score_Qk[i].tolist(), strict=True):
        colour = _RIGHT if index == task.answers[i] else _WRONG
        lines.append((f"{score:.3f}  {_shorten(task.candidates[index].turns[0])}", colour))
    lines.append((f"truth  {_shorten(task.candidates[task.answers[i]].turns[0])}", _INK))
    for n, (text, colour) in enumerate(lines):
        draw.text((_THUMB + 2 * _MARGIN, _MARGIN + n * 30), text, fill=colour, font=font)
    return canvas


def _shorten(text: Turn) -> str:
    return textwrap.shorten(str(text), 72, placeholder=" ...")
