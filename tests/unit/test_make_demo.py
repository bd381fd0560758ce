"""tools/make_demo.py: complete, loadable offline with the stock classes, deterministic, never overwrites user data."""

import json
import re
import runpy
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Qwen2VLForConditionalGeneration

from muco_ds.data.conversations import ConversationReader
from muco_ds.data.demo_scenes import sample_scenes
from muco_ds.data.readers import IMAGE_MARK, PairReader
from muco_ds.models.demo_model import SPECIAL_TOKENS, build_demo

TOOL = Path(__file__).parents[2] / "tools" / "make_demo.py"
COLUMNS = ["qry", "qry_sentence", "qry_image_path", "pos_text", "pos_sentence", "pos_image_path", "neg_text"]


def run_tool(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *args])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert build_demo(out, scenes=60, test_scenes=100, seed=3)
    return out


@pytest.mark.parametrize("split, count", [("train", 60), ("test", 100)])
def test_rows_have_m3t_columns_and_pictures(demo: Path, split: str, count: int) -> None:
    table = pq.read_table(demo / "data" / f"{split}.parquet")
    assert table.column_names == COLUMNS
    rows = table.to_pylist()
    assert len(rows) == count
    for row in rows:
        assert [len(row[column]) for column in ("qry", "pos_text", "pos_sentence", "neg_text")] == [7, 7, 7, 7]
        assert all(len(questions) > 1 for questions in row["qry"])
        assert all(q.startswith("<|image_1|>\n") and q.count("<|") == 1 for questions in row["qry"] for q in questions)
        assert all(row["pos_text"]) and row["neg_text"] == [""] * 7 and row["pos_image_path"] == ""
        with Image.open(demo / "data" / "images" / row["qry_image_path"]) as image:
            assert image.size == (84, 84) and image.mode == "RGB"


def test_held_out_pairs_are_of_every_kind(demo: Path) -> None:
    rows = pq.read_table(demo / "data" / "test.parquet").to_pylist()
    reader = PairReader(str(demo / "data" / "pairs_test.parquet"), str(demo / "data" / "images"))
    records = [reader.record(row) for row in range(len(reader))]
    assert len(records) == 8 * len(rows)
    for i, row in enumerate(rows):
        *asked, sought = records[8 * i : 8 * i + 8]
        assert [record.turns[0].target for record in asked] == row["pos_text"]
        assert sought.target_images == asked[0].query_images and row["qry_sentence"] in sought.turns[0].questions[0]


def test_pairs_are_readable_and_their_negatives_wrong(demo: Path) -> None:
    reader = PairReader(str(demo / "data" / "pairs_train.parquet"), str(demo / "data" / "images"), negatives=True)
    records = [reader.record(row) for row in range(60)]
    for record in records:
        (negative,) = record.negatives
        assert bool(record.query_images) != bool(record.target_images) and all(record.restated())
        assert (negative.text, negative.images) != (record.turns[0].target, record.target_images)
    assert 2 <= sum(bool(record.target_images) for record in records) <= 20


