"""metrics.jsonl across a resume, and the meter of a logging window."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muco_ds import metrics
from muco_ds.data.schema import RowCounts, StepBatch
from muco_ds.metrics import METRIC_KEYS, WINDOW, Meter, MetricsWriter, peak_memory_gib, spread


def values(step: int, **more: float | None) -> dict[str, float | int | None]:
    return {**{key: 0.5 for key in METRIC_KEYS}, "mfu": None, "step": step, **more}


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, start_step=0)
    writer.write(values(1, **{"val/overall/precision@1": 0.25}))
    assert [line["step"] for line in written(tmp_path)] == [1]  # before close: a killed run keeps it
    writer.show({"val/answers": np.zeros((4, 6, 3), np.uint8), "val/said": "**yes**"}, 1)
    writer.config({"run": {"name": "r"}})
    writer.write(values(2))
    writer.close()
    assert written(tmp_path)[0]["mfu"] is None
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    scalars = set(board.Tags()["scalars"])
    assert {"train/loss", "train/in_batch_top1", "val/overall/precision@1"} <= scalars
    assert "train/step" not in scalars and "train/mfu" not in scalars
    assert board.Tags()["images"] == ["val/answers"] and {"config/text_summary", "val/said/text_summary"} <= {
        *board.Tags()["tensors"]
    }


@pytest.mark.parametrize("key", sorted(METRIC_KEYS))
def test_a_line_without_a_promised_key_is_our_mistake(tmp_path: Path, key: str) -> None:
    writer = MetricsWriter(tmp_path, start_step=0)
    incomplete = values(1)
    del incomplete[key]
    with pytest.raises(AssertionError, match=key):
        writer.write(incomplete)
    writer.close()
    assert written(tmp_path) == []


@pytest.mark.parametrize("tail", ["", '{"step": 41, "lo', '{"loss": 1.0}\n', "\0\0\0\n", "\n"])
def test_lines_after_the_resumed_step_and_half_lines_are_dropped(tmp_path: Path, tail: str) -> None:
    writer = MetricsWriter(tmp_path, start_step=0)
    for step in (10, 20, 30, 40):
        writer.write(values(step, loss=1.0))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    writer = MetricsWriter(tmp_path, start_step=20)
    assert [line["step"] for line in written(tmp_path)] == [10, 20]
    writer.write(values(30, loss=2.0))
    writer.close()
    assert [(line["step"], line["loss"]) for line in written(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_shows_the_resumed_steps_once(tmp_path: Path) -> None:
    for start, loss in ((0, 1.0), (20, 2.0)):
        writer = MetricsWriter(tmp_path, start_step=start)
        for step in (10, 20, 30):
            if step > start:
                writer.write(values(step, loss=loss))
        writer.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 1.0), (30, 2.0)]


# ---- the meter, with a clock that is set by hand


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    yield clock


def batch(tokens: int, flops: float, queries: list[int]) -> StepBatch:
    rows = [RowCounts(count, count) for count in queries]
    return StepBatch(
        0, 0, [], 0, rows, np.zeros(0), images=2, pairs=sum(queries), cost={"llm_tokens": tokens, "flops": flops}
    )


def test_rates_of_a_window(clock: Clock) -> None:
    meter = Meter()
    meter.add(batch(1000, 4e12, [3, 4]), waited=0.5, met=0.0)
    meter.add(batch(3000, 6e12, [7, 6]), waited=1.5, met=0.0)
    clock.now += 10
    rates = meter.rates(world_size=2, peak=1e12)
    assert rates == pytest.approx({"pairs_per_s": 2.0, "tokens_per_s": 400.0, "mfu": 0.5, "data_wait_frac": 0.2})
    clock.now += 5  # a new window knows nothing of the last
    meter.add(batch(100, 0.0, [5]), waited=0.0, met=0.0)
    again = meter.rates(world_size=1, peak=None)
    assert again["mfu"] is None
    assert (again["pairs_per_s"], again["tokens_per_s"], again["data_wait_frac"]) == pytest.approx((1.0, 20.0, 0.0))


def test_pauses_do_not_count(clock: Clock) -> None:
    meter = Meter()
    clock.now += 3
    for pause in (100, 7):
        with meter.paused():
            clock.now += pause
    clock.now += 1
    meter.add(batch(400, 8e12, [4]), waited=1.0, met=0.0)
    assert meter.rates(1, peak=4e12) == pytest.approx(
        {"pairs_per_s": 1.0, "tokens_per_s": 100.0, "mfu": 0.5, "data_wait_frac": 0.25}
    )


def own(clock: Clock, steps: list[tuple[float, float, float]]) -> np.ndarray:
    """What a rank's meter has to say of steps of so many seconds, of which it waited for data and for ranks."""
    meter = Meter()
    for seconds, waited, met in steps:
        with meter.paused():
            clock.now += 50  # validation
        clock.now += seconds
        meter.add(batch(1, 1.0, [1]), waited, met)
    return meter.own(torch.device("cpu")).numpy()


def test_percentiles_are_over_single_steps_of_all_ranks(clock: Clock) -> None:
    first = own(clock, [(1.0 + i, 0.1, 0.3) for i in range(10)])
    second = own(clock, [(1.0 + i, 0.1 * i, 0.1) for i in range(10)])
    third = own(clock, [(1.0 + i, 0.1, 0.4) for i in range(10)])
    second[-3:] = [5.0, 1.0, 7.0]
    first[-3:] = third[-3:] = [3.0, 2.0, 9.0]
    values = spread(np.stack([first, second, third]))
    assert [values[f"step_s_{p}"] for p in ("p50", "p90", "max")] == pytest.approx([5.5, 9.0 + 0.1, 10.0], abs=0.11)
    assert [values[f"data_wait_s_{p}"] for p in ("p50", "max")] == pytest.approx([0.1, 0.9])
    assert 0.4 < values["data_wait_s_p90"] < 0.7
    assert values["slowest_rank"] == 1, "the one that waits least for the others"
    assert values["slowest_late_s"] == pytest.approx(0.35 - 0.1)
    assert (values["resident_gib"], values["peak_mem_gib"], values["open_files"]) == (5.0, 2.0, 9)


def test_one_rank_alone_is_never_late_and_a_long_window_is_cut(clock: Clock) -> None:
    row = own(clock, [(9.0, 9.0, 9.0)] * 5 + [(1.0, 0.2, 0.1)] * WINDOW)
    values = spread(row[None])
    assert (values["slowest_rank"], values["slowest_late_s"]) == (0, 0.0)
    assert values["step_s_max"] == pytest.approx(1.0)
    assert 0.05 < values["resident_gib"] < values["peak_mem_gib"] + 0.01 < 64 and values["open_files"] > 2


def test_peak_memory_is_gibibytes_of_this_process() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    block = np.ones(2**28, np.uint8)  # a quarter of one, touched
    after = peak_memory_gib(torch.device("cpu"))
    assert 0.05 < before < 64 and block[-1] == 1
    assert before <= after < before + 0.5
