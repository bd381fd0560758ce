"""A miniature M-BEIR in the exact layout of the publication, with both spellings of modalities and candidate lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

DATASETS = ["visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq", "cirr", "mscoco"]
KINDS = {
    **{0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text")},
    **{4: ("image", "image"), 6: ("image,text", "text"), 7: ("image,text", "image"), 8: ("image,text", "image,text")},
}
NAMES = ["visualnews_task0", "mscoco_task0", "fashion200k_task0", "webqa_task1", "edis_task2", "webqa_task2"]
NAMES += ["visualnews_task3", "mscoco_task3", "fashion200k_task3", "nights_task4", "oven_task6", "infoseek_task6"]
NAMES += ["fashioniq_task7", "cirr_task7", "oven_task8", "infoseek_task8"]
QUERIES, CANDIDATES = 4, 7


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def paths(root: Path, name: str) -> tuple[Path, Path, Path]:
    """Files of queries, relevance and candidates."""
    pool = f"{name}_test" if name.startswith("mscoco") else name
    return (
        root / "query" / "test" / f"mbeir_{name}_test.jsonl",
        root / "qrels" / "test" / f"mbeir_{name}_test_qrels.txt",
        root / "cand_pool" / "local" / f"mbeir_{pool}_cand_pool.jsonl",
    )


def union_path(root: Path) -> Path:
    return root / "cand_pool" / "global" / "mbeir_union_test_cand_pool.jsonl"


def write_instructions(root: Path) -> None:
    lines = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"]
    for name in NAMES:
        dataset, task = name.split("_task")
        query, candidate = KINDS[int(task)]
        prompts = "\t".join(f"find it for {dataset} in way {i}" for i in range(4))
        lines.append(f"{query}\t{candidate}\t{dataset}\t{DATASETS.index(dataset)}\t{prompts}")
    write_lines(root / "instructions" / "query_instructions.tsv", lines)


def candidate(did: str, text: str | None, picture: str | None, kind: str) -> dict[str, Any]:
    return {"txt": text, "img_path": picture, "modality": kind, "did": did, "src_content": None}


def query(qid: str, text: str | None, picture: str | None, kind: str, positives: Sequence[Any]) -> dict[str, Any]:
    return {
        **{"qid": qid, "query_txt": text, "query_img_path": picture, "query_modality": kind, "query_src_content": None},
        **{"pos_cand_list": list(positives), "neg_cand_list": [], "task_id": 0},
    }


def write_mbeir(root: Path, names: Sequence[str] = NAMES, union: bool = True) -> None:
    """A few queries and candidates of each cell; each query's picture is that of its right candidate, or its text is.

    The union's own file holds all candidates, in another order.
    """
    write_instructions(root)
    everything = []
    for name in names:
        dataset, _, task = name.partition("_task")
        number, (asked, given) = DATASETS.index(dataset), KINDS[int(task)]
        swap = int(task) % 2 == 0  # the card's spelling, or that of the code
        pool, queries, relevance = [], [], []
        for i in range(CANDIDATES):
            did, picture = f"{number}:{int(task) * 100 + i}", f"mbeir_images/{dataset}_images/{task}_{i}.jpg"
            (root / picture).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (56, 56), (37 * i % 256, 11 * number, 29 * int(task))).save(root / picture)
            text = f"thing {i} of {name}"
            kind = "text,image" if swap and given == "image,text" else given
            pool.append(candidate(did, text if "text" in given else None, picture if "image" in given else None, kind))
            if i < QUERIES:
                qid, kind = f"{number}:{int(task) * 10 + i}", "text,image" if swap and asked == "image,text" else asked
                positives = [did] if swap else [{"did": did}]
                words, shown = (
                    f"thing {i} of {name}" if "text" in asked else None,
                    picture if "image" in asked else None,
                )
                queries.append(query(qid, words, shown, kind, positives))
                relevance.append(f"{qid} 0 {did} 1 {task}")
        for path, lines in zip(paths(root, name), (queries, relevance, pool), strict=True):
            write_lines(path, lines)
        everything += pool
    if union:
        write_lines(union_path(root), everything[::-1])
