"""M-BEIR on miniatures: what the files say, which candidates are searched, recalls worked out by hand."""

from __future__ import annotations

import json
import logging
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder, InMemory, Store
from muco_ds.eval.evaluation import evaluate
from muco_ds.eval.mbeir import CELLS, MBEIRSuite
from muco_ds.eval.mbeir_files import formatted, read_queries
from muco_ds.eval.suites import SuiteOptions, open_suite
from muco_ds.models.shards import Rows, Source

from tiny_mbeir import NAMES, candidate, paths, query, union_path, write_instructions, write_lines, write_mbeir
from tiny_models import embedder, packer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Protractor(Encoder):
    """Embeds a dialogue as the direction, in degrees, that stands first in its text or picture's name, else as any;
    one of a broken picture is zero."""

    seen: dict[str, list[Dialogue]] = field(default_factory=dict)

    def rows(self, source: Source, name: str, key: str) -> Rows:
        dialogues = list(source.dialogues(0, len(source)))
        self.seen[name] = dialogues
        found = []
        for dialogue in dialogues:
            said = f"{dialogue.turns[0]} {[Path(image).parts[-2:] for image in dialogue.images]}"
            angle = re.search(r"(\d+)deg", said)
            radians = math.radians(float(angle[1]) if angle else zlib.crc32(said.encode()) % 360)
            found.append([0.0, 0.0] if "broken" in said else [math.cos(radians), math.sin(radians)])
        return InMemory(np.array(found, np.float16))


def protractor(**options: Any) -> Protractor:
    return Protractor(embedder(), packer(), CPU, **options)


def by_hand(root: Path) -> None:
    """cirr_task7: candidates i at 5 i degrees, the twelfth where the second is. A query is at one degree, the fourth
    at five."""
    write_instructions(root)
    pool = [candidate(f"8:{i}", None, f"{5 * i if i < 11 else 5}deg/{i}.jpg", "image") for i in range(12)]
    positives: dict[str, list[Any]] = {
        "8:1": ["8:0"],
        "8:2": [{"did": "8:3"}, {"did": "8:5"}],
        "8:3": ["8:4"],
        "8:4": [{"did": "8:1"}],
        "8:5": ["8:0"],
        "8:6": ["8:77"],
    }
    kinds = ["image,text", "text,image"] * 3
    angles = ["1deg", "1deg", "1deg", "5deg", "broken", "1deg"]
    rows = zip(positives.items(), kinds, angles, strict=True)
    queries = [query(qid, "make it red", f"{angle}/q.jpg", kind, dids) for (qid, dids), kind, angle in rows]
    relevance = ["8:1 0 8:0 1 7", "8:2 0 8:3 1 7", "8:2 0 8:5 1 7", "8:3 0 8:4 1 7", "8:3 0 8:0 0 7", "8:4 0 8:1 1 7"]
    relevance += ["8:5 0 8:0 1 7", "8:6 0 8:77 1 7", "8:99 0 8:1 1 7"]
    for path, lines in zip(paths(root, "cirr_task7"), (queries, relevance, pool), strict=True):
        write_lines(path, lines)


def cirr(root: Path, **options: Any) -> MBEIRSuite:
    return MBEIRSuite(root, datasets=["cirr_task7"], **options)


def test_recalls_are_those_worked_out_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_hand(tmp_path)
    with caplog.at_level(logging.WARNING):
        entry = cirr(tmp_path).score("cirr_task7", protractor())["cirr_task7"]
    # Wrong ones before the best right one: none; 0, 1, 2 and 11; these and 3; the equal 11.
    assert [entry[f"recall@{k}"] for k in (1, 5, 10)] == [1 / 4, 3 / 4, 1.0]
    assert entry["recall@official"] == 3 / 4 and entry["score"] == "recall@5" and "recall@20" not in entry
    assert entry["task"] == "image,text -> image" and entry["pool"] == "local" and entry["seed"] == 2023
    assert (entry["queries"], entry["candidates"], entry["left_out"], entry["absent_positives"]) == (4, 12, 2, 1)
    misses = [math.comb(12 - right, 5) / math.comb(12, 5) for right in (1, 2, 1, 1)]
    assert entry["chance"] == pytest.approx(1 - sum(misses) / 4)
    relevance = paths(tmp_path, "cirr_task7")[1]
    assert f"{relevance}: line 8: {paths(tmp_path, 'cirr_task7')[2]} has no such candidate" in caplog.text
    assert f"{relevance}: line 9: the query file has no such query" in caplog.text


