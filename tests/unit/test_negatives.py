"""Hard negatives: how columns say them, which of them a pass brings along, what they cost and what masks them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muco_ds.build import build_data
from muco_ds.config_cli import parse_args
from muco_ds.data.collator import Collator
from muco_ds.data.index import Indexer, open_index, target_hash
from muco_ds.data.joined import JoinedReader, join_indices
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.data.schema import Negative
from muco_ds.data.stages.base import longest_rows
from muco_ds.data.stages.curriculum import Limit
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.errors import UserError

from demo import Demo, Rows, mixed_rows, row, write_picture, write_rows

AT_MOST = 2


def negatives_of(root: Path, neg_text: Any, neg_image_path: Any = None) -> tuple[Negative, ...]:
    (root / "images").mkdir(exist_ok=True)
    columns = {"neg_text": neg_text, "neg_image_path": neg_image_path}
    data = {**row([["q"]], ["t"]), **{name: value for name, value in columns.items() if value is not None}}
    reader = M3TReader(str(write_rows(root / "rows.parquet", [data])), str(root / "images"), negatives=True)
    return reader.record(0).negatives


@pytest.mark.parametrize(
    "neg_text, neg_image_path, expected",
    [
        ("tram", None, [("tram", "")]),
        ("", "", []),
        ([], None, []),
        (["a", "b"], ["", "x.png"], [("a", ""), ("b", "x.png")]),
        ("['it\\'s', \"b\"]", "['x.png', 'y.png']", [("it's", "x.png"), ("b", "y.png")]),
        ("", "x.png", [("", "x.png")]),
        (["<|image_1|>\na", "b", "c"], ["x.png", "y.png"], [("a", "x.png"), ("b", "y.png"), ("c", "y.png")]),
        ([["a", ""], ["b"]], None, [("a", ""), ("b", "")]),
        ("[laughs] hello", None, [("[laughs] hello", "")]),
    ],
)
def test_every_spelling_is_read(tmp_path: Path, neg_text: Any, neg_image_path: Any, expected: list) -> None:
    folder = (tmp_path / "images").resolve()
    found = negatives_of(tmp_path, neg_text, neg_image_path)
    assert found == tuple(Negative(text, (str(folder / path),) if path else ()) for text, path in expected)


@pytest.mark.parametrize(
    "neg_text, neg_image_path, reason",
    [
        ("['a', 'b]", None, "neg_text is a list literal that does not parse"),
        ("[__import__('os')]", None, "neg_text is a list literal that does not parse"),
        ("[1, 2]", None, "neg_text holds 1"),
        (["a"], ["../x.png"], "leaves data.images"),
        (7, None, "neg_text holds 7"),
        (["a"], 7, "neg_image_path holds 7"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, neg_text: Any, neg_image_path: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        negatives_of(tmp_path, neg_text, neg_image_path)


def test_they_are_not_read_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = [{**row([["q"]], ["t"]), "neg_text": "['broken"}]
    assert M3TReader(str(write_rows(tmp_path / "r.parquet", rows)), str(tmp_path / "images")).record(0).negatives == ()


@pytest.fixture(scope="module")
def data(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The ragged rows of the demo with none to four negatives each; one row's negative picture is missing."""
    root = tmp_path_factory.mktemp("negatives")
    rows = mixed_rows(root / "images")
    for i, entry in enumerate(rows):
        others = [rows[(i + k + 1) % len(rows)]["pos_text"][0] for k in range(i % 5)]
        entry["neg_text"] = [text if k != 1 else "" for k, text in enumerate(others)]
        entry["neg_image_path"] = [f"{(i + k) % 12}.png" if k % 2 else "" for k in range(len(others))]
    rows.append({**row([["q"]], ["t"]), "neg_text": ["wrong"], "neg_image_path": ["absent.png"]})
    packer = demo.packer()
    reader = M3TReader(str(write_rows(root / "rows.parquet", rows)), str(root / "images"), negatives=True)
    indexer = Indexer(reader, packer.template, packer.images)
    index = open_index(indexer, str(root / "index"), builder=True, progress=False)
    return Rows(reader, index, packer, demo.flops())


def stage(data: Rows, at_most: int = AT_MOST) -> MuCoStage:
    draw = {"query_history": 0.5, "target_history": 0.5}
    return MuCoStage(data.index, data.reader, data.packer.template, seed=0, negatives=Limit(at_most), **draw)