@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_are_the_rows_turns(
    demo: Path, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pq.read_table(demo / "data" / f"{split}.parquet").to_pylist()
    file = demo / "data" / f"conversations_{split}.jsonl"
    reader = ConversationReader(str(file), str(demo / "data" / "images"))
    assert len(reader) == len(rows)
    for i, row in enumerate(rows):
        record = reader.record(i)
        assert record.query_images == (str((demo / "data" / "images" / row["qry_image_path"]).resolve()),)
        assert [turn.target for turn in record.turns] == row["pos_text"]
        for turn, questions in zip(record.turns, row["qry"], strict=True):
            assert f"{IMAGE_MARK}{turn.questions[0]}" in questions
    data, output = demo / "data" / f"{split}.parquet", tmp_path / "again.jsonl"
    monkeypatch.setattr(sys, "argv", ["make_conversations.py", "--data", str(data), "--output", str(output)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL.parent / "make_conversations.py"), run_name="__main__")
    assert exit_info.value.code == 0 and output.read_bytes() == file.read_bytes()


def test_answers_of_a_conversation_follow_from_picture_and_question(demo: Path) -> None:
    """The parts of the scene that an answer names are in the caption, which names all of them."""
    reader = ConversationReader(str(demo / "data" / "conversations_test.jsonl"), str(demo / "data" / "images"))
    fixed = {"a", "the", "is", "are", "and", "one", "of", "in", "scene", "colours", "kinds", "tale", "sign", "says"}
    places = {"at", "top", "bottom", "left", "right", "centre"}
    for i in range(len(reader)):
        *turns, described = reader.record(i).turns
        named = set(described.target.replace(",", "").split())
        for turn in turns:
            assert set(turn.target.replace(",", "").split()) - fixed - places <= named, (turn, described)


def test_the_tokenizer_knows_the_words_of_conversations(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model", local_files_only=True)
    reader = ConversationReader(str(demo / "data" / "conversations_test.jsonl"), str(demo / "data" / "images"))
    turns = [turn for i in range(len(reader)) for turn in reader.record(i).turns]
    for text in [text for turn in turns for text in (turn.questions[0], turn.target)]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and len(ids) <= len(re.findall(r"\w+|[^\w\s]", text)) + 1, text


def test_train_and_test_pictures_are_disjoint(demo: Path) -> None:
    pixels = {}
    for split in ("train", "test"):
        files = sorted((demo / "data" / "images" / split).iterdir())
        pixels[split] = {Image.open(file).tobytes() for file in files}
        assert len(pixels[split]) == len(files)
    assert not pixels["train"] & pixels["test"]
    scenes = sample_scenes(500, seed=0)
    assert len(set(scenes)) == 500 and scenes[:100] == sample_scenes(100, seed=0)


def test_answers_are_many_and_name_their_question(demo: Path) -> None:
    rows = pq.read_table(demo / "data" / "test.parquet").to_pylist()
    assert 300 <= len({answer for row in rows for answer in row["pos_text"]}) <= 700
    kind_of: dict[str, int] = {}
    for row in rows:
        for kind, answer in enumerate(row["pos_text"]):
            assert kind_of.setdefault(answer, kind) == kind, f"{answer!r} answers two kinds of questions"


def test_tokenizer_round_trips_and_specials_are_single(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model", local_files_only=True)
    assert tokenizer.is_fast and tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    every_byte = "".join(map(chr, range(1, 256))) + "日本語 👩‍👩‍👧 ﷽ \U0010ffff\n\t  x"
    for text in ("a small red square", every_byte, "e\u0301"):
        assert tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text)
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1
    assert len(tokenizer("<|emb|>").input_ids) > 1 and len(tokenizer("<|mask|>").input_ids) > 1
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_model_loads_offline_and_runs(demo: Path) -> None:
    folder = demo / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, info = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer) + 64
    generator = Qwen2VLForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    assert generator.lm_head.weight is generator.get_input_embeddings().weight
    assert 0.5e6 < sum(parameter.numel() for parameter in generator.parameters()) < 1.0e6
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    for name, token in names.items():
        assert getattr(model.config, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(f"<|{token}|>")

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    image = Image.open(next((demo / "data" / "images" / "test").iterdir()))
    inputs = processor(images=image, return_tensors="pt")
    assert inputs.image_grid_thw.tolist() == [[1, 6, 6]]
    text = "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>\nWhat is it?"
    prompt = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        types = (prompt.input_ids == model.config.image_token_id).int()
        states = model(**prompt, **inputs, mm_token_type_ids=types).last_hidden_state
    assert states.shape == (1, prompt.input_ids.shape[1], model.config.text_config.hidden_size)
    assert states.isfinite().all()


def test_same_seed_same_files(demo: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

    build_demo(tmp_path / "same", scenes=60, test_scenes=100, seed=3)
    assert files(tmp_path / "same") == files(demo)
    build_demo(tmp_path / "other", scenes=60, test_scenes=100, seed=4)
    for name in ("data/train.parquet", "data/images/test/00000.png", "model/model.safetensors"):
        assert files(tmp_path / "other")[name] != files(demo)[name]


def test_tool_builds_keeps_and_rebuilds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    small = [str(out), "--scenes", "20", "--test_scenes", "2"]
    assert run_tool(monkeypatch, *small) == 0
    assert "demo written" in capsys.readouterr().out
    picture = out / "data" / "images" / "train" / "00019.png"
    written = picture.stat().st_mtime_ns
    assert run_tool(monkeypatch, *small) == 0
    assert "already" in capsys.readouterr().out and picture.stat().st_mtime_ns == written

    assert run_tool(monkeypatch, str(out), "--scenes", "16", "--test_scenes", "2") == 0
    assert not picture.exists() and len(list(picture.parent.iterdir())) == 16
    stamp = json.loads((out / "demo.json").read_text())
    (out / "demo.json").write_text(json.dumps({**stamp, "complete": False}))
    assert run_tool(monkeypatch, str(out), "--scenes", "16", "--test_scenes", "2") == 0
    assert json.loads((out / "demo.json").read_text()) == stamp


def test_tool_refuses_what_is_not_a_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "data" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    assert run_tool(monkeypatch, str(tmp_path)) == 2
    assert mine.read_text() == "precious"
    assert run_tool(monkeypatch, str(tmp_path / "new"), "--scenes", "3") == 2
    assert run_tool(monkeypatch, str(tmp_path / "new"), "--test_scenes", "0") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 3
    assert not (tmp_path / "new").exists()
