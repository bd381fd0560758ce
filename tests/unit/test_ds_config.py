"""The DeepSpeed JSON: the run's numbers filled in, clashes refused, every packaged file accepted by DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muco_ds.config import DataOptions, ModelOptions, OptimOptions, RunConfig, RunOptions
from muco_ds.ds_config import REPOSITORY, build_deepspeed_config
from muco_ds.errors import UserError

PACKAGED = sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json"))


def run_config(deepspeed: str = "ds_configs/zero3.json", precision: Any = "bf16") -> RunConfig:
    return RunConfig(
        run=RunOptions(name="x", max_steps=1, precision=precision),
        model=ModelOptions(path="model"),
        data=DataOptions(train="train.parquet", images="pictures"),
        optim=OptimOptions(max_grad_norm=0.7),
        deepspeed=deepspeed,
    )


def build(tmp_path: Path, content: str, world_size: int = 4, precision: str = "bf16") -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(content)
    return build_deepspeed_config(run_config(str(path), precision), world_size)


def problem(tmp_path: Path, content: str, precision: str = "bf16") -> str:
    with pytest.raises(UserError) as caught:
        build(tmp_path, content, precision=precision)
    assert "ds.json" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def check_owned(tree: dict[str, Any], world_size: int, precision: str) -> None:
    assert tree["train_batch_size"] == world_size
    assert tree["train_micro_batch_size_per_gpu"] == tree["gradient_accumulation_steps"] == 1
    assert tree["gradient_clipping"] == 0.7
    assert tree["bf16"]["enabled"] is (precision == "bf16")
    assert tree["data_types"]["grad_accum_dtype"] == tree["communication_data_type"] == "fp32"


def test_the_three_packaged_configs_are_here() -> None:
    assert {"zero2.json", "zero3.json", "zero3_offload.json"} <= set(PACKAGED)


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packaged_configs_leave_the_runs_numbers_to_the_run(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # found in the repository from anywhere
    tree = build_deepspeed_config(run_config(f"ds_configs/{name}", precision), world_size=8)
    check_owned(tree, 8, precision)
    assert "auto" not in json.dumps(tree)
    written = json.loads((REPOSITORY / "ds_configs" / name).read_text())
    assert tree["zero_optimization"] == written["zero_optimization"]


def test_a_file_in_the_current_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert build_deepspeed_config(run_config(), 2)["zero_optimization"]["stage"] == 1


def test_absent_keys_are_filled_and_equal_numbers_kept(tmp_path: Path) -> None:
    check_owned(build(tmp_path, "{}", precision="fp32"), 4, "fp32")
    owned = '"train_batch_size": 4, "bf16": {"enabled": true}, "zero_optimization": {"stage": 2}'
    check_owned(build(tmp_path, f"{{{owned}}}"), 4, "bf16")


def test_bf16_without_fp32_weights_is_refused(tmp_path: Path) -> None:
    assert "would keep no fp32 master weights" in problem(tmp_path, '{"zero_optimization": {"stage": 0}}')


def test_lower_precision_exchange_is_the_jsons_choice(tmp_path: Path) -> None:
    asked = '"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}'
    tree = build(tmp_path, f'{{{asked}, "zero_optimization": {{"stage": 3}}}}')
    assert tree["communication_data_type"] == tree["data_types"]["grad_accum_dtype"] == "bf16"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"gradient_clipping": 1.0}', ["gradient_clipping", "1.0", "0.7", "optim.max_grad_norm"]),
        ('{"train_batch_size": 256}', ["train_batch_size", "256", "4"]),
        ('{"train_micro_batch_size_per_gpu": 8}', ["train_micro_batch_size_per_gpu", "8", "1"]),
        (
            '{"gradient_accumulation_steps": 2}',
            ["gradient_accumulation_steps", "2", "1", "negatives", "gradient cache"],
        ),
        ('{"bf16": {"check_grad_overflow": false}}', ["bf16.check_grad_overflow", "false", "skipped"]),
        ('{"zero_optimization": {"compute_grad_norm": false}}', ["zero_optimization.compute_grad_norm", "remove"]),
        ('{"bf16": {"enabled": false}}', ["bf16.enabled", "false", "true", "precision"]),
        ('{"bf16": {"enabled": 1}}', ["bf16.enabled", "1", "true"]),
        ('{"bf16": true}', ["bf16", "object"]),
        ('{"optimizer": {"type": "Adam"}}', ["optimizer", "remove"]),
        ('{"scheduler": {"type": "WarmupLR"}}', ["scheduler", "remove"]),
        ('{"fp16": {"enabled": true}}', ["fp16", "remove"]),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', ["zero_optimization.reduce_bucket_size", "auto"]),
        ('{"a": 1, "a": 2}', ["'a'", "twice"]),
        ('{\n"a": 1,\n}', ["line"]),
        ("[]", ["object"]),
    ],
)
def test_clashes_name_the_file_and_both_values(tmp_path: Path, content: str, parts: list[str]) -> None:
    text = problem(tmp_path, content)
    assert all(part in text for part in parts), text


def test_bf16_json_under_an_fp32_run_is_refused(tmp_path: Path) -> None:
    assert "fp32" in problem(tmp_path, '{"bf16": {"enabled": true}}', precision="fp32")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"no such file 'absent\.json'"):
        build_deepspeed_config(replace(run_config(), deepspeed="absent.json"), 1)


TWO_STEPS = """
import json, sys
import deepspeed, torch
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # compiled, and locked for ever where that is killed
deepspeed.init_distributed("gloo")
for label, config in json.load(sys.stdin).items():
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=config["zero_optimization"]["stage"] == 3):
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    x = torch.randn(8, 16, dtype=dtype)
    losses = []
    for _ in range(3):
        loss = (engine(x).float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    model_dtype, grad_dtype = engine.get_data_types()
    assert model_dtype == dtype and grad_dtype == engine.communication_data_type == torch.float32
    assert engine.gradient_clipping() == 0.7 and engine.gradient_accumulation_steps() == 1
    print("RESULT", json.dumps({label: losses}), flush=True)
    engine.destroy()
"""


@pytest.mark.integration
def test_deepspeed_trains_with_every_packaged_config() -> None:
    configs = {
        f"{name} {precision}": build_deepspeed_config(run_config(f"ds_configs/{name}", precision), 1)
        for name in PACKAGED
        for precision in ("fp32", "bf16")
    }
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "0", "LOCAL_SIZE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_STEPS], input=json.dumps(configs), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses: dict[str, list[float]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            losses |= json.loads(line.removeprefix("RESULT "))
    assert set(losses) == set(configs)
    for label, (first, second, third) in losses.items():
        assert first > second > third, label
