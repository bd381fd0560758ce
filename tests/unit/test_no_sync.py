"""A step asks the device for nothing: what would make the host wait for a GPU is caught on a CPU by the operations'
names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from muco_ds.config import LossOptions
from muco_ds.data.schema import Dialogue, PackedBatch, RowCounts
from muco_ds.tasks.muco import MuCoTask

from tiny_models import new_embedder, pack, picture

KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter",
    "is_nonzero",
    "equal",
    "unique_consecutive",
}
"""Operations whose result, or its size, the host must wait for."""


class Waits(TorchDispatchMode):
    """Collects the waiting operations on tensors that would be on the device: all but small ones made on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in WAITING:
            self.found.append(name)
        # Indexing by a mask has to count it.
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def a_pack(kind: str) -> PackedBatch:
    dialogues = [
        Dialogue(("what is it", "and the colour"), (picture(0),)),
        Dialogue(("a house", "red")),
        Dialogue(("two of them", "where"), (picture(1, 112, 84), picture(2))),
        Dialogue(("boats", "at sea")),
    ]
    made = pack(dialogues, [True, False, False, True], kind)
    ids_E3 = torch.arange(len(made.emb_index_E))[:, None].expand(-1, 3).contiguous() // 2
    ids_E3[:, 1] = torch.tensor([0, 1, 2, 3]).repeat(2)
    return PackedBatch(**{**made.__dict__, "counts": RowCounts(4, 4), "ids_E3": ids_E3})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_loss_and_backward_wait_for_nothing(kind: str, checkpointing: bool) -> None:
    embedder = new_embedder(kind)
    if checkpointing:
        embedder.model.gradient_checkpointing_enable()
    task = MuCoTask(embedder.train(), LossOptions())
    made = a_pack(kind)
    task.loss([task(made)], [made], [made.counts]).loss.backward()  # attention's groups are made once, on the host
    with Waits() as waits:
        task.loss([task(made)], [made], [made.counts]).loss.backward()
    assert not waits.found


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with Waits() as waits:
        _ = x[x > 1]
        x.sum().item()
        x.masked_scatter(x > 1, x)
        x[x > 1] = 0
    assert waits.found == ["index by a mask", "_local_scalar_dense", "masked_scatter", "index_put_ by a mask"]
