"""report.html: everything of a run is there, as text, in one file; broken runs are read as far as they go."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from muco_ds.errors import UserError
from muco_ds.metrics import METRIC_KEYS
from muco_ds.pages.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, chart
from muco_ds.pages.report import held_out, options, render, tiles, time_spent, warnings
from muco_ds.pages.run_folder import Run, Session, read_run

ATTACK = "<script>alert('x')</script>"
CONFIG: dict[str, Any] = {
    "run": {"name": ATTACK, "dir": "runs", "max_steps": 40, "precision": "fp32"},
    "model": {"path": "demo/model", "lora": {"rank": 0}},
    "data": {"train": [{"path": "a.parquet", "images": None, "weight": 3.0}], "images": "images"},
    "batch": {"images": 32},
}


def line(step: int, **values: Any) -> dict[str, Any]:
    return (
        dict.fromkeys(METRIC_KEYS, 0.5) | {"step": step, "mfu": None, "replaced_images": 0, "skipped_steps": 0} | values
    )


def write_run(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with validation, examples, a checkpoint and an evaluation."""
    lines = [line(step, loss=4.25 / step) for step in range(10, 41, 10)]
    lines[1] |= {"val/overall/precision@1": 0.25, "val/<b>turn/precision@1": 0.5}
    lines[3] |= {"val/overall/precision@1": 0.75, "val/<b>turn/precision@1": 1.0, "replaced_images": 2}
    folder = write_run(tmp_path_factory.mktemp("report") / "run", lines)
    with SummaryWriter(str(folder / "tb")) as board:
        board.add_text("config", "not shown")
        for step in (20, 40):
            board.add_image("val/answers", np.full((40, 60, 3), step, np.uint8), step, dataformats="HWC")
        board.add_text("val/texts", f"| question | answer |\n|---|---|\n| {ATTACK} | a \\| b |", 40)
        for each in lines:
            board.add_scalar("train/loss", each["loss"], each["step"])
    entry = {"precision@1": 0.625, "queries": 1234, "candidates": 331, "chance": 0.003, "version": "V1"}
    for place in (folder / "evaluation", folder.parent / "elsewhere"):
        place.mkdir()
        (place / "results.json").write_text(json.dumps({"overall": entry, ATTACK: {"recall@5": 0.1}}))
    checkpoint = folder / "checkpoints" / "step_0000040"
    checkpoint.mkdir(parents=True)
    meta = {"step": 40, "world_size": 16, "zero_stage": 3, "versions": {"torch": "9.9.9"}, "data": {"rows": 777}}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    size = (checkpoint / "meta.json").stat().st_size
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"meta.json": size}}))
    return folder


