"""liger-kernel's kernels inside the models of every family give what the stock modules give.

They run in Triton's interpreter, so TRITON_INTERPRET must be set before they are imported: this file as a script does
the work in float32 and prints what it saw.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch

from muco_ds.config_lora import LoraOptions
from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError
from muco_ds.models import liger
from muco_ds.models.liger import use_liger
from muco_ds.models.lora import add_adapter

from interpreter import run_interpreted
from tiny_models import new_embedder, pack, picture

CPU = torch.device("cpu")
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def passes(kind: str, lora: bool) -> dict[str, Any]:
    """Largest relative differences of embeddings and of gradients, and the line of the log."""
    embedder = new_embedder(kind, freeze_vision=False)
    if lora:
        add_adapter(embedder.model, LoraOptions(rank=2, targets="all"), [], seed=0)
        for name, weight in embedder.named_parameters():
            if "lora_B" in name:  # zero at first
                torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    names = [name for name, _ in embedder.named_parameters()]
    batch = pack([Dialogue(("what", "where"), (picture(0, 56, 56),)), Dialogue(("a red house",))], False, kind)
    upstream_ED = torch.randn(3, embedder.sizes[-1], generator=torch.Generator().manual_seed(0))

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        emb_ED = embedder(batch)
        embedder.zero_grad()
        emb_ED.backward(upstream_ED)
        return emb_ED.detach(), {name: w.grad.clone() for name, w in embedder.named_parameters() if w.grad is not None}

    stock = run()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    liger.log.addHandler(handler)
    liger.log.setLevel(logging.INFO)
    use_liger(embedder.model, "liger", CPU)
    ours = run()
    assert [name for name, _ in embedder.named_parameters()] == names and stock[1].keys() == ours[1].keys()
    whole = max(gradient.norm() for gradient in stock[1].values())
    worst = max(
        float((ours[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-3 * whole))
        for name, gradient in stock[1].items()
    )
    (line,) = lines
    same_bits = torch.equal(stock[0], ours[0])
    return {
        "embeddings": float((stock[0] - ours[0]).norm()),
        "gradients": worst,
        "log": line,
        "same_bits": same_bits,
    }


def under_zero3() -> dict[str, Any]:
    """Largest relative difference of the gradients of a partitioned model with the kernels from a stock whole one's."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed("gloo", verbose=False)
    batch = pack([Dialogue(("what",), (picture(0, 56, 56),))], False, "qwen3_vl")
    upstream_ED = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    embedder = new_embedder("qwen3_vl")
    embedder(batch).backward(upstream_ED)
    stock = {name: weight.grad for name, weight in embedder.named_parameters() if weight.grad is not None}

    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    partitioned = HfDeepSpeedConfig(config)
    embedder = new_embedder("qwen3_vl")
    del partitioned
    use_liger(embedder.model, "liger", CPU)
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=embedder, optimizer=optimizer, config=config)
    engine.backward((engine(batch) * upstream_ED).sum())
    weights = dict(embedder.named_parameters())
    differences = [
        float((safe_get_full_grad(weights[name]) - gradient).norm() / gradient.norm().clamp_min(1e-6))
        for name, gradient in stock.items()
    ]
    return {"gradients": max(differences), "compared": len(differences)}


def refusal() -> str:
    """What is said of a kernel that computes something else."""
    model = new_embedder().model
    wrong = liger._NORM._replace(forward=lambda self, x: liger._rms_norm(self, x) * 1.001)
    liger._KINDS[liger.qwen2_vl.Qwen2VLRMSNorm] = wrong
    try:
        use_liger(model, "liger", CPU)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    return run_interpreted(__file__)


@pytest.mark.parametrize("case", [*KINDS, "qwen2_5_vl with LoRA"])
def test_embeddings_and_gradients_are_the_stock_models(seen: dict[str, Any], case: str) -> None:
    found = seen[case]
    assert found["embeddings"] < 1e-5 and found["gradients"] < 1e-4
    assert not found["same_bits"], "other kernels round otherwise: these did not run"


def test_weights_that_zero3_has_partitioned(seen: dict[str, Any]) -> None:
    assert seen["ZeRO-3"]["compared"] > 50 and seen["ZeRO-3"]["gradients"] < 1e-3


def test_the_log_says_what_was_replaced(seen: dict[str, Any]) -> None:
    for kind, names in {
        "qwen2_vl": ("Qwen2VLRMSNorm (RMSNorm)", "Qwen2MLP (SwiGLU)", "Qwen2VLAttention (rotary)"),
        "qwen2_5_vl": ("Qwen2_5_VLRMSNorm (RMSNorm)", "Qwen2_5_VLMLP (SwiGLU)", "Qwen2MLP (SwiGLU)"),
        "qwen3_vl": ("Qwen3VLTextRMSNorm (RMSNorm)", "Qwen3VLTextMLP (SwiGLU)", "Qwen3VLTextAttention (rotary)"),
    }.items():
        assert all(name in seen[kind]["log"] for name in names), seen[kind]["log"]


def test_a_kernel_that_computes_something_else_is_refused(seen: dict[str, Any]) -> None:
    assert "RMSNorm differs from Qwen2VLRMSNorm by 1.0e-03" in seen["refusal"]
    assert "model.kernels=torch" in seen["refusal"]


def test_torch_and_auto_leave_a_cpu_model_alone() -> None:
    model = new_embedder().model
    classes = [type(module) for module in model.modules()]
    for kernels in ("torch", "auto"):
        use_liger(model, kernels, CPU)  # type: ignore[arg-type]
        assert [type(module) for module in model.modules()] == classes


def test_liger_without_a_gpu_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"model\.kernels=liger .*(installed|GPU)"):
        use_liger(new_embedder().model, "liger", CPU)


def teach_interpreter() -> None:
    """What Triton's interpreter lacks: floats given to a kernel are Python's own there, without `to` (compiled, they
    are fp32), and functions of the device's library have no body."""
    import liger_kernel.ops.rms_norm as rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    interpreter._implicit_cvt = converted
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # found again in each call: the interpreter puts its own in its place


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # where DeepSpeed logs
        teach_interpreter()
        cases = {kind: passes(kind, lora=False) for kind in KINDS}
        cases["qwen2_5_vl with LoRA"] = passes("qwen2_5_vl", lora=True)
        cases["ZeRO-3"], refused = under_zero3(), refusal()
    json.dump({**cases, "refusal": refused}, sys.stdout)