def test_queries_stand_behind_an_instruction_and_candidates_do_not(tmp_path: Path) -> None:
    by_hand(tmp_path)
    encoder = protractor()
    cirr(tmp_path).score("cirr_task7", encoder)
    queries, candidates = (
        encoder.seen["mbeir/mbeir_cirr_task7_queries"],
        encoder.seen["mbeir/mbeir_cirr_task7_cand_pool"],
    )
    texts = [str(dialogue.turns[0]) for dialogue in queries]
    assert all(re.fullmatch(r"Find it for cirr in way [0-3]\. make it red\.", text) for text in texts)
    assert queries[0].images == (f"{tmp_path}/1deg/q.jpg",)
    assert candidates[3] == Dialogue(("",), (f"{tmp_path}/15deg/3.jpg",))


def test_prompts_depend_on_seed_and_query_alone(tmp_path: Path) -> None:
    write_instructions(tmp_path)
    count = 200
    query_path, relevance, pool = paths(tmp_path, "cirr_task7")
    queries = [query(f"8:{i}", "text", "1deg/q.jpg", "image,text", [f"8:{i}"]) for i in range(count)]
    write_lines(pool, [candidate(f"8:{i}", None, "2deg/c.jpg", "image") for i in range(count)])
    write_lines(relevance, [f"8:{i} 0 8:{i} 1 7" for i in range(count)])

    def prompts(order: slice, **options: Any) -> list[str]:
        write_lines(query_path, queries[order])
        encoder = protractor()
        cirr(tmp_path, **options).score("cirr_task7", encoder)
        (seen,) = [seen for name, seen in encoder.seen.items() if "queries" in name]
        return [str(dialogue.turns[0]) for dialogue in seen]

    forth = prompts(slice(None))
    assert prompts(slice(None, None, -1)) == forth[::-1] and prompts(slice(None), rows=7) == forth[:7]
    assert prompts(slice(None), seed=1) != forth
    assert all(30 < forth.count(prompt) < 70 for prompt in set(forth)) and len(set(forth)) == 4


def test_the_prompt_is_that_of_the_drawn_candidates_modality(tmp_path: Path) -> None:
    """Of the query's own data set: others share a pool (OVEN and InfoSeek) and are right, but choose no prompt."""
    columns = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt"
    rows = [
        "image,text\ttext\toven\t5\ta text",
        "text,image\timage,text\toven\t5\tboth",
        "image,text\timage\toven\t5\tno",
    ]
    write_lines(tmp_path / "instructions" / "query_instructions.tsv", [columns, *rows])
    files = paths(tmp_path, "oven_task6")
    dids = [["5:1"], ["5:2"], ["6:3", "5:1"], ["5:1", "5:2"], ["6:3"]]
    queries = [query(f"5:{i}", "x", "1deg/q.jpg", "image,text", positives) for i, positives in enumerate(dids)]
    queries += [query(f"5:{i}", "x", "1deg/q.jpg", "image,text", ["5:1", "5:2"]) for i in range(5, 25)]
    write_lines(files[0], queries)
    write_lines(files[1], [f"5:{i} 0 {'6:4' if i == 4 else '5:1'} 1 6" for i in range(25)])
    kinds = {"5:1": "text", "5:2": "text, image", "6:3": "image", "6:4": "text"}
    write_lines(files[2], [candidate(did, "a", None, kind) for did, kind in kinds.items()])
    encoder = protractor()
    MBEIRSuite(tmp_path, datasets=["oven_task6"]).score("oven_task6", encoder)
    texts = [dialogue.turns[0] for dialogue in encoder.seen["mbeir/mbeir_oven_task6_queries"]]
    assert texts[:3] == ["A text. x.", "Both. x.", "A text. x."] and texts[4] == "A text. x."
    assert set(texts[5:]) == {"A text. x.", "Both. x."}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ""),
        (' "a dog"\r\n', "A dog."),
        ("already done!", "Already done!"),
        ('"', ""),
        ("Is it?", "Is it?"),
        ('"x" and "y"', 'X" and "y.'),
    ],
)
def test_texts_are_brought_into_uniirs_form(text: str | None, expected: str) -> None:
    assert formatted(text) == expected


def test_cells_are_the_sixteen_with_their_metrics_and_groups(tmp_path: Path) -> None:
    assert [cell.name for cell in CELLS] == NAMES
    assert {cell.name for cell in CELLS if cell.k == 10} == {
        "fashion200k_task0",
        "fashion200k_task3",
        "fashioniq_task7",
    }
    groups = [cell.group for cell in CELLS]
    names = ("single->single", "single->multi", "multi->single", "multi->multi")
    assert [groups.count(name) for name in names] == [8, 2, 4, 2]


