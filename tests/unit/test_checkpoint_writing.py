"""Writing beside training: what was taken is what is written, and whatever fails is said and costs no older one."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muco_ds import checkpoint
from muco_ds.checkpoint import Checkpoints
from muco_ds.config import RunOptions
from muco_ds.errors import UserError
from muco_ds.manifest import damaged, discard, incomplete, listed
from muco_ds.snapshot import Snapshots
from muco_ds.trainer import Trainer

from stand_in_engine import META, Engine, complete, folder, loaded, names, save, write_beside


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are written only once this is set."""
    event, write = threading.Event(), torch.save

    def wait_and_write(*args: Any) -> None:
        assert event.wait(30)
        write(*args)

    monkeypatch.setattr(torch, "save", wait_and_write)
    return event


def flip(file: Path, byte: int = -10) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def shard(path: Path) -> Path:
    return next((path / "model").glob("*optim*"))


def test_training_goes_on_while_it_is_written(store: Checkpoints, held: threading.Event) -> None:
    engine = Engine(7)
    path = store.save(engine, 1, META, write_beside)
    engine.state.fill_(8)  # the next step
    assert not path.exists() and not store.failed
    held.set()
    store.finish()
    assert loaded(path) == 7 and damaged(path) is None


def test_the_next_save_waits_for_the_one_before(store: Checkpoints, held: threading.Event) -> None:
    store.save(Engine(1), 1, META, write_beside)
    threading.Timer(0.2, held.set).start()
    store.save(Engine(2), 2, META, write_beside)
    assert [path.name for path in complete(store)][-1] == "step_0000001"
    store.finish()
    assert [loaded(path) for path in complete(store)] == [2, 1]


@pytest.mark.parametrize("error", [UserError("row 3: it changed"), RuntimeError("CUDA out of memory")])
def test_what_ends_a_run_does_not_cost_the_one_being_written(
    store: Checkpoints, held: threading.Event, error: Exception
) -> None:
    def steps(_bar: object) -> bool:
        store.save(Engine(1), 1, META, write_beside)
        threading.Timer(0.2, held.set).start()
        raise error

    trainer = Trainer.__new__(Trainer)
    run = RunOptions("r")
    trainer.config, trainer.metrics, trainer.checkpoints = SimpleNamespace(run=run), None, store  # type: ignore[assignment]
    trainer.start_step, trainer.max_steps = 0, 2
    trainer._steps = steps  # type: ignore[method-assign]
    with pytest.raises(type(error), match=str(error)):
        trainer.fit()
    assert [loaded(path) for path in complete(store)] == [1]


def test_in_the_foreground_it_is_there_at_once(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1, background=False)
    path = store.save(Engine(1), 1, META, write_beside)
    assert incomplete(path) is None and loaded(path) == 1


def test_in_the_foreground_there_is_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, written = Engine(1), []
    monkeypatch.setattr(torch, "save", lambda tree, path: written.append(tree) or path.write_bytes(b"x"))
    Checkpoints(tmp_path, keep=1, background=False).save(engine, 1, META, write_beside)
    assert written[0]["state"].data_ptr() == engine.state.data_ptr()
    with Snapshots().instead_of_writing(engine, tmp_path, copied=False):
        assert engine.checkpoint_engine.preserves_storage_sharing(), "DeepSpeed cuts views out itself"


def test_a_failure_in_the_background_is_known_before_the_next_step_and_said_at_the_end(
    store: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(store, 1)

    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/7")

    monkeypatch.setattr(torch, "save", full)
    store.save(Engine(2), 2, META, write_beside)
    store.wait(30)
    assert store.failed
    with pytest.raises(UserError, match=r"step_0000002: can't be written .*older ones are intact"):
        store.finish()
    assert not store.failed and complete(store) == [older] and names(folder(store)) == ["latest", "step_0000001"]


def test_without_space_nothing_is_written(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    older, written = save(store, 1), []
    free = shutil.disk_usage(folder(store))._replace(free=2**24)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(torch, "save", lambda *args: written.append(args))
    with pytest.raises(UserError, match=r"step_0000002: can't be written \(0.02 GB are needed and 0.02 GB are free\)"):
        save(store, 2)
    assert not written and complete(store) == [older]


@pytest.mark.parametrize("change", [flip, lambda file: flip(file, 0), lambda file: flip(file, 100)])
def test_an_altered_file_is_named_and_the_older_one_taken(
    store: Checkpoints, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None]
) -> None:
    older, newest = save(store, 1), save(store, 2)
    for name in listed(newest):
        file, before = newest / name, (newest / name).read_bytes()
        if len(before) < 101:
            continue
        change(file)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "muco_ds"):
            assert store.newest_intact() == older
        assert f"{newest} is damaged ({name} was altered" in caplog.text
        file.write_bytes(before)
    assert store.newest_intact() == newest


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(store: Checkpoints) -> None:
    flip(shard(save(store, 1)))
    (save(store, 2) / "meta.json").unlink()
    with pytest.raises(UserError, match=r"checkpoints: none of its checkpoints \(2\) is intact: restore one"):
        store.newest_intact()


