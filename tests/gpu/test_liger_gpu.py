"""liger-kernel in bfloat16 on a GPU is as near to the float32 model as the stock modules are, in every family."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from muco_ds.data.schema import Dialogue
from muco_ds.models.embedder import Embedder
from muco_ds.models.liger import use_liger

from tiny_models import export, new_embedder, pack, picture

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
CUDA = torch.device("cuda")


def run(kind: str, dtype: torch.dtype, kernels: str) -> list[torch.Tensor]:
    """Embeddings and every gradient, in float32."""
    embedder = new_embedder(kind, attention="auto", dtype=dtype).to(CUDA)
    use_liger(embedder.model, kernels, CUDA)  # type: ignore[arg-type]
    dialogues = [Dialogue(("what", "where"), (picture(0), picture(1, 112, 84))), Dialogue(("a red house", "boats"))]
    emb_ED = embedder(pack(dialogues, True, kind).to(CUDA))
    emb_ED.backward(torch.randn(emb_ED.shape, generator=torch.Generator().manual_seed(0)).to(CUDA))
    return [emb_ED.detach(), *(weight.grad.float() for weight in embedder.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_to_float32_as_the_stock_modules(kind: str) -> None:
    exact = run(kind, torch.float32, "torch")
    stock, ours = (run(kind, torch.bfloat16, kernels) for kernels in ("torch", "auto"))
    assert len(exact) == len(stock) == len(ours)
    whole = max(gradient.norm() for gradient in exact[1:])

    def distances(found: list[torch.Tensor]) -> torch.Tensor:
        scales = [exact[0].norm(), *(gradient.norm().clamp_min(1e-2 * whole) for gradient in exact[1:])]
        pairs = zip(found, exact, scales, strict=True)
        return torch.stack([(a.float() - b.float()).norm() / scale for a, b, scale in pairs])

    assert distances(ours)[0] <= 1.5 * distances(stock)[0] + 1e-3
    assert distances(ours)[1:].mean() <= 1.5 * distances(stock)[1:].mean() + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_float32_on_a_gpu(kind: str) -> None:
    stock, ours = run(kind, torch.float32, "torch"), run(kind, torch.float32, "liger")
    whole = max(gradient.norm() for gradient in stock[1:])
    for got, want in zip(ours, stock, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm().clamp_min(1e-2 * whole)


def test_an_embedder_for_encoding_has_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="muco_ds.models.liger"):
        embedder = Embedder.from_pretrained(str(export(tmp_path / "model", "qwen2_5_vl")))
    assert "RMSNorm" in caplog.text and "SwiGLU" in caplog.text and "rotary" in caplog.text
    emb_ND = embedder.encode(["a house", "boats at sea"])
    assert emb_ND.shape[0] == 2 and abs((emb_ND**2).sum(1) - 1).max() < 1e-4
