"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muco_ds.data.readers import M3TReader
from muco_ds.errors import UserError
from muco_ds.eval.m3t import M3TSuite
from muco_ds.eval.mbeir import SEED, MBEIRSuite
from muco_ds.eval.mmeb import MMEBSuite
from muco_ds.eval.mmeb_text import Convention
from muco_ds.eval.suite import Suite

SUITES = {
    "m3t": "precision@1 per turn type of rows in M3T's columns",
    "mmeb": "precision@1 of MMEB V1's 36 data sets, each query among its own candidates",
    "mbeir": "recall of M-BEIR's 16 cells of a data set and a task",
}
"""What each is, in a line."""


@dataclass(frozen=True)
class SuiteOptions:
    """What to evaluate on.

    Args:
        name: one of `SUITES`.
        data: m3t: parquet file, folder or glob; else the folder of the benchmark.
        images: folder that picture paths start from; None: where the benchmark has it.
        datasets: only these; None: all.
        rows: only the first ones of each data set; None: all.
        convention: mmeb: how texts are composed; None: `muco`.
        pool: mbeir: `local` (None), `union` or `both`.
        seed: mbeir: of the prompts; None: its own.
    """

    name: str
    data: str
    images: str | None = None
    datasets: Sequence[str] | None = None
    rows: int | None = None
    convention: Convention | None = None
    pool: str | None = None
    seed: int | None = None

    def of_others(self) -> dict[str, tuple[str, object]]:
        """Options that one suite alone has, with its name."""
        return {
            "convention": ("mmeb", self.convention),
            "pool": ("mbeir", self.pool),
            "seed": ("mbeir", self.seed),
        }


def open_suite(options: SuiteOptions) -> Suite:
    """Raises UserError: files that are not there, a data set or an option that the suite has not."""
    for key, (suite, value) in options.of_others().items():
        if value is not None and suite != options.name:
            raise UserError(f"--{key}: is for {suite}, {options.name} has none: leave it out")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows {options.rows}: give at least 1")
    if options.name == "mmeb":
        convention = options.convention or "muco"
        return MMEBSuite(options.data, options.images, options.datasets, options.rows, convention)
    if options.name == "mbeir":
        seed = SEED if options.seed is None else options.seed
        root, pool = Path(options.data), options.pool or "local"
        return MBEIRSuite(root, options.images, options.datasets, pool, options.rows, seed)
    if options.datasets:
        raise UserError(f"--datasets: {options.name} is one data set: leave it out")
    images = options.images or str(Path(options.data).parent / "images")
    return M3TSuite(M3TReader(options.data, images, "--data"), options.rows)
