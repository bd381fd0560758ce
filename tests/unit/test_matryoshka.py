"""Smaller sizes of the embedding: which are allowed, their loss, and what is made of them at test time."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_m3t_eval import held_out

from muco_ds.config import LossOptions, RunConfig, save_config
from muco_ds.config_cli import parse_args
from muco_ds.config_matryoshka import sizes_of
from muco_ds.data.schema import RowCounts
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.m3t import M3TTask
from muco_ds.eval.retrieval import rank_candidates
from muco_ds.losses import RowIds, info_nce_dense
from muco_ds.losses.matryoshka import over_sizes, prefix
from muco_ds.memory import embedding_bytes
from muco_ds.memory_activations import Load
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import SETTINGS_FILE, Settings, read_settings
from muco_ds.tasks.muco import MuCoTask

from tiny_models import embedder, export, packer

MINIMAL = ["--run.name", "r", "--run.max_steps", "200", "--model.path", "m", "--data.train", "t", "--data.images", "i"]


def config_of(*argv: str) -> RunConfig:
    return parse_args([*MINIMAL, *argv]).config


# ---- which sizes


@pytest.mark.parametrize("sizes", [None, [], [96]])
def test_without_smaller_ones_there_is_one_size(sizes: list[int] | None) -> None:
    assert sizes_of(sizes, 96) == [96]


@pytest.mark.parametrize("sizes", [[8, 24], [24, 8], [96, 8, 24]])
def test_sizes_ascend_and_the_whole_is_one_of_them(sizes: list[int]) -> None:
    assert sizes_of(sizes, 96) == [8, 24, 96]


def test_sizes_are_a_list_in_the_configuration(tmp_path: Path) -> None:
    assert config_of().loss.matryoshka is None
    config = config_of("--loss.matryoshka", "[64, 8]")
    assert config.loss.matryoshka == [64, 8]
    save_config(config, tmp_path / "config.yaml")
    assert parse_args(["--config", str(tmp_path / "config.yaml")]).config == config


@pytest.mark.parametrize(
    "given, named",
    [
        ("[64, 8, 64]", ["loss.matryoshka", "64 twice"]),
        ("[64, 0]", ["loss.matryoshka[1]", "0", "at least 1"]),
        ("[-8]", ["loss.matryoshka[0]", "-8"]),
        ("[8.5]", ["loss.matryoshka", "[8.5]", "list[int]"]),
        ("[true]", ["loss.matryoshka", "[true]", "list[int]"]),
        ("64", ["loss.matryoshka", "'64'", "list[int]"]),
        ("[{path: x}]", ["loss.matryoshka", "list[int]"]),
    ],
)
def test_what_is_no_list_of_sizes_is_refused(given: str, named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_of("--loss.matryoshka", given)
    assert "\n" not in str(caught.value) and all(name in str(caught.value) for name in named), caught.value


def test_no_size_may_be_larger_than_the_embedding() -> None:
    config = config_of("--loss.matryoshka", "[64, 128]")
    with pytest.raises(UserError, match=r"loss\.matryoshka holds 128 but the model's embeddings have 96 components"):
        Settings.of_run(config, 96)
    assert Settings.of_run(config, 256).matryoshka == [64, 128, 256]
    assert Settings.of_run(config_of(), 256).matryoshka == Settings.of_run(config_of(), 256).matryoshka == []


# ---- the loss


def test_a_prefix_has_unit_length() -> None:
    emb_ND = F.normalize(torch.randn(5, 12, generator=torch.manual_seed(0)), dim=1)
    assert prefix(emb_ND, 12) is emb_ND
    short_NP = prefix(emb_ND, 4)
    assert torch.allclose(short_NP.norm(dim=1), torch.ones(5)) and short_NP.is_contiguous()
    assert torch.allclose(short_NP, emb_ND[:, :4] / emb_ND[:, :4].norm(dim=1, keepdim=True))
    assert prefix(emb_ND.bfloat16(), 4).dtype == torch.float32 and prefix(emb_ND.double(), 4).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix(emb_ND, 4), short_NP)


def test_statistics_are_those_of_the_whole_embedding() -> None:
    generator = torch.manual_seed(0)
    row_RD, key_KD = (F.normalize(torch.randn(n, 12, generator=generator), dim=1) for n in (6, 9))
    ids_K3 = torch.arange(9)[:, None].expand(-1, 3)
    ids = RowIds.from_table(ids_K3[:6]), RowIds.from_table(ids_K3)
    seen: list[int] = []

    def loss(row_RP: torch.Tensor, key_KP: torch.Tensor):  # type: ignore[no-untyped-def]
        seen.append(row_RP.shape[1])
        return info_nce_dense(row_RP, key_KP, *ids, temperature=0.1)

    result, whole = over_sizes(loss, [row_RD, key_KD], [3, 12]), loss(row_RD, key_KD)
    assert seen[:2] == [3, 12]  # the order in which ranks that exchange keys meet
    assert result.count == 6 and result.stats.keys() == whole.stats.keys()
    assert all(torch.equal(value, whole.stats[name]) for name, value in result.stats.items())
    assert result.loss_sum.shape == (2,) and result.loss_sum[1] == whole.loss_sum != result.loss_sum[0]


class _Batch:
    """What `by_side` reads of a pack."""

    def __init__(self, pairs: int) -> None:
        self.counts = RowCounts(pairs, pairs, 0)
        self.ids_E3 = torch.arange(pairs).repeat(2)[:, None].repeat(1, 3)


def losses(sizes: Sequence[int] | None) -> dict[str, float]:
    emb_ED = F.normalize(torch.randn(14, 96, generator=torch.manual_seed(1)), dim=1)
    batch = _Batch(7)
    task = MuCoTask(embedder(), LossOptions(temperature=0.1, matryoshka=None if sizes is None else list(sizes)))
    result = task.loss([emb_ED], [batch], [batch.counts])  # type: ignore[list-item]
    assert result.stats["loss"] == result.loss
    return {name: float(value) for name, value in result.stats.items() if name.startswith("loss")}


def test_the_loss_is_the_mean_over_sizes_and_each_is_told() -> None:
    plain, several = losses(None), losses([8, 24])
    assert plain.keys() == losses([]).keys() == losses([96]).keys() == {"loss"}
    assert several.keys() == {"loss", "loss_8", "loss_24", "loss_96"}
    assert several["loss_96"] == plain["loss"] == losses([96])["loss"]
    parts = [value for name, value in several.items() if name != "loss"]
    assert several["loss"] == pytest.approx(sum(parts) / 3) and len(set(parts)) == 3


def test_memory_of_the_prefixes_is_counted() -> None:
    load = Load(packs=1, tokens=0, attended=0, patches=0, rank_patches=0, rank_rows=10, keys=30)
    plain = embedding_bytes(96, load, [])
    assert plain == 4 * 96 * (2 * 10 + 3 * 30)
    assert embedding_bytes(96, load, [8, 24]) == plain + 4 * ((32 + 72) * 40 + 96 * 30)


# ---- at test time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that was trained for several sizes."""
    path = export(tmp_path_factory.mktemp("sizes") / "model")
    write_sizes(path, [8, 24, embedder().sizes[-1]])
    return path