class Parsed(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def values(self, name: str) -> Iterator[str]:
        return (value for key, value in self.attributes if key == name)


def test_everything_of_the_run_is_there(whole: Path) -> None:
    page = Parsed(render(read_run(whole, [whole.parent / "elsewhere"])))
    for words in ("finished after 40 steps", "9.9.9", "777", "demo/model", "a.parquet", "best 75.0 % at step 40"):
        assert words in page.text, words
    assert page.text.count("62.5 %") == 2 and "1,234" in page.text and "elsewhere" in page.text
    assert len([src for src in page.values("src") if src.startswith("data:image/png;base64,")]) == 2
    assert "a | b" in page.text and "---" not in page.text
    assert "2 pictures could not be decoded" in page.text
    assert "not shown" not in page.text
    titles = list(page.values("aria-label"))
    assert {"loss", "val precision@1", "learning rate", "pairs per second", "peak memory, GiB"} <= set(titles)
    assert "MFU" not in titles, "a chart of nothing"
    assert "step 10\n0.425" in page.text, "the value under the pointer"


def test_what_a_run_says_is_text(whole: Path) -> None:
    page = Parsed(render(read_run(whole, [])))
    assert "script" not in page.tags and "b" in page.tags
    assert page.text.count(ATTACK) >= 4, "title, heading, configuration, example and result"
    assert "<b>turn" in page.text


def test_the_page_asks_for_nothing(whole: Path) -> None:
    content = render(read_run(whole, []))
    page = Parsed(content)
    assert not {"link", "script", "iframe", "object", "embed", "a"} & set(page.tags)
    assert all(src.startswith("data:") for src in page.values("src"))
    assert not list(page.values("href")) and not list(page.values("srcset"))
    assert not re.search(r"url\(|@import|https?:", content)
    assert "default-src 'none'" in content
    assert "prefers-color-scheme: dark" in content and 'name="viewport"' in content


def test_a_run_that_is_writing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(10), line(20)], tail='{"step": 30, "lo')
    (folder / "tb").mkdir()
    run = read_run(folder, [])
    assert [each["step"] for each in run.lines] == [10, 20] and not run.problems
    page = Parsed(render(run))
    assert "step 20 of 40" in page.text and "val precision@1" not in page.values("aria-label")


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(10)], tail='oops\n{"step": 20, "loss": NaN}\n{"step": 30}\n')
    (folder / "config.yaml").write_text("run: [")
    (folder / "checkpoints" / "step_0000010").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text("{")
    (folder / "tb").mkdir()
    (folder / "tb" / "events.out.tfevents.1").write_bytes(b"no events at all, and more than a few bytes of it")
    run = read_run(folder, [])
    page = Parsed(render(run))
    for words in ("config.yaml can't be read", "1 lines can't be read", "step_0000010 is not complete", "results.json"):
        assert words in page.text, words
    assert [each["step"] for each in run.lines] == [10, 20, 30]


@pytest.mark.parametrize("step", ["Infinity", '"5"', "5.5", "1" + "0" * 400, "true"])
def test_lines_without_a_step_are_left_out(tmp_path: Path, step: str) -> None:
    folder = write_run(tmp_path / "run", [line(10)], tail=f'{{"step": {step}, "loss": 1.0}}\n')
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line(20, loss=10**400)) + "\n")
    run = read_run(folder, [])
    assert "metrics.jsonl: 1 lines can't be read and are left out" in Parsed(render(run)).text
    assert [each["step"] for each in run.lines] == [10, 20] and run.values("loss") == [(10, 0.5)]


def test_results_that_nest_too_deep_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(10)])
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text("[" * 100_000)
    assert "results.json can't be read (RecursionError)" in Parsed(render(read_run(folder, []))).text


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    assert "No step of this run was logged yet" in Parsed(render(read_run(folder, []))).text


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder: give the folder of a run"):
        read_run(tmp_path / "none", [])
    with pytest.raises(UserError, match=r"holds neither config.yaml nor metrics.jsonl"):
        read_run(tmp_path, [])
    with pytest.raises(UserError, match=r"holds no results.json"):
        read_run(write_run(tmp_path / "run", []), [tmp_path])


def test_a_benchmark_of_many_data_sets_gets_several_charts() -> None:
    scores = {f"mmeb/{name}/precision@1": 0.5 for name in (*map(str, range(19)), "overall")}
    run = Run(Path("run"), {}, [line(10), line(20, **scores)])
    (first,), more = held_out(run)
    assert first.lines[0].label == "overall" and first.title == "mmeb precision@1, 1 to 8 of 20"
    assert [len(one.lines) for one in (first, *more)] == [8, 8, 4]
    assert ("mmeb precision@1", "50.0 %", "best 50.0 % at step 20") in tiles(run)
    partly = Run(Path("run"), {}, [line(20, **{"mmeb/a/precision@1": 0.5, "mmeb/b/precision@1": 0.1})])
    assert not any("mmeb" in name for name, _, _ in tiles(partly)), "a data set does not stand for the benchmark"


