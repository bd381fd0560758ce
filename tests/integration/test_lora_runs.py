"""Training an adapter: the same losses however it is run, resumed exactly, merged and written for peft as trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_train import write_stage
from transformers import AutoModel

from muco_ds.checkpoint import TAG
from muco_ds.errors import UserError
from muco_ds.export import Exported, export_checkpoint
from muco_ds.models.backbones import canonical_name
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Processing, Settings, read_settings

from programs import REPOSITORY, Demo, Programs, losses, metrics, refusal, vouch

CONVERT = REPOSITORY / "tools" / "convert_ckpt.py"
TABLE = "embed_tokens.weight"
STEPS, MIDDLE = 4, 2
SETTINGS = Settings("<|emb|>", 56 * 56, 84 * 84, short_side=None)
DORA: dict[str, object] = {
    **{"run.max_steps": STEPS, "optim.lr": 2e-3, "optim.warmup_steps": 0, "optim.schedule": "constant"},
    **{"model.freeze_vision": "true", "model.lora.rank": 4, "model.lora.alpha": 8, "model.lora.dora": "true"},
    **{"checkpoint.every": MIDDLE, "checkpoint.keep": STEPS},
}


# CoMa's paper: the attention alone, and the whole table in full.
COMA: dict[str, object] = {**DORA, "model.lora.targets": "attention", "model.lora.train_embeddings": "all"}


def write_partitioned(folder: Path) -> Path:
    """ZeRO-3 that partitions small tensors too, and keeps nothing that it has gathered."""
    path = write_stage(folder, 3)
    small = '"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0'
    path.write_text(path.read_text().replace('"stage": 3', small))
    return path


def saved(out: Path, step: int) -> Path:
    return out / "run" / "checkpoints" / f"step_{step:07d}"


def cut(whole: Path, out: Path) -> Path:
    """A copy of a run as if it had been killed after its middle checkpoint."""
    return Path(shutil.copytree(whole, out, ignore=shutil.ignore_patterns(saved(whole, STEPS).name)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {canonical_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def plain(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the run that the others are compared with: one process, stage 0, one pack."""
    out = tmp_path_factory.mktemp("plain")
    programs.run(demo.train(out, {**DORA, "deepspeed": write_stage(out, 0)})).check()
    assert losses(out)[STEPS] < 0.9 * losses(out)[1], "nothing was learned"
    return out


