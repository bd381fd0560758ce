"""Files of items -> embeddings in a file or in a folder of shards, with a report, in bounded memory, resumable.

Shape suffixes: L lines, N rows, D embedding size.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.files import beside, replacing
from muco_ds.models.embedder import Embedder
from muco_ds.models.item_files import ItemFiles
from muco_ds.models.shards import Layout, Shards, encode_shards


@dataclass(frozen=True)
class Output:
    """What is written: one .npy file, or a folder of shards. Until it is complete its shards lie beside it."""

    path: Path
    format: Literal["npy", "parquet"]

    @property
    def one_file(self) -> bool:
        return self.path.suffix == ".npy"

    @property
    def broken(self) -> Path:
        """The list of what could not be encoded."""
        return beside(self.path, "broken.jsonl") if self.one_file else self.path / "broken.jsonl"

    @property
    def work(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    def put(self, shards: Shards, beside_them: dict[str, str]) -> None:
        """Give the embeddings their place; `beside_them` are texts by the ending of their file's name.

        What lies beside the embeddings comes first: where they are, it is. Raises UserError.
        """
        try:
            (self._put_file if self.one_file else self._put_folder)(shards, beside_them)
            shutil.rmtree(self.work, ignore_errors=True)
        except OSError as error:
            raise UserError(f"can't write '{self.path}' ({error.strerror or error})") from error

    def _put_file(self, shards: Shards, beside_them: dict[str, str]) -> None:
        for ending in ("rows.npy", "broken.jsonl"):  # of an earlier output
            beside(self.path, ending).unlink(missing_ok=True)
        if len(shards) != shards.layout.lines:
            with replacing(beside(self.path, "rows.npy")) as work, open(work, "wb") as file:
                _header(file, "<i8", (shards.layout.lines + 1,))
                for shard in range(shards.layout.shards):
                    file.write(shards.line_starts(shard)[:-1].astype("<i8").tobytes())
                file.write(np.int64(len(shards)).tobytes())
        for ending, text in beside_them.items():
            with replacing(beside(self.path, ending)) as work:
                work.write_text(text, encoding="utf-8")
        with replacing(self.path) as work, open(work, "wb") as file:
            _header(file, "<f4", (len(shards), shards.width))
            for part_ND in shards.parts():
                file.write(part_ND.astype("<f4").tobytes())

    def _put_folder(self, shards: Shards, beside_them: dict[str, str]) -> None:
        made = shards.folder
        if self.format == "parquet":
            made = self.path.with_name(f".{self.path.name}.parquet.partial")
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            for shard, part_ND in enumerate(shards.parts()):
                pq.write_table(_table(shards, shard, part_ND), made / f"{shard:05}.parquet", write_page_checksum=True)
        for ending in ("report.json", "broken.jsonl"):  # of a run that ended here
            (made / ending).unlink(missing_ok=True)
        for ending, text in beside_them.items():
            (made / ending).write_text(text, encoding="utf-8")
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(made, self.path)


def _header(file: Any, kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})


def _table(shards: Shards, shard: int, part_ND: np.ndarray) -> pa.Table:
    starts_L1 = shards.line_starts(shard)
    counts_L = np.diff(starts_L1)
    line_N = np.repeat(np.arange(len(counts_L)), counts_L)
    flat = pa.array(np.asarray(part_ND, np.float32).reshape(-1))
    columns = {
        "line": pa.array(line_N + shards.layout.bounds(shard)[0]),
        "question": pa.array(np.arange(len(line_N)) - (starts_L1[:-1] - starts_L1[0])[line_N], pa.int32()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, shards.width),
    }
    return pa.table(columns)


def encode_file(
    embedder: Embedder,
    items: ItemFiles,
    output: Output,
    *,
    key: str,
    device: torch.device,
    pack_tokens: int | None,
    dim: int,
    skip_broken: bool,
) -> dict[str, Any]:
    """Write `output`, where an earlier run of the same `key` stopped, and what belongs beside it. Collective.

    Returns:
        on rank 0, the report: lines, rows, dim, lines that could not be used and why, seconds of this run.
    Raises:
        UserError: a picture that can't be used, or an embedding that is not finite, where `skip_broken` is off.
    """
    assert embedder.packer is not None
    start = time.monotonic()
    shards = encode_shards(
        embedder,
        embedder.packer,
        items,
        output.work,
        Layout(key, len(items), dim, "float32"),
        device=device,
        pack_tokens=pack_tokens,
        mark_broken=skip_broken,
        progress="encoding",
        located=items.located,
    )
    report: dict[str, Any] = {}

    def finish() -> None:
        broken = [items.broken(int(line)) for line in np.unique(shards.lines_of(shards.broken_rows()))]
        report.update(
            lines=len(items),
            rows=len(shards),
            dim=dim,
            broken=len(broken),
            reasons=dict(Counter(entry["reason"].partition(" (")[0] for entry in broken).most_common()),
            seconds=round(time.monotonic() - start, 1),
            key=key,
        )
        texts = {"report.json": json.dumps(report, indent=2) + "\n"}
        if broken:
            texts["broken.jsonl"] = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in broken)
        output.put(shards, texts)

    env.on_main(finish)
    return report
