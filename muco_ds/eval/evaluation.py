"""All data sets of a benchmark, one after the other; what is finished is kept, so that an evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.suite import Entry, Suite
from muco_ds.files import replacing


def prepare_output(output: Path, suite: str) -> None:
    """Make the folder of a suite's results. Raises UserError: it can't be written, or holds those of another suite."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"--output: can't write to '{output}' ({error.strerror}): give another folder") from error
    if others := [path.name for path in output.glob("*_datasets") if path.name != f"{suite}_datasets"]:
        other = others[0].removesuffix("_datasets")
        raise UserError(f"--output: '{output}' holds results of {other}: give each suite a folder of its own")


def evaluate(suite: Suite, encoder: Encoder, output: Path, model: Any) -> tuple[dict[str, Entry], list[str]]:
    """Score what `output` does not hold yet, and write results.json and the suite's report there. Collective.

    Args:
        model: what JSON can hold, equal where the model is the same.
    Returns:
        on every rank: the results, and a problem for each data set that could not be scored.
    Raises:
        UserError: on every rank; nothing could be scored or written.
    """
    kept = KeptEntries(output / f"{suite.name}_datasets")
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for dataset in suite.datasets:
        found: dict[str, Entry] | None = None
        with env.agreement():
            if env.is_main():
                key = _digest([suite.name, dataset, suite.identity(dataset), model, list(encoder.sizes)])
                found = kept.read(dataset, key)
        found = env.from_main(found)
        if found is None:
            try:
                found = suite.score(dataset, encoder)
            except UserError as error:
                problems.append(f"{dataset}: {error}")
                continue
            with env.agreement():
                if env.is_main():
                    kept.write(dataset, key, found)
        entries |= found
        with env.agreement():  # after each, so that an evaluation that is ended leaves what it has
            if env.is_main():
                _write_json(output / "results.json", suite.results(entries))
    if not entries:
        raise UserError(problems[0], on_every_rank=True)
    results = suite.results(entries)
    with env.agreement():
        if env.is_main():
            suite.report(results, output)
    return results, problems


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Raises UserError where the folder can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: can't write to '{path.parent}' ({error.strerror})") from error
    with replacing(path) as work:
        work.write_text(json.dumps(content, indent=2) + "\n")


class KeptEntries:
    """A file for each finished data set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, dataset: str, key: str) -> dict[str, Entry] | None:
        """The entries of a data set; None where it is not finished, or was with another key.

        One of which something was left out counts as not finished: its pictures may be there by now.
        """
        try:
            kept = json.loads((self.folder / f"{dataset}.json").read_text())
            entries = dict(kept["entries"]) if kept["key"] == key else None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        whole = entries is not None and not any(
            entry.get("left_out") or entry.get("broken_candidates") for entry in entries.values()
        )
        return entries if whole else None

    def write(self, dataset: str, key: str, entries: Mapping[str, Entry]) -> None:
        _write_json(self.folder / f"{dataset}.json", {"key": key, "entries": entries})


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
