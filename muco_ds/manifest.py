"""Folders that are whole or not there: every file is flushed, listed in a manifest with size and digest, then renamed.

A missing or shortened file is found without reading (`incomplete`), an altered one by its digest (`damaged`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"

_BLOCK = 2**24


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file: bytes, and their XXH3 (128 bits, hexadecimal)."""

    size: int
    digest: str


def flushed(path: Path) -> Entry:
    """Have a file on the disk itself; what the manifest will say of it."""
    flush(path)
    return Entry(path.stat().st_size, _digest(path))


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(work: Path, final: Path, files: dict[str, Entry], **facts: object) -> None:
    """Give a folder of flushed files its manifest and its name: whole or not there, whatever happens meanwhile.

    Args:
        files: by path below `work`.
        facts: further entries of the manifest.
    """
    manifest = {
        "files": {name: entry.size for name, entry in files.items()},
        "digests": {name: entry.digest for name, entry in files.items()},
        **facts,
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2))
    flush(work / MANIFEST)
    for folder in [path for path in work.rglob("*") if path.is_dir()] + [work]:
        flush(folder)
    discard(final)
    work.rename(final)
    flush(final.parent)


def discard(folder: Path) -> None:
    """Remove a sealed folder, which loses its name first: half of one is never taken for the whole."""
    doomed = folder.with_name(f"{folder.name}.discarded.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def incomplete(path: Path) -> str | None:
    """Why a folder is not complete, by the names and sizes of its files, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        sizes = {name: int(size) for name, size in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"no readable {MANIFEST}"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} holds {file.stat().st_size} bytes instead of {size}"
    return None


def damaged(path: Path, names: Iterable[str] | None = None) -> str | None:
    """Why a complete folder's files are not those that were written, or None. Reads them.

    Args:
        names: these alone; default all that the manifest lists.
    """
    digests: dict[str, str] = json.loads((path / MANIFEST).read_text()).get("digests", {})
    chosen = [name for name in digests if names is None or name in names]

    def problem(name: str) -> str | None:
        try:
            return None if _digest(path / name) == digests[name] else f"{name} was altered: its checksum is another"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(problem, chosen)), None)


def listed(path: Path) -> list[str]:
    """The files of a complete folder."""
    return list(json.loads((path / MANIFEST).read_text())["files"])


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
