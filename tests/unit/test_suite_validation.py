"""Benchmarks during training: which data sets are scored when, under a limit of time, and what is logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from muco_ds.config_cli import parse_args
from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder, OutOfTime
from muco_ds.eval.held_out import SuiteValidation
from muco_ds.eval.suite import Entry
from muco_ds.models import encode

from tiny_models import embedder, packer

CPU = torch.device("cpu")
MINIMAL = ["--run.name", "r", "--run.max_steps", "200", "--model.path", "m", "--data.train", "t", "--data.images", "i"]


class Named:
    """A benchmark of data sets whose names say what happens."""

    name = "named"

    def __init__(self, datasets: Sequence[str]) -> None:
        self.datasets = datasets

    def identity(self, dataset: str) -> Any:
        return None

    def score(self, dataset: str, encoder: Encoder) -> dict[str, Entry]:
        assert encoder.deadline is not None
        if dataset.startswith("slow"):
            time.sleep(max(encoder.deadline - time.monotonic(), 0) + 0.01)
            raise OutOfTime
        if dataset.startswith("last"):  # finishes, with no time left for another
            time.sleep(max(encoder.deadline - time.monotonic(), 0) + 0.01)
        if dataset.startswith("bad"):
            raise UserError(f"{dataset}: no usable row", on_every_rank=True)
        return {dataset: {"precision@1": 0.5, "queries": 2, "version": "v1"}}

    def results(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {"overall": {"precision@1": 0.5}, **entries}


def validation(*datasets: str, seconds: float = 0.2) -> SuiteValidation:
    return SuiteValidation(Named(datasets), packer(), pack_tokens=500, sizes=(), seconds=seconds)


def scored(judge: SuiteValidation) -> list[str]:
    return [name.split("/")[1] for name in judge(embedder(), CPU).values]


def test_means_stand_where_every_data_set_was_scored() -> None:
    judge = validation("a", "b")
    found = judge(embedder(), CPU)
    assert found.values == dict.fromkeys([f"named/{name}/precision@1" for name in ("overall", "a", "b")], 0.5)
    assert "| a | 0.5000 | v1 |" in found.shown["named/scores"]
    assert scored(judge) == ["overall", "a", "b"]


def test_the_next_time_goes_on_with_what_is_left() -> None:
    judge = validation("a", "last", "b", "c")
    assert scored(judge) == ["a", "last"]
    assert scored(judge) == ["overall", "b", "c", "a", "last"]


def test_a_data_set_that_never_fits_does_not_keep_others_away(caplog: pytest.LogCaptureFixture) -> None:
    judge = validation("a", "slow", "b")
    with caplog.at_level(logging.WARNING):
        assert scored(judge) == ["a"] and not caplog.messages  # it may fit when it comes first
        assert scored(judge) == []
        assert caplog.messages == ["evaluation.named: slow: 0.2 seconds are not enough: raise seconds or lower rows"]
        assert scored(judge) == ["b", "a"]


def test_a_problem_is_logged_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    judge = validation("bad", "b")
    with caplog.at_level(logging.WARNING):
        assert scored(judge) == ["b"]
    assert caplog.messages == ["evaluation.named: bad: no usable row"]


def test_an_encoder_keeps_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muco_ds.eval.encoder._TIMED_DIALOGUES", 2)
    dialogues = [Dialogue((f"text {i}",)) for i in range(6)]
    passed = Encoder(embedder(), packer(), CPU, 500, deadline=time.monotonic() - 1)
    with pytest.raises(OutOfTime):
        passed.encode(dialogues, "texts")
    whole_ND = Encoder(embedder(), packer(), CPU, 500).encode(dialogues, "texts")
    ahead = Encoder(embedder(), packer(), CPU, 500, deadline=time.monotonic() + 60)
    torch.testing.assert_close(ahead.encode(dialogues, "texts"), whole_ND)
    # What is finished is not thrown away.
    assert passed.encode(dialogues[:2], "texts").shape == whole_ND[:2].shape
    assert encode.WINDOW_DIALOGUES > 6


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--evaluation.mmeb.every", "5"], r"evaluation\.mmeb\.every is 5 but evaluation\.mmeb\.data is null"),
        (["--evaluation.mbeir.seconds", "0"], r"evaluation\.mbeir\.seconds is 0"),
        (
            [
                *("--evaluation.m3t.every", "5", "--evaluation.m3t.data", "x", "--task.name", "coma_compress"),
                *("--model.compression_tokens", "4"),
            ],
            r"gives no embeddings",
        ),
    ],
)
def test_options_are_checked(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args([*MINIMAL, *argv])
