"""Build the length index of a recipe's data ahead of a run, and say what the data is like.

    python tools/index_data.py --config recipe.yaml [--section.key value ...] [--processes N] [--rebuild]

reads data.train and, if set, data.val: picture sizes from headers, token counts, and which rows can't be used and why.
The run finds the index where this leaves it. --rebuild measures anew: pictures that were mended or added since are not
noticed by themselves, while changed parquet files, picture limits or tokenizers are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from itertools import islice

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the work is forked; its threads would not survive

import numpy as np

from muco_ds.build import build_packer, build_reader, build_stage, load_processing
from muco_ds.config import RunConfig, Source, check_paths
from muco_ds.config_cli import parse_args
from muco_ds.data.collator import Packer
from muco_ds.data.index import Index, Indexer, index_path, open_index
from muco_ds.data.readers import SourceReader
from muco_ds.data.stages.base import Stage, longest_rows
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.models.backbones import load_config

SHOWN_BAD_ROWS = 5


def split_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This tool's own options, and the rest, which is a training run's command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per CPU core")
    parser.add_argument("--rebuild", action="store_true", help="measure anew even if an index is there")
    own, rest = parser.parse_known_args(argv)
    if own.processes < 1:
        raise UserError(f"--processes {own.processes}: give at least 1")
    return own, rest


def indexed(
    config: RunConfig, packer: Packer, source: Source, key: str, own: argparse.Namespace
) -> tuple[SourceReader, Index]:
    reader = build_reader(config, source, key)
    indexer = Indexer(reader, packer.template, packer.images)
    if own.rebuild:
        shutil.rmtree(index_path(indexer, config.data.index_dir), ignore_errors=True)
    return reader, open_index(indexer, config.data.index_dir, builder=True, processes=own.processes)


def report(config: RunConfig, packer: Packer, reader: SourceReader, index: Index) -> None:
    print(f"rows      {len(reader)}, usable {len(index)}, bad {index.bad_rows}")
    if index.bad_rows:
        print_bad_rows(index)
    if index.uncaptioned:
        print(f"captions  of pictures missing in {index.uncaptioned} rows (qry_sentence, pos_sentence)")
    turns_S = np.diff(index.samples["turn_end"], prepend=0)
    print(f"turns     a row: min {turns_S.min()}, mean {turns_S.mean():.1f}, max {turns_S.max()}")
    tokens_S = longest_rows(stage_of(config, reader.key, index, reader, packer))
    print(f"tokens    a row, both sides, longest paraphrases: {spread(tokens_S)}")
    print(f"patches   a row, into the vision tower: {spread(index.samples['patches'])}")
    worst, budget = int(tokens_S.argmax()), config.batch.pack_tokens
    verdict = f"fits batch.pack_tokens={budget}"
    if tokens_S[worst] > budget:
        verdict = f"does not fit batch.pack_tokens={budget}: raise it, lower data.max_pixels, or shorten the row"
    print(f"longest   row {index.samples['row'][worst]}, {tokens_S[worst]} tokens: {verdict}")
    print(f"index     {index.folder}")


def stage_of(config: RunConfig, key: str, index: Index, reader: SourceReader, packer: Packer) -> Stage:
    """The run's stage; held-out questions and answers are turns to be encoded, whatever it is trained on."""
    if key != "data.val" or config.task.name == "coma_compress":
        return build_stage(config, index, reader, packer)
    query_history, target_history = config.task.query_history, config.task.target_history
    rows = index, reader, packer.template
    return MuCoStage(*rows, seed=config.run.seed, query_history=query_history, target_history=target_history)


def print_bad_rows(index: Index) -> None:
    path = index.folder / "bad_rows.jsonl"
    with open(path) as file:
        for entry in map(json.loads, islice(file, SHOWN_BAD_ROWS)):
            print(f"  row {entry['row']}: {entry['reason']}")
    if index.bad_rows > SHOWN_BAD_ROWS:
        print(f"  ... {index.bad_rows - SHOWN_BAD_ROWS} more")
    print(f"  all of them: {path}; after mending them run this with --rebuild")


def spread(values: np.ndarray) -> str:
    p50, p95 = np.percentile(values, (50, 95))
    return f"mean {values.mean():.0f}, p50 {p50:.0f}, p95 {p95:.0f}, max {values.max()}"


@exit_on_user_error()
def main() -> int:
    own, rest = split_args(sys.argv[1:])
    config = parse_args(rest).config
    check_paths(config)
    load_config(config.model.path)  # says it when this is no model folder
    packer = build_packer(config, load_processing(config))
    sources = config.data.sources()
    keys = ["data.train"] if len(sources) == 1 else [f"data.train[{i}]" for i in range(len(sources))]
    if config.data.val is not None:
        sources, keys = [*sources, Source(config.data.val, config.data.images)], [*keys, "data.val"]
    for key, source in zip(keys, sources, strict=True):
        print(f"\n{key}  {source.path}", flush=True)
        report(config, packer, *indexed(config, packer, source, key, own))
    return 0


if __name__ == "__main__":
    sys.exit(main())
