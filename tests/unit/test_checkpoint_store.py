"""Checkpoints are whole or not there. The engine is a stand-in that writes files as DeepSpeed does."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muco_ds import checkpoint
from muco_ds.checkpoint import MANIFEST, UNIVERSAL, Checkpoints, incomplete, load_files, read_meta
from muco_ds.errors import UserError

META = {"config": {"run": {"name": "r"}}, "world_size": 1}


class Engine:
    """Writes and reads a shard with a number in it; fails on demand after a part of its files."""

    def __init__(self, state: int = 0, fail: Exception | None = None) -> None:
        self.state, self.fail = state, fail
        self.optimizer = SimpleNamespace(
            param_groups=[{"params": [], "lr_ratio": 1.0}, {"params": [], "lr_ratio": 0.1}]
        )

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest, "DeepSpeed's own pointer would not be atomic"
        shards = Path(folder, tag)
        shards.mkdir()
        (shards / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_text(f"{self.state}")
        if self.fail is not None:
            raise self.fail
        (shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("m" * 1000)

    def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> tuple[str | None, dict[str, Any]]:
        self.optimizer.param_groups = [{"params": [], "lr_ratio": 1.0}, {"params": [], "lr_ratio": 0.5}]  # as saved
        file = Path(folder, tag, "zero_pp_rank_0_mp_rank_00_model_states.pt")
        if not file.exists():
            return None, {}
        self.state = int(file.read_text())
        return folder, {}


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def save(store: Checkpoints, step: int, engine: Engine | None = None, meta: dict[str, Any] = META) -> Path:
    def write_beside(path: Path) -> None:
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text("{}")

    return store.save(engine or Engine(step), step, meta, write_beside)


def names(store: Checkpoints) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_saved_checkpoint_is_complete_and_loads(store: Checkpoints) -> None:
    assert store.complete() == []
    path = save(store, 100, Engine(7))
    assert path == store.folder / "step_0000100" and store.complete() == [path] and incomplete(path) is None
    assert names(store) == ["latest", "step_0000100"]
    files = json.loads((path / MANIFEST).read_text())["files"]
    on_disk = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert on_disk == files.keys() | {MANIFEST} and "hf/config.json" in files and "meta.json" in files
    engine = Engine()
    load_files(engine, path)
    assert read_meta(path) == {"step": 100, **META}
    assert engine.state == 7
    assert [group["lr_ratio"] for group in engine.optimizer.param_groups] == [1.0, 0.1], "this run's, not the saved"


def test_the_newest_are_kept_and_latest_points_at_the_last(store: Checkpoints) -> None:
    for step in (5, 90, 100, 1000):
        save(store, step)
        assert (store.folder / "latest").read_text().strip() == f"step_{step:07d}"
    assert [path.name for path in store.complete()] == ["step_0001000", "step_0000100"]
    assert names(store) == ["latest", "step_0000100", "step_0001000"]


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing_shard": (lambda p: next((p / "model").glob("*optim*")).unlink(), "optim_states.pt is missing"),
    "truncated_shard": (lambda p: next((p / "model").glob("*optim*")).write_text("m"), "holds 1 bytes instead of 1000"),
    "missing_meta": (lambda p: (p / "meta.json").unlink(), "meta.json is missing"),
    "no_manifest": (lambda p: (p / MANIFEST).unlink(), f"no readable {MANIFEST}"),
    "cut_manifest": (lambda p: (p / MANIFEST).write_text('{"files": {"a'), f"no readable {MANIFEST}"),
    "empty_folder": (emptied, f"no readable {MANIFEST}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_incomplete_checkpoint_is_named_and_passed_over(
    store: Checkpoints, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = save(store, 1), save(store, 2)
    change, reason = DAMAGE[damage]
    change(newest)
    with caplog.at_level(logging.WARNING, "muco_ds"):
        assert store.complete() == [older]
    assert f"{newest} is not complete" in caplog.text and reason in caplog.text
    with pytest.raises(UserError, match="not a complete checkpoint") as error:
        read_meta(newest)
    assert str(newest) in str(error.value) and reason in str(error.value)
    # Saving that step again heals it, and it does not count as one of those that are kept.
    save(store, 2)
    assert store.complete() == [newest, older]


def test_what_a_killed_save_left_is_ignored_and_removed_later(store: Checkpoints) -> None:
    first = save(store, 1)
    shutil.copytree(first, store.folder / "step_0000002.tmp")  # killed before the rename, manifest and all
    (store.folder / "latest.tmpfile").write_text("step_00")  # and a pointer cut off
    assert store.complete() == [first]
    save(store, 3)
    assert names(store) == ["latest", "step_0000001", "step_0000003"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_write_is_one_line_and_leaves_older_ones(store: Checkpoints, error: Exception) -> None:
    older = save(store, 1)
    with pytest.raises(UserError, match=r"step_0000002: can't be written .*older ones are intact"):
        save(store, 2, Engine(fail=error))
    assert store.complete() == [older] and (store.folder / "latest").read_text().strip() == older.name
    assert save(store, 2) in store.complete()  # the next attempt is not hindered by the remains


def test_a_failure_beside_or_while_publishing_is_a_user_error_too(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    older = save(store, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="can't be written"):
        store.save(Engine(2), 2, META, full)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush", full)
        with pytest.raises(UserError, match="can't be written"):
            save(store, 2)
    assert store.complete() == [older]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        save(Checkpoints(tmp_path / "file" / "checkpoints", keep=1), 1)


def test_every_rank_hears_of_another_ranks_failure(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = []

    def agree(problem: str | None) -> None:
        said.append(problem)
        if problem:
            raise UserError(problem)

    def full(_folder: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(checkpoint.env, "agree", agree)
    with pytest.raises(UserError):
        store.save(Engine(2), 2, META, full)
    assert said[-1] is not None and "full" in said[-1]
    said.clear()
    save(store, 3)
    assert said and not any(said)


def test_manifest_is_the_last_thing_written_before_the_rename(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rename, flush = Path.rename, checkpoint.flush

    def noted_rename(self: Path, to: Path) -> Path:
        order.append(f"rename {to.name}")
        return rename(self, to)

    def noted_flush(path: Path) -> None:
        order.append(path.name)
        flush(path)

    monkeypatch.setattr(Path, "rename", noted_rename)
    monkeypatch.setattr(checkpoint, "flush", noted_flush)
    save(store, 4)
    shards = [order.index(name) for name in order if name.endswith(".pt") or name in ("meta.json", "config.json")]
    assert len(shards) == 4 and max(shards) < order.index(MANIFEST)
    assert order.index(MANIFEST) < order.index("rename step_0000004") < order.index("latest.tmpfile")


def test_forms_for_other_numbers_of_ranks_do_not_outlive_the_next_checkpoint(store: Checkpoints) -> None:
    older = save(store, 1)
    for name in (UNIVERSAL, f"{UNIVERSAL}.tmp"):
        (older / name).mkdir()
    assert incomplete(older) is None
    save(store, 2)
    assert incomplete(older) is None and not list(older.glob(f"{UNIVERSAL}*"))


def test_an_engine_that_loads_nothing_is_not_taken_for_resumed(store: Checkpoints) -> None:
    """DeepSpeed only warns when it finds no weights under the tag; training would start over, looking resumed."""
    path = save(store, 1)

    class Deaf(Engine):
        def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> tuple[str | None, dict[str, Any]]:
            return None, {}

    with pytest.raises(UserError, match="can't load it"):
        load_files(Deaf(), path)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a runs/NAME/checkpoints/step_"):
        read_meta(tmp_path / "absent")
