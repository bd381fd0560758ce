"""Checkpoints that are whole or not there: written beside, fsynced, listed in a manifest, renamed.

checkpoints/step_0000100/
    model/          DeepSpeed's files
    hf/             config, tokenizer, image settings: all that conversion needs beside the weights
    probe.safetensors   embeddings of fixed items by the model that was saved
    meta.json       step, configuration, versions, world size
    manifest.json   every file with its size; written last
    universal/      the same state for another number of ranks, where one asked for it (muco_ds/reshard.py)
checkpoints/latest  name of the newest one
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muco_ds.distributed import env
from muco_ds.errors import UserError

log = logging.getLogger(__name__)

TAG = "model"
MANIFEST = "manifest.json"
UNIVERSAL = "universal"


class Checkpoints:
    """The checkpoints of one run. All methods are called by every rank.

    Args:
        folder: `runs/NAME/checkpoints`.
        keep: how many of the newest stay.
        frozen: save the weights that are not trained, too.
    """

    def __init__(self, folder: Path, keep: int, *, frozen: bool = True) -> None:
        self.folder, self.keep, self.frozen = folder, keep, frozen

    def save(self, engine: Any, step: int, meta: dict, write_beside: Callable[[Path], None]) -> Path:
        """Save the engine's state. `write_beside(path)` adds the small files; rank 0 calls it.

        Raises:
            UserError: on every rank, when any rank could not write; older checkpoints are untouched.
        """
        final = self.folder / f"step_{step:07d}"
        work = final.with_suffix(".tmp")
        with _agreed(final):
            if env.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob("*.tmp"):
                    shutil.rmtree(stale, ignore_errors=True)
                work.mkdir()
        try:
            engine.save_checkpoint(str(work), tag=TAG, save_latest=False, exclude_frozen_parameters=not self.frozen)
        except (OSError, RuntimeError) as error:
            # The others are inside DeepSpeed's collectives, which this rank can't join any more: it leaves, and the
            # launcher ends the rest.
            raise _unwritable(final, error) from error
        files: dict[str, int] = {}
        with _agreed(final):
            if env.is_main():
                write_beside(work)
                (work / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=2))
            files = _flush_own(work)
        # Each rank vouches for the files it wrote: what another machine sees on a network disk may be late.
        written = env.from_all(files)
        with _agreed(final):
            if env.is_main():
                self._publish(work, final, dict(sorted(item for part in written for item in part.items())))
        return final

    def _publish(self, work: Path, final: Path, files: dict[str, int]) -> None:
        seal(work, final, {"files": files})
        pointer = self.folder / "latest.tmpfile"
        pointer.write_text(final.name + "\n")
        flush(pointer)
        os.replace(pointer, self.folder / "latest")
        flush(self.folder)
        for old in self.complete(warn=False)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        for unneeded in self.folder.glob(f"step_*/{UNIVERSAL}*"):  # a resumed run will start from `final`
            shutil.rmtree(unneeded, ignore_errors=True)

    def complete(self, *, warn: bool = True) -> list[Path]:
        """Complete checkpoints, newest first. Ones with a missing or shortened file are passed over, and named."""
        found = []
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            if path.suffix == ".tmp":
                continue
            problem = incomplete(path)
            if problem is None:
                found.append(path)
            elif warn and env.is_main():
                log.warning("%s is not complete (%s): passed over", path, problem)
        return found


def load_files(engine: Any, folder: Path, *, frozen: bool = True) -> None:
    """Load the weights and optimizer that DeepSpeed wrote below `folder`. Collective.

    Args:
        frozen: the weights that are not trained were saved, too.
    Raises:
        UserError: there are none.
    """
    with _own_hyperparameters(engine):
        loaded, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=frozen)
    if loaded is None:  # DeepSpeed only warns, and the run would start from the first weights again
        raise UserError(f"{folder}: DeepSpeed can't load it: remove it to resume from an older one")


@contextmanager
def _own_hyperparameters(engine: Any) -> Iterator[None]:
    """Keep what the parameter groups were configured with: learning rates may change when a run goes on.

    DeepSpeed's universal load under ZeRO-3 would also give all groups those of the first, weight decay among them.
    """
    groups = engine.optimizer.param_groups
    own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    yield
    for group, values in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(values)


def seal(work: Path, final: Path, manifest: dict) -> None:
    """Give a folder of flushed files its manifest and its name: whole or not there, whatever happens meanwhile."""
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2))
    flush(work / MANIFEST)
    for folder in [path for path in work.rglob("*") if path.is_dir()] + [work]:
        flush(folder)
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    flush(final.parent)


def read_meta(path: Path) -> dict:
    """meta.json of a checkpoint folder. Raises UserError for a folder that is none."""
    problem = incomplete(path)
    if problem is not None:
        raise UserError(f"{path}: not a complete checkpoint ({problem}): give a runs/NAME/checkpoints/step_... folder")
    return json.loads((path / "meta.json").read_text())


def incomplete(path: Path) -> str | None:
    """Why a folder is not a complete checkpoint, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MANIFEST}"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} holds {file.stat().st_size} bytes instead of {size}"
    return None


@contextmanager
def _agreed(final: Path) -> Iterator[None]:
    """A part of saving that every rank finishes or none goes on from."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError) as error:
        problem = str(_unwritable(final, error))
    env.agree(problem)


def _unwritable(final: Path, error: Exception) -> UserError:
    """torch.save reports a full disk as RuntimeError."""
    return UserError(f"checkpoint {final}: can't be written ({error}): free space; older ones are intact")


def _flush_own(work: Path) -> dict[str, int]:
    """Flush what this rank wrote, and say how large it is: its own shards, on rank 0 also what is nobody's shard."""
    sizes = {}
    for path in work.rglob("*"):
        shard = path.name.partition("zero_pp_rank_")[2].partition("_")[0]
        owner = int(shard) if shard.isdigit() else 0
        if owner == env.rank() and path.is_file():
            flush(path)
            sizes[str(path.relative_to(work))] = path.stat().st_size
    return sizes


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