@pytest.fixture(scope="module")
def zero3(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """Output folder and options of a run on two ranks under ZeRO-3."""
    out = tmp_path_factory.mktemp("zero3")
    options = {**DORA, "deepspeed": write_partitioned(out)}
    programs.run(demo.train(out, options), ranks=2).check()
    return out, options


@pytest.fixture(scope="module")
def dropped(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The same with dropout and four packs a rank."""
    out = tmp_path_factory.mktemp("dropped")
    options = {**DORA, "deepspeed": write_partitioned(out), "batch.pack_tokens": 340, "model.lora.dropout": 0.2}
    programs.run(demo.train(out, options), ranks=2).check()
    return out, options


@pytest.fixture(scope="module")
def merged(zero3: tuple[Path, dict[str, object]], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_checkpoint(zero3[0] / "run", tmp_path_factory.mktemp("merged") / "model", progress=False)


def assert_close(out: Path, expected: Path) -> None:
    assert len(losses(out)) == STEPS
    assert losses(out) == pytest.approx(losses(expected), rel=1e-5)


def test_two_ranks_under_zero3_train_as_one_process(zero3: tuple[Path, dict[str, object]], plain: Path) -> None:
    assert_close(zero3[0], plain)


@pytest.mark.parametrize("stage", [2, 3])
def test_several_packs_train_as_one(
    stage: int, demo: Demo, programs: Programs, zero3: tuple[Path, dict[str, object]], plain: Path, tmp_path: Path
) -> None:
    path = write_partitioned(tmp_path) if stage == 3 else write_stage(tmp_path, stage)
    overrides = {**DORA, "deepspeed": path, "batch.pack_tokens": 340, "model.activation_checkpointing.text": 1}
    programs.run(demo.train(tmp_path, overrides), ranks=2).check()
    assert_close(tmp_path, plain)
    norms = [[line["grad_norm"] for line in metrics(out)] for out in (tmp_path, zero3[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert export_checkpoint(tmp_path / "run", tmp_path / "model", progress=False).difference < 1e-5


def test_dropout_is_drawn_and_a_resumed_run_draws_it_again(
    demo: Demo, programs: Programs, dropped: tuple[Path, dict[str, object]], plain: Path, tmp_path: Path
) -> None:
    whole, options = dropped
    assert losses(whole)[STEPS] < 0.95 * losses(whole)[1], "nothing was learned"
    assert losses(whole)[STEPS] != pytest.approx(losses(plain)[STEPS], rel=1e-3), "nothing was left out"
    out = cut(whole, tmp_path / "out")
    programs.run(demo.train(out, options), ranks=2).check()
    assert losses(out) == losses(whole)


def test_a_run_goes_on_at_another_number_of_ranks(
    demo: Demo, programs: Programs, zero3: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    out = cut(zero3[0], tmp_path / "out")
    output = programs.run(demo.train(out, zero3[1])).check().output
    assert "converting what 2 ranks wrote" in output and "resumed from" in output
    assert_close(out, zero3[0])


def test_a_checkpoint_holds_the_adapter_alone(zero3: tuple[Path, dict[str, object]], demo: Demo) -> None:
    size = sum(path.stat().st_size for path in (saved(zero3[0], STEPS) / TAG).iterdir())
    assert size < 0.5 * (demo.model / "model.safetensors").stat().st_size


def test_the_merged_model_is_the_trained_one(merged: Exported, demo: Demo) -> None:
    """The exporter has compared embeddings; here which weights differ from the backbone's."""
    assert merged.difference < 1e-5
    before, after = weights(demo.model), weights(merged.folder)
    assert AutoModel.from_pretrained(merged.folder).config.model_type == "qwen2_vl"
    changed = set()
    for name, tensor in after.items():
        if not torch.equal(before[name], tensor):
            changed.add(re.sub(r"layers\.\d+\.", "", name))
    projections = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {
        f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    assert changed == {*projections, TABLE}
    moved = (after[TABLE] != before[TABLE]).any(-1).nonzero().flatten().tolist()
    tokenizer = Processing.load(str(merged.folder), read_settings(str(merged.folder))).tokenizer
    assert moved == [tokenizer.convert_tokens_to_ids("<|emb|>")], "<|mask|> does not occur in this stage"


def test_peft_reads_the_adapter(
    programs: Programs, zero3: tuple[Path, dict[str, object]], merged: Exported, demo: Demo, tmp_path: Path
) -> None:
    result = programs.run([CONVERT, zero3[0] / "run", tmp_path / "adapter", "--no-merge_lora"]).check()
    assert "embeddings of the written model differ" in result.output
    assert not (tmp_path / "adapter" / "config.json").exists()
    base = AutoModel.from_pretrained(demo.model, key_mapping={r"^model\.visual\.": "visual."})
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    found = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in weights(merged.folder).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    items = ["a red circle", {"image": demo.data / "images" / "test" / "00000.png", "text": "Where is it?"}]
    one_ND, other_ND = (
        Embedder.from_pretrained(folder, device="cpu").encode(items) for folder in (tmp_path / "adapter", merged.folder)
    )
    assert np.abs(one_ND - other_ND).max() < 1e-5
    assert "base=" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.fixture(scope="module")
def coma(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """Output folder and options of a run in CoMa's setting on two ranks under ZeRO-3."""
    out = tmp_path_factory.mktemp("coma")
    options = {**COMA, "deepspeed": write_partitioned(out)}
    programs.run(demo.train(out, options), ranks=2).check()
    return out, options


def test_a_table_in_full_trains_as_in_one_process_and_goes_on_there(
    demo: Demo, programs: Programs, coma: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    programs.run(demo.train(plain, {**COMA, "deepspeed": write_stage(tmp_path, 0)})).check()
    assert losses(plain)[STEPS] < 0.9 * losses(plain)[1], "nothing was learned"
    assert_close(coma[0], plain)
    out = cut(coma[0], tmp_path / "out")
    output = programs.run(demo.train(out, coma[1])).check().output
    assert "converting what 2 ranks wrote" in output
    assert_close(out, coma[0])


def test_a_table_in_full_is_exported(
    programs: Programs, coma: tuple[Path, dict[str, object]], demo: Demo, tmp_path: Path
) -> None:
    exported = export_checkpoint(coma[0] / "run", tmp_path / "model", progress=False)
    assert exported.difference < 1e-5
    before, after = weights(demo.model), weights(exported.folder)
    changed = {re.sub(r"layers\.\d+\.", "", name) for name in after if not torch.equal(before[name], after[name])}
    assert changed == {*(f"self_attn.{p}_proj.weight" for p in "qkvo"), TABLE}
    moved = (after[TABLE] != before[TABLE]).any(-1).sum()
    assert moved > 100, "only the new tokens' rows"

    alone = export_checkpoint(coma[0] / "run", tmp_path / "adapter", merge_lora=False, progress=False)
    assert alone.difference < 1e-5
    base = AutoModel.from_pretrained(demo.model, key_mapping={r"^model\.visual\.": "visual."})
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    found = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    assert torch.equal(found[TABLE], after[TABLE])
    for name, tensor in after.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stage", "embeddings"), [(2, "new"), (3, "all")])
def test_rows_alone_of_a_table_without_spare_ones(
    stage: int, embeddings: str, demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    """The table is enlarged; nothing but rows of it differs afterwards."""
    base = tmp_path / "base"
    shutil.copytree(demo.model, base)
    rows = len(Processing.load(str(base), SETTINGS).tokenizer) - 2
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith(TABLE))
    tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    overrides = {
        **{**DORA, "model.path": base, "model.lora.targets": "tokens", "model.lora.train_embeddings": embeddings},
        "deepspeed": write_partitioned(tmp_path) if stage == 3 else write_stage(tmp_path, stage),
    }
    programs.run(demo.train(tmp_path, overrides), ranks=2).check()
    assert losses(tmp_path)[STEPS] < losses(tmp_path)[1]
    exported = export_checkpoint(tmp_path / "run", tmp_path / "model", progress=False)
    assert exported.difference < 1e-5
    before, after = weights(base), weights(exported.folder)
    assert after[TABLE].shape[0] == rows + 2
    assert [name for name in before if not torch.equal(before[name], after[name][: len(before[name])])] == (
        [TABLE] if embeddings == "all" else []
    )
    with pytest.raises(UserError, match=r"none for the new tokens.*leave out --no-merge_lora"):
        export_checkpoint(tmp_path / "run", tmp_path / "adapter", merge_lora=False, progress=False)


def test_both_towers_in_bf16_with_a_learning_rate_for_vision(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    overrides = {
        **{**DORA, "model.freeze_vision": "false", "model.lora.targets": "all", "model.lora.dora": "false"},
        **{"run.precision": "bf16", "optim.vision_lr": 1e-4, "deepspeed": write_partitioned(tmp_path)},
    }
    programs.run(demo.train(tmp_path, overrides), ranks=2).check()
    exported = export_checkpoint(tmp_path / "run", tmp_path / "model", dtype="fp32", progress=False)
    before, after = weights(demo.model), weights(exported.folder)
    moved = {name: (after[name] - before[name]).abs().max() for name in after}
    assert 0 < moved["visual.blocks.0.attn.qkv.weight"] < 0.1 * moved["layers.0.self_attn.q_proj.weight"]


def test_an_adapter_of_another_model_is_refused(
    demo: Demo, programs: Programs, zero3: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo.model, other)
    tensors = load_file(other / "model.safetensors")
    tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    line = refusal(programs.run([CONVERT, zero3[0] / "run", tmp_path / "out", "--base", other]))
    assert f"{other}: is another model than the one whose adapter {saved(zero3[0], STEPS)} holds" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"no such folder, but .* give --base DIR"):
        export_checkpoint(zero3[0] / "run", tmp_path / "out", base=str(tmp_path / "gone"))

    out = cut(zero3[0], tmp_path / "run")
    meta = saved(out, MIDDLE) / "meta.json"
    text = meta.read_text()
    digest = json.loads(text)["base"]
    meta.write_text(text.replace(digest, digest[::-1]))
    vouch(meta.parent, meta)
    line = refusal(programs.run(demo.train(out, zero3[1]), ranks=2))
    assert f"{demo.model}: is another model than the one whose adapter {saved(out, MIDDLE)} holds" in line
