"""Training an adapter: the same losses however it is run, resumed exactly, merged and written for peft as trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLModel

from muco_ds.checkpoint import TAG
from muco_ds.export import export_checkpoint

from programs import REPOSITORY, Demo, Programs, losses, metrics, refusal
from test_train import write_stage

CONVERT = REPOSITORY / "tools" / "convert_ckpt.py"
STEPS = 3
DORA = {
    **{"run.max_steps": STEPS, "optim.lr": 2e-3, "optim.warmup_steps": 0, "model.freeze_vision": "true"},
    **{"model.lora.rank": 4, "model.lora.alpha": 8, "model.lora.dora": "true"},
}


def write_partitioned(folder: Path) -> Path:
    """ZeRO-3 that partitions small tensors too, and keeps nothing it has gathered."""
    path = write_stage(folder, 3)
    small = '"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0'
    path.write_text(path.read_text().replace('"stage": 3', small))
    return path


@pytest.fixture(scope="module")
def plain(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the run that the others are compared with: one process, stage 0, one pack."""
    out = tmp_path_factory.mktemp("plain")
    programs.run(demo.train(out, {**DORA, "deepspeed": write_stage(out, 0)})).check()
    return out


@pytest.mark.parametrize(
    ("stage", "ranks", "packs"), [(3, 1, 1), (3, 2, 1), (3, 2, 4), (2, 2, 4)]
)
def test_stages_ranks_and_packs_give_the_same_losses(
    stage: int, ranks: int, packs: int, demo: Demo, programs: Programs, plain: Path, tmp_path: Path
) -> None:
    path = write_partitioned(tmp_path) if stage == 3 else write_stage(tmp_path, stage)
    overrides = {**DORA, "deepspeed": path, "model.activation_checkpointing": str(packs > 1).lower()}
    if packs > 1:
        overrides["batch.pack_tokens"] = 340  # a pack holds one example
    programs.run(demo.train(tmp_path, overrides), ranks=ranks).check()
    found, expected = losses(tmp_path), losses(plain)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert expected[STEPS] < 0.99 * expected[1], "nothing was learned"
