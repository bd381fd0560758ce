"""Adapters under ZeRO-3: whole gradients as without it, and no more gathered than in full training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_lora import LoraOptions
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.distributed.testing import run_distributed
from muco_ds.models.backbones import load_backbone
from muco_ds.models.embedder import Embedder
from muco_ds.models.lora import TABLE, add_adapter
from muco_ds.models.recompute import recompute_layers

from tiny_models import model_folder, pack, picture

ROWS = [896, 897]
KINDS = {
    "full text": LoraOptions(),
    "full all": LoraOptions(targets="all"),
    "lora": LoraOptions(rank=4, alpha=8),
    "dora": LoraOptions(rank=4, alpha=8, dora=True),
    "all": LoraOptions(rank=4, alpha=8, dora=True, targets="all"),
    "no rows": LoraOptions(rank=4, alpha=8, dora=True, train_embeddings="none"),
    "attention": LoraOptions(rank=4, alpha=8, dora=True, targets="attention", train_embeddings="all"),
    "rows alone": LoraOptions(rank=1, targets="tokens"),
    "table alone": LoraOptions(rank=1, targets="tokens", train_embeddings="all"),
}
CHECKPOINTED = "dora"


def build(folder: Path, options: LoraOptions) -> Embedder:
    model = load_backbone(str(folder), dtype=torch.float32, attention="sdpa", vocabulary=0)
    if options.rank:
        add_adapter(model, options, ROWS, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would hide half of the gradients
                parameter.data.normal_(std=0.1, generator=generator)
    return Embedder(model, freeze_vision=options.targets != "all")


def weighted(emb_ED: torch.Tensor) -> torch.Tensor:
    return (emb_ED * torch.randn(emb_ED.shape, generator=torch.Generator().manual_seed(2))).sum()


def batch() -> PackedBatch:
    return pack([Dialogue(("Where?", "What is it?"), (picture(0),)), Dialogue(("A red square.",))], [True, False])


@contextmanager
def counting() -> Iterator[list[int]]:
    """Entries of everything that is gathered inside."""
    from deepspeed.comm.torch import TorchBackend

    counts: list[int] = []
    original = TorchBackend.all_gather_into_tensor

    def counted(self: Any, output_tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        counts.append(output_tensor.numel())
        return original(self, output_tensor, *args, **options)

    TorchBackend.all_gather_into_tensor = counted
    yield counts
    TorchBackend.all_gather_into_tensor = original


def on_a_rank(folder: Path, packed: PackedBatch) -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    """For each kind of training under ZeRO-3: entries gathered by a step, and every whole gradient."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed("gloo", verbose=False)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    zero["stage3_prefetch_bucket_size"] = 0
    config = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    found = {}
    for kind, options in KINDS.items():
        partitioned = HfDeepSpeedConfig(config)
        embedder = build(folder, options)
        del partitioned
        if kind == CHECKPOINTED:
            recompute_layers(embedder.model, ActivationCheckpointing(), freeze_vision=embedder.freeze_vision)
        trained = [parameter for parameter in embedder.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=embedder, optimizer=torch.optim.AdamW(trained, lr=0.0, fused=True), config=config
        )
        for _ in range(2):  # the first step records the order of modules
            with counting() as counts:
                engine.backward(weighted(engine(packed)))
                gathered = sum(counts)
                gradients = {n: safe_get_full_grad(p) for n, p in embedder.named_parameters() if p.requires_grad}
                engine.step()
        found[kind] = gathered, gradients
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def sharded() -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    return run_distributed(on_a_rank, 2, model_folder("qwen2_vl"), batch())[0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_zero(kind: str, sharded: dict[str, Any]) -> None:
    embedder = build(model_folder("qwen2_vl"), KINDS[kind])
    weighted(embedder(batch())).backward()
    expected = {name: p.grad for name, p in embedder.named_parameters() if p.requires_grad}
    found = sharded[kind][1]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    if KINDS[kind].rank and KINDS[kind].train_embeddings != "none":
        name = "trained_rows" if KINDS[kind].train_embeddings == "new" else "weight"
        assert found[f"model.{TABLE}.{name}"].abs().max() > 0


def test_no_more_is_gathered_than_in_full_training(sharded: dict[str, Any]) -> None:
    """Than the backbone's weights; the adapter's come to them."""
    entries = {kind: gathered for kind, (gathered, _) in sharded.items()}
    for kind, options in KINDS.items():
        if options.rank:
            # DoRA uses an update's own small tensors twice over.
            adapter = sum(gradient.numel() for gradient in sharded[kind][1].values())
            full = entries["full all" if options.targets == "all" else "full text"]
            assert entries[kind] <= full + 6 * adapter, (kind, entries)
