"""Mining: which negatives, against plain loops; what is written, read back; what is left when it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from muco_ds.data.index import Indexer, open_index, target_hash
from muco_ds.data.readers import IMAGE_MARK, M3TReader, PairReader
from muco_ds.data.schema import Negative
from muco_ds.errors import UserError
from muco_ds.mining import mine as mine_module
from muco_ds.mining.columns import write_rows
from muco_ds.mining.corpus import Corpus, Turns
from muco_ds.mining.mine import Task, mine_negatives, report_path
from muco_ds.mining.search import Asked, Mined, Rule, mine
from muco_ds.mining.vectors import Vectors

from demo import mixed_rows, row, write_picture
from demo import write_rows as write_parquet
from tiny_models import embedder, packer

D = 8
CPU = torch.device("cpu")


def vectors_of(path: Path, rows_ND: np.ndarray) -> Vectors:
    vectors = Vectors(path)
    for part in np.array_split(rows_ND.astype(np.float32), 3):  # as chunks arrive
        vectors.append(part)
    return vectors


def problem(folder: Path, *, rows: int = 16, targets: int = 60, seed: int = 1) -> tuple[Vectors, Vectors, Asked]:
    """Ragged rows with one to four turns; some turns share a question, some rows and targets are unusable."""
    rng = np.random.default_rng(seed)
    row_Q = np.repeat(np.arange(rows), rng.integers(1, 5, rows))
    corpus_CD = rng.standard_normal((targets, D))
    answer_Q = rng.integers(0, targets, len(row_Q))
    # A query lies somewhat towards its target, so that scores of own targets are mostly high, and negative at times.
    query_QD = rng.standard_normal((len(row_Q), D)) + 0.7 * corpus_CD[answer_Q]
    query_QD, corpus_CD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query_QD, corpus_CD))
    usable_R, usable_C = rng.random(rows) < 0.9, rng.random(targets) < 0.9
    asked = Asked(row_Q, rng.integers(0, len(row_Q) // 2, len(row_Q)), answer_Q, usable_R[row_Q], usable_C)
    return vectors_of(folder / "queries", query_QD), vectors_of(folder / "targets", corpus_CD), asked


def by_loops(queries: Vectors, targets: Vectors, asked: Asked, rule: Rule) -> list[list[int]]:
    """Negatives of each row, from the rule's own words."""
    query_QD, corpus_CD = (v.read(0, len(v)).astype(np.float64) for v in (queries, targets))
    right_of_row: dict[int, set[int]] = {}
    right_of_query: dict[int, set[int]] = {}
    for q, answer in enumerate(asked.answer_Q.tolist()):
        right_of_row.setdefault(int(asked.row_Q[q]), set()).add(answer)
        right_of_query.setdefault(int(asked.query_Q[q]), set()).add(answer)
    negatives = []
    for r in range(asked.rows):
        good: dict[int, float] = {}
        left_out: set[int] = set()
        for q in np.flatnonzero(asked.row_Q == r).tolist():
            if not asked.usable_Q[q]:
                continue
            scores = {c: float(corpus_CD[c] @ query_QD[q]) for c in range(len(corpus_CD))}
            own = scores[int(asked.answer_Q[q])]
            limit = rule.max_share * own if own >= 0 else own - (1 - rule.max_share) * -own
            near = sorted(scores, key=lambda c: -scores[c])[: rule.depth]
            right = right_of_row[r] | right_of_query[int(asked.query_Q[q])]
            left_out |= right
            wrong = [c for c in near if asked.usable_C[c] and c not in right]
            for place, c in enumerate(wrong):
                if place < rule.skip or scores[c] >= limit:
                    left_out.add(c)
                else:
                    good[c] = max(good.get(c, -np.inf), scores[c])
        best = sorted((c for c in good if c not in left_out), key=lambda c: -good[c])
        negatives.append(best[: rule.negatives])
    return negatives


def listed(mined: Mined) -> list[list[int]]:
    return [[c for c in row.tolist() if c >= 0] for row in mined.negatives_Rn]


