"""M-BEIR (UniIR, arXiv 2311.17136): 16 cells of a data set and a task, each over its own pool or the union of all."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muco_ds.config_matryoshka import sizes_of
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.mbeir_files import read_instructions, read_queries, read_relevance
from muco_ds.eval.mbeir_pools import Pool, Pools
from muco_ds.eval.mbeir_published import GROUPS, MEANS, OFFICIAL, PUBLISHED, UNION
from muco_ds.eval.mbeir_task import Asked, instructed
from muco_ds.eval.recall import Found, chance, find_answers, recall
from muco_ds.eval.report import write_report
from muco_ds.eval.suite import Entry, scores_of
from muco_ds.files import file_facts
from muco_ds.models.shards import Rows
from muco_ds.search import load_faiss

log = logging.getLogger(__name__)

SEED = 2023
"""UniIR's, of the prompts; the draws themselves are our own."""

POOLS = ("local", "union", "both")

_KINDS = {
    **{0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text")},
    **{4: ("image", "image"), 6: ("image,text", "text"), 7: ("image,text", "image"), 8: ("image,text", "image,text")},
}
"""Modalities of a task's queries and candidates."""


@dataclass(frozen=True)
class Cell:
    """A data set and a task."""

    name: str

    @property
    def kinds(self) -> tuple[str, str]:
        """Modalities of queries and candidates."""
        return _KINDS[int(self.name[-1])]

    @property
    def group(self) -> str:
        """`single->multi`: modalities of query and candidate."""
        return "->".join("multi" if "," in kind else "single" for kind in self.kinds)

    @property
    def k(self) -> int:
        """Of the official recall."""
        return 10 if self.name.startswith("fashion") else 5

    @property
    def depths(self) -> tuple[int, ...]:
        """All k of which recalls are given."""
        return (1, 5, 10, 20, 50) if self.name.startswith("fashion") else (1, 5, 10)

    @property
    def pool(self) -> str:
        """Name of its local pool; MSCOCO alone has one for each split."""
        return f"{self.name}_test" if self.name.startswith("mscoco") else self.name


CELLS = [
    *map(Cell, ["visualnews_task0", "mscoco_task0", "fashion200k_task0", "webqa_task1", "edis_task2", "webqa_task2"]),
    *map(Cell, ["visualnews_task3", "mscoco_task3", "fashion200k_task3", "nights_task4", "oven_task6"]),
    *map(Cell, ["infoseek_task6", "fashioniq_task7", "cirr_task7", "oven_task8", "infoseek_task8"]),
]
_POOL_NAMES = [cell.pool for cell in CELLS]


class MBEIRSuite:
    """Suite: `cirr_task7` over its own pool, `cirr_task7@union` over all candidates.

    Args:
        root: M-BEIR's folder.
        images: where picture paths start; None: there too.
        datasets: cells, by name; None: all.
        pool: one of `POOLS`.
        rows: only so many queries of each cell, over a part of its pool; None: all.
    """

    name = "mbeir"

    def __init__(
        self,
        root: Path,
        images: str | None = None,
        datasets: Sequence[str] | None = None,
        pool: str = "local",
        rows: int | None = None,
        seed: int = SEED,
    ) -> None:
        self.root, self.limit, self.seed = root, rows, seed
        self.images = os.path.realpath(images or root)
        self.pools = Pools(root, self.images)
        if not root.is_dir():
            raise UserError(f"--data: no such folder '{root}': give the one that holds query, cand_pool and qrels")
        if rows is not None and pool != "local":
            raise UserError(f"--rows: a part of the union pool says nothing: leave --pool {pool} out")
        cells = _chosen(datasets)
        local = [cell.name for cell in cells] if pool != "union" else []
        union = [cell.name + UNION for cell in cells] if pool != "local" else []
        self.datasets = local + union
        missing = {name: [path for path in self._files(name) if not path.exists()] for name in self.datasets}
        if any(missing.values()):
            paths = list(dict.fromkeys(path for of_name in missing.values() for path in of_name))
            more = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
            spoilt = {name.removesuffix(UNION) for name, of_name in missing.items() if of_name}
            complete = [cell.name for cell in cells if cell.name not in spoilt]
            cure = f"name what is there with --datasets {' '.join(complete)}" if complete else "download it"
            raise UserError(f"--data: '{paths[0]}'{more} missing: {cure}")

    def identity(self, dataset: str) -> Any:
        facts = [[str(path.parent), *file_facts(path)] for path in self._files(dataset)]
        return facts, self.images, self.limit, self.seed

    def score(self, dataset: str, encoder: Encoder) -> dict[str, Entry]:
        cell = Cell(dataset.removesuffix(UNION))
        self.pools.progress = encoder.progress and env.is_main()
        with env.agreement():
            if encoder.device.type == "cpu":
                load_faiss()  # now, and not after hours of encoding
            asked, pool = self._prepared(dataset)
            prompts = read_instructions(self._instructions)
            queries = instructed(asked, pool.files, prompts, self.seed)
        part = "" if self.limit is None else f"_first{self.limit}"
        query_QD = _all(encoder.rows(queries, f"mbeir/mbeir_{cell.name}_queries{part}", queries.key))
        usable_Q = torch.ones(len(query_QD), dtype=torch.bool)
        usable_Q[list(encoder.unusable(queries.all, ~query_QD.any(1)))] = False
        if not usable_Q.any():
            raise UserError(
                f"{asked.queries[0].where}: neither this nor any other query has a picture that can be used",
                on_every_rank=True,
            )
        answers = asked.answers(pool.number_C, usable_Q.numpy())
        candidates = pool.encoded(encoder)
        found = find_answers(
            query_QD[usable_Q],
            candidates,
            answers,
            max(cell.depths),
            sizes_of(encoder.sizes, candidates.width),
            device=encoder.device,
            progress=f"searching {dataset}" if encoder.progress else None,
        )
        if found.broken and encoder.store is not None and env.is_main():
            folder = encoder.store.folder / "mbeir"
            log.warning("%s: %d candidates could not be encoded and are zero in %s", dataset, found.broken, folder)
        left_out = asked.left_out + int((~usable_Q).sum())
        return {
            dataset: {
                **_recalls(cell, found),
                "score": f"recall@{cell.k}",
                "task": " -> ".join(cell.kinds),
                "pool": pool.kind,
                "queries": int(usable_Q.sum()),
                "candidates": len(candidates),
                "chance": chance(answers.per_query, len(candidates), cell.k),
                "left_out": left_out,
                "absent_positives": asked.absent,
                "broken_candidates": found.broken,
                "pool_file": pool.path.name,
                "seed": self.seed,
                "version": _version([*map(_digest, self._files(dataset)[:3]), *(file.digest for file in pool.files)]),
            }
        }

    def results(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """`overall` and the groups are means over the local pools, or over the union pool where it alone was searched;
        where both were, `overall@union` and so on are the union pool's."""
        local, union = ([name for name in entries if name.endswith(UNION) == there] for there in (False, True))
        means = _means(entries, local or union, "") | (_means(entries, union, UNION) if local and union else {})
        return means | dict(entries)

    def report(self, results: Mapping[str, Entry], folder: Path) -> None:
        cells = {name: entry for name, entry in results.items() if "task" in entry}
        left_out, broken = (sum(entry[key] for entry in cells.values()) for key in ("left_out", "broken_candidates"))
        notes = [
            f"{OFFICIAL} is recall@5, of Fashion200K and FashionIQ recall@10. {left_out} queries are left out; "
            f"{broken} candidates could not be encoded and are never found."
        ]
        if self.limit is not None:
            notes.append("Only a part of each pool was searched (--rows): these are no scores to be compared.")
        write_report(
            folder,
            "M-BEIR: recall",
            results,
            means=[*MEANS, *(mean + UNION for mean in MEANS)],
            groups={name: (Cell(name.removesuffix(UNION)).group, entry["task"]) for name, entry in cells.items()},
            published=PUBLISHED,
            notes=notes,
        )

    @property
    def _instructions(self) -> Path:
        return self.root / "instructions" / "query_instructions.tsv"

    def _files(self, dataset: str) -> list[Path]:
        cell = Cell(dataset.removesuffix(UNION))
        queries = self.root / "query" / "test" / f"mbeir_{cell.name}_test.jsonl"
        relevance = self.root / "qrels" / "test" / f"mbeir_{cell.name}_test_qrels.txt"
        union = dataset.endswith(UNION)
        pools = self.pools.union_paths(_POOL_NAMES) if union else [self.pools.local_path(cell.pool)]
        return [queries, relevance, self._instructions, *pools]

    @cached_property
    def _union(self) -> Pool:
        return self.pools.union(_POOL_NAMES)

    def _prepared(self, dataset: str) -> tuple[Asked, Pool]:
        cell = Cell(dataset.removesuffix(UNION))
        query_path, relevance_path, *_ = self._files(dataset)
        queries = read_queries(query_path, self.images, self.limit)
        pool = self._union if dataset.endswith(UNION) else self.pools.local(cell.pool)
        part = self.limit is not None
        asked = Asked.of(queries, read_relevance(relevance_path), pool.number_C, pool.path, part=part)
        if self.limit is not None:
            right = np.concatenate([asked.right[query.number] for query in asked.queries])
            pool = self.pools.part(pool, right, len(asked.queries), self.limit)
        return asked, pool


def _chosen(datasets: Sequence[str] | None) -> list[Cell]:
    names = [cell.name for cell in CELLS]
    for name in datasets or []:
        if name not in names:
            near = difflib.get_close_matches(name, names, cutoff=0.4) or names
            raise UserError(f"--datasets: mbeir has no '{name}': {', '.join(near)}")
    return [cell for cell in CELLS if not datasets or cell.name in datasets]


def _all(rows: Rows) -> torch.Tensor:
    return torch.from_numpy(rows.read(0, len(rows))).float()


def _recalls(cell: Cell, found: Found) -> dict[str, float]:
    *smaller, whole = sorted(found.better_Q)
    scores = {}
    for size in (whole, *smaller):
        end = "" if size == whole else f"@{size}"
        scores[OFFICIAL + end] = recall(found.better_Q[size], cell.k)
        scores |= {f"recall@{k}{end}": recall(found.better_Q[size], k) for k in cell.depths}
    return scores


def _means(entries: Mapping[str, Entry], names: Sequence[str], end: str) -> dict[str, Entry]:
    """Plain means of `overall` and of each group that has cells."""
    groups = {"overall": list(names)}
    for group in GROUPS:
        groups[group] = [name for name in names if Cell(name.removesuffix(UNION)).group == group]
    of = {"overall": len(CELLS)} | Counter(cell.group for cell in CELLS)
    return {
        group + end: _mean([entries[name] for name in of_group], of[group])
        for group, of_group in groups.items()
        if of_group
    }


def _mean(entries: Sequence[Entry], of: int) -> Entry:
    scores = [name for name in scores_of(entries[0]) if all(name in entry for entry in entries)]
    union = entries[0]["pool"] == "union"
    return {
        **{name: sum(entry[name] for entry in entries) / len(entries) for name in (*scores, "chance")},
        "score": OFFICIAL,
        "pool": entries[0]["pool"],
        "datasets": len(entries),
        "of": of,
        "queries": sum(entry["queries"] for entry in entries),
        "candidates": (max if union else sum)(entry["candidates"] for entry in entries),
        "seed": entries[0]["seed"],
        "version": _version([entry["version"] for entry in entries]),
    }


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def _version(digests: Sequence[str]) -> str:
    """Changes with the files."""
    return "M-BEIR " + hashlib.blake2b("\n".join(digests).encode(), digest_size=6).hexdigest()
