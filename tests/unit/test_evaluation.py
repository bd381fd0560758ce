"""An evaluation's output: made before anything is encoded, of one suite, and going on where a data set fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.evaluation import evaluate, prepare_output
from muco_ds.eval.suite import Entry

from tiny_models import embedder, packer

ENCODER = Encoder(embedder(), packer(), torch.device("cpu"))


class Suite:
    """Data sets; those named bad can't be scored."""

    name = "own"

    def __init__(self, *datasets: str) -> None:
        self.datasets = datasets
        self.scored: list[str] = []

    def identity(self, dataset: str) -> Any:
        return dataset

    def score(self, dataset: str, encoder: Encoder) -> dict[str, Entry]:
        self.scored.append(dataset)
        if dataset.startswith("bad"):
            raise UserError("no usable row", on_every_rank=True)
        return {dataset: {"precision@1": 0.5, "left_out": int(dataset == "part")}}

    def results(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {"overall": {"precision@1": 0.5}, **entries}

    def report(self, results: Mapping[str, Entry], folder: Path) -> None:
        (folder / "report").write_text(" ".join(results))


def test_others_are_scored_where_one_fails(tmp_path: Path) -> None:
    suite = Suite("a", "bad", "part", "c")
    results, problems = evaluate(suite, ENCODER, tmp_path, "model")
    assert list(results) == ["overall", "a", "part", "c"] and problems == ["bad: no usable row"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "report").read_text() == "overall a part c"
    suite.scored.clear()
    assert evaluate(suite, ENCODER, tmp_path, "model")[0] == results
    assert suite.scored == ["bad", "part"]  # what was left out may be there by now
    suite.scored.clear()
    evaluate(suite, ENCODER, tmp_path, "another model")
    assert suite.scored == ["a", "bad", "part", "c"]
    with pytest.raises(UserError, match="bad2: no usable row"):
        evaluate(Suite("bad2"), ENCODER, tmp_path / "none", "model")


def test_what_is_no_kept_entry_is_scored_again(tmp_path: Path) -> None:
    suite = Suite("a")
    evaluate(suite, ENCODER, tmp_path, "model")
    kept = tmp_path / "own_datasets" / "a.json"
    for text in ("[]", "{", '{"key": 1}', '{"key": "x", "entries": 3}'):
        kept.write_text(text)
        evaluate(suite, ENCODER, tmp_path, "model")
    assert suite.scored == ["a"] * 5


def test_the_output_is_found_wanting_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--output: can't write to"):
            prepare_output(path, "own")
    prepare_output(tmp_path / "new" / "folder", "own")
    evaluate(Suite("a"), ENCODER, tmp_path / "new" / "folder", "model")
    prepare_output(tmp_path / "new" / "folder", "own")
    with pytest.raises(UserError, match="holds results of own: give each suite a folder of its own"):
        prepare_output(tmp_path / "new" / "folder", "mmeb")