@pytest.mark.parametrize("memory", [9 * 4 * D, 2**20])  # nine vectors at a time, all
@pytest.mark.parametrize(
    "rule",
    [
        Rule(negatives=4),
        Rule(negatives=2, max_share=0.5),
        Rule(negatives=3, skip=4),
        Rule(negatives=5, depth=9, max_share=0.8),
        Rule(negatives=60, max_share=np.inf),
        Rule(negatives=4, max_share=1.2, skip=1, depth=12),
    ],
    ids=str,
)
def test_negatives_are_those_of_plain_loops(tmp_path: Path, rule: Rule, memory: int) -> None:
    queries, targets, asked = problem(tmp_path)
    mined = mine(queries, targets, asked, rule, device=CPU, memory=memory)
    expected = by_loops(queries, targets, asked, rule)
    assert listed(mined) == expected and any(expected)
    assert mined.filled().tolist() == [len(negatives) for negatives in expected]


def test_the_problem_has_what_it_is_about(tmp_path: Path) -> None:
    queries, targets, asked = problem(tmp_path)
    own_Q = np.einsum("qd,qd->q", queries.read(0, len(queries)), targets.read(0, len(targets))[asked.answer_Q])
    assert (own_Q < 0).any() and not asked.usable_Q.all() and not asked.usable_C.all()
    assert len(np.unique(asked.query_Q)) < len(asked.query_Q) and len(np.unique(asked.row_Q)) < len(asked.row_Q)
    found = by_loops(queries, targets, asked, Rule(negatives=60))
    assert sum(len(negatives) < 60 for negatives in found) > 0


def test_counts_add_up(tmp_path: Path) -> None:
    queries, targets, asked = problem(tmp_path)
    mined = mine(queries, targets, asked, Rule(negatives=60, max_share=0.6, skip=2, depth=60), device=CPU)
    usable = int(asked.usable_Q.sum())
    assert mined.looked_at == usable * int(asked.usable_C.sum()) and mined.queries == usable
    assert mined.skipped == 2 * usable and mined.right >= usable * 0.8 and mined.too_near > 0
    everything = mine(queries, targets, asked, Rule(negatives=60, max_share=np.inf, depth=60), device=CPU)
    assert everything.too_near == everything.skipped == 0 and everything.right == mined.right


def test_equal_scores_and_shards(tmp_path: Path) -> None:
    """Whole numbers: every score is exact, many are equal, and shards must not change what is taken."""
    rng = np.random.default_rng(1)
    targets = vectors_of(tmp_path / "targets", rng.integers(-2, 3, (200, D)))
    queries = vectors_of(tmp_path / "queries", rng.integers(-2, 3, (40, D)))
    asked = Asked(np.arange(40), np.arange(40), np.arange(40), np.ones(40, bool), np.ones(200, bool))
    rule = Rule(negatives=200, max_share=0.9, depth=200)
    whole = mine(queries, targets, asked, rule, device=CPU)
    assert whole.too_near > 0
    for memory in (4 * D * 17, 4 * D * 33):
        assert listed(mine(queries, targets, asked, rule, device=CPU, memory=memory)) == listed(whole)


def test_rows_that_are_not_finite_become_zero(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path / "v")
    vectors.append(np.array([[1, 2], [np.nan, np.nan]], np.float32))
    vectors.append(np.array([[np.inf, 0]], np.float32))
    assert vectors.broken.tolist() == [False, True, True] and len(vectors) == 3
    assert vectors.read(0, 3).tolist() == [[1, 2], [0, 0], [0, 0]] and vectors.read(1, 2).tolist() == [[0, 0]]


# ---- rows: what is read, encoded, written


def pairs(root: Path, **changes: Any) -> list[dict[str, Any]]:
    """Six pairs: text and picture targets, two equal but for case, an old negative, a column of the user's own."""
    for i in range(4):
        write_picture(root / "images" / "sub" / f"{i}.png", 70, 60, seed=i)
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path", "weight")
    rows = [
        ("<|image_1|>\nWhat?\n", "sub/0.png", "a red star", "", "old", "", 1),
        ("<|image_1|>\nWhich?\n", "sub/1.png", "A  Red Star", "", "old", "gone.png", 2),
        ("Find it: blue", "", "<|image_1|>\nRepresent it.\n", "sub/2.png", "", "", 3),
        ("Find it: green", "", "", "sub/3.png", "", "", 4),
        ("<|image_1|>\nWhere?\n", "sub/2.png", "[left] or 'right'", "", "['x']", "", 5),
        ("How many?", "", "two", "", "", "", 6),
    ]
    made = [dict(zip(columns, values, strict=True)) for values in rows]
    for name, values in changes.items():
        for entry, value in zip(made, values, strict=True):
            entry[name] = value
    return made


