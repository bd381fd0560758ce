"""Rows in M3T's columns as miniature benchmarks, in the layouts in which MMEB and M-BEIR are published.

They show what the files look like and try an evaluation out; their scores say nothing about the benchmarks, after whose
data sets they are named. Sources of the layouts: TIGER-Lab/MMEB-eval, TIGER-Lab/M-BEIR.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from muco_ds.data.readers import IMAGE_MARK
from muco_ds.data.schema import Record
from muco_ds.errors import UserError

MOST_CANDIDATES = 100  # of an MMEB row

_MMEB_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("qry_text", "qry_img_path")]
    + [(name, pa.list_(pa.string())) for name in ("tgt_text", "tgt_img_path")]
)
_NOTE = "Miniature benchmarks, made of own rows to try the evaluation with. Scores are not those of {name}.\n"


@dataclass(frozen=True)
class Asked:
    """A question about a picture, and its answer."""

    picture: str
    question: str
    answer: str
    kind: int


def write_miniatures(records: Iterable[Record], out: Path, seed: int = 0) -> None:
    """Write out/mmeb and out/mbeir: pictures with questions of the first, of other and of the last kind of turn."""
    asked = [
        Asked(record.query_images[0], turn.questions[0].removeprefix(IMAGE_MARK), turn.target, turn.kind)
        for record in records
        if record.query_images
        for turn in record.turns
    ]
    last = max(one.kind for one in asked)
    labels = [one for one in asked if one.kind == 0]
    questions = [one for one in asked if 0 < one.kind < last]
    captions = [one for one in asked if one.kind == last]
    write_mmeb(labels, questions, captions, out / "mmeb", seed)
    write_mbeir(questions, captions, out / "mbeir")


def write_mmeb(
    labels: Sequence[Asked], questions: Sequence[Asked], captions: Sequence[Asked], root: Path, seed: int
) -> None:
    """VOC2007 of labels, OK-VQA of questions, MSCOCO_i2t and MSCOCO_t2i of captions; pictures in root/eval_images."""
    rng = random.Random(f"mmeb {seed}")
    path_of = _copied((one.picture for one in (*labels, *questions, *captions)), root / "eval_images", "pictures")
    for name, asked in (("VOC2007", labels), ("OK-VQA", questions), ("MSCOCO_i2t", captions)):
        if not asked:
            continue
        rows = []
        for one in asked:
            wrong = sorted({other.answer for other in asked if other.kind == one.kind} - {one.answer})
            candidates = [one.answer, *rng.sample(wrong, min(MOST_CANDIDATES - 1, len(wrong)))]
            rows.append((f"{IMAGE_MARK}{one.question}\n", path_of[one.picture], candidates, [""] * len(candidates)))
        _write_mmeb(root / name, rows)
    pictures = sorted({path_of[one.picture] for one in captions})
    rows = []
    for one in captions:
        wrong = [path for path in pictures if path != path_of[one.picture]]
        candidates = [path_of[one.picture], *rng.sample(wrong, min(MOST_CANDIDATES - 1, len(wrong)))]
        text = f"{IMAGE_MARK}Represent the given image.\n"
        rows.append((f"Find the picture: {one.answer}\n", "", [text] * len(candidates), candidates))
    _write_mmeb(root / "MSCOCO_t2i", rows)
    (root / "README.md").write_text(_NOTE.format(name="MMEB"))


def _write_mmeb(folder: Path, rows: Sequence[tuple]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dict(zip(_MMEB_SCHEMA.names, row, strict=True)) for row in rows], _MMEB_SCHEMA)
    pq.write_table(table, folder / "test-00000-of-00001.parquet", write_page_checksum=True)


def write_mbeir(questions: Sequence[Asked], captions: Sequence[Asked], root: Path) -> None:
    """mscoco_task0 and mscoco_task3 of captions, oven_task6 of questions, local pools and their union."""
    path_of = _copied((one.picture for one in (*questions, *captions)), root, "mbeir_images/own_images")
    pictures = {path: f"9:{n}" for n, path in enumerate(sorted({path_of[one.picture] for one in captions}), 1)}
    texts = {text: f"9:{n}" for n, text in enumerate(sorted({one.answer for one in captions}), len(pictures) + 1)}
    answers = {text: f"5:{n}" for n, text in enumerate(sorted({one.answer for one in questions}), 1)}
    pools = {
        "mscoco_task0": [_candidate(did, None, path) for path, did in pictures.items()],
        "mscoco_task3": [_candidate(did, text, None) for text, did in texts.items()],
        "oven_task6": [_candidate(did, text, None) for text, did in answers.items()],
    }
    right: dict[str, list[tuple[str | None, str | None, str]]] = {
        "mscoco_task0": [(one.answer, None, pictures[path_of[one.picture]]) for one in captions],
        "mscoco_task3": [(None, path_of[one.picture], texts[one.answer]) for one in captions],
        "oven_task6": [(one.question, path_of[one.picture], answers[one.answer]) for one in questions],
    }
    for cell, rows in right.items():
        if not rows:
            continue
        task = int(cell.rpartition("task")[2])
        pool_name = f"{cell}_test" if cell.startswith("mscoco") else cell
        _write_lines(root / "cand_pool" / "local" / f"mbeir_{pool_name}_cand_pool.jsonl", pools[cell])
        queries: list[dict[str, Any]] = []
        qrels: list[str] = []
        for n, (text, picture, did) in enumerate(rows, 1):
            qid = f"{did.partition(':')[0]}:{task}{n:05}"
            queries.append(_query(qid, text, picture, did, task))
            qrels.append(f"{qid} 0 {did} 1 {task}\n")
        _write_lines(root / "query" / "test" / f"mbeir_{cell}_test.jsonl", queries)
        _write(root / "qrels" / "test" / f"mbeir_{cell}_test_qrels.txt", "".join(qrels))
    union = [candidate for pool in pools.values() for candidate in pool]
    _write_lines(root / "cand_pool" / "global" / "mbeir_union_test_cand_pool.jsonl", union)
    columns = ["query_modality", "cand_modality", "dataset_name", "dataset_id", *(f"prompt_{i}" for i in range(1, 5))]
    lines = [
        ["text", "image", "MSCOCO", "9", *("Find the picture", "Show it", "Which picture is it?", "Look for")],
        ["image", "text", "MSCOCO", "9", *("Describe the picture", "Say what it shows", "What is it?", "Caption it")],
        ["image,text", "text", "OVEN", "5", *("Answer", "Answer the question", "What is right?", "Reply")],
    ]
    tsv = "".join("\t".join(line) + "\n" for line in (columns, *lines))
    _write(root / "instructions" / "query_instructions.tsv", tsv)
    (root / "README.md").write_text(_NOTE.format(name="M-BEIR"))


def _query(qid: str, text: str | None, picture: str | None, did: str, task: int) -> dict[str, Any]:
    return {
        **{"qid": qid, "query_txt": text, "query_img_path": picture, "query_modality": _modality(text, picture)},
        **{"query_src_content": None, "pos_cand_list": [did], "neg_cand_list": [], "task_id": task},
    }


def _candidate(did: str, text: str | None, picture: str | None) -> dict[str, Any]:
    modality = _modality(text, picture)
    return {"did": did, "txt": text, "img_path": picture, "modality": modality, "src_content": None}


def _modality(text: str | None, picture: str | None) -> str:
    return ",".join([*["image"] * (picture is not None), *["text"] * (text is not None)])


def _copied(pictures: Iterable[str], root: Path, folder: str) -> dict[str, str]:
    """Copy pictures to root/folder; their new paths, relative to `root`, by the old ones. Raises UserError."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    path_of: dict[str, str] = {}
    for picture in pictures:
        if picture not in path_of:
            if not Path(picture).is_file():
                raise UserError(f"picture {picture}: no such file: name the folder that paths start from")
            path_of[picture] = f"{folder}/{len(path_of):05}{Path(picture).suffix}"
            shutil.copyfile(picture, root / path_of[picture])
    return path_of


def _write_lines(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
