"""Ranks share out the shards of a folder; what one can't encode ends all of them, and the finished shards stay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from muco_ds.data.schema import Dialogue
from muco_ds.distributed import env
from muco_ds.distributed.testing import run_distributed
from muco_ds.errors import UserError
from muco_ds.models import shards
from muco_ds.models.shards import Layout, Shards, encode_shards


class Numbers:
    """Line i is a dialogue about i, or says that it is broken."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.rows, self.broken = count, broken

    def __len__(self) -> int:
        return self.rows

    def dialogues(self, start: int, stop: int) -> Sequence[Dialogue]:
        return [Dialogue(("broken" if line == self.broken else str(line),)) for line in range(start, stop)]

    def name(self, line: int) -> str:
        return f"line {line}"


def _encode(folder: Path, broken: int | None) -> tuple[list[int], str | None]:
    """The lines that this rank encoded, and what went wrong."""
    seen: list[int] = []

    def windows(model, packer, given, **options):  # type: ignore[no-untyped-def]
        for window in given:
            texts = [dialogue.turns[0] for dialogue in window]
            if "broken" in texts:
                raise UserError("picture broken: no such file")
            seen.extend(map(int, texts))
            yield torch.tensor([[float(text), 1.0] for text in texts])

    shards.encode_windows = windows  # type: ignore[assignment]
    source = Numbers(9, broken)
    options = {"device": torch.device("cpu"), "pack_tokens": None, "mark_broken": True, "progress": None}
    nothing = SimpleNamespace()
    try:
        encode_shards(nothing, nothing, source, folder, Layout("key", 9, 2, "float32", shard_lines=2), **options)  # type: ignore[arg-type]
    except UserError as error:
        return seen, f"{env.rank()} {error.on_every_rank} {error}"
    return seen, None


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_shard_is_encoded_once(tmp_path: Path, world_size: int) -> None:
    found = run_distributed(_encode, world_size, tmp_path, None)
    seen = [lines for lines, _ in found]
    assert sorted(chain(*seen)) == list(range(9)) and all(seen)
    rows_ND = Shards.open(tmp_path).read(0, 9)
    line_N = rows_ND[:, 0] / rows_ND[:, 1]
    np.testing.assert_allclose(line_N, np.arange(9), atol=1e-5)


def test_a_problem_of_one_rank_ends_all_and_what_is_finished_stays(tmp_path: Path) -> None:
    found = run_distributed(_encode, 2, tmp_path, 5)
    assert [problem for _, problem in found] == [f"{rank} True picture broken: no such file" for rank in range(2)]
    with pytest.raises(UserError, match="is missing"):
        Shards.open(tmp_path)
    again = run_distributed(_encode, 2, tmp_path, None)
    assert sorted(chain(*(lines for lines, _ in again))) == [4, 5, 8]
    assert len(Shards.open(tmp_path)) == 9
