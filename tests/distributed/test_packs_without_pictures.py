"""Under ZeRO-3 a rank whose pack has no picture gathers and reduces what the others do, in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.data.collator import QUERY, Side
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.distributed import env
from muco_ds.distributed.testing import run_distributed
from muco_ds.models.backbones import load_backbone
from muco_ds.models.demo_model import write_model
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Processing, Settings
from muco_ds.models.recompute import recompute_layers

from tiny_folders import KINDS, change_family

pytestmark = pytest.mark.distributed

PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
DIALOGUES = [
    Dialogue(("Describe it.", "x"), (PICTURE, PICTURE.rotate(90))),
    Dialogue(("the red star", "a longer text")),
]


def embedder_and_packs(folder: Path, checkpointing: bool) -> tuple[Embedder, list[PackedBatch]]:
    """A pack with pictures and one without."""
    processing = Processing.load(str(folder), Settings("<|emb|>", 56 * 56, 112 * 112, None))
    vocabulary = len(processing.tokenizer)
    model = load_backbone(str(folder), dtype=torch.float32, attention="sdpa", vocabulary=vocabulary)
    if checkpointing:
        recompute_layers(model, ActivationCheckpointing(), freeze_vision=False)
    ids_k3 = torch.zeros(2, 3, dtype=torch.int64).numpy()
    packer = processing.packer()
    packs = [packer.pack([Side(QUERY, dialogue, True, ids_k3)], replace_broken=False) for dialogue in DIALOGUES]
    assert [pack.has_images for pack in packs] == [True, False]
    return Embedder(model, freeze_vision=False).train(), packs


def value(emb_ED: torch.Tensor) -> torch.Tensor:
    return (emb_ED * torch.linspace(-1, 1, emb_ED.numel()).view_as(emb_ED)).sum()


Gradients = dict[str, torch.Tensor]
CASES = [("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False), ("qwen3_vl", True)]


def zero3_gradients(root: Path) -> list[list[Gradients]]:
    """For each case, of three passes: rank 0 has the pictures, then rank 1, then rank 0."""
    env.start()
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {
        **{"train_batch_size": 2, "steps_per_print": 10**9},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    found = []
    for kind, checkpointing in CASES:
        embedder, packs = embedder_and_packs(root / kind, checkpointing)
        optimizer = torch.optim.AdamW(embedder.parameters(), lr=0.0)
        engine, *_ = deepspeed.initialize(model=embedder, optimizer=optimizer, config=config)
        found.append([])
        for step in range(3):
            engine.backward(value(engine(packs[(dist.get_rank() + step) % 2])))
            found[-1].append({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})
            engine.step()
        engine.destroy()
    return found


def test_gradients_are_the_mean_over_ranks_with_and_without_pictures(tmp_path: Path) -> None:
    texts = row_texts(write_data(tmp_path / "data", 20, 1, seed=0))
    for kind in KINDS:
        write_model(tmp_path / kind, texts, seed=0)
        change_family(tmp_path / kind, kind)
    per_rank = run_distributed(zero3_gradients, 2, tmp_path, timeout_s=300.0)
    for i, (kind, checkpointing) in enumerate(CASES):
        embedder, packs = embedder_and_packs(tmp_path / kind, checkpointing)
        (sum(value(embedder(pack)) for pack in packs) / 2).backward()  # type: ignore[union-attr]
        for step in (step for found in per_rank for step in found[i]):
            for name, parameter in embedder.named_parameters():
                assert parameter.grad is not None
                error = (step[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-3)
                assert error < 1e-5, f"{kind} {name}: relative error {error:.1e}"
