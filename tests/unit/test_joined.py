"""Several data sets joined: the same rows, lengths and texts as each has alone, told apart in ids and messages."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from muco_ds.data.collator import Collator
from muco_ds.data.index import Index, Indexer, open_index
from muco_ds.data.joined import JoinedReader, join_indices
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.data.stages.base import longest_rows
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.errors import UserError

from demo import Rows, row, write_rows


@pytest.fixture
def parts(mixed: Rows, tmp_path: Path) -> tuple[list[M3TReader], list[Index]]:
    """The mixed rows of the demo, and two text-only rows among a bad one."""
    texts = [row([["a question"]], ["an answer"]), row([], []), row([["two", "or"], ["three"]], ["b", "c"])]
    readers = [
        M3TReader(str(mixed.reader.files[0]), mixed.reader.images, "data.train[0]"),
        M3TReader(str(write_rows(tmp_path / "texts.parquet", texts)), str(tmp_path), "data.train[1]"),
    ]
    indexers = [Indexer(reader, mixed.packer.template, mixed.packer.images) for reader in readers]
    return readers, [open_index(indexer, str(tmp_path / "index"), builder=True, progress=False) for indexer in indexers]


def joined(parts: tuple[list[M3TReader], list[Index]], folder: Path) -> tuple[JoinedReader, Index]:
    readers, indices = parts
    return JoinedReader(readers), join_indices(indices, readers, str(folder), builder=True)


def test_lengths_and_rows_are_those_of_the_parts(
    mixed: Rows, parts: tuple[list[M3TReader], list[Index]], tmp_path: Path
) -> None:
    reader, index = joined(parts, tmp_path / "index")
    first, second = parts[1]
    assert len(index) == len(first) + 2 and index.bad_rows == first.bad_rows + 1
    draw = {"seed": 0, "query_history": 0.5, "target_history": 0.5}
    stages = [MuCoStage(part, reader, mixed.packer.template, **draw) for part in (first, second, index)]
    *alone, together = [longest_rows(stage) for stage in stages]
    assert together.tolist() == np.concatenate(alone).tolist()
    for position, (part, sample) in enumerate([*((0, i) for i in range(len(first))), (1, 0), (1, 1)]):
        record = reader.record(int(index.samples["row"][position]))
        assert replace(record, row=0) == replace(
            parts[0][part].record(int(parts[1][part].samples["row"][sample])), row=0
        )
    assert index.name(0) == f"data.train[0] row {first.samples['row'][0]}"
    assert index.name(len(index) - 1) == "data.train[1] row 2"


def test_text_only_rows_of_two_data_sets_are_not_one_picture(
    parts: tuple[list[M3TReader], list[Index]], tmp_path: Path
) -> None:
    _, texts = parts[1]
    twice = join_indices([texts, texts], [parts[0][1]] * 2, str(tmp_path), builder=True)
    assert len(set(twice.samples["image_id"].tolist())) == 2 * len(texts)


def test_plan_and_collator_agree_on_a_mixture(
    mixed: Rows, parts: tuple[list[M3TReader], list[Index]], tmp_path: Path
) -> None:
    reader, index = joined(parts, tmp_path / "index")
    sizes = [len(part) for part in parts[1]]
    mixture = Mixture(sizes, [3.0, 1.0], images=8, run=1, seed=0)
    stage = MuCoStage(index, reader, mixed.packer.template, seed=0, query_history=0.5, target_history=0.5)
    plan = Plan(stage, mixed.flops, mixture, pack_tokens=100_000, world_size=2)
    collator = Collator(stage, mixed.packer)
    for step in range(3):
        planned = plan.step(step)
        assert planned.passes_B.max() > 0 or step == 0, "the small data set is passed several times in a batch"
        batches = [
            collator(planned.samples_B[pack], planned.passes_B[pack], step) for rank in planned.packs for pack in rank
        ]
        assert sum(batch.tokens for batch in batches) == planned.tokens
        pairs = np.concatenate([batch.ids_E3[: batch.counts.queries, 1].numpy() for batch in batches])
        assert len(set(pairs.tolist())) == len(pairs), "a row that comes twice keeps its pairs apart"


def test_a_joined_index_is_reused_and_another_mixture_is_another(
    parts: tuple[list[M3TReader], list[Index]], tmp_path: Path
) -> None:
    _, index = joined(parts, tmp_path / "index")
    written = (index.folder / "samples.bin").stat().st_mtime_ns
    _, again = joined(parts, tmp_path / "index")
    assert again.folder == index.folder and (again.folder / "samples.bin").stat().st_mtime_ns == written
    readers, indices = parts
    other = join_indices(indices[::-1], readers[::-1], str(tmp_path / "index"), builder=True)
    assert other.folder != index.folder
    assert other.name(0) == "data.train[1] row 0" and other.parts[1].key == "data.train[0]"


def test_a_part_that_was_built_anew_is_joined_anew(
    mixed: Rows, parts: tuple[list[M3TReader], list[Index]], tmp_path: Path
) -> None:
    """As after `index_data --rebuild`: the same files, other usable rows."""
    _, before = joined(parts, tmp_path / "index")
    readers, indices = parts
    shutil.rmtree(indices[1].folder)
    write_rows(Path(readers[1].files[0]), [row([["only"]], ["one"])])
    reader = M3TReader(readers[1].files[0], readers[1].images, readers[1].key)
    again = open_index(
        Indexer(reader, mixed.packer.template, mixed.packer.images),
        str(tmp_path / "index"),
        builder=True,
        progress=False,
    )
    again.folder.rename(indices[1].folder)  # the name is of what the inputs looked like
    _, after = joined(
        ([readers[0], reader], [indices[0], replace(again, folder=indices[1].folder)]), tmp_path / "index"
    )
    assert after.folder != before.folder and len(after) == len(before) - 1
    assert not before.folder.exists(), "what nothing uses any more is removed"


def test_a_row_that_breaks_later_is_named(
    mixed: Rows, parts: tuple[list[M3TReader], list[Index]], tmp_path: Path
) -> None:
    reader, index = joined(parts, tmp_path / "index")
    reader.record = lambda row: (_ for _ in ()).throw(RowError("the reason"))  # type: ignore[assignment, method-assign]
    stage = MuCoStage(index, reader, mixed.packer.template, seed=0, query_history=0.5, target_history=0.5)
    collator = Collator(stage, mixed.packer)
    with pytest.raises(RowError, match=r"data\.train\[1\] row 2: the reason"):
        collator(np.array([len(index) - 1]), np.array([0]), 0)


def test_a_folder_that_cannot_be_written_is_named(parts: tuple[list[M3TReader], list[Index]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write the length index there .*: set data\.index_dir"):
        joined(parts, tmp_path / "file" / "index")
