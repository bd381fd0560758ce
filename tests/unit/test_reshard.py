"""The universal form of a checkpoint is whole or not there, and of no other checkpoint. DeepSpeed is stood in for."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from muco_ds import reshard
from muco_ds.checkpoint import TAG, UNIVERSAL
from muco_ds.errors import UserError
from muco_ds.manifest import MANIFEST, flushed, seal
from muco_ds.reshard import load_universal, universal_form, unusable
from muco_ds.resume import Start

PROBE_ND = torch.nn.functional.normalize(torch.arange(6.0).view(2, 3) + 1)


def make_checkpoint(folder: Path, step: int = 7, stage: int = 3, weight: float = 1.0) -> Path:
    path = folder / f"step_{step:07d}"
    work = path.with_suffix(".tmp")
    (work / TAG).mkdir(parents=True)
    (work / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("shard")
    meta = {
        "step": step,
        "world_size": 2,
        "zero_stage": stage,
        "nonfinite": {"skipped": 0, "in_a_row": 0},
        "temperature": {},
    }
    (work / "meta.json").write_text(json.dumps(meta))
    save_file({"probe_ND": PROBE_ND * weight}, work / "probe.safetensors")
    files = {str(file.relative_to(work)): flushed(file) for file in work.rglob("*") if file.is_file()}
    seal(work, path, files)
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were converted."""
    done: list[Path] = []

    def convert(work: Callable[..., None], shards: Path, out: Path, workers: int, stage: int) -> None:
        (out / "zero" / "weight").mkdir(parents=True)
        (out / "zero" / "weight" / "fp32.pt").write_text(str(shards.parent))
        done.append(shards.parent)

    monkeypatch.setattr(reshard, "_apart", convert)
    return done


def test_made_once(tmp_path: Path, conversions: list[Path]) -> None:
    checkpoint = make_checkpoint(tmp_path)
    assert unusable(checkpoint) == f"no readable {MANIFEST}"
    assert universal_form(checkpoint) == checkpoint / UNIVERSAL and unusable(checkpoint) is None
    assert universal_form(checkpoint) == checkpoint / UNIVERSAL
    assert conversions == [checkpoint]


def cut_short(path: Path) -> None:
    next(path.rglob("fp32.pt")).write_text("s")


def altered(path: Path) -> None:
    file = next(path.rglob("fp32.pt"))
    file.write_text("s" * file.stat().st_size)


def no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(cut_short, "holds 1 bytes"), (altered, "checksum"), (no_manifest, f"no readable {MANIFEST}")],
)
def test_a_damaged_one_is_made_again(
    tmp_path: Path,
    conversions: list[Path],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
    reason: str,
) -> None:
    checkpoint = make_checkpoint(tmp_path)
    spoil(universal_form(checkpoint))
    with caplog.at_level(logging.WARNING, "muco_ds"):
        universal_form(checkpoint)
    assert conversions == [checkpoint] * 2 and unusable(checkpoint) is None
    assert f"{checkpoint / UNIVERSAL} (" in caplog.text and reason in caplog.text


@pytest.mark.parametrize("other", [{"step": 8}, {"weight": 0.5}], ids=["another_step", "another_run"])
def test_one_copied_from_elsewhere_is_made_again(
    tmp_path: Path, conversions: list[Path], other: dict[str, Any]
) -> None:
    checkpoint, foreign = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", **other)
    universal_form(foreign).rename(checkpoint / UNIVERSAL)
    assert unusable(checkpoint) == "made from another checkpoint"
    assert next(universal_form(checkpoint).rglob("fp32.pt")).read_text() == str(checkpoint)


FAILURES = {
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device): free space"),
    "torch": (RuntimeError("PytorchStreamWriter failed\nat line 3"), "RuntimeError: PytorchStreamWriter failed"),
    "memory": (BrokenProcessPool(), "tools/reshard_ckpt.py --workers 1"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_the_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    error, line = FAILURES[failure]

    def fail(work: Callable[..., None], shards: Path, out: Path, workers: int, stage: int) -> None:
        out.mkdir()
        raise error

    checkpoint = make_checkpoint(tmp_path)
    before = sorted(checkpoint.rglob("*"))
    monkeypatch.setattr(reshard, "_apart", fail)
    with pytest.raises(UserError) as raised:
        universal_form(checkpoint)
    assert line in str(raised.value) and str(checkpoint) in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(checkpoint.rglob("*")) == before


@pytest.mark.parametrize(("stage", "ranks", "universal"), [(3, 2, False), (3, 1, True), (1, 4, True), (0, 4, False)])
def test_only_what_is_cut_over_other_ranks_is_converted(
    tmp_path: Path, stage: int, ranks: int, universal: bool
) -> None:
    checkpoint = make_checkpoint(tmp_path, stage=stage)
    start = Start.of(checkpoint, ranks)
    assert (start.step, start.universal) == (7, universal)
    start.check_stage(stage)
    with pytest.raises(UserError, match=f"ZeRO stage 4 but .* under stage {stage}"):
        start.check_stage(4)


def test_a_model_that_is_not_the_saved_one_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    start = Start.of(checkpoint, 1)
    start.check_probe(PROBE_ND + 1e-5, "fp32")
    start.check_probe(PROBE_ND + 1e-2, "bf16")
    for probe_ND in (PROBE_ND + 1e-3, PROBE_ND * float("nan")):
        with pytest.raises(UserError, match="embeddings differ") as raised:
            start.check_probe(probe_ND, "fp32")
        assert str(raised.value).startswith(f"{checkpoint / UNIVERSAL}: ")


def test_groups_keep_their_own_counter_and_hyperparameters(tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 hands out one counter and the first group's values, as this engine does."""
    masters = [torch.zeros(2), torch.zeros(3)]
    optimizer = SimpleNamespace(
        state={}, param_groups=[{"params": [m], "weight_decay": w} for m, w in zip(masters, (0.1, 0.0), strict=True)]
    )

    def load_checkpoint(folder: str, tag: str, load_module_strict: bool) -> tuple[str, dict[str, Any]]:
        assert folder == str(tmp_path / UNIVERSAL)
        counter = torch.tensor(5.0)
        for master, group in zip(masters, optimizer.param_groups, strict=True):
            optimizer.state[master] = {"step": counter}
            group.update(weight_decay=0.1, params=[])
        return folder, {}

    outer = SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups)
    load_universal(SimpleNamespace(optimizer=outer, load_checkpoint=load_checkpoint), tmp_path)
    counters = [state["step"] for state in optimizer.state.values()]
    counters[0] += 1
    assert [float(counter) for counter in counters] == [6.0, 5.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
