"""M-BEIR's files while they are evaluated: pictures that can't be used, or later can, and pools that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder, Store
from muco_ds.eval.evaluation import evaluate
from muco_ds.eval.mbeir import MBEIRSuite
from muco_ds.models.shards import Shards

from tiny_mbeir import paths, write_mbeir
from tiny_models import embedder, packer

CPU = torch.device("cpu")


def test_broken_pictures_are_counted_and_embeddings_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_mbeir(root, ["nights_task4"])
    whole = MBEIRSuite(root, datasets=["nights_task4"])
    before = whole.score("nights_task4", Encoder(embedder(), packer(), CPU))["nights_task4"]
    (root / "mbeir_images/nights_images/4_3.jpg").write_bytes(b"no picture")  # of a query and its candidate
    (root / "mbeir_images/nights_images/4_6.jpg").unlink()  # of a candidate
    store = Store(tmp_path / "embeddings", "model", 96)
    encoder = Encoder(embedder(), packer(), CPU, store=store)
    entry = whole.score("nights_task4", encoder)["nights_task4"]
    assert (entry["queries"], entry["left_out"]) == (3, 1)
    assert (entry["candidates"], entry["broken_candidates"]) == (7, 2)
    assert before["recall@5"] == entry["recall@5"] == 1.0

    shards = Shards.open(tmp_path / "embeddings/mbeir/mbeir_nights_task4_cand_pool")
    assert shards.layout.dtype == "float16" and shards.broken_rows().tolist() == [3, 6]

    def refuse(_: Any) -> torch.Tensor:
        raise AssertionError("encoded again")

    again = whole.score("nights_task4", Encoder(refuse, packer(), CPU, store=store))
    assert again["nights_task4"] == entry
    with pytest.raises(AssertionError, match="encoded again"):
        other = Store(store.folder, "another model", 96)
        whole.score("nights_task4", Encoder(refuse, packer(), CPU, store=other))


def test_pictures_that_are_there_later_count_then(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_mbeir(root, ["nights_task4"])
    pictures = [root / f"mbeir_images/nights_images/4_{n}.jpg" for n in (3, 6)]
    whole = {picture: picture.read_bytes() for picture in pictures}
    for picture in pictures:
        picture.unlink()
    encoder = Encoder(embedder(), packer(), CPU, store=Store(tmp_path / "embeddings", "model", 96))

    def run() -> dict[str, Any]:
        suite = MBEIRSuite(root, datasets=["nights_task4"])
        return evaluate(suite, encoder, tmp_path / "out", "model")[0]["nights_task4"]

    first = run()
    assert (first["queries"], first["left_out"], first["broken_candidates"]) == (3, 1, 2)
    for picture, content in whole.items():
        picture.write_bytes(content)
    second = run()
    assert (second["queries"], second["left_out"], second["broken_candidates"]) == (4, 0, 0)


def test_what_the_model_makes_nothing_of_counts_against_it(tmp_path: Path) -> None:
    write_mbeir(tmp_path, ["nights_task4"])

    def nothing(batch: Any) -> torch.Tensor:
        return torch.full_like(embedder()(batch), torch.nan)

    entry = MBEIRSuite(tmp_path, datasets=["nights_task4"]).score("nights_task4", Encoder(nothing, packer(), CPU))
    assert entry["nights_task4"]["queries"] == 4 and entry["nights_task4"]["left_out"] == 0
    assert entry["nights_task4"]["recall@5"] == 0.0


def test_a_pool_that_changes_meanwhile_is_one_line(tmp_path: Path) -> None:
    write_mbeir(tmp_path, ["nights_task4"])
    suite = MBEIRSuite(tmp_path, datasets=["nights_task4"])
    encoder = Encoder(embedder(), packer(), CPU)
    suite.score("nights_task4", encoder)
    pool = paths(tmp_path, "nights_task4")[2]
    pool.write_text(pool.read_text()[5:])
    with pytest.raises(UserError, match="has changed since it was read"):
        suite.score("nights_task4", encoder)
    pool.unlink()
    with pytest.raises(UserError, match="can't be read"):
        suite.score("nights_task4", encoder)
