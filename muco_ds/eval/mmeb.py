"""MMEB V1: 36 data sets, each query among the candidates of its own row, precision@1.

Shape suffixes: N dialogues, Q queries, C candidates, R rows, D embedding size.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muco_ds.config_matryoshka import sizes_of
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.mmeb_datasets import DATASETS, MEANS, chosen
from muco_ds.eval.mmeb_files import MMEBFile, Pictures, find_datasets
from muco_ds.eval.mmeb_published import PUBLISHED
from muco_ds.eval.mmeb_task import MMEBTask
from muco_ds.eval.mmeb_text import Convention, Wording
from muco_ds.eval.report import write_report
from muco_ds.eval.suite import Entry, scores_of
from muco_ds.files import file_facts
from muco_ds.losses.matryoshka import prefix

log = logging.getLogger(__name__)


class MMEBSuite:
    """Suite: those of the 36 data sets that are in a folder, or some of them.

    Args:
        data: folder with one folder per data set, of either publication.
        images: folder that the paths of the rows start from; None: image-tasks, eval_images or images in `data`, or
            `data` itself.
        datasets: only these; None: all that are there.
        rows: only the first ones of each.
    Raises:
        UserError: a folder or a data set that is not there, a name that is none of the 36.
    """

    name = "mmeb"

    def __init__(
        self, data: str, images: str | None, datasets: Sequence[str] | None, rows: int | None, convention: Convention
    ) -> None:
        self.limit, self.convention = rows, convention
        wanted = chosen(datasets) if datasets else None
        found = find_datasets(data)
        for name in wanted or []:
            if name not in found:
                raise UserError(f"--data: '{data}' holds no folder {name}; it holds {', '.join(found)}")
        self.files = {name: MMEBFile.open(name, found[name]) for name in wanted or found}
        self.pictures = Pictures(data, images)
        missing = [name for name in DATASETS if name not in found]
        if missing and not wanted and env.is_main():
            others = "%d of MMEB's 36 data sets are not in '%s', and means are over the others: %s"
            log.warning(others, len(missing), data, ", ".join(missing))

    @property
    def datasets(self) -> list[str]:
        return list(self.files)

    def identity(self, dataset: str) -> Any:
        facts = [file_facts(Path(file)) for file in self.files[dataset].files]
        return facts, self.pictures.roots, self.limit, self.convention

    def score(self, dataset: str, encoder: Encoder) -> dict[str, Entry]:
        file = self.files[dataset]
        with env.agreement():
            wording = Wording(self.convention, encoder.packer.template)
            task = MMEBTask.from_file(file, self.pictures, wording, self.limit)
            version = f"{self._version(file.publication)}, data {file.digest()}"
        sides = (task.queries, task.candidates)
        query_QD, candidate_CD = (
            encoder.encode(side, f"{dataset} {name}", mark_broken=True)
            for name, side in zip(("queries", "candidates"), sides, strict=True)
        )
        task = task.without(
            *(
                encoder.unusable(side, emb_ND.isnan().any(1))
                for side, emb_ND in zip(sides, (query_QD, candidate_CD), strict=True)
            )
        )
        if task.left_out and env.is_main():
            log.warning("%s: %d rows are left out; %s", dataset, task.left_out, task.problem)
        *smaller, whole = sizes_of(encoder.sizes, query_QD.shape[1])
        entry: Entry = {}
        for size in (whole, *smaller):
            correct_R = task.correct(prefix(query_QD, size), prefix(candidate_CD, size))
            entry["precision@1" if size == whole else f"precision@1@{size}"] = float(correct_R.double().mean())
        lengths_R = np.array([len(row.candidates_K) for row in task.rows])
        entry |= {"queries": len(task.rows), "candidates": len(task.candidates)}
        entry |= {"list_length": float(lengths_R.mean()), "chance": float((1 / lengths_R).mean())}
        return {dataset: {**entry, "left_out": task.left_out, "version": version}}

    def results(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Plain means over data sets before them; `datasets` of the `of` that the benchmark has are in a mean."""
        means: dict[str, Entry] = {}
        for name in MEANS:
            if members := [dataset for dataset in DATASETS if dataset in entries and name in DATASETS[dataset].means]:
                means[name] = self._mean([entries[dataset] for dataset in members], members)
                means[name]["of"] = sum(name in dataset.means for dataset in DATASETS.values())
        if means and (missing := [dataset for dataset in DATASETS if dataset not in entries]):
            means["overall"]["missing"] = missing
        return {**means, **{dataset: entries[dataset] for dataset in DATASETS if dataset in entries}}

    def report(self, results: Mapping[str, Entry], folder: Path) -> None:
        """results.md and results.png, beside what was published.

        Raises:
            UserError: the folder can't be written.
        """
        write_report(
            folder,
            "MMEB: precision@1",
            results,
            means=MEANS,
            groups={name: (d.meta_task, "IND" if d.in_distribution else "OOD") for name, d in DATASETS.items()},
            published=PUBLISHED,
        )

    def _version(self, publications: str) -> str:
        rows = "" if self.limit is None else f", first {self.limit} rows"
        return f"MMEB V1, {publications}{rows}, texts as {self.convention}"

    def _mean(self, entries: Sequence[Entry], members: Sequence[str]) -> Entry:
        mean: Entry = {key: _average(entries, key) for key in scores_of(entries[0])}
        mean |= {key: sum(entry[key] for entry in entries) for key in ("queries", "candidates")}
        mean |= {key: _average(entries, key) for key in ("list_length", "chance")}
        publications = sorted({self.files[name].publication for name in members})
        digest = hashlib.blake2b("\n".join(entry["version"] for entry in entries).encode(), digest_size=4).hexdigest()
        version = f"{self._version(' and '.join(publications))}, data {digest}"
        return {**mean, "datasets": len(entries), "version": version}


def _average(entries: Sequence[Entry], key: str) -> float:
    return sum(entry[key] for entry in entries) / len(entries)
