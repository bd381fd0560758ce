"""Mining of hard negatives: encode targets and questions, on all ranks, then search and write, on rank 0.

Shape suffixes: Q queries (turns of usable rows), R usable rows, C distinct targets.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.collator import Packer
from muco_ds.data.images import ImageError
from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import PackedBatch
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.files import beside, replacing
from muco_ds.mining.columns import write_rows
from muco_ds.mining.corpus import Corpus, Turns
from muco_ds.mining.search import Asked, Mined, Rule, mine
from muco_ds.mining.vectors import Vectors, encode_to
from muco_ds.models.encode import WINDOW_DIALOGUES


@dataclass(frozen=True)
class Task:
    """What to mine for (the first of `sources`) and among."""

    turns: Turns
    corpus: Corpus
    answer_Q: np.ndarray
    output: Path

    @classmethod
    def of(cls, reader: M3TReader, others: list[M3TReader], output: Path, *, progress: bool) -> Task:
        """Read the rows. Raises UserError when there is nothing to mine for, or nothing wrong to be found."""
        sources = [Turns.of(one, progress=progress) for one in (reader, *others)]
        return cls(sources[0], *Corpus.of(sources), output)


def report_path(output: Path) -> Path:
    """Where the report about a mined file lies."""
    return beside(output, "json")


def mine_negatives(
    model: Callable[[PackedBatch], torch.Tensor],
    packer: Packer,
    task: Task,
    rule: Rule,
    *,
    provenance: dict[str, Any],
    pack_tokens: int,
    device: torch.device,
    progress: bool,
) -> dict[str, Any]:
    """Write `task.output` and its report; returns the report, on rank 0. Collective.

    Raises:
        UserError: on every rank; the output is then what it was.
    """
    report: dict[str, Any] = {}
    with ExitStack() as stack:
        vectors: list[Vectors | None] = [None, None]
        with env.agreement():
            if env.is_main():
                folder = stack.enter_context(_work_folder(task.output))
                vectors = [Vectors(Path(folder) / name) for name in ("targets", "queries")]
        size = WINDOW_DIALOGUES * env.world_size()
        work = (
            ("targets", len(task.corpus), task.corpus.targets(size)),
            ("queries", len(task.turns.row_N), task.turns.queries(size)),
        )
        for target, (name, total, chunks) in zip(vectors, work, strict=True):
            bar = tqdm(total=total, desc=f"encoding {name}", unit="row", disable=not (progress and env.is_main()))
            encode_to(target, chunks, model, packer, pack_tokens=pack_tokens, device=device, progress=bar)

        def search_and_write() -> None:
            targets, queries = vectors
            assert targets is not None and queries is not None
            report.update(_search_and_write(packer, task, rule, provenance, queries, targets, device, progress))

        env.on_main(search_and_write)
    return report


def _work_folder(output: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise UserError(f"can't write to '{output.parent}' ({error.strerror})") from error


def _search_and_write(
    packer: Packer,
    task: Task,
    rule: Rule,
    provenance: dict[str, Any],
    queries: Vectors,
    targets: Vectors,
    device: torch.device,
    progress: bool,
) -> dict[str, Any]:
    turns, corpus = task.turns, task.corpus
    rows_R, row_Q = np.unique(turns.row_N, return_inverse=True)
    broken_R = np.zeros(len(rows_R), bool)
    np.logical_or.at(broken_R, row_Q, queries.broken | targets.broken[task.answer_Q])
    bad_rows = turns.bad_rows | {row: _why_broken(packer, turns, row) for row in rows_R[broken_R].tolist()}
    if broken_R.all():
        row, reason = min(bad_rows.items())
        raise UserError(f"{turns.reader.files[0]}: no usable row; row {row}: {reason}")
    usable_C = corpus.writable_C & ~targets.broken
    asked = Asked(row_Q, turns.query_N, task.answer_Q, ~broken_R[row_Q], usable_C)
    mined = mine(queries, targets, asked, rule, device=device, progress=progress)

    place_of = dict(zip(rows_R.tolist(), range(len(rows_R)), strict=True))

    def negatives_of(row: int) -> list[tuple[str, str]]:
        place = place_of.get(row)
        return [] if place is None else [corpus.negative(i) for i in mined.negatives_Rn[place].tolist() if i >= 0]

    report = {
        **provenance,
        "rule": asdict(rule),
        "targets": {"distinct": len(corpus), "usable_as_negatives": int(usable_C.sum())},
        **_counts(mined, ~broken_R, rule),
        "bad_rows": [{"row": row, "reason": bad_rows[row]} for row in sorted(bad_rows)],
    }
    with replacing(task.output) as rows_file:
        write_rows(turns.reader, negatives_of, rows_file)
        # The rows come last: where they are, the report is.
        with replacing(report_path(task.output)) as report_file:
            report_file.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _counts(mined: Mined, usable_R: np.ndarray, rule: Rule) -> dict[str, Any]:
    filled_R = mined.filled()[usable_R]
    total = int(filled_R.sum())
    return {
        "candidates": {
            "looked_at": mined.looked_at,
            "right": mined.right,
            "skipped": mined.skipped,
            "too_near": mined.too_near,
        },
        "rows": {
            "usable": len(filled_R),
            "full": int((filled_R == rule.negatives).sum()),
            "fewer": int(((filled_R > 0) & (filled_R < rule.negatives)).sum()),
            "none": int((filled_R == 0).sum()),
        },
        "negatives": total,
        "mean_score": {
            "own_target": mined.positive_sum / max(mined.queries, 1),
            "negative": mined.negative_sum / max(total, 1),
        },
    }


def _why_broken(packer: Packer, turns: Turns, row: int) -> str:
    record = turns.reader.record(row)
    for path in (*record.query_images, *record.target_images):
        try:
            packer.images.patches(path)
        except ImageError as error:
            return f"picture {path}: {error}"
    return "an embedding of it is not finite"
