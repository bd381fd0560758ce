"""Miniature MMEB data sets in the layout of either publication, and an encoder with chosen embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from muco_ds.data.schema import Dialogue
from muco_ds.eval.encoder import Encoder

from tiny_models import packer, picture

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
INSTRUCTIONS = ("qry_inst", "tgt_inst")


def ready(text: str, image: str, texts: Any, images: Any) -> dict[str, Any]:
    """A row of TIGER-Lab/MMEB-eval."""
    return dict(zip(COLUMNS, (text, image, texts, images), strict=True))


def instructed(inst: str, text: str, image: str, target: str, texts: Any, images: Any) -> dict[str, Any]:
    """A row of ziyjiang/MMEB_Test_Instruct."""
    return {"qry_inst": inst, "qry_text": text, "qry_img_path": image, "tgt_inst": target} | {
        "tgt_text": texts,
        "tgt_img_path": images,
    }


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], stem: str = "test-00000-of-00001") -> Path:
    """`folder`/test-00000-of-00001.parquet, lists as lists, all else as strings."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = {name for name in rows[0] if any(isinstance(row[name], list) for row in rows)}
    schema = pa.schema([(name, pa.list_(pa.string()) if name in lists else pa.string()) for name in rows[0]])
    path = folder / f"{stem}.parquet"
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path)
    return path


def write_pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name)


@dataclass(frozen=True)
class ChosenEncoder(Encoder):
    """`vectors`: embedding of a text, or of `text|picture.png`; what is missing on the disk is NaN."""

    vectors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)

    def encode(self, dialogues: Sequence[Dialogue], name: str, *, mark_broken: bool = False) -> torch.Tensor:
        assert mark_broken
        names = [said(dialogue) for dialogue in dialogues]
        self.asked.append(names)
        width = len(next(iter(self.vectors.values())))
        rows = [
            self.vectors[name] if all(Path(str(image)).exists() for image in dialogue.images) else [torch.nan] * width
            for name, dialogue in zip(names, dialogues, strict=True)
        ]
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def said(dialogue: Dialogue) -> str:
    """A dialogue by its text and the names of its pictures."""
    return "|".join([packer().template.shown(dialogue.turns[0]), *(Path(str(path)).name for path in dialogue.images)])


def chosen_encoder(vectors: Mapping[str, Sequence[float]], sizes: Sequence[int] = ()) -> ChosenEncoder:
    return ChosenEncoder(lambda pack: pack, packer(), torch.device("cpu"), sizes=sizes, vectors=vectors)  # type: ignore
