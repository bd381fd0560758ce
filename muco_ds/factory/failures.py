"""Pictures that did not work: why, in a file of one JSON line each and in counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from muco_ds.errors import UserError


class PictureError(Exception):
    """A picture that is given up. `kind` is what the report counts by; the message says what happened."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Failures:
    """The failures of one run: a new file, which is there only if there are any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first = ""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"can't replace '{path}' ({error.strerror or error})") from error

    def add(self, error: PictureError, **entry: Any) -> None:
        """Count a failure and write its line; `entry` says which picture."""
        self.counts[error.kind] += 1
        self.first = self.first or f"{', '.join(str(value) for value in entry.values())}: {error.kind}: {error}"
        line = json.dumps({**entry, "reason": error.kind, "message": str(error)})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as failure:
            raise UserError(f"can't write '{self.path}' ({failure.strerror or failure})") from failure

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def summary(self) -> str:
        """`3: 2 nonsense, 1 picture`."""
        parts = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        return f"{self.total}: {parts}" if parts else "0"
