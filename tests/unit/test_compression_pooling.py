"""sentence-transformers files of a compressed model: the pooling module, how it is found, the prompts, the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError

from muco_ds.export_st import chat_template, write_sentence_transformers
from muco_ds.model_card_snippets import COMPRESSION
from muco_ds.models.backbones import compression_ids, load_tokenizer

from tiny_models import model_folder, settings

pytest.importorskip("sentence_transformers")
from muco_ds.compression_pooling import CompressionPooling

LENGTHS, LONGEST = [7, 4, 9], 9


def padded(side: str, tokens: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random states beside padding of NaN, and the mean of each prompt's last `tokens`."""
    states = [torch.randn(length, 6) for length in LENGTHS]
    pooled = [torch.full((LONGEST - length, 6), torch.nan) for length in LENGTHS]
    pairs = zip(states, pooled, strict=True)
    rows = [torch.cat([pad, own] if side == "left" else [own, pad]) for own, pad in pairs]
    features = {"token_embeddings": torch.stack(rows)}
    features["attention_mask"] = (~features["token_embeddings"][..., 0].isnan()).long()
    return features, torch.stack([own[-tokens:].sum(0) / tokens for own in states])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_exactly_the_last_tokens_are_averaged(side: str, tokens: int) -> None:
    features, expected_BD = padded(side, tokens)
    pooled = CompressionPooling(6, tokens)(features)
    assert pooled["token_embeddings"] is features["token_embeddings"]
    torch.testing.assert_close(pooled["sentence_embedding"], expected_BD)


def test_states_in_bf16_are_averaged_in_float32() -> None:
    features, _ = padded("right", 4)
    features["token_embeddings"] = features["token_embeddings"].bfloat16()
    found_BD = CompressionPooling(6, 4)(dict(features))["sentence_embedding"]
    features["token_embeddings"] = features["token_embeddings"].float()
    assert torch.equal(found_BD, CompressionPooling(6, 4)(features)["sentence_embedding"])


def test_a_prompt_without_enough_tokens_is_no_embedding() -> None:
    features, _ = padded("right", 4)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        CompressionPooling(6, 5)(features)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    CompressionPooling(6, 4).save(str(tmp_path / "1_Pooling"))
    again = CompressionPooling.load(str(tmp_path), subfolder="1_Pooling")
    assert (again.get_embedding_dimension(), again.compression_tokens) == (6, 4)


WITHOUT_MUCO = """
import os, sys
sys.modules["muco_ds"] = None
from sentence_transformers.util import import_module_class
import json
folder, type = sys.argv[1], json.load(open(sys.argv[1] + "/modules.json"))[1]["type"]
found = import_module_class(type, folder, trust_remote_code=True, local_files_only=True)
module = found.load(folder, subfolder="1_Pooling")
os.makedirs(folder + "/again/1_Pooling")
module.save(folder + "/again/1_Pooling")
again = import_module_class(type, folder + "/again", trust_remote_code=True, local_files_only=True)
print(module)
print(again.load(folder + "/again", subfolder="1_Pooling"))
import_module_class(type, folder, local_files_only=True)
"""


def test_the_folder_is_enough_if_its_code_is_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "model"  # apart from where it runs, which Python searches as well
    folder.mkdir()
    write_sentence_transformers(folder, 6, replace(settings(), compression_tokens=4))
    command = [sys.executable, "-c", WITHOUT_MUCO, str(folder)]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    loaded = "CompressionPooling({'embedding_dimension': 6, 'compression_tokens': 4})"
    assert done.stdout.splitlines() == [loaded] * 2, done.stderr
    refusal = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "Please pass the argument `trust_remote_code=True`" in refusal[-1]
    said = "references the module class 'compression_pooling.CompressionPooling', which is not part of"
    assert said in refusal[-2] and said in " ".join(COMPRESSION.split())


def test_compressed_models_bring_their_pooling(tmp_path: Path) -> None:
    for tokens in (0, 4):
        folder = tmp_path / f"{tokens}"
        folder.mkdir()
        write_sentence_transformers(folder, 6, replace(settings(), compression_tokens=tokens))
        assert (folder / "compression_pooling.py").exists() == (tokens > 0)
        types = [module["type"].rpartition(".")[2] for module in json.loads((folder / "modules.json").read_text())]
        assert types == ["Transformer", "CompressionPooling" if tokens else "Pooling", "Normalize"]


# ---- prompts

PICTURE, MARK = {"type": "image", "image": "x.png"}, "<|vision_start|><|image_pad|><|vision_end|>"
TOKENS = "<|ctoken_pad_0|><|ctoken_pad_1|><|ctoken_pad_2|>"
CHAT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = load_tokenizer(str(model_folder("qwen2_vl")), "<|emb|>", compression=3)
    template = chat_template(options.pop("pool_token", "<|emb|>"), **options)
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (user(" Where?\n"), "Where?"),
        (user(PICTURE), MARK),
        (user("What?", PICTURE, PICTURE), f"{MARK}{MARK}\nWhat?"),
        (user(PICTURE, " "), MARK),
    ],
)
@pytest.mark.parametrize("pool_token", ["<|emb|>", "<|im_end|>"])
def test_prompts_end_with_the_compression_tokens(message: dict[str, Any], text: str, pool_token: str) -> None:
    options = {"pool_token": pool_token, "compression_tokens": 3}
    assert rendered([message], **options, template="plain") == text + TOKENS
    one = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{TOKENS}"
    assert rendered([message], **options) == CHAT + one
    assert rendered([message, message], **options) == f"{CHAT}{one}<|im_end|>\n{one}"
    assert rendered([message, message], **options, template="plain") == (text + TOKENS) * 2
    assert rendered([message], pool_token=pool_token, template="plain") == text + pool_token


def test_each_token_of_the_prompt_is_one_id() -> None:
    tokenizer = load_tokenizer(str(model_folder("qwen2_vl")), "<|emb|>", compression=3)
    prompt = rendered([user("Where?")], compression_tokens=3, template="plain")
    assert tokenizer(prompt)["input_ids"][-3:] == compression_ids(tokenizer)


def test_a_system_message_has_no_place_in_a_plain_prompt() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert rendered([system, user("x")], compression_tokens=3).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    with pytest.raises(TemplateError, match="Plain prompts have no system message"):
        rendered([system, user("x")], compression_tokens=3, template="plain")
