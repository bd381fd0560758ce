"""Checkpoints that are whole or not there: copied to memory, written beside, flushed, listed in a manifest, renamed.

checkpoints/step_0000100/
    model/          DeepSpeed's files
    hf/             config, tokenizer, image settings: all that conversion needs beside the weights
    probe.safetensors   embeddings of fixed items by the model that was saved
    meta.json       step, configuration, versions, world size
    manifest.json   every file with its size and checksum; written last
    universal/      the same state for another number of ranks, where one asked for it (muco_ds/reshard.py)
checkpoints/latest  name of the newest one
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muco_ds.causes import cause_of
from muco_ds.distributed import env
from muco_ds.distributed.helper import Helper
from muco_ds.errors import UserError
from muco_ds.manifest import Entry, damaged, discard, flush, flushed, incomplete, listed, seal
from muco_ds.safe_load import tensors_only
from muco_ds.snapshot import Snapshots, State

log = logging.getLogger(__name__)

TAG = "model"
UNIVERSAL = "universal"

_SEALED = re.compile(r"step_\d+")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_")
_LOOK_S = 0.5
_SPARE = 16 * 2**20
"""Bytes of a checkpoint that are no tensors: tokenizer, settings, and what the files have around the tensors."""


class Place:
    """A folder of checkpoints. Rank 0 alone writes names into it."""

    def __init__(self, folder: Path, keep: int = 1, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def complete(self, *, warn: bool = True) -> list[Path]:
        """Complete checkpoints, newest first. Ones with a missing or shortened file are passed over, and named."""
        found = []
        for path in sorted(self.sealed(), reverse=True):
            problem = incomplete(path)
            if problem is None:
                found.append(path)
            elif warn and env.is_main():
                log.warning("%s is not complete (%s): passed over", path, problem)
        return found

    def sealed(self) -> list[Path]:
        """What has a checkpoint's name, damaged ones too."""
        return [path for path in self.folder.glob("step_*") if _SEALED.fullmatch(path.name)]

    def begin(self, step: int) -> Path:
        """A folder to write to, without anything that killed saves left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        work = self.work(step)
        work.mkdir()
        return work

    def final(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def work(self, step: int) -> Path:
        return self.final(step).with_suffix(".tmp")

    def check_space(self, step: int, needed: int) -> None:
        """Raises OSError when `needed` bytes would fill the disk."""
        free = shutil.disk_usage(self.work(step)).free
        if free < needed + _SPARE:
            raise OSError(f"{(needed + _SPARE) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")

    def publish(self, step: int, files: dict[str, Entry]) -> None:
        """Name what was written, point to it, and remove what need not be kept any more."""
        final = self.final(step)
        seal(self.work(step), final, files)
        pointer = self.folder / "latest.tmpfile"
        pointer.write_text(final.name + "\n")
        flush(pointer)
        os.replace(pointer, self.folder / "latest")
        flush(self.folder)
        # Newer ones were passed over as altered when the run went on from an older one: they must not push this out.
        kept = [path for path in self.complete(warn=False) if path.name <= final.name][: self.keep]
        for old in self.sealed():  # ones that are not complete, too
            milestone = self.keep_every > 0 and int(old.name.removeprefix("step_")) % self.keep_every == 0
            if len(kept) == self.keep and old.name < kept[-1].name and not milestone:
                discard(old)
        for unneeded in self.folder.glob(f"step_*/{UNIVERSAL}*"):  # a resumed run will start from `final`
            shutil.rmtree(unneeded, ignore_errors=True)


@dataclass
class Save:
    """A checkpoint that is being written: what this rank adds to it, and the bytes of all ranks."""

    step: int
    states: list[State]
    needed: int
    meta: dict[str, Any]
    write_beside: Callable[[Path], None]
    started: float


class Checkpoints:
    """The checkpoints of one run. Made by all ranks together; methods are collective unless they say otherwise.

    Args:
        folder: `runs/NAME/checkpoints`.
        keep: how many of the newest stay.
        keep_every: those of steps divisible by it stay, too; 0: none.
        copies: a second folder, on another file system, which gets a copy of each.
        background: write while training goes on, from copies.
        frozen: save the weights that are not trained, too.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        keep_every: int = 0,
        copies: Path | None = None,
        background: bool = True,
        frozen: bool = True,
    ) -> None:
        self.places = [Place(place, keep, keep_every) for place in (folder, copies) if place is not None]
        self.background, self.frozen = background, frozen
        self._snapshots = Snapshots()
        self._group = env.background_group()  # the writing threads' own: training uses the others meanwhile
        self._save: Save | None = None
        self._writer = Helper("checkpoint")
        if copies is not None:
            _check_shared(copies)

    def save(self, engine: Any, step: int, meta: dict, write_beside: Callable[[Path], None]) -> Path:
        """Take the engine's state and have it written. `write_beside(path)` adds the small files, on rank 0.

        Returns: where the checkpoint will be; it is there after `finish`.
        Raises:
            UserError: on every rank, when any rank could not write, this one or the one before; too little space.
                Older checkpoints are untouched.
        """
        self.finish()
        place, started = self.places[0], time.perf_counter()
        final, work = place.final(step), place.work(step)
        with _agreed(final):
            if env.is_main():
                place.begin(step)
        try:
            with self._snapshots.instead_of_writing(engine, work, copied=self.background) as states:
                engine.save_checkpoint(str(work), tag=TAG, save_latest=False, exclude_frozen_parameters=not self.frozen)
        except (OSError, RuntimeError) as error:
            if cause_of(error).consequence:  # another rank is gone
                raise
            # The others are inside DeepSpeed's collectives, which this rank can't join any more: it leaves, and the
            # launcher ends the rest.
            raise _unwritable(final, error) from error
        needed = sum(env.from_all(sum(state.size for state in states)))
        with _agreed(final):
            if env.is_main():
                place.check_space(step, needed)
        save = self._save = Save(step, states, needed, {"step": step, **meta}, write_beside, started)
        self._writer.begin(lambda: self._write(save))
        if not self.background:
            self.finish()
        return final

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint being written can't be: `finish` will say so. Not collective."""
        return self._save is not None and self._writer.error is not None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: on every rank, when any rank could not write it.
        """
        save, self._save = self._save, None
        if save is not None:
            with env.agreement(patient=True) as lost:
                # Its own collectives wait for days: that another rank is gone is known by those of the main threads.
                while not self._writer.wait(_LOOK_S) and not lost.is_set():
                    pass
                error = self._writer.error
                if error is not None:
                    known = isinstance(error, UserError) or cause_of(error).consequence
                    raise error if known else _unwritable(self.places[0].final(save.step), error)

    def wait(self, seconds: float | None = None) -> None:
        """Let this rank's part of it end, or that many seconds pass. Not collective."""
        self._writer.wait(seconds)

    def newest_intact(self) -> Path | None:
        """The newest checkpoint whose files are those that were written; None where there is none at all.

        Raises:
            UserError: there are some, but none is intact: the run would silently begin anew.
        """
        # Rank 0 chooses: ranks that each looked for themselves could disagree on what they see.
        for path in env.from_main(self._complete() if env.is_main() else None):
            with env.agreement():
                if not path.is_dir():
                    raise UserError(f"rank {env.rank()} does not see {path}: run.dir must be shared by all machines")
            with env.agreement(patient=True):  # of large ones some ranks read longer than others
                mine = damaged(path, {name for name in listed(path) if _owner(name) % env.world_size() == env.rank()})
            problem = next(filter(None, env.from_all(mine)), None)
            if problem is None:
                return path
            if env.is_main():
                log.warning("%s is damaged (%s): passed over", path, problem)
        ruins = env.from_main([path for place in self.places for path in place.sealed()])
        if ruins:
            raise UserError(
                f"{ruins[0].parent}: none of its checkpoints ({len(ruins)}) is intact: restore one, or remove them to "
                "begin again from step 0",
                on_every_rank=True,
            )
        return None

    def _complete(self) -> list[Path]:
        """Complete checkpoints of all places, newest first; of the same step, the first place's first."""
        return sorted((path for place in self.places for path in place.complete()), key=lambda p: p.name, reverse=True)

    def _write(self, save: Save) -> None:
        """What a thread of each rank does beside training. Raises what `finish` will say."""
        for place in self.places:
            try:
                self._write_to(place, save)
            except (UserError, RuntimeError) as error:  # RuntimeError: another rank is gone
                if env.is_main():  # its space is given back
                    shutil.rmtree(place.work(save.step), ignore_errors=True)
                if place is self.places[0]:
                    raise
                if env.is_main():
                    log.warning("%s: training goes on without this copy", error)

    def _write_to(self, place: Place, save: Save) -> None:
        """Raises UserError, with the first problem that any rank had, on every rank."""
        final, work = place.final(save.step), place.work(save.step)
        first = self.places[0].final(save.step)

        def begin() -> None:
            if env.is_main() and final != first:
                place.begin(save.step)
                place.check_space(save.step, save.needed)
                for name in listed(first):
                    if _SHARD.search(name) is None:
                        (work / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(first / name, work / name)

        def write() -> dict[str, Entry]:
            for state in save.states:
                (work / state.name).parent.mkdir(parents=True, exist_ok=True)
                torch.save(state.tree, work / state.name)
            if env.is_main() and final == first:
                save.write_beside(work)
                (work / "meta.json").write_text(json.dumps(save.meta, indent=2))
            mine = [path for path in work.rglob("*") if path.is_file() and _owner(path.name) == env.rank()]
            return {str(path.relative_to(work)): flushed(path) for path in mine}

        self._together(final, begin)
        # Each rank vouches for the files it wrote: what another machine sees on a network disk may be late.
        parts = self._together(final, write)
        files = dict(sorted(item for part in parts for item in part.items()))
        self._together(final, lambda: place.publish(save.step, files) if env.is_main() else None)
        if env.is_main():
            log.info("%s: saved, %.1f s after its step", final, time.perf_counter() - save.started)

    def _together(self, final: Path, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on each rank; UserError on every rank where it failed on any. Threads' own collective."""
        result, problem = None, None
        try:
            result = work()
        except Exception as error:  # a thread that ends by one is silent, and the others would wait for it
            problem = str(_unwritable(final, error))
        found = env.from_all((result, problem), group=self._group)
        first = next((problem for _, problem in found if problem is not None), None)
        if first is not None:
            raise UserError(first)
        return [result for result, _ in found]


def read_meta(path: Path) -> dict:
    """meta.json of a checkpoint folder. Raises UserError for a folder that is none."""
    problem = incomplete(path)
    if problem is not None:
        raise UserError(f"{path}: not a complete checkpoint ({problem}): give a runs/NAME/checkpoints/step_... folder")
    return json.loads((path / "meta.json").read_text())


def load_files(engine: Any, folder: Path, *, frozen: bool = True) -> None:
    """Load the weights and optimizer that DeepSpeed wrote below `folder`. Collective.

    Args:
        frozen: the weights that are not trained were saved, too.
    Raises:
        UserError: there are none.
    """
    with _own_hyperparameters(engine), tensors_only(folder):
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


def _check_shared(copies: Path) -> None:
    """Collective. Raises UserError where rank 0 can't write the folder or another rank does not see it."""
    mark = copies / ".shared"
    with env.agreement():
        try:
            if env.is_main():
                copies.mkdir(parents=True, exist_ok=True)
                mark.touch()
        except OSError as error:
            problem = f"checkpoint.copy_to: can't write to '{copies}' ({error.strerror}): set another folder, or null"
            raise UserError(problem) from error
    with env.agreement():
        if not mark.exists():
            problem = f"checkpoint.copy_to: rank {env.rank()} does not see '{copies}': share it with all machines"
            raise UserError(problem)
    if env.is_main():
        mark.unlink(missing_ok=True)


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


def _owner(name: str) -> int:
    """The rank that writes a file: a shard's is in its name, all else is rank 0's."""
    shard = _SHARD.search(name)
    return int(shard[1]) if shard else 0
