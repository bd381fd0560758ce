"""CoMa's two stages as a user runs them: the same losses however they are run, and models that stock classes load."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_export import check_sentence_transformers
from test_lora_runs import MIDDLE, STEPS, TABLE, cut, weights, write_partitioned
from test_preflight import PREFLIGHT
from test_train import write_stage
from transformers import AutoTokenizer

from muco_ds.config import PromptOptions, TaskOptions
from muco_ds.export import Exported, export_checkpoint
from muco_ds.metrics import CONTRASTIVE_KEYS, METRIC_KEYS
from muco_ds.models.backbones import compression_ids
from muco_ds.models.folder import Processing, read_settings

from coma_by_hand import HEAD, Stock, conversation_rows, untie
from programs import Demo, Programs, Result, losses, metrics, refusal
from tiny_folders import change_family

TOKENS, HELD_OUT = 4, 3
COMPRESS: dict[str, object] = {
    **{"task.name": "coma_compress", "task.query_history": 1.0, "task.target_history": 1.0},
    **{"model.compression_tokens": TOKENS, "model.template": "plain", "run.max_steps": STEPS},
    **{"optim.lr": 2e-3, "optim.warmup_steps": 0, "optim.schedule": "constant"},
    **{"checkpoint.every": MIDDLE, "checkpoint.keep": STEPS, "validation.every": STEPS, "validation.rows": HELD_OUT},
}
SEVERAL_PACKS: dict[str, object] = {"batch.pack_tokens": 300}
LORA: dict[str, object] = {"model.lora.rank": 4, "model.lora.alpha": 8, "model.freeze_vision": "true"}


@dataclass(frozen=True)
class Coma:
    """Folders of a model, `short` like `untied` without spare rows, and conversations about the demo's scenes."""

    demo: Demo
    folder: Path

    def train(self, out: Path, *overrides: dict[str, object]) -> list[str]:
        """Command line of a compressing run."""
        options = {**COMPRESS, "model.path": self.folder / "tied"}
        options |= {"data.train": self.folder / "train.jsonl", "data.val": self.folder / "val.jsonl"}
        for part in overrides:
            options |= part
        return self.demo.train(out, options)

    def loss_by_hand(self, model: Path) -> float:
        """Mean over the tokens of the held-out conversations by an exported model, as transformers loads it."""
        stock = Stock(model, TaskOptions(name="coma_compress"), TOKENS, PromptOptions())
        images = self.demo.data / "images"
        with torch.no_grad():
            return torch.stack([loss for row in self.held_out() for loss in stock.losses(row, images)]).mean().item()

    def held_out(self) -> list[dict[str, Any]]:
        """The conversations that a run is judged by."""
        lines = (self.folder / "val.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"id"')][:HELD_OUT]


@pytest.fixture(scope="module")
def coma(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Coma:
    folder = tmp_path_factory.mktemp("coma")
    for name in ("tied", "untied"):
        shutil.copytree(demo.model, folder / name)
        change_family(folder / name, "qwen2_5_vl")
    untie(folder / "untied")
    shorten(Path(shutil.copytree(folder / "untied", folder / "short")))
    made = {
        name: conversation_rows(pq.read_table(demo.data / f"{name}.parquet").to_pylist()) for name in ("train", "test")
    }
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made["train"]))
    good = [json.dumps(row) for row in made["test"]]
    unanswered = {**made["test"][1], "conversations": made["test"][1]["conversations"][:1]}
    twice = {**made["test"][2], "conversations": [unanswered["conversations"][0]] * 2}
    bad = ["nonsense", *(json.dumps({"row": row, **row}) for row in (unanswered, twice))]
    (folder / "val.jsonl").write_text("\n".join([good[0], *bad, *good[1:]]) + "\n")
    return Coma(demo, folder)