def test_the_union_is_searched_by_the_local_pools_embeddings(tmp_path: Path) -> None:
    write_mbeir(tmp_path, union=False)
    extra = candidate("9:900", "90deg", None, "text")
    pools = {name: paths(tmp_path, name)[2] for name in NAMES}
    lines = [line for path in pools.values() for line in path.read_text().splitlines()]
    append(lines[3 * 7])(pools["webqa_task2"])  # what webqa_task1 has
    options: dict[str, Any] = {"datasets": ["cirr_task7"], "pool": "union"}

    joined = protractor()
    without = MBEIRSuite(tmp_path, **options).score("cirr_task7@union", joined)["cirr_task7@union"]
    assert without["candidates"] == len(lines) == 16 * 7 and without["pool_file"] == "local"

    write_lines(union_path(tmp_path), [extra, *reversed(lines[7:])])  # one more, and not those of the first pool
    whole = protractor()
    entry = MBEIRSuite(tmp_path, **options).score("cirr_task7@union", whole)["cirr_task7@union"]
    assert entry["candidates"] == len(lines) - 7 + 1 and entry["pool"] == "union"
    assert len(whole.seen["mbeir/mbeir_union_test_cand_pool_rest"]) == 1
    assert {name for name in whole.seen if "cand_pool" in name} == {
        *(name for name in joined.seen if "cand_pool" in name),
        "mbeir/mbeir_union_test_cand_pool_rest",
    } - {"mbeir/mbeir_visualnews_task0_cand_pool"}

    pools["edis_task2"].unlink()
    rest = protractor()
    again = MBEIRSuite(tmp_path, **options).score("cirr_task7@union", rest)["cirr_task7@union"]
    assert len(rest.seen["mbeir/mbeir_union_test_cand_pool_rest"]) == 8
    assert again["candidates"] == entry["candidates"] and again["recall@1"] == entry["recall@1"]
    assert sum(len(seen) for name, seen in rest.seen.items() if "cand_pool" in name) == entry["candidates"] + 1


def test_all_cells_and_their_means(tmp_path: Path) -> None:
    write_mbeir(tmp_path / "data")
    suite = MBEIRSuite(tmp_path / "data", pool="both")
    assert list(suite.datasets) == NAMES + [f"{name}@union" for name in NAMES]
    store = Store(tmp_path / "embeddings", "model", 96)
    encoder = Encoder(embedder(), packer(), CPU, sizes=[24], store=store)
    results, problems = evaluate(suite, encoder, tmp_path / "out", "model")
    assert not problems
    assert list(results)[:6] == [
        "overall",
        "single->single",
        "single->multi",
        "multi->single",
        "multi->multi",
        "overall@union",
    ]
    cells = [results[name] for name in NAMES]
    for score in ("recall@official", "recall@1", "recall@5@24", "chance"):
        assert results["overall"][score] == pytest.approx(sum(entry[score] for entry in cells) / 16)
    fashion = results["fashioniq_task7"]
    assert (
        fashion["score"] == "recall@10" and fashion["recall@official"] == fashion["recall@10"] == fashion["recall@50"]
    )
    assert "recall@50" not in results["overall"] and results["overall"]["datasets"] == 16
    pair = [results[name]["recall@official"] for name in ("oven_task8", "infoseek_task8")]
    assert results["multi->multi"]["recall@official"] == sum(pair) / 2
    assert results["overall"]["candidates"] == results["overall@union"]["candidates"] == 16 * 7
    # A picture is its own nearest; among all, text queries and their texts differ from everything else's less.
    assert results["nights_task4"]["recall@5"] == 1.0 and {entry["pool"] for entry in cells} == {"local"}
    assert all(results[f"{name}@union"]["recall@5"] <= results[name]["recall@5"] for name in NAMES)
    assert len({entry["version"] for entry in cells}) == 16

    suite.report(results, tmp_path / "out")
    table = (tmp_path / "out" / "results.md").read_text()
    for name in ("cirr_task7", "cirr_task7@union"):
        score = 100 * results[name]["recall@official"]
        assert f"| {name} | multi->single, image,text -> image | {score:.1f} |" in table
    assert "| MuCo 2B (arXiv 2602.06393) | 51.6 | 49.1 | 68.2 | 41.6 | 64.8 | 51.6 |" in table
    assert "0 queries are left out" in table
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000


