"""A converted checkpoint is the model that was trained, for muco_ds, transformers and sentence-transformers alike."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, Qwen2VLModel, Qwen3VLModel

from muco_ds.checkpoint import TAG
from muco_ds.data.templates import ChatTemplate
from muco_ds.errors import UserError
from muco_ds.export import PREFIX, Exported, export_checkpoint
from muco_ds.export_st import chat_template
from muco_ds.manifest import MANIFEST
from muco_ds.models.backbones import canonical_name, load_tokenizer

from programs import REPOSITORY, Demo, Programs, vouch
from tiny_folders import change_family

CONVERT = REPOSITORY / "tools" / "convert_ckpt.py"
FROZEN = "visual.blocks.0.attn.qkv.weight"


@dataclass(frozen=True)
class Layout:
    """How a checkpoint was written."""

    stage: int
    ranks: int
    precision: str
    freeze_vision: bool
    kind: str = "qwen2_vl"


LAYOUTS = {
    "zero3": Layout(3, 2, "fp32", freeze_vision=False),
    "zero3-qwen3": Layout(3, 2, "fp32", freeze_vision=False, kind="qwen3_vl"),
    "zero3-bf16-frozen": Layout(3, 3, "bf16", freeze_vision=True),
    "zero2-bf16-frozen": Layout(2, 2, "bf16", freeze_vision=True),
    "zero2": Layout(2, 1, "fp32", freeze_vision=False),
    "zero0-frozen": Layout(0, 1, "fp32", freeze_vision=True),
}


@pytest.fixture(scope="module")
def backbone(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> folder of the model that training starts from."""

    @cache
    def folder(kind: str) -> Path:
        if kind == "qwen2_vl":
            return demo.model
        made = Path(shutil.copytree(demo.model, tmp_path_factory.mktemp(kind) / "model"))
        change_family(made, kind)
        return made

    return folder


