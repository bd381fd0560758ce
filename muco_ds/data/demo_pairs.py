"""Single pairs about the rendered scenes, in the columns of TIGER-Lab/MMEB-train, with captions and a wrong answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from muco_ds.data.readers import IMAGE_MARK

COLUMNS = ("qry", "qry_image_path", "qry_sentence", "pos_text", "pos_image_path", "pos_sentence")
PAIR_SCHEMA = pa.schema([(name, pa.string()) for name in (*COLUMNS, "neg_text", "neg_image_path")])
_LOOKED_AT = 16  # rows among which a wrong answer is sought


def write_pairs(path: Path, rows: Sequence[dict[str, Any]], seed: int, *, all_kinds: bool) -> None:
    """Write one pair for each M3T row of the demo, or one of each kind, a function of the arguments alone.

    Seven kinds ask one of the row's questions about its picture, with another scene's answer to the same kind of
    question as hard negative; the eighth seeks the picture by its caption, with another picture as hard negative.
    """
    rng = random.Random(f"pairs {seed}")
    kinds = len(rows[0]["pos_text"]) + 1
    slots = [range(kinds) if all_kinds else [rng.randrange(kinds)] for _ in rows]
    pairs = [_pair(row, slot, rows, rng) for row, chosen in zip(rows, slots, strict=True) for slot in chosen]
    pq.write_table(pa.Table.from_pylist(pairs, schema=PAIR_SCHEMA), path, write_page_checksum=True)


def _pair(row: dict[str, Any], slot: int, rows: Sequence[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    others = rng.sample(rows, min(_LOOKED_AT, len(rows)))
    if slot == len(row["pos_text"]):
        wrong = next((other["qry_image_path"] for other in others if other is not row), "")
        return {
            "qry": f"{IMAGE_MARK}Find the picture: {row['qry_sentence']}\n",
            "qry_image_path": "",
            "qry_sentence": "",
            "pos_text": f"{IMAGE_MARK}Represent the picture.\n",
            "pos_image_path": row["qry_image_path"],
            "pos_sentence": row["qry_sentence"],
            "neg_text": f"{IMAGE_MARK}Represent the picture.\n" if wrong else "",
            "neg_image_path": wrong,
        }
    answer = row["pos_text"][slot]
    return {
        "qry": rng.choice(row["qry"][slot]),
        "qry_image_path": row["qry_image_path"],
        "qry_sentence": row["qry_sentence"],
        "pos_text": answer,
        "pos_image_path": "",
        "pos_sentence": "",
        "neg_text": next((o["pos_text"][slot] for o in others if o["pos_text"][slot] != answer), ""),
        "neg_image_path": "",
    }
