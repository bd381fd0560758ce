"""A checkpoint's files may hold tensors and DeepSpeed's own few classes: a pickle that runs something is not run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from muco_ds.checkpoint import load_files
from muco_ds.errors import UserError
from muco_ds.export import checkpoint_weights
from muco_ds.reshard import _drop_first_shard
from muco_ds.safe_load import tensors_only

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Attack:
    """What a pickle can ask for: any call with any arguments."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.proof}'",)


def shard() -> dict[str, Any]:
    """As DeepSpeed writes them under ZeRO-1, -2 and -3."""
    return {
        "optimizer_state_dict": {
            "loss_scaler": LossScaler(scale=1),
            "zero_stage": ZeroStageEnum.weights,
            "param_slice_mappings": [{"weight": fragment_address(start=3, numel=4)}],
            "fp32_flat_groups": [torch.arange(4.0)],
        },
        "ds_version": "0.19.8",
    }


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    return tmp_path / "was_run"


@pytest.fixture(params=["zip", "pickle"])
def attack(tmp_path: Path, proof: Path, request: pytest.FixtureRequest) -> Path:
    """The shard of a checkpoint, altered. It does run where nothing guards it."""
    path = tmp_path / "model" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.parent.mkdir()
    torch.save({**shard(), "more": Attack(proof)}, path, _use_new_zipfile_serialization=request.param == "zip")
    torch.load(path, weights_only=False)
    assert proof.exists()
    proof.unlink()
    return path


def test_what_deepspeed_writes_is_loaded(tmp_path: Path) -> None:
    torch.save(shard(), tmp_path / "shard.pt")
    with tensors_only(tmp_path):
        state = torch.load(tmp_path / "shard.pt", weights_only=False)["optimizer_state_dict"]
    assert state["zero_stage"] is ZeroStageEnum.weights and state["loss_scaler"].loss_scale == 1
    assert state["param_slice_mappings"][0]["weight"].numel == 4
    assert torch.equal(state["fp32_flat_groups"][0], torch.arange(4.0))


def test_what_was_written_by_early_pythons_3_11_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = lambda self, protocol: (getattr, (type(self), self.name))  # noqa: E731 - as enum.py has it there
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", by_name)
    torch.save(shard(), tmp_path / "shard.pt")
    assert b"getattr" in (tmp_path / "shard.pt").read_bytes()
    with tensors_only(tmp_path):
        state = torch.load(tmp_path / "shard.pt", weights_only=False)["optimizer_state_dict"]
    assert state["zero_stage"] is ZeroStageEnum.weights


class Reach:
    """Asks for an attribute of something."""

    def __init__(self, *of: object) -> None:
        self.of = of

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, self.of


@pytest.mark.parametrize("of", [(ZeroStageEnum, "__class__"), (LossScaler, "backward"), (ZeroStageEnum, "mro")])
def test_attributes_are_not_reached_that_way(tmp_path: Path, of: tuple[object, str]) -> None:
    torch.save({"more": Reach(*of)}, tmp_path / "shard.pt")
    with pytest.raises(UserError, match=r"holds more than tensors \(getattr\)"), tensors_only(tmp_path):
        torch.load(tmp_path / "shard.pt", weights_only=False)


def load_by_engine(path: Path) -> None:
    def load_checkpoint(folder: str, tag: str, load_module_strict: bool) -> None:
        torch.load(path, map_location="cpu", weights_only=False)  # as DeepSpeed does

    optimizer = SimpleNamespace(param_groups=[])
    load_files(SimpleNamespace(optimizer=optimizer, load_checkpoint=load_checkpoint), path.parent.parent)


@pytest.mark.parametrize(
    "load",
    [load_by_engine, lambda path: checkpoint_weights(path.parent, 3), _drop_first_shard],
    ids=["resume", "convert", "reshard"],
)
def test_an_attack_is_refused_in_one_line_and_not_run(attack: Path, proof: Path, load: Callable[[Path], Any]) -> None:
    with pytest.raises(
        UserError, match=r"more than tensors \((posix|os)\.system\).*was not run|does not load"
    ) as raised:
        load(attack)
    assert not proof.exists()
    assert "\n" not in str(raised.value) and str(attack.parent.parent) in str(raised.value)


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_environment_is_left_as_it_was(
    tmp_path: Path, attack: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv(FORCED, raising=False)
    if before is not None:
        monkeypatch.setenv(FORCED, before)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch would refuse both
    with pytest.raises(UserError), tensors_only(tmp_path):
        torch.load(attack, weights_only=False)
    assert os.environ.get(FORCED) == before and os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert LossScaler not in torch.serialization.get_safe_globals()
