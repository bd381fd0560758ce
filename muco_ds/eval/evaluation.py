"""All data sets of a benchmark, one after the other; what is finished is kept, so that an evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.suite import Entry, Suite
from muco_ds.files import replacing


def evaluate(suite: Suite, encoder: Encoder, output: Path, model: Any) -> dict[str, Entry]:
    """Score what `output` does not hold yet, and write results.json and the suite's report there. Collective.

    Args:
        model: what JSON can hold, equal where the model is the same.
    Returns:
        the results, on every rank.
    Raises:
        UserError: on every rank.
    """
    kept = KeptEntries(output / f"{suite.name}_datasets")
    entries: dict[str, Entry] = {}
    for dataset in suite.datasets:
        found: dict[str, Entry] | None = None
        with env.agreement():
            if env.is_main():
                key = _digest([suite.name, dataset, suite.identity(dataset), model, list(encoder.sizes)])
                found = kept.read(dataset, key)
        found = env.from_main(found)
        if found is None:
            found = suite.score(dataset, encoder)
            with env.agreement():
                if env.is_main():
                    kept.write(dataset, key, found)
        entries |= found
        with env.agreement():  # after each, so that an evaluation that is ended leaves what it has
            if env.is_main():
                write_results(output / "results.json", suite.results(entries))
    results = suite.results(entries)
    with env.agreement():
        if env.is_main():
            suite.report(results, output)
    return results


def write_results(path: Path, results: Mapping[str, Entry]) -> None:
    """Raises UserError where the folder can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: can't write to '{path.parent}' ({error.strerror})") from error
    with replacing(path) as work:
        work.write_text(json.dumps(results, indent=2) + "\n")


class KeptEntries:
    """A file for each finished data set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, dataset: str, key: str) -> dict[str, Entry] | None:
        """The entries of a data set; None where it is not finished, or was with another key."""
        try:
            kept = json.loads((self.folder / f"{dataset}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return kept["entries"] if kept["key"] == key else None

    def write(self, dataset: str, key: str, entries: Mapping[str, Entry]) -> None:
        write_results(self.folder / f"{dataset}.json", {"key": key, "entries": entries})  # type: ignore[dict-item]


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
