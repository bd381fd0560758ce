"""The collator: what lies where in a pack, and what a picture that breaks at run time changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from muco_ds.data.collator import Collator, Packer
from muco_ds.data.images import ImageError
from muco_ds.data.index import target_hash
from muco_ds.data.readers import M3T_SCHEMA
from muco_ds.data.schema import QUERY, TARGET, TURNS_PER_SAMPLE, Dialogue, PackedBatch, RowCounts, Side

from demo import Demo, Rows, open_data, row, write_mixed, write_picture, write_rows


def in_pass(collator: Collator, samples: np.ndarray, number: int) -> PackedBatch:
    """These samples as they are packed in pass `number`."""
    return collator(samples, np.full(len(samples), number), 0)


def turn_texts(packer: Packer, batch: PackedBatch) -> list[str]:
    """The text of the turn that each pooled row closes."""
    ids = batch.input_ids_T.tolist()
    closers = {packer.template.vision_end, ids[batch.emb_index_E[0]]}  # a picture, or the turn before
    user = packer.template.opening[-3:]  # <|im_start|>, "user", newline
    texts = []
    for pooled in batch.emb_index_E.tolist():
        start = end = pooled - len(packer.template.tail) + 1
        while ids[start - 1] not in closers and ids[start - len(user) : start] != user:
            start -= 1
        texts.append(str(packer.template.tokenizer.decode(ids[start:end])).strip())
    return texts


@pytest.mark.parametrize("history", [0.0, 1.0])
def test_queries_first_then_their_targets(mixed: Rows, history: float) -> None:
    samples = np.array([3, 11, 0, 21])
    batch = in_pass(mixed.collator(history=history), samples, 2)
    records = {int(sample): mixed.reader.record(int(mixed.index.samples["row"][sample])) for sample in samples}
    n = sum(len(record.turns) for record in records.values())
    assert batch.counts == RowCounts(n, n) and len(batch.emb_index_E) == len(batch.ids_E3) == 2 * n
    assert torch.equal(batch.ids_E3[:n], batch.ids_E3[n:])
    pool = mixed.packer.template.tokenizer.get_vocab()["<|emb|>"]
    assert (batch.input_ids_T == pool).nonzero()[:, 0].tolist() == sorted(batch.emb_index_E.tolist())
    texts = turn_texts(mixed.packer, batch)
    pairs = set()
    for i, (image_id, pair_id, hashed) in enumerate(batch.ids_E3[:n].tolist()):
        sample, turn = pair_id // TURNS_PER_SAMPLE % 2**37, pair_id % TURNS_PER_SAMPLE
        record = records[sample]
        assert image_id == mixed.index.samples["image_id"][sample]
        assert hashed == target_hash(record.turns[turn].target, record.target_images)
        if history == 0.0:
            assert texts[i] in record.turns[turn].questions and texts[n + i] == record.turns[turn].target
        pairs.add((sample, turn))
    assert len(pairs) == n
    owners = batch.ids_E3[:n, 1] // TURNS_PER_SAMPLE % 2**37
    assert owners.unique_consecutive().tolist() == samples.tolist()


def test_both_sides_are_shuffled_alike_and_anew_each_epoch(scenes: Rows) -> None:
    collator = scenes.collator()
    orders = []
    for epoch in range(4):
        batch = in_pass(collator, np.array([5, 6]), epoch)
        turns = (batch.ids_E3[:, 1] % TURNS_PER_SAMPLE).reshape(2, 2, 7)  # side, sample, turn
        assert torch.equal(turns[0], turns[1])
        assert all(sorted(order) == list(range(7)) for order in turns[0].tolist())
        orders += [tuple(order) for order in turns[0].tolist()]
    assert len(set(orders)) > 6
    first = [int(in_pass(collator, np.array([sample]), 0).ids_E3[0, 1] % TURNS_PER_SAMPLE) for sample in range(64)]
    assert np.bincount(first, minlength=7).min() >= 1


def test_the_order_of_a_sample_does_not_depend_on_its_pack(mixed: Rows) -> None:
    collator = mixed.collator()
    alone, together = in_pass(collator, np.array([9]), 1), in_pass(collator, np.array([2, 9, 30]), 1)
    mine = together.ids_E3[:, 1] // TURNS_PER_SAMPLE % 2**37 == 9
    assert torch.equal(together.ids_E3[mine], alone.ids_E3)
    rows = together.input_ids_T.tolist()
    part = alone.input_ids_T.tolist()
    assert any(rows[i : i + len(part)] == part for i in range(len(rows)))


def test_paraphrases_change_over_epochs(scenes: Rows) -> None:
    collator = scenes.collator(history=0.0)
    seen: dict[int, set[str]] = {}
    for epoch in range(8):
        batch = in_pass(collator, np.array([5]), epoch)
        for pair_id, text in zip(batch.ids_E3[:7, 1].tolist(), turn_texts(scenes.packer, batch)[:7], strict=True):
            seen.setdefault(pair_id % TURNS_PER_SAMPLE, set()).add(text)
    assert max(map(len, seen.values())) == 3 and min(map(len, seen.values())) >= 2


def test_histories_are_drawn_per_dialogue(scenes: Rows) -> None:
    samples = np.arange(64)
    for history, expected in ((0.0, 64 * 2 * 8), (1.0, 64 * 2)):
        assert len(in_pass(scenes.collator(history=history), samples, 0).segments.cu_q_S1) - 1 == expected
    batches = [in_pass(scenes.collator(history=0.5), samples, number) for number in (0, 1)]
    segments = [len(batch.segments.cu_q_S1) - 1 for batch in batches]
    assert segments[0] != segments[1] and all(64 * 2 * 2 < count < 64 * 2 * 7 for count in segments)


def test_shapes_and_types(mixed: Rows) -> None:
    batch = in_pass(mixed.collator(), np.arange(8), 0)
    rows = batch.tokens
    assert batch.position_ids_41T.shape == (4, 1, rows) and int(batch.segments.cu_q_S1[-1]) == rows
    assert batch.input_ids_T.dtype == batch.position_ids_41T.dtype == batch.emb_index_E.dtype == torch.int64
    assert batch.ids_E3.dtype == batch.grid_thw_I3.dtype == torch.int64 and batch.pixels_PY.dtype == torch.uint8
    assert batch.has_images and batch.pixels_PY.shape[0] == int(batch.grid_thw_I3.prod(1).sum()) == batch.patches
    pads = int((batch.input_ids_T == mixed.packer.template.image_pad).sum())
    assert pads == batch.patches // 4


@pytest.mark.parametrize("damage", ["deleted", "truncated", "text"])
def test_a_picture_that_breaks_at_run_time_is_replaced_and_counted(demo: Demo, tmp_path: Path, damage: str) -> None:
    parquet, images = write_mixed(tmp_path, count=12)
    data = open_data(demo, parquet, images, tmp_path / "index")
    samples = np.arange(12)
    before = in_pass(data.collator(), samples, 0)
    victim = images / "3.png"
    if damage == "deleted":
        victim.unlink()
    else:
        whole = victim.read_bytes()
        victim.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"text")
    after, again = in_pass(data.collator(), samples, 0), in_pass(data.collator(), samples, 0)
    records = [data.reader.record(i) for i in range(12)]
    users = sum((*record.query_images, *record.target_images).count(str(victim)) for record in records)
    assert before.replaced_images == 0 and after.replaced_images == users > 0
    assert after.counts == before.counts and torch.equal(after.ids_E3, before.ids_E3)
    assert len(after.grid_thw_I3) == len(before.grid_thw_I3) and after.tokens <= before.tokens
    assert torch.equal(after.input_ids_T, again.input_ids_T) and torch.equal(after.pixels_PY, again.pixels_PY)
    assert int((after.input_ids_T == data.packer.template.image_pad).sum()) == after.patches // 4


def test_inference_refuses_a_broken_picture(demo: Demo, tmp_path: Path) -> None:
    ids_k3 = np.zeros((1, 3), np.int64)
    side = Side(QUERY, Dialogue(("q",), (str(tmp_path / "absent.png"),)), False, ids_k3)
    with pytest.raises(ImageError, match="no such file"):
        demo.packer().pack([side], replace_broken=False)


def test_a_pack_without_pictures_carries_a_dummy(demo: Demo, tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "unused.png", 30, 30)
    rows = [row([[f"q{i}"]], [f"t{i}"]) for i in range(4)]
    data = open_data(
        demo, write_rows(tmp_path / "rows.parquet", rows, M3T_SCHEMA), tmp_path / "images", tmp_path / "index"
    )
    batch = in_pass(data.collator(), np.arange(4), 0)
    assert not batch.has_images and batch.patches == 0 and batch.replaced_images == 0
    assert batch.pixels_PY.shape == (4, 588) and batch.grid_thw_I3.tolist() == [[1, 2, 2]]
    assert not (batch.input_ids_T == data.packer.template.image_pad).any()


def test_pooled_rows_are_grouped_by_side_whatever_the_order_of_dialogues(demo: Demo) -> None:
    sides = [
        Side(kind, Dialogue((text,)), True, np.array([[0, i, 0]]))
        for i, (kind, text) in enumerate([(TARGET, "first target"), (QUERY, "query"), (TARGET, "second target")])
    ]
    packer = demo.packer()
    batch = packer.pack(sides, replace_broken=False)
    assert batch.counts == RowCounts(1, 2) and batch.ids_E3[:, 1].tolist() == [1, 0, 2]
    assert turn_texts(packer, batch) == ["query", "first target", "second target"]
