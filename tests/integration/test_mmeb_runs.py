"""MMEB by the program: two processes score as one does, and go on where another evaluation ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from programs import EVALUATE, Programs, refusal
from tiny_mmeb import instructed, ready, write_pictures, write_rows
from tiny_models import export

COLOURS = ["a red star", "a blue dot", "two cars", "a tree", "a cup"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of one publication, one of the other, and a model folder."""
    root = tmp_path_factory.mktemp("mmeb")
    names = [f"p{i}.png" for i in range(6)]
    write_pictures(root / "image-tasks", *names)
    lists = [COLOURS[i:] + COLOURS[:i] for i in range(5)]
    asked = "<|image_1|>\nWhat is in the picture?\n"
    write_rows(root / "ChartQA", [ready(asked, names[i], lists[i], [""] * 5) for i in range(5)])
    show = "<|image_1|>\nRepresent the given image.\n"
    rows = [instructed("Find", COLOURS[i], "", show, [""] * 4, [*names[i : i + 3], "p0.png"]) for i in range(4)]
    rows[3]["tgt_img_path"] = [*names[:3], "absent.png"]
    write_rows(root / "MSCOCO_t2i", rows)
    rows = [instructed("<|image_1|>\nFind", "it", names[i], show, COLOURS[:2], names[i : i + 2]) for i in range(4)]
    write_rows(root / "RefCOCO-Matching", rows)
    export(root / "model")
    return root


def test_two_ranks_score_as_one_and_go_on(data: Path, programs: Programs, tmp_path: Path) -> None:
    argv = [EVALUATE, "--model", data / "model", "--suite", "mmeb", "--data", data, "--dims", "8", "--output"]
    jobs = [
        programs.start([*argv, tmp_path / "two"], ranks=2),
        programs.start([*argv, tmp_path / "parts", "--datasets", "ChartQA"], ranks=2),
    ]
    two, part = (job.wait().check() for job in jobs)
    begun = (tmp_path / "parts" / "mmeb_datasets" / "ChartQA.json").stat().st_mtime_ns
    one = programs.run([*argv, tmp_path / "parts"]).check()  # another number of processes goes on
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert json.loads((tmp_path / "parts" / "results.json").read_text()) == results
    assert (tmp_path / "parts" / "mmeb_datasets" / "ChartQA.json").stat().st_mtime_ns == begun
    assert results["overall"]["datasets"] == 3 and results["MSCOCO_t2i"]["left_out"] == 1
    for name in ("results.md", "results.png"):
        assert (tmp_path / "two" / name).exists()

    assert two.stdout[0].splitlines() == [line.replace("/parts/", "/two/") for line in one.stdout[0].splitlines()]
    lines = two.stdout[0].splitlines()
    assert lines[0].split() == ["precision@1", "precision@1@8", "queries", "candidates", "chance"]
    assert lines[1].startswith("overall (3 of 36)    ") and len({len(line) for line in lines[:9]}) == 1
    assert [line.split()[0] for line in lines[2:9]] == [
        *("IND", "OOD", "VQA", "Retrieval", "Grounding", "ChartQA", "MSCOCO_t2i"),
    ]
    assert lines[10] == "1 rows could not be used and are not counted" and not two.stdout[1]
    for done in (two, one):
        assert done.output.count("33 of MMEB's 36 data sets are not in") == 1
        assert done.output.count("absent.png: no such file") == 1
    assert "overall (1 of 36)" in part.stdout[0]


def test_what_the_user_got_wrong_is_said_once(data: Path, programs: Programs, tmp_path: Path) -> None:
    argv = [EVALUATE, "--model", data / "model", "--suite", "mmeb", "--data", data, "--output", tmp_path]
    wrong = {
        "no data set 'CIFAR-100': the nearest names are": ["--datasets", "CIFAR-100"],
        "no usable row; ": ["--datasets", "ChartQA", "--images", data / "model"],
    }
    jobs = [programs.start([*argv, *options], ranks=2) for options in wrong.values()]
    for message, job in zip(wrong, jobs, strict=True):
        assert message in refusal(job.wait())