def test_values_that_were_not_finite_are_told() -> None:
    lines = [line(1), line(2, loss=None, temperature=None), line(3, loss=None, grad_norm=None, skipped_steps=1)]
    told = warnings(Run(Path("run"), {}, lines))
    assert "loss was not finite in 2 lines, first at step 2" in told
    assert "temperature was not finite in 1 lines, first at step 2" in told
    assert "1 steps were skipped: their gradient was not finite" in told
    assert not any(text.startswith(("grad_norm", "mfu")) for text in told), "by design"


def test_defaults_are_told_apart() -> None:
    found = {option.key: option for option in options(CONFIG)}
    assert found["batch.images"].changed and found["batch.images"].default == "1,024"
    assert found["run.precision"].default == "bf16"
    assert not found["model.lora.rank"].changed and not found["run.dir"].changed
    assert found["model.path"].changed and found["model.path"].default is None, "it has none"


def test_where_the_time_went() -> None:
    """Two windows of 10 steps, 8 pairs each: 8 s and 4 s, a quarter and half of them waiting; 20 s by the clock."""
    rates = {"pairs": 8, "mfu": None}
    lines = [
        line(10, pairs_per_s=10.0, data_wait_frac=0.25, **rates),
        line(20, pairs_per_s=20.0, data_wait_frac=0.5, **rates),
    ]
    run = Run(Path("run"), {}, lines, sessions=[Session(100.0, [(10, 110.0), (20, 120.0)])])
    shares = {part.name: part.share for part in time_spent(run)}
    assert shares == pytest.approx(
        {"steps": 8 / 20, "waiting for data": 4 / 20, "validation, checkpoints and start": 8 / 20}
    )
    assert time_spent(Run(Path("run"), {}, lines)) == []


def points(text: str) -> np.ndarray:
    return np.array([[float(number) for number in pair.split(",")] for pair in text.split()])


def test_a_chart_stays_in_its_box_and_hides_no_extreme() -> None:
    values = np.sin(np.arange(1, 5001) / 50) + 3
    values[2500] = 40.0
    made = chart("title", {"a": list(enumerate(values.tolist())), "b": [(100, 5.0), (4900, -5.0)], "none": []})
    assert made is not None and [one.label for one in made.lines] == ["a", "b"]
    for text in (made.lines[0].points, made.lines[0].band, made.lines[1].points):
        x, y = points(text).T
        assert x.min() >= LEFT and x.max() <= WIDTH - RIGHT and y.min() >= TOP and y.max() <= HEIGHT - BOTTOM
    assert len(points(made.lines[0].points)) <= 240 and not made.lines[0].dots and len(made.lines[1].dots) == 2
    top = points(made.lines[0].band)[:, 1].min()
    assert top < points(made.lines[0].points)[:, 1].min() - 20, "the peak is in the band, not in the mean"
    assert sum(width for _, width, _ in made.tips) == pytest.approx(WIDTH - RIGHT - LEFT, abs=2)
    assert [label for _, label in made.y_ticks] == ["0", "20", "40"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1.0001, 1.0003, 1.0007], ["1.0002", "1.0004", "1.0006"]),
        ([0.0, 0.002], ["0", "0.5e-3", "1e-3", "1.5e-3", "2e-3"]),
        ([12_000.0, 16_000.0], ["12k", "13k", "14k", "15k", "16k"]),
    ],
)
def test_ticks_are_round_and_told_apart(values: list[float], labels: list[str]) -> None:
    made = chart("title", {"": list(enumerate(values))})
    assert made is not None and [label for _, label in made.y_ticks] == labels


def test_one_value_and_none() -> None:
    made = chart("title", {"": [(7, 0.0)]})
    assert made is not None and len(made.lines[0].dots) == 1
    assert chart("title", {"": []}) is None


@pytest.mark.parametrize("values", [[1e308, -1e308], [0.0, 5e-324], [1e-320], [1e308]])
@pytest.mark.parametrize("percent", [False, True])
def test_what_floats_cannot_divide_has_no_chart(values: list[float], percent: bool) -> None:
    with np.errstate(over="ignore"):
        assert chart("title", {"": list(enumerate(values))}, percent=percent) is None
