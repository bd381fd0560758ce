"""Checkpoints are whole or not there. The engine is a stand-in that writes files as DeepSpeed does."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muco_ds import checkpoint, manifest
from muco_ds.checkpoint import UNIVERSAL, Checkpoints, load_files, read_meta
from muco_ds.errors import UserError
from muco_ds.manifest import MANIFEST, damaged, incomplete, listed

from stand_in_engine import META, Engine, complete, folder, names, save


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_a_saved_checkpoint_is_complete_and_loads(store: Checkpoints) -> None:
    assert complete(store) == [] and store.newest_intact() is None
    path = save(store, 100, Engine(7))
    assert path == folder(store) / "step_0000100" == store.newest_intact()
    assert complete(store) == [path] and incomplete(path) is None and damaged(path) is None
    assert names(folder(store)) == ["latest", "step_0000100"]
    on_disk = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert on_disk == {*listed(path), MANIFEST}
    assert {"hf/config.json", "meta.json", "model/zero_to_fp32.py"} < on_disk
    engine = Engine()
    load_files(engine, path)
    assert read_meta(path) == {"step": 100, **META}
    assert engine.state == 7
    assert [group["lr_ratio"] for group in engine.optimizer.param_groups] == [1.0, 0.1], "this run's, not the saved"


def test_the_newest_are_kept_and_latest_points_at_the_last(store: Checkpoints) -> None:
    for step in (5, 90, 100, 1000):
        save(store, step)
        assert (folder(store) / "latest").read_text().strip() == f"step_{step:07d}"
    assert [path.name for path in complete(store)] == ["step_0001000", "step_0000100"]
    assert names(folder(store)) == ["latest", "step_0000100", "step_0001000"]


def test_milestones_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1, keep_every=20)
    for step in (10, 20, 30, 40, 50):
        save(store, step)
    assert names(tmp_path) == ["latest", "step_0000020", "step_0000040", "step_0000050"]


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing_shard": (lambda p: next((p / "model").glob("*optim*")).unlink(), "optim_states.pt is missing"),
    "truncated_shard": (lambda p: next((p / "model").glob("*optim*")).write_text("m"), "holds 1 bytes instead of "),
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
        assert complete(store) == [older]
    assert f"{newest} is not complete" in caplog.text and reason in caplog.text
    with pytest.raises(UserError, match="not a complete checkpoint") as error:
        read_meta(newest)
    assert str(newest) in str(error.value) and reason in str(error.value)
    # Saving that step again heals it, and it does not count as one of those that are kept.
    save(store, 2)
    assert complete(store) == [newest, older]


def test_what_a_killed_save_left_is_ignored_and_removed_later(store: Checkpoints) -> None:
    first = save(store, 1)
    shutil.copytree(first, folder(store) / "step_0000002.tmp")  # killed before the rename, manifest and all
    (folder(store) / "latest.tmpfile").write_text("step_00")  # and a pointer cut off
    assert complete(store) == [first]
    save(store, 3)
    assert names(folder(store)) == ["latest", "step_0000001", "step_0000003"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_write_is_one_line_and_leaves_older_ones(store: Checkpoints, error: Exception) -> None:
    older = save(store, 1)
    with pytest.raises(UserError, match=r"step_0000002: can't be written .*older ones are intact"):
        save(store, 2, Engine(fail=error))
    assert complete(store) == [older] and (folder(store) / "latest").read_text().strip() == older.name
    assert save(store, 2) in complete(store)  # the next attempt is not hindered by the remains


def test_a_failure_beside_or_while_publishing_is_a_user_error_too(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    older = save(store, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store.save(Engine(2), 2, META, full)
    with pytest.raises(UserError, match="can't be written"):
        store.finish()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "flush", full)
        with pytest.raises(UserError, match="can't be written"):
            save(store, 2)
    assert complete(store) == [older]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        save(Checkpoints(tmp_path / "file" / "checkpoints", keep=1), 1)


def test_every_rank_hears_of_another_ranks_failure(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = []

    def agree(problem: str | None, *, patient: bool = False) -> None:
        said.append(problem)
        if problem:
            raise UserError(problem)

    def full(_folder: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(checkpoint.env, "agree", agree)
    store.save(Engine(2), 2, META, full)
    with pytest.raises(UserError):
        store.finish()
    assert said[-1] is not None and "full" in said[-1]
    said.clear()
    save(store, 3)
    assert said and not any(said)


def test_manifest_is_the_last_thing_written_before_the_rename(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rename, flush = Path.rename, manifest.flush

    def noted_rename(self: Path, to: Path) -> Path:
        order.append(f"rename {to.name}")
        return rename(self, to)

    def noted_flush(path: Path) -> None:
        order.append(path.name)
        flush(path)

    monkeypatch.setattr(Path, "rename", noted_rename)
    for module in (manifest, checkpoint):
        monkeypatch.setattr(module, "flush", noted_flush)
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


def test_a_newer_one_that_was_passed_over_does_not_push_the_written_one_out(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    altered = save(store, 300)
    (altered / "meta.json").write_bytes((altered / "meta.json").read_bytes().replace(b"r", b"s", 1))
    assert incomplete(altered) is None and damaged(altered) is not None
    written = save(store, 250)  # resumed from an older one, and stopped by a signal
    assert store.newest_intact() == written


def test_ones_that_are_not_complete_go_with_those_older_than_the_kept(store: Checkpoints) -> None:
    for step in (1, 2):
        (save(store, step) / "meta.json").unlink()
    save(store, 3)
    assert "step_0000001" in names(folder(store)), "until enough whole ones are there"
    save(store, 4)
    assert names(folder(store)) == ["latest", "step_0000003", "step_0000004"]
