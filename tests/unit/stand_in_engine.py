"""An engine that has files written as DeepSpeed does, and what tests of checkpoints ask of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from muco_ds.checkpoint import Checkpoints, load_files

META = {"config": {"run": {"name": "r"}}, "world_size": 1}


class Engine:
    """Has a shard with a number in it written, and reads it; fails on demand after a part of its files."""

    def __init__(self, state: int = 0, fail: Exception | None = None) -> None:
        self.state, self.fail = torch.tensor([state]), fail
        self.checkpoint_engine: Any = None
        self.optimizer = SimpleNamespace(
            param_groups=[{"params": [], "lr_ratio": 1.0}, {"params": [], "lr_ratio": 0.1}]
        )

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest, "DeepSpeed's own pointer would not be atomic"
        shards = Path(folder, tag)
        self.checkpoint_engine.makedirs(str(shards))
        self.checkpoint_engine.save({"state": self.state}, str(shards / "zero_pp_rank_0_mp_rank_00_model_states.pt"))
        if self.fail is not None:
            raise self.fail
        self.checkpoint_engine.save({"m": torch.ones(99)}, str(shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt"))
        (shards / "zero_to_fp32.py").write_text("DeepSpeed writes this itself")

    def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> tuple[str | None, dict[str, Any]]:
        self.optimizer.param_groups = [{"params": [], "lr_ratio": 1.0}, {"params": [], "lr_ratio": 0.5}]  # as saved
        file = Path(folder, tag, "zero_pp_rank_0_mp_rank_00_model_states.pt")
        if not file.exists():
            return None, {}
        self.state = torch.load(file)["state"]
        return folder, {}


def write_beside(path: Path) -> None:
    (path / "hf").mkdir()
    (path / "hf" / "config.json").write_text("{}")


def save(store: Checkpoints, step: int, engine: Engine | None = None, meta: dict[str, Any] = META) -> Path:
    path = store.save(engine or Engine(step), step, meta, write_beside)
    store.finish()
    return path


def folder(store: Checkpoints) -> Path:
    return store.places[0].folder


def complete(store: Checkpoints) -> list[Path]:
    return store.places[0].complete()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(path: Path) -> int:
    engine = Engine()
    load_files(engine, path)
    return int(engine.state)