def shorten(folder: Path) -> None:
    """Cut table and head to the tokens that the tokenizer knows."""
    rows = len(AutoTokenizer.from_pretrained(folder))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in (HEAD, next(name for name in tensors if name.endswith(TABLE))):
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def plain(coma: Coma, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Output folder and outputs of the run that the others are compared with: one process, stage 0, one pack."""
    out = tmp_path_factory.mktemp("plain")
    argv = coma.train(out, {"deepspeed": write_stage(out, 0)})
    return out, programs.run(argv).check()


@pytest.fixture(scope="module")
def zero3(coma: Coma, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Output folder and command line of a run on two ranks, several packs each, table and head partitioned."""
    out = tmp_path_factory.mktemp("zero3")
    options = {**SEVERAL_PACKS, "deepspeed": write_partitioned(out)}
    programs.run(coma.train(out, options), ranks=2).check()
    return out, coma.train(out, options)


@pytest.fixture(scope="module")
def compressed(zero3: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_checkpoint(zero3[0] / "run", tmp_path_factory.mktemp("compressed") / "model", progress=False)


def test_ranks_and_packs_change_no_loss(zero3: tuple[Path, list[str]], plain: tuple[Path, Result]) -> None:
    assert losses(plain[0])[STEPS] < 0.9 * losses(plain[0])[1], "nothing was learned"
    assert losses(zero3[0]) == pytest.approx(losses(plain[0]), rel=1e-5)
    norms = [[line["grad_norm"] for line in metrics(out)] for out in (zero3[0], plain[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(packs(zero3[0], 300)) > 1


def packs(out: Path, budget: int) -> list[int]:
    """How many each of two ranks had, by step."""
    return [round(line["llm_tokens"] / line["pack_fill"] / budget / 2) for line in metrics(out)]


def test_preflight_announces_the_run(zero3: tuple[Path, list[str]], coma: Coma, programs: Programs) -> None:
    out, argv = zero3

    def announced(*options: object) -> dict[str, Any]:
        result = programs.run([PREFLIGHT, *argv[1:], "--json", *map(str, options)]).check()
        return json.loads(result.stdout[0])

    plan = announced("--ranks", 2)
    for step, line in zip(plan["planned"], metrics(out), strict=True):
        for name in ("step", "pairs", "llm_tokens", "vit_patches", "imbalance", "pack_fill"):
            assert step[name] == pytest.approx(line[name], rel=1e-9), name
        assert line["predicted_tokens"] / 2 / step["packs"] <= step["load"]["predicted"] < line["predicted_tokens"]
    head_VD = load_file(coma.folder / "untied" / "model.safetensors")[HEAD]
    most = max(step["load"]["predicted"] for step in plan["planned"])
    assert plan["memory"]["embeddings"] == 12 * most * head_VD.shape[1], "three float32 rows for each prediction"
    folders = (coma.folder / name for name in ("tied", "untied"))
    tied, untied = (announced("--ranks", 1, "--model.path", folder)["memory"] for folder in folders)
    assert untied["weights"] - tied["weights"] == 4 * head_VD.numel()
    assert untied["optimizer"] - tied["optimizer"] == 12 * head_VD.numel()


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_killed_run_goes_on(ranks: int, programs: Programs, zero3: tuple[Path, list[str]], tmp_path: Path) -> None:
    whole, argv = zero3
    out = cut(whole, tmp_path / "out")
    argv = [str(out) if part == str(whole) else part for part in argv]
    output = programs.run(argv, ranks=ranks).check().output
    assert "resumed from" in output and ("converting what 2 ranks wrote" in output) == (ranks == 1)
    if ranks == 2:
        assert losses(out) == losses(whole)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    assert metrics(out)[-1]["val/loss"] == pytest.approx(metrics(whole)[-1]["val/loss"], rel=1e-5)


def test_numbers_and_answers_are_logged(plain: tuple[Path, Result], coma: Coma) -> None:
    out, result = plain
    lines = metrics(out)
    for line in lines:
        assert set(line) >= METRIC_KEYS
        assert {key for key in METRIC_KEYS if line[key] is None} == {*CONTRASTIVE_KEYS, "mfu"}
        assert line["perplexity"] == pytest.approx(torch.tensor(line["loss"]).exp().item(), rel=1e-5)
        assert 0 < line["predicted_tokens"] < line["llm_tokens"] and line["images"] == 8
    assert [("val/loss" in line, "val/perplexity" in line) for line in lines] == [(False, False)] * 3 + [(True, True)]
    board = EventAccumulator(str(out / "run" / "tb"))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/perplexity", "val/loss", "val/perplexity"} <= set(tags["scalars"])
    assert not {f"train/{key}" for key in CONTRASTIVE_KEYS} & set(tags["scalars"])
    (event,) = board.Tensors("val/answers/text_summary")
    table = event.tensor_proto.string_val[0].decode().splitlines()
    assert event.step == STEPS and len(table) == 2 + HELD_OUT, "a row for each conversation"
    said = [
        [entry["value"].replace("<image>", "").strip() for entry in row["conversations"][:2]] for row in coma.held_out()
    ]
    shown = [line.strip("| ").split(" | ") for line in table[2:]]
    assert sorted([question, true] for question, _, true in shown) == sorted(said)
    assert "data.val: 3 of 9 rows left out, listed in" in result.output


def test_a_tied_model_is_exported_without_a_head(
    compressed: Exported, zero3: tuple[Path, list[str]], coma: Coma
) -> None:
    assert compressed.difference < 1e-5
    assert HEAD not in load_file(compressed.folder / "model.safetensors")
    assert json.loads((compressed.folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert coma.loss_by_hand(compressed.folder) == pytest.approx(metrics(zero3[0])[-1]["val/loss"], rel=1e-5)


@dataclass(frozen=True)
class Variant:
    """What is trained of which model, and how it is run."""

    model: str
    ranks: int
    stage: int
    options: dict[str, object]
    changed: set[str]


ATTENTION = {f"self_attn.{projection}_proj.weight" for projection in "qkvo"}
DORA = {**LORA, "model.lora.dora": "true", "model.lora.targets": "attention", "model.lora.train_embeddings": "all"}
ROWS = {**LORA, "model.lora.targets": "tokens"}
VARIANTS = {
    "whole": Variant("untied", 2, 3, {}, {HEAD, TABLE, *ATTENTION}),
    "attention and table": Variant("untied", 2, 3, DORA, {TABLE, *ATTENTION}),
    "rows, none to spare": Variant("short", 1, 2, ROWS, set()),
    "tied, rows": Variant("tied", 2, 3, ROWS, {TABLE}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_classes_load_what_was_trained(name: str, coma: Coma, programs: Programs, tmp_path: Path) -> None:
    variant, steps = VARIANTS[name], 2
    path = write_partitioned(tmp_path) if variant.stage == 3 else write_stage(tmp_path, variant.stage)
    base, options = coma.folder / variant.model, {"run.max_steps": steps, "validation.every": steps, "optim.lr": 1e-2}
    options |= {**variant.options, **SEVERAL_PACKS, "model.path": base, "deepspeed": path}
    programs.run(coma.train(tmp_path, options), ranks=variant.ranks).check()
    exported = export_checkpoint(tmp_path / "run", tmp_path / "model", progress=False)
    assert exported.difference < 1e-5
    before, after = weights(base), weights(exported.folder)
    assert (HEAD in after) == (variant.model != "tied")
    known = len(before[TABLE])
    changed = {
        re.sub(r"layers\.\d+\.", "", name)
        for name in after
        if not torch.equal(before[name], after[name][: len(before[name])])
    }
    assert variant.changed <= changed if name == "whole" else variant.changed == changed
    if "rows" in name:
        tokenizer = Processing.load(str(exported.folder), read_settings(str(exported.folder))).tokenizer
        moved = (after[TABLE][:known] != before[TABLE]).any(-1).nonzero().flatten().tolist()
        moved += range(known, len(after[TABLE]))
        assert moved == compression_ids(tokenizer) and len(moved) == TOKENS
    assert coma.loss_by_hand(exported.folder) == pytest.approx(metrics(tmp_path)[-1]["val/loss"], rel=1e-5)


@pytest.fixture(scope="module")
def matched(
    coma: Coma, compressed: Exported, programs: Programs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Exported]:
    """Output folder and model of a matching run from the compressed model: two ranks, several packs each."""
    out = tmp_path_factory.mktemp("matched")
    data = {name: coma.demo.data / f"pairs_{split}.parquet" for name, split in (("train", "train"), ("val", "test"))}
    options = {"task.name": "coma_match", "model.path": compressed.folder, "loss.temperature": 0.03}
    options |= {"data.train": data["train"], "data.val": data["val"], "deepspeed": write_partitioned(out)}
    options |= {"run.max_steps": 2, "validation.every": 2, "batch.pack_tokens": 100}
    programs.run(coma.train(out, options), ranks=2).check()
    return out, export_checkpoint(out / "run", out / "model", progress=False)


@pytest.fixture(scope="module")
def turns(coma: Coma, compressed: Exported, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Model of a run on several turns from the compressed model, with the chat's markup: by configuration alone."""
    out = tmp_path_factory.mktemp("turns")
    options = {"task.name": "muco", "model.path": compressed.folder, "model.template": "chat"}
    options |= {"data.train": coma.demo.data / "train.parquet", "data.val": coma.demo.data / "test.parquet"}
    programs.run(coma.train(out, {**options, "run.max_steps": 2, "validation.every": 0})).check()
    return export_checkpoint(out / "run", out / "model", progress=False)


def test_a_compressed_model_is_matched(matched: tuple[Path, Exported], compressed: Exported) -> None:
    out, exported = matched
    first, last = metrics(out)
    assert first["temperature"] == 0.03 and 0 <= last["in_batch_top1"] <= 1 and "val/overall/precision@1" in last
    assert min(packs(out, 100)) > 1
    assert exported.difference < 1e-5
    assert read_settings(str(exported.folder)) == read_settings(str(compressed.folder))
    assert exported.settings.compression_tokens == TOKENS and exported.settings.template == "plain"


def test_a_conversation_longer_than_a_pack_is_refused(coma: Coma, programs: Programs, tmp_path: Path) -> None:
    """By its row; no answer is ever cut."""
    line = refusal(programs.run(coma.train(tmp_path, {"batch.pack_tokens": 80}), ranks=2))
    assert re.match(r"error: data\.train row \d+ needs up to \d+ tokens but batch\.pack_tokens=80: raise", line), line


def test_another_number_of_tokens_is_refused(
    coma: Coma, compressed: Exported, programs: Programs, tmp_path: Path
) -> None:
    options = {"model.path": compressed.folder, "model.compression_tokens": TOKENS + 1}
    line = refusal(programs.run(coma.train(tmp_path, options), ranks=2))
    assert f"model.compression_tokens is {TOKENS + 1} but '{compressed.folder}' was compressed with {TOKENS}" in line
    assert line.endswith(f"set it to {TOKENS}") and not (tmp_path / "run" / "checkpoints").exists()


def test_sentence_transformers_gives_the_same_embeddings(matched: tuple[Path, Exported], turns: Exported) -> None:
    folders = [matched[1].folder, turns.folder]
    assert [read_settings(str(folder)).template for folder in folders] == ["plain", "chat"]
    check_sentence_transformers(folders)
