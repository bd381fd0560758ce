#!/usr/bin/env python3
"""Does a rank's own memory grow with the number of rows? Indexes data sets of several sizes, collates the same steps.

    python benchmarks/host_memory.py --model demo/model --rows 10000 100000

Prints one JSON line per size: anonymous memory (not the shared, file-backed pages of mapped files) after opening the
data set, its index and plan and collating steps, above that of a process that has only imported the program.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

STEPS, IMAGES = 20, 64


def anonymous_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def write_rows(path: Path, rows: int) -> None:
    """Text-only rows in M3T's columns, seven turns with two paraphrases."""
    writer = None
    for start in range(0, rows, 10_000):
        chunk = [
            {
                "qry": [[f"question {turn} of row {row}", f"row {row}, asked again: {turn}"] for turn in range(7)],
                "pos_text": [f"answer {turn} of row {row}" for turn in range(7)],
                "qry_image_path": "",
            }
            for row in range(start, min(start + 10_000, rows))
        ]
        table = pa.Table.from_pylist(chunk)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def measure(model: str, folder: str, rows: int, queue: multiprocessing.Queue) -> None:
    from transformers import AutoConfig

    from muco_ds.data.collator import Collator
    from muco_ds.data.index import Indexer, open_index
    from muco_ds.data.mixture import Mixture
    from muco_ds.data.plan import Plan
    from muco_ds.data.readers import M3TReader
    from muco_ds.data.stages.muco import MuCoStage
    from muco_ds.flops import FlopsModel
    from muco_ds.models.folder import Processing, Settings

    packer = Processing.load(model, Settings("<|emb|>", 3136, 7056, None)).packer()
    before = anonymous_mib()
    reader = M3TReader(f"{folder}/{rows}.parquet", folder)
    index = open_index(Indexer(reader, packer.template, packer.images), None, builder=True, processes=2)
    stage = MuCoStage(index, reader, packer.template, seed=0, query_history=0.5, target_history=0.5)
    flops = FlopsModel.from_config(AutoConfig.from_pretrained(model), train_vision=True)
    mixture = Mixture([len(index)], [None], images=IMAGES, run=1, seed=0)
    plan = Plan(stage, flops, mixture, pack_tokens=32768, world_size=1)
    collator = Collator(stage, packer)
    for number in range(STEPS):
        step = plan.step(number)
        for pack in step.packs[0]:
            collator(step.samples_B[pack], step.passes_B[pack], number)
    queue.put(anonymous_mib() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder, for its tokenizer")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            write_rows(Path(folder) / f"{rows}.parquet", rows)
            for phase in ("index built here", "index found"):
                queue = context.Queue()
                process = context.Process(target=measure, args=(args.model, folder, rows, queue))
                process.start()
                print(json.dumps({"rows": rows, "phase": phase, "added_mib": round(queue.get(), 1)}), flush=True)
                process.join()


if __name__ == "__main__":
    main()