def run(task: Task, rule: Rule = Rule(negatives=3, max_share=np.inf)) -> dict[str, Any]:  # noqa: B008 - frozen
    device = torch.device("cpu")
    options = {"pack_tokens": 300, "device": device, "progress": False, "provenance": {"model": "m"}}
    return mine_negatives(embedder(), packer(), task, rule, **options)  # type: ignore[arg-type]


def mined_pairs(root: Path, *, rule: Rule | None = None, **changes: Any) -> tuple[Path, dict[str, Any]]:
    source = write_parquet(root / "rows.parquet", pairs(root, **changes))
    output = root / "mined.parquet"
    task = Task.of(M3TReader(str(source), str(root / "images")), [], output, progress=False)
    return output, run(task, rule) if rule else run(task)


def test_both_readers_read_back_what_was_mined(tmp_path: Path) -> None:
    output, report = mined_pairs(tmp_path)
    before, after = pq.read_table(tmp_path / "rows.parquet"), pq.read_table(output)
    assert after.column_names == before.column_names
    kept = [name for name in before.column_names if not name.startswith("neg_")]
    assert after.select(kept).to_pylist() == before.select(kept).to_pylist()
    assert after.schema.field("neg_text").type == pa.list_(pa.string())
    for kind in (M3TReader, PairReader):
        reader = kind(str(output), str(tmp_path / "images"), negatives=True)
        records = [reader.record(i) for i in range(6)]
        targets = {target_hash(r.turns[0].target, r.target_images) for r in records}
        assert len(targets) == 5  # two differ in case and spaces only
        for record in records:
            own = target_hash(record.turns[0].target, record.target_images)
            hashes = [target_hash(negative.text, negative.images) for negative in record.negatives]
            assert len(set(hashes)) == 3 and own not in hashes and targets.issuperset(hashes)
        assert all(Path(path).is_file() for r in records for n in r.negatives for path in n.images)
        assert any(n.images for r in records for n in r.negatives) and not any(
            "old" in str(r.negatives) for r in records
        )
    assert report["rows"] == {"usable": 6, "full": 6, "fewer": 0, "none": 0} and report["bad_rows"] == []
    assert json.loads(report_path(output).read_text()) == report and report["targets"]["distinct"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {
        "images",
        "rows.parquet",
        "mined.parquet",
        "mined.parquet.json",
    }


def test_what_is_mined_is_nearest_by_the_models_own_embeddings(tmp_path: Path) -> None:
    output, _ = mined_pairs(tmp_path, rule=Rule(negatives=4, max_share=np.inf))
    reader = PairReader(str(output), str(tmp_path / "images"), negatives=True)
    records = [reader.record(i) for i in range(6)]

    def encode(text: str, images: tuple[str, ...]) -> np.ndarray:
        from muco_ds.data.schema import Dialogue

        from tiny_models import pack

        with torch.no_grad():
            return embedder()(pack([Dialogue((text,), images)], True))[0].numpy()

    for record in records:
        query = encode(record.turns[0].questions[0], record.query_images)
        scores = [float(query @ encode(n.text, n.images)) for n in record.negatives]
        assert scores == sorted(scores, reverse=True) and len(scores) == 4


def test_a_round_later_old_negatives_are_replaced(tmp_path: Path) -> None:
    first, _ = mined_pairs(tmp_path)
    reader = M3TReader(str(first), str(tmp_path / "images"))
    second = tmp_path / "again.parquet"
    run(Task.of(reader, [], second, progress=False), Rule(negatives=1, max_share=np.inf))
    again = M3TReader(str(second), str(tmp_path / "images"), negatives=True)
    before = M3TReader(str(first), str(tmp_path / "images"), negatives=True)
    assert [again.record(i).negatives for i in range(6)] == [before.record(i).negatives[:1] for i in range(6)]


def test_ragged_rows_get_negatives_of_all_their_turns_and_never_their_own(tmp_path: Path) -> None:
    rows = mixed_rows(tmp_path / "images", 24)
    rows[3]["pos_text"][0] = rows[8]["pos_text"][0]
    source = write_parquet(tmp_path / "rows.parquet", rows)
    task = Task.of(M3TReader(str(source), str(tmp_path / "images")), [], tmp_path / "m.parquet", progress=False)
    run(task, Rule(negatives=6, max_share=np.inf, depth=20))
    reader = M3TReader(str(tmp_path / "m.parquet"), str(tmp_path / "images"), negatives=True)
    for i in range(24):
        record = reader.record(i)
        own = {target_hash(turn.target, record.target_images) for turn in record.turns}
        hashes = {target_hash(n.text, n.images) for n in record.negatives}
        assert len(hashes) == 6 and not own & hashes
    assert [reader.record(i).turns for i in range(24)] == [task.turns.reader.record(i).turns for i in range(24)]


def test_bad_rows_are_named_and_carried_along(tmp_path: Path) -> None:
    pictures = ["sub/0.png", "sub/absent.png", "", "", "sub/2.png", ""]
    changes = {"qry_image_path": pictures, "pos_text": ["a", "b", "c", "", "d", ""]}
    broken = tmp_path / "images" / "sub" / "3.png"
    rows = pairs(tmp_path, **changes)
    broken.write_bytes(broken.read_bytes()[:200])  # its header is intact
    source = write_parquet(tmp_path / "rows.parquet", rows)
    output = tmp_path / "mined.parquet"
    report = run(Task.of(M3TReader(str(source), str(tmp_path / "images")), [], output, progress=False))
    reasons = {entry["row"]: entry["reason"] for entry in report["bad_rows"]}
    assert set(reasons) == {1, 3, 5}
    assert "absent.png: no such file" in reasons[1] and "3.png: does not decode" in reasons[3]
    assert reasons[5] == "turn 0 has an empty target"
    found = pq.read_table(output).to_pylist()
    assert [len(entry["neg_text"]) for entry in found] == [3, 0, 3, 0, 3, 0]  # b, c, d are targets still
    assert [entry["qry"] for entry in found] == [entry["qry"] for entry in rows]
    assert not any("3.png" in path for entry in found for path in entry["neg_image_path"])
    assert report["rows"]["usable"] == 3 and report["targets"] == {"distinct": 5, "usable_as_negatives": 4}


def test_targets_of_several_pictures_have_no_place_in_the_columns(tmp_path: Path) -> None:
    pairs(tmp_path)
    rows = [{**row([["q"]], [f"t{i}"]), "pos_image_path": ["sub/0.png", "sub/1.png"][: i + 1]} for i in range(2)]
    rows.append({**row([["r"]], ["u"]), "pos_image_path": []})
    source = write_parquet(tmp_path / "rows.parquet", rows)
    reader = M3TReader(str(source), str(tmp_path / "images"))
    report = run(Task.of(reader, [], tmp_path / "m.parquet", progress=False))
    assert report["targets"] == {"distinct": 3, "usable_as_negatives": 2}
    assert report["rows"] == {"usable": 3, "full": 0, "fewer": 3, "none": 0}
    assert [entry["neg_text"] for entry in pq.read_table(tmp_path / "m.parquet").to_pylist()][2] == [IMAGE_MARK + "t0"]


def test_another_corpus_gives_negatives_and_equal_questions_share_their_answers(tmp_path: Path) -> None:
    pairs(tmp_path)
    asked = [row([["what?"]], ["one"]), row([["What?"]], ["two"])]
    more = [row([["-"]], [text]) for text in ("one", "three", "four")]
    readers = [
        M3TReader(str(write_parquet(tmp_path / f"{name}.parquet", rows)), str(tmp_path / "images"))
        for name, rows in (("asked", asked), ("more", more))
    ]
    task = Task.of(readers[0], readers[1:], tmp_path / "m.parquet", progress=False)
    assert len(task.corpus) == 4 and task.answer_Q.tolist() == [0, 1]
    report = run(task)
    found = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert [sorted(entry["neg_text"]) for entry in found] == [["four", "three"]] * 2
    assert report["rows"]["fewer"] == 2 and report["candidates"]["right"] == 4


def test_nothing_usable_and_nothing_wrong_are_refused(tmp_path: Path) -> None:
    pairs(tmp_path)

    def task(*rows: dict[str, Any]) -> Task:
        source = write_parquet(tmp_path / "rows.parquet", rows)
        return Task.of(M3TReader(str(source), str(tmp_path / "images")), [], tmp_path / "m.parquet", progress=False)

    with pytest.raises(UserError, match=r"rows\.parquet: no usable row; row 0: turn 0 has an empty target"):
        task(row([["a"]], [""]))
    with pytest.raises(UserError, match=r"all targets are the same.*--corpus"):
        task(row([["a"]], ["Same"]), row([["b"]], ["same "]))
    with pytest.raises(UserError, match=r"no usable row; row 0: picture .*absent\.png: no such file"):
        run(task(row([["a"]], ["x"], "absent.png"), row([["b"]], ["y"], "absent.png")))
    assert not (tmp_path / "m.parquet").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    output, _ = mined_pairs(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    task = Task.of(M3TReader(str(output), str(tmp_path / "images")), [], output, progress=False)

    def fails_halfway(reader: M3TReader, negatives_of: Any, path: Path) -> None:
        path.write_bytes(b"half a file")
        assert any(entry.is_dir() and entry.name.startswith(".mined") for entry in tmp_path.iterdir())
        raise failure

    monkeypatch.setattr(mine_module, "write_rows", fails_halfway)
    with pytest.raises(UserError if isinstance(failure, OSError) else type(failure), match=None) as caught:
        run(task)
    if isinstance(failure, OSError):
        assert "can't write" in str(caught.value) and "No space left" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"images"}


def test_the_report_is_there_before_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "rows.parquet", pairs(tmp_path))
    task = Task.of(M3TReader(str(source), str(tmp_path / "images")), [], tmp_path / "m.parquet", progress=False)

    def unwritable(_: Path) -> Path:
        return tmp_path / "absent" / "m.parquet.json"

    monkeypatch.setattr(mine_module, "report_path", unwritable)
    with pytest.raises(UserError, match=r"can't write '.*absent/m\.parquet\.json'"):
        run(task)
    assert not (tmp_path / "m.parquet").exists()