@pytest.fixture(scope="module")
def trained(
    demo: Demo, backbone: Callable[[str], Path], programs: Programs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Name of a layout -> the run's folder, trained for three steps when first asked for."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            layout, out = LAYOUTS[name], tmp_path_factory.mktemp(name)
            overrides: dict[str, object] = {
                "model.path": backbone(layout.kind),
                "data.max_pixels": 96 * 96,  # three by three tokens, of 28 or 32 px
                "run.max_steps": 3,
                "run.precision": layout.precision,
                "model.freeze_vision": str(layout.freeze_vision).lower(),
                "optim.lr": 1e-3,
                "checkpoint.every": 2,
                "deepspeed": write_deepspeed(out / "deepspeed.json", layout.stage),
            }
            programs.run(demo.train(out, overrides), ranks=layout.ranks).check()
            runs[name] = out / "run"
        return runs[name]

    return run


@pytest.fixture(scope="module", params=["zero3", "zero3-qwen3"])
def exported(
    trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Exported:
    return export_checkpoint(trained(request.param), tmp_path_factory.mktemp("exported") / "model")


def write_deepspeed(path: Path, stage: int) -> Path:
    tree = json.loads((REPOSITORY / "ds_configs" / f"zero{stage or 2}.json").read_text())
    tree["zero_optimization"]["stage"] = stage
    if stage == 3:
        # Small tensors are partitioned too, and each optimizer group is kept as several vectors.
        tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 50_000}
    path.write_text(json.dumps(tree))
    return path


def consolidated(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights by DeepSpeed's own means, under the stock names."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = checkpoint / TAG / "mp_rank_00_model_states.pt"
    if any((checkpoint / TAG).glob("*_optim_states.pt")):
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    else:
        state = torch.load(whole, weights_only=False)["module"]
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(newest(run), to / newest(run).name))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a DeepSpeed file, and what the manifest says of it."""
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)
    vouch(file.parents[1], file)


@pytest.mark.parametrize("name", LAYOUTS)
def test_converted_is_trained(
    name: str, trained: Callable[[str], Path], backbone: Callable[[str], Path], tmp_path: Path
) -> None:
    """The embeddings are those of the trained model, and each weight is the one that DeepSpeed itself puts together."""
    layout = LAYOUTS[name]
    exported = export_checkpoint(trained(name), tmp_path / "model")
    assert exported.checkpoint.name == "step_0000003"  # of two
    assert exported.difference <= (1e-5 if layout.precision == "fp32" else 2e-2)

    written = load_file(tmp_path / "model" / "model.safetensors")
    expected = consolidated(exported.checkpoint)
    assert written.keys() == expected.keys()
    dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32
    for key, tensor in expected.items():
        assert written[key].dtype == dtype
        assert torch.equal(written[key], tensor.to(dtype)), key

    stored = load_file(backbone(layout.kind) / "model.safetensors")
    (start,) = (tensor for key, tensor in stored.items() if canonical_name(key) == FROZEN)
    assert torch.equal(written[FROZEN], start.to(dtype)) == layout.freeze_vision
    assert not (tmp_path / "model.partial").exists()


def test_bf16_export_rounds_the_master_weights(trained: Callable[[str], Path], tmp_path: Path) -> None:
    exported = export_checkpoint(trained("zero3"), tmp_path / "model", dtype="bf16")
    masters = consolidated(exported.checkpoint)
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(tensor, masters[name].bfloat16()), name
    assert 0 < exported.difference < exported.tolerance
    assert AutoModel.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "max_shard", "expected"),
    [
        ("zero3", "4GB", Qwen2VLModel),
        ("zero3", "500KB", Qwen2VLModel),
        ("zero3-qwen3", "4GB", Qwen3VLModel),
        ("zero3-qwen3", "500KB", Qwen3VLModel),
    ],
)
def test_auto_model_finds_every_weight(
    name: str, max_shard: str, expected: type, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    export_checkpoint(trained(name), out, max_shard=max_shard)
    files = list(out.glob("*.safetensors"))
    assert (len(files) > 1) == (out / "model.safetensors.index.json").exists() == (max_shard == "500KB")
    assert max_shard == "4GB" or max(file.stat().st_size for file in files) < 520_000
    model, loading = AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(model) is expected
    assert not any(loading.values()), loading
    assert json.loads((out / "config.json").read_text())["architectures"] == [expected.__name__]
    assert "model_max_length" not in json.loads((out / "tokenizer_config.json").read_text())


PICTURE, MARK = {"type": "image", "image": "x.png"}, "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("pool_token", ["<|emb|>", "<|im_end|>"])
@pytest.mark.parametrize(
    ("contents", "texts", "pictures", "user"),
    [
        (["  Where is it?\n"], ["Where is it?"], 0, "Where is it?"),
        ([[PICTURE]], [""], 1, MARK),
        ([[PICTURE, {"type": "text", "text": " \n "}]], [""], 1, MARK),
        ([[PICTURE, {"type": "text", "text": "What?"}]], ["What?"], 1, MARK + "\nWhat?"),
        ([[{"type": "text", "text": "Two\nlines "}, PICTURE, PICTURE]], ["Two\nlines"], 2, MARK * 2 + "\nTwo\nlines"),
        ([[PICTURE, {"type": "text", "text": "One?"}], "Two?"], ["One?", "Two?"], 1, None),
    ],
    ids=["text", "picture", "blank text", "both", "text first", "two turns"],
)
def test_chat_template_renders_the_training_prompt(
    pool_token: str, contents: list, texts: list[str], pictures: int, user: str | None, demo: Demo
) -> None:
    tokenizer = load_tokenizer(str(demo.model), pool_token)
    template = ChatTemplate(tokenizer, pool_token)
    messages = [{"role": "user", "content": content} for content in contents]

    def rendered(messages: list, **options: Any) -> str:
        return str(
            tokenizer.apply_chat_template(messages, chat_template=chat_template(pool_token), tokenize=False, **options)
        )

    prompt = rendered(messages)
    if user is not None:
        tail = f"{user}<|im_end|>\n<|im_start|>assistant\n{pool_token}"
        assert prompt == f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{tail}"
        other = rendered([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *messages])
        assert other == f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{tail}"
    assert rendered(messages, add_generation_prompt=True) == prompt
    # A grid of 2 x 2 patches is one token, as in the template's text.
    trained = template.render(template.encode_texts(texts), [(1, 2, 2)] * pictures, merge_size=2, history=True)
    assert tokenizer(prompt)["input_ids"] == trained.ids_L.tolist()


def test_chat_template_refuses_what_was_not_trained(demo: Demo) -> None:
    tokenizer = load_tokenizer(str(demo.model), "<|emb|>")
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "assistant", "content": "No."},
    ]
    for message in messages:
        with pytest.raises(Exception, match=r"texts and pictures|user messages"):
            tokenizer.apply_chat_template([message], chat_template=chat_template("<|emb|>"), tokenize=False)


def test_sentence_transformers_gives_the_same_embeddings(exported: Exported) -> None:
    check_sentence_transformers([exported.folder])


def check_sentence_transformers(folders: list[Path]) -> None:
    """Every kind of input through SentenceTransformer and stock transformers, and the model card's programs, against
    Embedder."""
    apart = Path(sys.prefix) / "torchvision-only"
    if not apart.is_dir() and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: stock processors of these models need it")
    pytest.importorskip("sentence_transformers")
    script = Path(__file__).with_name("sentence_transformers_check.py")
    paths = [str(REPOSITORY), *([str(apart)] if apart.is_dir() else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *folders], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, line in zip(folders, done.stdout.splitlines()[-len(folders) :], strict=True):
        seen = json.loads(line)
        # torchvision resizes to within one grey level of Pillow, so only pictures of fitting sizes are equal.
        assert seen["differences"].pop("resized") < 5e-3, folder
        assert max(seen["differences"].values()) < 1e-5, (folder, seen)
        assert all(seen["ids_equal"]), folder
        assert seen["limit"] is None or seen["limit"] > 10**6


def test_damaged_weight_is_found_and_nothing_is_left(
    trained: Callable[[str], Path], programs: Programs, tmp_path: Path
) -> None:
    checkpoint = copied(trained("zero3"), tmp_path)
    file = next((checkpoint / TAG).glob("zero_pp_rank_1_*_optim_states.pt"))
    edit(file, lambda state: state["optimizer_state_dict"]["fp32_flat_groups"][0].data[:1000].add_(1.0))
    done = programs.run([CONVERT, checkpoint, tmp_path / "model"])
    assert done.codes == [2]
    assert "Traceback" not in done.stderr[0]
    errors = [line for line in done.stderr[0].splitlines() if "error: " in line]
    assert len(errors) == 1 and "embeddings differ" in errors[0], done.output
    assert done.stdout[0].strip() == ""
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_missing_weight_is_named(trained: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(trained("zero3-bf16-frozen"), tmp_path)
    file = next((checkpoint / TAG).glob("zero_pp_rank_0_*_model_states.pt"))
    edit(file, lambda state: state["frozen_param_shapes"].pop(PREFIX + FROZEN))
    with pytest.raises(UserError, match=f"lacks the weight '{FROZEN}'"):
        export_checkpoint(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_bad_checkpoints_are_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "model"
    (tmp_path / "none").mkdir()
    for path in (tmp_path / "none", tmp_path / "absent"):
        with pytest.raises(UserError, match="no complete checkpoint"):
            export_checkpoint(path, out)

    checkpoint = copied(trained("zero3"), tmp_path)
    meta = json.loads((checkpoint / "meta.json").read_text())
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"]["meta.json"], manifest["digests"]["meta.json"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / "meta.json").write_text(json.dumps({**meta, "zero_stage": 4}))
    with pytest.raises(UserError, match="ZeRO stage 4; stages 0 to 3"):
        export_checkpoint(checkpoint, out)

    (checkpoint / "meta.json").write_text(json.dumps(meta))
    shard = next((checkpoint / TAG).glob("*optim_states.pt"))
    content = shard.read_bytes()
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=f"{shard.name}(: does not load| was altered)"):
        export_checkpoint(checkpoint, out)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        export_checkpoint(checkpoint, out)
    assert not out.exists()


def test_only_an_earlier_export_is_replaced(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run, out = trained("zero3"), tmp_path / "model"
    out.mkdir()
    export_checkpoint(run, out)  # empty: taken
    with pytest.raises(UserError, match="--overwrite"):
        export_checkpoint(run, out)
    (out / "old").touch()
    export_checkpoint(run, out, overwrite=True)
    assert not (out / "old").exists()

    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no exported model"):
        export_checkpoint(run, other, overwrite=True)
    assert (other / "notes.txt").read_text() == "mine"
