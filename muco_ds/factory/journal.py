"""The finished pictures of an output, in a file beside it that survives a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from muco_ds.errors import UserError


class Journal:
    """An append-only file: a header line with the settings, then a line for each finished picture, written whole.

    A last line without its end is what a killed run left of it: it is cut off, and its picture is done again.

    Args:
        path: The file; made if it is not there.
        settings: What the rows depend on. A file that was begun with others is refused.

    Raises:
        UserError: other settings, a damaged line, a file that can't be written, or one that another run writes.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.places: dict[str, int] = {}
        """Finished pictures, and where in the file their lines begin."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise UserError(f"can't write '{path}' ({error.strerror or error})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(settings)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(f"'{path}' is in use: another run writes this output") from error
        except BaseException:
            self._file.close()
            raise

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Note that a picture is finished."""
        self.places[name] = self._append({"image": name, "row": row})

    def row(self, name: str) -> dict[str, Any]:
        """The row of a finished picture."""
        with open(self.path, "rb") as file:
            file.seek(self.places[name])
            return json.loads(file.readline())["row"]

    def close(self) -> None:
        self._file.close()

    def _append(self, entry: dict[str, Any]) -> int:
        place = self._file.seek(0, os.SEEK_END)
        line = json.dumps(entry).encode("ascii") + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise UserError(f"can't write '{self.path}' ({error.strerror or error})") from error
        if written != len(line):
            raise UserError(f"can't write '{self.path}': the disk is full")
        return place

    def _read(self, settings: dict[str, Any]) -> None:
        with open(self.path, "rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._file.truncate(place)
                    break
                try:
                    entry = json.loads(line)
                    if number == 1:
                        self._compare(entry["settings"], settings)
                    else:
                        self.places[entry["image"]] = place
                except (ValueError, KeyError, TypeError) as error:
                    if isinstance(error, UserError):
                        raise
                    raise UserError(
                        f"{self.path}, line {number} is damaged: remove that line, or the file to begin anew"
                    ) from error
                place += len(line)
        if not place:
            self._append({"settings": settings})

    def _compare(self, begun_with: dict[str, Any], settings: dict[str, Any]) -> None:
        for name in sorted(settings.keys() | begun_with.keys()):
            before, now = begun_with.get(name), settings.get(name)
            if before != now:
                values = f" {before!r}, not {now!r}" if len(f"{before}{now}") < 200 else " another text"
                raise UserError(
                    f"{self.path} was begun with {name} ={values}: give the same, another --output, or remove that file"
                )
