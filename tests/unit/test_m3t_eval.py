"""Precision@1 on M3T rows: what the queries and candidates are, and which rows are left out."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import Dialogue, Record, RecordTurn
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.m3t import M3TSuite, M3TTask

from tiny_models import demo_folder, embedder, pack, packer


def record(row: int, *turns: tuple[str, str], image: str = "i.png", targets: tuple[str, ...] = ()) -> Record:
    made = tuple(RecordTurn((question, "paraphrase"), target, kind) for kind, (question, target) in enumerate(turns))
    return Record(row, made, (image,), targets)


def held_out() -> M3TReader:
    data = demo_folder() / "data"
    return M3TReader(str(data / "test.parquet"), str(data / "images"), "--data")


def test_candidates_are_the_distinct_targets_and_text_decides() -> None:
    task = M3TTask.from_records(
        [
            record(0, ("q0", "red"), ("q1", "blue")),
            record(1, ("q2", "blue"), ("q3", "green"), ("q4", "red"), image="j.png"),
        ]
    )
    assert task.candidates == [Dialogue((text,)) for text in ("red", "blue", "green")]
    assert task.answers == [0, 1, 1, 2, 0]
    assert task.kinds == [0, 1, 0, 1, 2]
    assert task.queries == [Dialogue(("q0", "q1"), ("i.png",)), Dialogue(("q2", "q3", "q4"), ("j.png",))]
    assert [question for _, question in task.questions()] == ["q0", "q1", "q2", "q3", "q4"]
    assert [asked.row for asked, _ in task.questions()] == [0, 0, 1, 1, 1]


def test_the_same_text_beside_another_target_picture_is_another_candidate() -> None:
    pictures: list[tuple[str, ...]] = [("a.png",), ("b.png",), ()]
    task = M3TTask.from_records([record(row, ("q", "red"), targets=images) for row, images in enumerate(pictures)])
    assert task.answers == [0, 1, 2]
    assert task.candidates[:2] == [Dialogue(("red",), ("a.png",)), Dialogue(("red",), ("b.png",))]


def test_scores_of_a_real_model_equal_those_by_hand() -> None:
    task, left_out = M3TTask.from_reader(held_out())
    assert left_out == 0 and len(task.answers) == 8 * 7
    device = torch.device("cpu")
    rankings = task.rank(Encoder(embedder(), packer(), device, 2000))
    results, (ranking,) = task.results(rankings), rankings.values()
    assert set(results) == {"overall", *(f"turn_{kind}" for kind in range(7))}
    assert results["overall"]["queries"] == 56 and results["overall"]["candidates"] == len(task.candidates)
    assert results["overall"]["chance"] == 1 / len(task.candidates)

    with torch.no_grad():
        candidate_CD = embedder()(pack(task.candidates, True))
        for q, (asked, question) in enumerate(task.questions()):
            query_D = embedder()(pack([Dialogue((question,), asked.query_images)], True))[0]
            score_C = candidate_CD @ query_D
            assert abs(float(ranking.top_score_Qk[q, 0]) - float(score_C.max())) < 1e-5
            assert ranking.top_index_Qk.shape == (56, 3)
    by_hand = sum(bool(c) for c in ranking.correct_Q) / 56
    assert results["overall"]["precision@1"] == pytest.approx(by_hand)


def test_unusable_rows_are_counted_and_left_out(tmp_path: Path) -> None:
    table = pq.read_table(demo_folder() / "data" / "test.parquet").to_pylist()
    table[0]["qry_image_path"] = "test/absent.png"
    table[1]["pos_text"] = table[1]["pos_text"][:-1]
    schema = pq.read_schema(demo_folder() / "data" / "test.parquet")
    pq.write_table(pa.Table.from_pylist(table, schema=schema), tmp_path / "rows.parquet")
    reader = M3TReader(str(tmp_path / "rows.parquet"), str(demo_folder() / "data" / "images"), "--data")
    task, left_out = M3TTask.from_reader(reader)
    assert left_out == 2 and [kept.row for kept in task.records] == list(range(2, 8))
    task, left_out = M3TTask.from_reader(reader, limit=4)
    assert left_out == 2 and len(task.records) == 2
    with pytest.raises(UserError, match=r"rows\.parquet.*no usable row; row 0: picture .*absent\.png: no such file"):
        M3TTask.from_reader(reader, limit=1)


def test_a_score_says_what_it_is_of() -> None:
    suite = M3TSuite(held_out(), 2)
    entries = suite.score("m3t", Encoder(embedder(), packer(), torch.device("cpu"), 2000))
    size = (demo_folder() / "data" / "test.parquet").stat().st_size
    assert {entry["version"] for entry in entries.values()} == {f"own rows: test.parquet ({size} bytes), first 2 rows"}
    assert entries["overall"]["queries"] == 14 and entries["overall"]["left_out"] == 0
