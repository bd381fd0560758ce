"""What the step benchmark trains on: rows in M3T's columns, with the pictures' sizes and the texts' lengths drawn.

The shares of aspect ratios and the ranges of lengths are those of `plan.py`: assumptions, M3T itself is not at hand.
Texts are random words, cut to the drawn number of tokens; a picture's content does not change what a step costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers import PreTrainedTokenizerFast

from muco_ds.data.readers import IMAGE_MARK, M3T_SCHEMA
from muco_ds.models.demo_model import ENGLISH

from plan import ASPECTS, QUESTION_TOKENS, TARGET_TOKENS


@dataclass(frozen=True)
class Workload:
    """A kind of example: its turns, and which sides show a picture."""

    turns: int
    query_picture: bool = True
    target_picture: bool = False


WORKLOADS = {
    "seven_turns": Workload(turns=7),
    "one_turn": Workload(turns=1),
    "text_only": Workload(turns=7, query_picture=False),
    "pictures_both_sides": Workload(turns=1, target_picture=True),
}
MAIN = "seven_turns"


@dataclass(frozen=True)
class Pictures:
    """Pixels of the short side, and least and most pixels of a resized picture."""

    short_side: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def scaled(cls, short_side: int) -> Pictures:
        """The recipe's limits (short side 640, 256 to 1,280 tokens of 28 x 28 pixels) for another short side."""
        share = (short_side / 640) ** 2
        return cls(short_side, max(4, round(256 * share)) * 28**2, max(4, round(1280 * share)) * 28**2)


def write_rows(
    folder: Path, workload: Workload, pictures: Pictures, tokenizer: PreTrainedTokenizerFast, examples: int, seed: int
) -> None:
    """`folder`/rows.parquet and the JPEG pictures it names. The same arguments give the same files."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(examples):
        questions = [_text(rng, tokenizer, *QUESTION_TOKENS) for _ in range(workload.turns)]
        # One turn is a retrieval pair: its target is a caption, the last kind.
        targets = [_text(rng, tokenizer, *bounds) for bounds in TARGET_TOKENS[-workload.turns :]]
        query = _picture(rng, folder / f"query_{number}.jpg", pictures) if workload.query_picture else ""
        target = _picture(rng, folder / f"target_{number}.jpg", pictures) if workload.target_picture else ""
        rows.append(
            {
                "qry": [[(IMAGE_MARK if query else "") + question] for question in questions],
                "qry_sentence": "",
                "qry_image_path": query,
                "pos_text": targets,
                "pos_sentence": targets,
                "pos_image_path": target,
                "neg_text": [""] * workload.turns,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=M3T_SCHEMA), folder / "rows.parquet")


def _text(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, least: int, most: int) -> str:
    """Words whose tokens are as many as drawn, give or take the last word's cut."""
    wanted = int(rng.integers(least, most + 1))
    words = " ".join(rng.choice(ENGLISH.split(), 2 * wanted))
    return str(tokenizer.decode(tokenizer(words, add_special_tokens=False)["input_ids"][:wanted]))


def _picture(rng: np.random.Generator, path: Path, pictures: Pictures) -> str:
    """A JPEG of a drawn aspect ratio with the recipe's short side: smooth noise, so that it is as large as a photo."""
    named = float(rng.choice([*ASPECTS, 0.0], p=[*ASPECTS.values(), 1 - sum(ASPECTS.values())]))
    aspect = named or float(np.clip(np.exp(rng.normal(0, 0.35)), 0.4, 2.5))
    # Whole tokens, where the short side is: libraries that resize in their own way then have nothing to resize.
    short, unit = pictures.short_side, 28 if pictures.short_side % 28 == 0 else 1
    long = unit * round(short * max(aspect, 1 / aspect) / unit)
    size = (long, short) if aspect > 1 else (short, long)
    small = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return path.name