def test_the_index_has_their_numbers_and_a_missing_picture_is_a_bad_row(data: Rows) -> None:
    assert len(data.index) == 40 and data.index.bad_rows == 1
    assert "negative picture" in (data.index.folder / "bad_rows.jsonl").read_text()
    for sample in range(40):
        record = data.reader.record(int(data.index.samples["row"][sample]))
        entries = data.index.negatives[slice(*data.index.negative_bounds(sample))]
        assert len(entries) == len(record.negatives) == sample % 5
        for negative, entry in zip(record.negatives, entries, strict=True):
            grids = [data.packer.images.patches(path).grid for path in negative.images]
            assert entry["tokens"] == len(data.packer.template.encode_texts([negative.text])[0])
            assert entry["target_hash"] == target_hash(negative.text, negative.images)
            assert entry["images"] == len(grids) and entry["image_tokens"] == sum(map(data.packer.images.tokens, grids))
            assert entry["patches"] == sum(int(np.prod(grid)) for grid in grids)


@pytest.mark.parametrize("world_size", [1, 3])
def test_predictions_equal_what_is_collated(data: Rows, world_size: int) -> None:
    mixture = Mixture([40], [None], images=10, run=1, seed=0)
    plan = Plan(stage(data), data.flops, mixture, pack_tokens=8192, world_size=world_size)
    collator = Collator(stage(data), data.packer)
    for step in range(4):
        planned = plan.step(step)
        for packs, counts in zip(planned.packs, planned.rows_per_rank, strict=True):
            samples, passes = planned.samples_B[packs[0]], planned.passes_B[packs[0]]
            batch, costs = collator(samples, passes, 0), plan.costs(samples, passes, 0)
            assert batch.counts == counts and counts.negatives == np.minimum(samples % 5, AT_MOST).sum()
            assert batch.tokens == costs.tokens_B.sum() and batch.patches == costs.patches_B.sum()
            negative_ids = batch.ids_E3[counts.queries + counts.targets :]
            assert (negative_ids[:, :2] == -1).all()


def test_which_of_them_is_drawn_anew_in_each_pass(data: Rows) -> None:
    drawn = [stage(data).sides(4, number, 0)[2:] for number in range(30)]
    again = stage(data).sides(4, 0, 0)[2:]
    assert [side.dialogue for side in again] == [side.dialogue for side in drawn[0]]
    assert all(len({side.dialogue for side in sides}) == AT_MOST for sides in drawn)
    record = data.reader.record(4)
    assert {side.dialogue.turns[0] for sides in drawn for side in sides} == {n.text for n in record.negatives}
    assert [len(stage(data, at_most).sides(4, 0, 0)) for at_most in (0, 1, 9)] == [2, 3, 6]


def test_the_longest_covers_every_draw(data: Rows) -> None:
    longest = longest_rows(stage(data))
    plan = Plan(stage(data), data.flops, Mixture([40], [None], images=8, run=1, seed=0), pack_tokens=8192, world_size=1)
    drawn = np.stack([plan.costs(np.arange(40), np.full(40, number), 0).tokens_B for number in range(60)])
    assert (drawn <= longest).all() and (drawn.max(0) == longest).mean() > 0.2


def test_a_joined_index_keeps_them(data: Rows, tmp_path: Path) -> None:
    index = join_indices([data.index] * 2, [data.reader] * 2, str(tmp_path), builder=True)
    reader = JoinedReader([data.reader] * 2)
    both = MuCoStage(index, reader, data.packer.template, seed=0, query_history=1, target_history=1, negatives=Limit(4))
    for sample in (3, 43):
        assert [side.dialogue for side in both.sides(sample, 0, 0)[2:]] != []
        hashes = index.negatives["target_hash"][slice(*index.negative_bounds(sample))]
        assert hashes.tolist() == data.index.negatives["target_hash"][slice(*data.index.negative_bounds(3))].tolist()


def test_a_row_that_lost_one_says_so(data: Rows) -> None:
    class Forgetful(M3TReader):
        def record(self, row: int):  # type: ignore[no-untyped-def]
            return replace(super().record(row), negatives=())

    forgetful = Forgetful(data.reader.files[0], data.reader.images, negatives=True)
    with pytest.raises(RowError, match="has 0 negatives, 3 were indexed"):
        stage(replace(data, reader=forgetful)).sides(3, 0, 0)


def test_asking_for_negatives_of_data_without_any_is_refused(demo: Demo, tmp_path: Path) -> None:
    argv = ["--run.name", "r", "--run.max_steps", "200", "--model.path", str(demo.model), "--task.negatives", "2"]
    argv += ["--data.train", str(demo.train), "--data.images", str(demo.images), "--data.index_dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"task\.negatives=2 but no row of data\.train holds any: fill the columns"):
        build_data(parse_args([*argv, "--batch.images", "8"]).config)


def test_the_picture_of_a_row_without_negatives_is_no_part_of_it(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "x.png", 60, 60)
    assert negatives_of(tmp_path, ["", ""], ["", ""]) == ()
