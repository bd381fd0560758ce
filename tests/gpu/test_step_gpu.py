"""The step on a GPU: nothing in it waits for the device, packs that cross ahead arrive whole, one call for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch

from muco_ds.config import LossOptions
from muco_ds.data.schema import Dialogue, PackedBatch, RowCounts
from muco_ds.data.segments import separate
from muco_ds.models.attention import segment_attention
from muco_ds.models.pointwise import QuickGELU, rotated
from muco_ds.tasks.crossing import Crossing
from muco_ds.tasks.muco import MuCoTask

from tiny_models import new_embedder, pack, picture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def a_pack(kind: str, seed: int = 0) -> PackedBatch:
    """Two queries with pictures and two targets, of two turns each."""
    dialogues = [
        Dialogue(("what is it", "and the colour"), (picture(seed),)),
        Dialogue(("two of them", "where"), (picture(seed + 1, 112, 84), picture(seed + 2))),
        Dialogue(("a house", "red")),
        Dialogue(("boats", "at sea")),
    ]
    made = pack(dialogues, [True, False, False, True], kind)
    ids_E3 = torch.arange(len(made.emb_index_E))[:, None].expand(-1, 3).contiguous() // 2
    ids_E3[:, 1] = torch.tensor([0, 1, 2, 3]).repeat(2)
    return PackedBatch(**{**made.__dict__, "counts": RowCounts(4, 4), "ids_E3": ids_E3}).pin_memory()


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_forward_loss_and_backward_wait_for_nothing(kind: str) -> None:
    embedder = new_embedder(kind, attention="auto", dtype=torch.bfloat16).cuda().train()
    task, batch = MuCoTask(embedder, LossOptions()), a_pack(kind)

    def step() -> torch.Tensor:
        made = batch.to(torch.device("cuda"))
        loss = task.loss([task(made)], [made], [made.counts]).loss
        loss.backward()
        return loss

    step()  # kernels are compiled
    with no_waiting():
        loss = step()
    assert torch.isfinite(loss)


def test_packs_that_cross_ahead_arrive_whole() -> None:
    """Asked for in turn and twice, with the stream kept busy, each equals a plain copy."""
    packs, device = [a_pack("qwen2_5_vl", seed) for seed in range(3)], torch.device("cuda")
    crossing = Crossing(3, packs.__getitem__, device, rounds=2)
    busy = torch.randn(2048, 2048, device=device)
    for number in [0, 1, 2, 0, 1, 2]:
        busy = busy @ busy / 50
        arrived, expected = crossing[number], packs[number].to(device)
        for field in fields(PackedBatch):
            value = getattr(expected, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(arrived, field.name), value), field.name
        assert torch.equal(arrived.vision.given["position_ids"], expected.vision.given["position_ids"])
        del arrived


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_functions_equal_the_plain_ones(dtype: torch.dtype) -> None:
    """Forward and backward, at several sizes without compiling anew."""
    for rows in (5, 1200, 777):
        x_Nd, angle_Nd = torch.randn(rows, 2, 4, 80, dtype=dtype), torch.randn(rows, 80)
        results = []
        for device in ("cuda", "cpu"):
            leaf, tables = x_Nd.to(device).requires_grad_(), (angle_Nd.cos().to(device), angle_Nd.sin().to(device))
            outs = [rotated(leaf, *tables), QuickGELU()(leaf)]
            grads = [torch.autograd.grad(out.float().square().sum(), leaf)[0] for out in outs]
            results.append([tensor.cpu() for tensor in (*outs, *grads)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize("backend", ["auto", "varlen"])
def test_pictures_attend_within_themselves_in_one_call(backend: str, head_dim: int) -> None:
    """Head sizes of the vision towers, pictures of many sizes, forward and backward against the dense twin."""
    plan = separate([64, 4, 1200, 256, 300, 64]).map(lambda tensor: tensor.cuda())
    generator = torch.Generator("cuda").manual_seed(0)
    rows = int(plan.cu_q_S1[-1])
    leaves = [torch.randn(rows, 16, head_dim, device="cuda", generator=generator).bfloat16() for _ in range(3)]
    upstream = torch.randn(rows, 16, head_dim, device="cuda", generator=generator)
    results = []
    for name, dtype in ((backend, torch.bfloat16), ("dense", torch.float32)):
        q, k, v = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        out = segment_attention(q, k, v, plan, head_dim**-0.5, name)
        results.append([out, *torch.autograd.grad(out, (q, k, v), upstream.to(dtype))])
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() <= 2e-2 * want.norm()