def test_a_part_is_the_first_queries_with_their_candidates_and_some_others(tmp_path: Path) -> None:
    by_hand(tmp_path)
    encoder = protractor()
    suite = cirr(tmp_path, rows=2)
    entry = suite.score("cirr_task7", encoder)["cirr_task7"]
    assert entry["pool"] == "part" and entry["queries"] == 2 and entry["candidates"] == 12
    assert "recall@1" in suite.results({"cirr_task7": entry})["overall"]
    pool = paths(tmp_path, "cirr_task7")[2]
    others = [candidate(f"8:{i}", None, f"{80}deg/{i}.jpg", "image") for i in range(100, 140)]
    pool.write_text("".join(json.dumps(item) + "\n" for item in others) + pool.read_text())
    entry = cirr(tmp_path, rows=2).score("cirr_task7", encoder)["cirr_task7"]
    assert entry["candidates"] == 3 + 20 and (entry["recall@1"], entry["recall@5"]) == (0.5, 1.0)
    assert len(encoder.seen["mbeir/mbeir_cirr_task7_cand_pool_first2"]) == 23


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    write_mbeir(tmp_path, ["cirr_task7"], union=False)
    with pytest.raises(UserError, match=r"--datasets: mbeir has no 'cir_task7': cirr_task7"):
        MBEIRSuite(tmp_path, datasets=["cir_task7"])
    with pytest.raises(
        UserError, match=r"mbeir_visualnews_task0_test\.jsonl' and 44 more files missing: .*--datasets cirr_task7$"
    ):
        MBEIRSuite(tmp_path)
    with pytest.raises(
        UserError, match=r"mbeir_visualnews_task0_cand_pool\.jsonl' and 14 more files missing: download"
    ):
        cirr(tmp_path, pool="union")
    with pytest.raises(UserError, match=r"--rows: .*--pool both"):
        cirr(tmp_path, pool="both", rows=3)
    with pytest.raises(UserError, match=r"--data: no such folder '.*/absent'"):
        cirr(tmp_path / "absent")
    assert cirr(tmp_path).datasets == ["cirr_task7"]


@pytest.mark.parametrize("option", [{"pool": "union"}, {"seed": 3}])
def test_other_suites_refuse_its_options(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(option))}: is for mbeir, m3t has none: leave it out"):
        open_suite(SuiteOptions("m3t", str(tmp_path), **option))


def append(line: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text() + line + "\n")


def empty(path: Path) -> None:
    path.write_text("\n")


NO_MODALITY = '{"qid": "8:99", "query_txt": null, "query_img_path": null}'
OUTSIDE = '{"qid": "8:99", "query_txt": "", "query_img_path": "../secret.jpg", "query_modality": "image"}'


@pytest.mark.parametrize(
    ("which", "spoil", "message"),
    [
        (0, append('{"qid": '), r"mbeir_cirr_task7_test\.jsonl: line 5: is no JSON"),
        (0, append(NO_MODALITY), r"_test\.jsonl: line 5: has no 'query_modality'"),
        (0, append(OUTSIDE), r"_test\.jsonl: line 5: query_img_path leaves '.*': '\.\./secret\.jpg'"),
        (0, append("[]"), r"_test\.jsonl: line 5: holds no object"),
        (0, empty, r"_test\.jsonl: is empty"),
        (1, append("8:1 0 8:x 1 7"), r"_qrels\.txt: line 5: invalid literal.*a line is"),
        (1, append("8:1 0"), r"_qrels\.txt: line 5: not enough values.*a line is"),
        (1, empty, r"_qrels\.txt: is empty"),
        (
            1,
            lambda path: path.write_text("8:70 0 8:1 1 7\n"),
            r"_qrels\.txt: no query has a right candidate in .*_pool",
        ),
        (2, append('{"did": "8'), r"_cand_pool\.jsonl: line 8: is no JSON"),
        (2, append('{"did": "8:10000000"}'), r"_cand_pool\.jsonl: line 8: '8:10000000' is no id"),
        (2, append('{"did": "8:5", "txt": 3}'), r"_cand_pool\.jsonl: candidate '8:5': txt is 3"),
        (2, append('{"txt": "a"}'), r"_cand_pool\.jsonl: line 8: has no 'did'"),
        (2, empty, r"_cand_pool\.jsonl: is empty"),
        (3, empty, r"query_instructions\.tsv: is empty"),
        (3, append("text\ttext\twebqa"), r"query_instructions\.tsv: line 18: not enough values"),
        (
            3,
            lambda path: path.write_text("head\ntext\timage\tcirr\t8\ta\n"),
            r"_test\.jsonl: line 1: query_instructions\.tsv has no prompt for data set 8, query modality 'image,text'",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, which: int, spoil: Callable[[Path], None], message: str) -> None:
    write_mbeir(tmp_path, ["cirr_task7"])
    files = [*paths(tmp_path, "cirr_task7"), tmp_path / "instructions" / "query_instructions.tsv"]
    spoil(files[which])
    with pytest.raises(UserError, match=message):
        cirr(tmp_path).score("cirr_task7", Encoder(embedder(), packer(), CPU))


def test_both_spellings_are_one(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    lines = [
        query("4:17", "a", "b.jpg", kind, [did])
        for kind, did in (("image,text", "4:9"), ("text,image", {"did": "4:9"}))
    ]
    write_lines(path, lines)
    first, second = read_queries(path, str(tmp_path), None)
    assert first.modality == second.modality and first.positives == second.positives == (40_000_009,)
    assert first.number == 40_000_017 and first.images == (f"{tmp_path}/b.jpg",)
