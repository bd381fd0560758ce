"""Embeddings in shards: slices, lines of several rows, what is missing or damaged, another key."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError
from muco_ds.models.encode import encode_dialogues
from muco_ds.models.shards import Layout, Shards, encode_shards

from tiny_models import embedder, packer, picture

WIDTH = 96
CPU = torch.device("cpu")


class Lines:
    """Line i asks `counts[i]` questions; those in `broken` have a picture that is not there."""

    def __init__(self, counts: Sequence[int], broken: Sequence[int] = ()) -> None:
        self.counts, self.broken = list(counts), broken
        self.asked: list[int] = []

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def dialogues(self, start: int, stop: int) -> list[Dialogue]:
        self.asked += range(start, stop)
        return [self.dialogue(line) for line in range(start, stop)]

    def name(self, line: int) -> str:
        return f"line {line}"

    def dialogue(self, line: int) -> Dialogue:
        images = ("absent.png",) if line in self.broken else ()
        return Dialogue(tuple(f"line {line} {j}" for j in range(self.counts[line])), images)


def layout(source: Lines, **changes: Any) -> Layout:
    return replace(Layout("key", len(source), WIDTH, "float32", shard_lines=3), **changes)


def encode(source: Lines, folder: Path, mark_broken: bool = True, **changes: Any) -> Shards:
    options: dict[str, Any] = {"device": CPU, "pack_tokens": 500, "mark_broken": mark_broken, "progress": None}
    return encode_shards(embedder(), packer(), source, folder, layout(source, **changes), **options)


def alone(source: Lines) -> np.ndarray:
    rows = [Dialogue((turn,)) for line in range(len(source)) for turn in source.dialogue(line).turns]
    return encode_dialogues(embedder(), packer(), rows, pack_tokens=500, device=CPU, shared=False).numpy()


def test_slices_equal_what_was_encoded(tmp_path: Path) -> None:
    source = Lines([1, 1, 1, 1, 3, 0, 1])
    shards, want_ND = encode(source, tmp_path), alone(source)
    assert len(shards) == 8 and shards.width == WIDTH
    for start, stop in ((0, 8), (0, 3), (2, 7), (3, 3), (7, 8)):
        np.testing.assert_allclose(shards.read(start, stop), want_ND[start:stop], atol=1e-6)
    starts = [shards.line_starts(shard).tolist() for shard in range(3)]
    assert starts == [[0, 1, 2, 3], [3, 4, 7, 7], [7, 8]]
    assert shards.lines_of(np.array([0, 3, 5, 6, 7])).tolist() == [0, 3, 4, 4, 6]
    halves = encode(source, tmp_path / "halves", dtype="float16")
    assert halves.read(0, 8).dtype == np.float16
    np.testing.assert_allclose(halves.read(0, 8), want_ND, atol=1e-3)
    leading_ND = encode(source, tmp_path / "leading", width=8).read(0, 8)
    np.testing.assert_allclose(np.linalg.norm(leading_ND, axis=1), 1, atol=1e-5)


def test_only_what_is_missing_or_damaged_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Lines([1] * 8)
    whole_ND = encode(source, tmp_path).read(0, 8)
    (tmp_path / "00000.npy").unlink()
    with pytest.raises(UserError, match=r"00000\.npy is missing: .*goes on"):
        Shards.open(tmp_path)
    cut = tmp_path / "00002.npy"
    cut.write_bytes(cut.read_bytes()[:-5])
    source.asked.clear()
    with caplog.at_level(logging.WARNING):
        again = encode(source, tmp_path)
    assert sorted(source.asked) == [0, 1, 2, 6, 7]
    damaged, found = caplog.messages
    assert re.search(r"00002\.npy is damaged.*encoded again", damaged) and "1 of 3 shards are there" in found
    np.testing.assert_allclose(again.read(0, 8), whole_ND, atol=1e-6)
    source.asked.clear()
    encode(source, tmp_path)
    assert source.asked == []


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    encode(Lines([1] * 4), tmp_path)
    path = tmp_path / "00001.npy"
    whole = path.read_bytes()
    for left in (0, 20, len(whole) - 1):
        path.write_bytes(whole[:left])
        with pytest.raises(UserError, match=r"00001\.npy is damaged"):
            Shards.open(tmp_path)
    np.save(path, np.zeros((2, WIDTH), np.float32))
    with pytest.raises(UserError, match=r"00001\.npy holds 2 x 96 float32 instead of 1 x 96 float32"):
        Shards.open(tmp_path)
    with pytest.raises(UserError, match=r"holds no embeddings"):
        Shards.open(tmp_path / "elsewhere")


def test_another_key_starts_anew(tmp_path: Path) -> None:
    encode(Lines([1, 1, 3, 1]), tmp_path)
    source = Lines([1, 1])
    shards = encode(source, tmp_path, key="other")
    assert source.asked == [0, 1] and len(shards) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.npy", "shards.json"]


def test_rows_that_can_not_be_encoded(tmp_path: Path) -> None:
    source = Lines([1, 2, 1, 1, 1], broken=[1, 4])
    shards = encode(source, tmp_path)
    assert shards.broken_rows().tolist() == [1, 2, 5]
    assert shards.lines_of(shards.broken_rows()).tolist() == [1, 1, 4]
    with pytest.raises(UserError, match=r"^picture absent\.png: no such file$"):
        encode(source, tmp_path / "strict", mark_broken=False)


def test_lines_are_tried_again_when_their_pictures_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Lines([1, 2, 1, 1, 1], broken=[1])
    folder = tmp_path / "shards"
    assert encode(source, folder).broken_rows().tolist() == [1, 2]
    source.asked.clear()
    encode(source, folder)
    assert source.asked == [1]  # looked at, and as it was
    picture(0).save(tmp_path / "absent.png")
    with caplog.at_level(logging.WARNING):
        shards = encode(source, folder)
    assert len(shards.broken_rows()) == 0 and shards.read(0, 6).any(axis=1).all()
    assert "pictures can be used that could not be" in caplog.text


def test_what_a_killed_writer_left_goes_away(tmp_path: Path) -> None:
    (tmp_path / ".00000.npy.tmp77").write_bytes(b"half")
    encode(Lines([1]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.npy", "shards.json"]