def write_sizes(path: Path, sizes: object) -> None:
    file = path / SETTINGS_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"matryoshka": sizes}))


def test_an_embedder_cuts_what_it_encoded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Embedder.from_pretrained(str(folder), device="cpu")
    width = model.sizes[-1]
    assert model.sizes == [8, 24, width]
    whole_ND = model.encode(["a red star", "two"])
    for dim in (8, 24, width):
        short_NP = model.encode(["a red star", "two"], dim=dim)
        assert short_NP.shape == (2, dim) and short_NP.dtype == np.float32
        head_NP = whole_ND[:, :dim]
        np.testing.assert_allclose(short_NP, head_NP / np.linalg.norm(head_NP, axis=1, keepdims=True), atol=1e-6)
    assert model.encode([], dim=8).shape == (0, 8) and model.encode([]).shape == (0, width)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert model.encode(["two"], dim=9).shape == (1, 9)
    assert f"dim=9: the model was trained for embeddings of [8, 24, {width}] components" in caplog.text
    for dim in (0, -1, width + 1):
        with pytest.raises(UserError, match=rf"dim is {dim} but embeddings have {width} components"):
            model.encode(["two"], dim=dim)


def test_settings_without_sizes_are_those_of_one_size(folder: Path, tmp_path: Path) -> None:
    path = export(tmp_path / "model")
    assert read_settings(str(path)).matryoshka == []
    file = path / SETTINGS_FILE
    older = json.loads(file.read_text())
    del older["matryoshka"]
    file.write_text(json.dumps(older))
    assert read_settings(str(path)).matryoshka == []
    assert Embedder.from_pretrained(str(path), device="cpu").sizes == embedder().sizes


@pytest.mark.parametrize("sizes", [8, "8", [8, 8], [0], [True], None])
def test_settings_that_hold_no_sizes_are_refused(sizes: object, tmp_path: Path) -> None:
    path = export(tmp_path / "model")
    write_sizes(path, sizes)
    with pytest.raises(UserError, match=f"{SETTINGS_FILE}: not the settings of an exported model"):
        read_settings(str(path))


def test_settings_of_another_model_are_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "model")
    write_sizes(path, [8, 10**4])
    with pytest.raises(UserError, match=rf"{SETTINGS_FILE}: matryoshka holds 10000 but"):
        Embedder.from_pretrained(str(path), device="cpu")


def test_each_size_is_ranked_by_itself() -> None:
    task, _ = M3TTask.from_reader(held_out())
    encoded = 0

    def model(batch):  # type: ignore[no-untyped-def]
        nonlocal encoded
        encoded += 1
        return embedder()(batch)

    encoder = Encoder(model, packer(), torch.device("cpu"), 10**5)
    width = embedder().sizes[-1]
    rankings = task.rank(replace(encoder, sizes=[8, 2]))
    assert encoded == 2  # both sides once, however many sizes
    assert list(rankings) == [2, 8, width]
    results, plain = task.results(rankings), task.results(task.rank(encoder))
    for name, entry in results.items():
        assert {key: value for key, value in entry.items() if "@1@" not in key} == plain[name]
        assert {key for key in entry if "@1@" in key} == {"precision@1@2", "precision@1@8"}
    assert results["overall"]["precision@1@8"] == float(rankings[8].correct_Q.float().mean())
    query_QD, candidate_CD = (encoder.encode(side, "side") for side in (task.queries, task.candidates))
    cosine_QC = torch.nn.functional.cosine_similarity(query_QD[:, None, :8], candidate_CD[None, :, :8], dim=-1)
    assert torch.allclose(rankings[8].top_score_Qk, cosine_QC.topk(3, dim=1).values, atol=1e-6)


def test_scores_of_a_size_do_not_see_the_rest() -> None:
    """The whole embedding ranks right, its first two components wrong."""
    query_1D = F.normalize(torch.tensor([[1.0, 0.0, 3.0]]), dim=1)
    candidate_CD = F.normalize(torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.1, -3.0]]), dim=1)
    answer = torch.tensor([0])
    assert rank_candidates(query_1D, candidate_CD, answer).correct_Q.item()
    assert not rank_candidates(prefix(query_1D, 2), prefix(candidate_CD, 2), answer).correct_Q.item()