def test_many_rows_are_written_in_parts(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    source = write_parquet(tmp_path / "rows.parquet", [row([[f"q{i}"]], [f"t{i}"]) for i in range(2500)])
    reader = M3TReader(str(source), str(tmp_path / "images"))
    write_rows(reader, lambda i: [(f"n{i}", "")] * (i % 3), tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [entry["pos_text"] for entry in found] == [[f"t{i}"] for i in range(2500)]
    assert [entry["neg_text"] for entry in found] == [[f"n{i}"] * (i % 3) for i in range(2500)]


def test_training_names_the_rows_whose_mined_pictures_are_gone(tmp_path: Path) -> None:
    output, _ = mined_pairs(tmp_path)
    (tmp_path / "images" / "sub" / "3.png").unlink()
    reader = PairReader(str(output), str(tmp_path / "images"), negatives=True)
    index = open_index(Indexer(reader, packer().template, packer().images), str(tmp_path / "i"), builder=True)
    bad = [json.loads(line) for line in (index.folder / "bad_rows.jsonl").read_text().splitlines()]
    gone = str((tmp_path / "images").resolve() / "sub" / "3.png")
    named = {i for i in range(6) if any(gone in negative.images for negative in reader.record(i).negatives)}
    assert named and {entry["row"] for entry in bad} == named | {3} and index.bad_rows == len(bad)
    for entry in bad:
        assert entry["reason"].endswith(f"picture {gone}: no such file")
        assert entry["reason"].startswith("negative ") == (entry["row"] != 3)


def test_turns_and_corpus_of_rows(tmp_path: Path) -> None:
    pairs(tmp_path)
    rows = [row([["a", "paraphrase"], ["b"]], ["x", "y"], "sub/0.png"), row([["c"]], [""]), row([["a"]], ["Y"])]
    turns = Turns.of(
        M3TReader(str(write_parquet(tmp_path / "r.parquet", rows)), str(tmp_path / "images")), progress=False
    )
    assert turns.row_N.tolist() == [0, 0, 2] and turns.place_N.tolist() == [0, 1, 0] and set(turns.bad_rows) == {1}
    first, second, alone = turns.query_N.tolist()
    assert first == second != alone, "questions about one picture belong together, those without one by their words"
    corpus, answer_Q = Corpus.of([turns])
    assert answer_Q.tolist() == [0, 1, 1] and [corpus.negative(i) for i in range(2)] == [("x", ""), ("y", "")]
    questions = [dialogue.turns for chunk in turns.queries(1) for dialogue in chunk]
    assert questions == [("a", "b"), ("a",)]
    assert replace(turns, row_N=turns.row_N[:2]).rows().tolist() == [0]
    assert Negative("x") == Negative(corpus.negative(0)[0])
