"""Two ZeRO-3 steps in bf16 of a Qwen2-VL in the shape of the released 2B model, with random weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.flops import peak_flops
from muco_ds.models.demo_model import write_model

NEEDED_GIB = 40
REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < NEEDED_GIB * 2**30,
        reason=f"needs a CUDA GPU with {NEEDED_GIB} GiB",
    ),
]

# Saving is left out: tens of gigabytes that say nothing about the step. A process of its own, because DeepSpeed's and
# the process group's state outlive an engine.
DRIVER = """
import sys
from muco_ds.config_cli import parse_args
from muco_ds.distributed import env
from muco_ds.trainer import Trainer
Trainer._save = lambda self, step: None
finished = Trainer(parse_args(sys.argv[1:]).config, env.start()).fit()
env.stop()
sys.exit(not finished)
"""


def write_2b(model_dir: Path) -> int:
    """Give a demo model folder the released 2B model's shape, vocabulary apart; returns its number of weights."""
    config = Qwen2VLConfig.from_pretrained(model_dir)
    text = {
        **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        **{"num_attention_heads": 12, "num_key_value_heads": 2, "initializer_range": 0.02},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
    values: dict[str, Any] = config.to_dict()
    values["text_config"].update(text, layer_types=None)
    values["vision_config"].update(vision, initializer_range=0.02)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(Qwen2VLConfig.from_dict(values), dtype=torch.bfloat16)
    model.save_pretrained(model_dir)
    weights = sum(parameter.numel() for parameter in model.parameters())
    del model
    torch.cuda.empty_cache()
    return weights


def train_two_steps(root: Path, recipe: str, rows: str) -> list[dict[str, Any]]:
    """Train on the demo's data as its recipes do, in bf16 under ZeRO-3; returns the lines of metrics."""
    arguments = [
        *("--config", str(REPOSITORY / "launch" / "recipes" / recipe)),
        *("--run.name", "two_steps", "--run.dir", str(root / "runs"), "--run.max_steps", "2"),
        *("--run.precision", "bf16", "--optim.warmup_steps", "1", "--optim.lr", "1e-5"),
        *("--model.path", str(root / "model"), "--model.freeze_vision", "true"),
        *("--model.activation_checkpointing.text", "1", "--data.train", str(root / "data" / rows)),
        *("--data.val", str(root / "data" / "test.parquet"), "--data.images", str(root / "data" / "images")),
        *("--data.index_dir", str(root / "index"), "--batch.images", "8"),
        *("--validation.every", "0", "--log.every", "1"),
    ]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = {**alone, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return [json.loads(line) for line in (root / "runs" / "two_steps" / "metrics.jsonl").read_text().splitlines()]


def check(lines: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert math.isfinite(line["loss"]) and line["loss"] > 0
        assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
        assert line["pairs"] == 8 * 7 and line["images"] == 8
    assert lines[0]["loss"] != lines[1]["loss"]


@pytest.mark.parametrize(
    ("recipe", "rows"), [("demo.yaml", "train.parquet"), ("demo_coma_compress.yaml", "conversations_train.jsonl")]
)
def test_two_zero3_steps_in_bf16(tmp_path: Path, recipe: str, rows: str) -> None:
    write_model(tmp_path / "model", row_texts(write_data(tmp_path / "data", 24, 8, seed=0)), seed=0)
    weights = write_2b(tmp_path / "model")
    assert 1.9e9 < weights < 2.1e9  # 2.2e9 with the released vocabulary
    lines = train_two_steps(tmp_path, recipe, rows)
    check(lines)
    # 2 bytes for every weight, and 12 for each trained one (fp32 copy and AdamW's two moments).
    lowest = (2 * weights + 12 * 1.3e9) / 2**30
    print(f"peak memory {lines[-1]['peak_mem_gib']:.1f} GiB, mfu {lines[-1]['mfu']}")
    assert lines[-1]["peak_mem_gib"] > lowest
    assert (lines[-1]["mfu"] is None) == (peak_flops(torch.device("cuda")) is None)
    if lines[-1]["mfu"] is not None:
        assert 0 < lines[-1]["mfu"] < 1
