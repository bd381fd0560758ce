"""What every benchmark has in common: data sets that are scored one by one, and figures over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from muco_ds.eval.encoder import Encoder

Entry = dict[str, Any]
"""One line of results: its scores (`precision@1`, `recall@5`, ...), `queries`, `candidates`, `chance`, `left_out` and
the benchmark's `version`."""


class Suite(Protocol):
    """A benchmark whose files were found and whose options are sound."""

    @property
    def name(self) -> str: ...

    @property
    def datasets(self) -> Sequence[str]:
        """Those to be scored, in order."""
        ...

    def identity(self, dataset: str) -> Any:
        """What JSON can hold, equal where an earlier score of the data set counts: its files and the options."""
        ...

    def score(self, dataset: str, encoder: Encoder) -> dict[str, Entry]:
        """Entries of one data set by name. Collective.

        Raises:
            UserError: on every rank; what is wrong with the data.
        """
        ...

    def results(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """`entries` of all data sets scored so far, with `overall` and other means before them."""
        ...

    def report(self, results: Mapping[str, Entry], folder: Path) -> None:
        """Write what people read of `results` into `folder`, beside results.json. On rank 0.

        Raises:
            UserError: the folder can't be written.
        """
        ...


def scores_of(entry: Entry) -> dict[str, float]:
    """The scores in an entry, without what else it says."""
    return {name: value for name, value in entry.items() if name.startswith(("precision@", "recall@"))}


def label(name: str, entry: Entry) -> str:
    """An entry's name; a mean over some of the benchmark's data sets says so: `overall (3 of 36)`."""
    some = entry.get("datasets", 0) < entry.get("of", 0)
    return f"{name} ({entry['datasets']} of {entry['of']})" if some else name