def test_a_second_place_gets_a_copy_and_stands_in(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "run", keep=1, copies=tmp_path / "copies" / "run")
    for step in (1, 2):
        save(store, step)
    first, copied = tmp_path / "run" / "step_0000002", tmp_path / "copies" / "run" / "step_0000002"
    assert names(copied.parent) == ["latest", "step_0000002"]
    assert sorted(listed(copied)) == sorted(listed(first)) and damaged(copied) is None and loaded(copied) == 2
    assert store.newest_intact() == first
    flip(shard(first))
    assert store.newest_intact() == copied
    shutil.rmtree(tmp_path / "run")
    assert store.newest_intact() == copied


def test_a_second_place_that_fails_costs_only_the_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Checkpoints(tmp_path / "run", keep=1, copies=tmp_path / "copies" / "run")
    shutil.rmtree(tmp_path / "copies")
    (tmp_path / "copies").write_text("a file, no folder")
    with caplog.at_level(logging.WARNING, "muco_ds"):
        path = save(store, 1)
    assert store.newest_intact() == path and "training goes on without this copy" in caplog.text


def test_a_second_place_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "copies").write_text("a file, no folder")
    with pytest.raises(UserError, match=r"checkpoint\.copy_to: can't write to .*copies/run"):
        Checkpoints(tmp_path / "run", keep=1, copies=tmp_path / "copies" / "run")


def test_a_second_place_that_a_rank_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.env, "is_main", lambda: False)  # nobody makes the mark here
    monkeypatch.setattr(checkpoint.env, "rank", lambda: 1)
    with pytest.raises(UserError, match=r"checkpoint\.copy_to: rank 1 does not see .*share it"):
        Checkpoints(tmp_path / "run", keep=1, copies=tmp_path / "copies" / "run")


def test_without_memory_for_the_copy_the_cure_is_named(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", none)
    with pytest.raises(UserError, match=r"set checkpoint\.background=false"):
        save(store, 1)


def test_a_rank_that_is_gone_while_saving_is_no_full_disk(store: Checkpoints) -> None:
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        save(store, 1, Engine(fail=RuntimeError("Connection closed by peer")))


def test_a_checkpoint_loses_its_name_before_its_files(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(store, 1)

    def killed(*_: object, **__: object) -> None:
        assert not path.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: killed() if path.exists() else None)
        with pytest.raises(KeyboardInterrupt):
            discard(path)
    assert complete(store) == [] and not store.places[0].sealed()
    save(store, 2)
    assert names(folder(store)) == ["latest", "step_0000002"]


def test_a_full_disk_while_writing_leaves_the_older_one(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(store, 1)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "flushed", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(store, 2)
    assert store.newest_intact() == older


class Saves:
    """Has one tree saved."""

    checkpoint_engine: Any = "DeepSpeed's"

    def __init__(self, tree: Any) -> None:
        self.tree = tree


def test_a_snapshot_is_the_tree_apart_from_its_memory(tmp_path: Path) -> None:
    weight, flat = torch.randn(3, 4), torch.randn(1000)
    state = torch.nn.Linear(2, 2).state_dict()
    tree = {
        **{"tied": [weight, weight], "view": flat[10:20], "turned": weight.t(), "none": None, "step": 3},
        **{"empty": torch.empty(0), "nested": (1, [torch.ones(2, dtype=torch.bfloat16)]), "module": state},
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    snapshots, engine = Snapshots(), Saves(tree)
    for _ in range(2):  # the second time into the same memory
        with snapshots.instead_of_writing(engine, tmp_path) as states:
            engine.checkpoint_engine.save(engine.tree, str(tmp_path / "model" / "file.pt"))
        assert engine.checkpoint_engine == "DeepSpeed's"
        assert states[0].name == "model/file.pt"
        torch.save(states[0].tree, tmp_path / "file.pt")
        read = torch.load(tmp_path / "file.pt")
        assert torch.equal(read["view"], flat[10:20]) and torch.equal(read["turned"], weight.t())
        assert read["tied"][0].data_ptr() == read["tied"][1].data_ptr() and torch.equal(read["tied"][0], weight)
        assert read["nested"][0] == 1 and read["nested"][1][0].dtype == torch.bfloat16
        assert read["step"] == 3 and read["none"] is None and read["empty"].shape == (0,)
        assert read["module"]._metadata == state._metadata and torch.equal(read["parameter"], torch.ones(2))
        assert (tmp_path / "file.pt").stat().st_size < 8000, "a view does not drag its storage along"
        assert states[0].size == 4 * (12 + 12 + 10 + 6 + 2) + 4
        flat.add_(1)
        weight.mul_(2)
