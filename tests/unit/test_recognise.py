"""Released checkpoints and plain backbones by path: what they are is read from their files, and embeddings are those of
the stock classes on the released code's prompts.

Shape suffixes: L tokens of a prompt, D embedding size.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.data.templates import ChatTemplate
from muco_ds.errors import UserError
from muco_ds.export_st import chat_template
from muco_ds.models.backbones import canonical_name, load_tokenizer
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Settings
from muco_ds.models.recognise import recognise

from tiny_folders import KINDS
from tiny_models import export, model_folder, picture

# As the released MuCo code has it, byte for byte, with the user's text in the middle.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n<|emb|><|im_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PIXELS = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}

WIDE, TALL, TINY = picture(1, 140, 84), picture(2, 60, 300), picture(3, 20, 40)
ITEMS: list[tuple[Any, str, list[Image.Image]]] = [
    ("a dog", "a dog\n", []),
    ("What is it?", "What is it?\n", []),  # "?\n" may be one token
    ("two\n\n\nlines \n", "two\nlines \n", []),
    (WIDE, f"{IMAGE}\n", [WIDE]),
    ({"image": TALL, "text": "Where?"}, f"{IMAGE}\nWhere?\n", [TALL]),
    ({"image": [WIDE, TALL], "text": "Which one?"}, f"{IMAGE}{IMAGE}\nWhich one?\n", [WIDE, TALL]),
    ({"image": TINY, "text": "small"}, f"{IMAGE}\nsmall\n", [TINY.resize((56, 56))]),
]


def stock_embedding(
    folder: Path, model: Any, prompt: str, images: Sequence[Image.Image], pooled: list[str] | None, size: dict[str, int]
) -> np.ndarray:
    """Mean of the states at some tokens of a prompt (None: at its last), unit length, [D], by stock classes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extra: dict[str, Any] = {}
    if images:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        extra = dict(processor(images=list(images), size=size, return_tensors="pt"))
        counts = iter(int(grid.prod()) // 4 for grid in extra["image_grid_thw"])
        prompt = re.sub(re.escape("<|image_pad|>"), lambda mark: mark[0] * next(counts), prompt)
    ids_1L = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if images:
        extra["mm_token_type_ids"] = (ids_1L == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    model.model.rope_deltas = None
    with torch.no_grad():
        out = model(input_ids=ids_1L, output_hidden_states=True, use_cache=False, **extra)
    states_LD = out.hidden_states[-1][0]
    if pooled is None:
        mean_D = states_LD[-1]
    else:
        mean_D = states_LD[torch.isin(ids_1L[0], torch.tensor(tokenizer.convert_tokens_to_ids(pooled)))].mean(0)
    return torch.nn.functional.normalize(mean_D, dim=0).numpy()


def add_tokens(folder: Path, tokens: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)


def rename(folder: Path, name_of: Callable[[str], str], *, head: bool) -> None:
    """Store the weights under other names; `head`: with a vocabulary head."""
    tensors = {
        name_of(canonical_name(name)): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    if head:
        (table,) = (tensor for name, tensor in tensors.items() if "embed_tokens" in name)
        tensors["lm_head.weight"] = table.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def visual(name: str) -> bool:
    return name.startswith("visual.")


# Layout of a release's weights -> names from canonical ones ("layers.0...", "visual..."), and whether it has a head.
LAYOUTS: dict[str, tuple[Callable[[str], str], bool]] = {
    "4.x": (lambda name: name if visual(name) else f"model.{name}", True),
    "5.x": (lambda name: f"model.{name}" if visual(name) else f"model.language_model.{name}", True),
    "without head": (lambda name: name if visual(name) else f"language_model.{name}", False),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of MuCo's merge script. Read only."""
    folder = Path(shutil.copytree(model_folder("qwen2_vl"), tmp_path_factory.mktemp("released") / "MuCo"))
    add_tokens(folder, ["<|emb|>", "<|mask|>"])
    config = json.loads((folder / "config.json").read_text())
    # The script writes this into every section, whatever stood there.
    config["text_config"]["model_type"] = config["vision_config"]["model_type"] = "qwen2_vl"
    config["architectures"] = ["CustomQwen2VLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def expected(released: Path) -> np.ndarray:
    """Of ITEMS, by the stock class."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(released, dtype=torch.float32).eval()
    return np.stack(
        [
            stock_embedding(released, model, BEFORE + text + BEHIND, images, ["<|emb|>"], PIXELS)
            for _, text, images in ITEMS
        ]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_released_muco_folder_gives_the_embeddings_of_the_released_prompt(
    layout: str, released: Path, expected: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "MuCo"))
    name_of, head = LAYOUTS[layout]
    rename(folder, name_of, head=head)
    embedder = Embedder.from_pretrained(folder, device="cpu")
    assert not [record for record in caplog.records if record.name.startswith("muco_ds")]
    for pack_tokens in (1, 10**6):
        got_ND = embedder.encode([item for item, _, _ in ITEMS], pack_tokens=pack_tokens)
        np.testing.assert_allclose(got_ND, expected, atol=1e-5, rtol=0)
    questions = ["Where?", "", "Who?"]
    want_ND = embedder.encode([{"image": TALL, "text": text} for text in questions], pack_tokens=1)
    np.testing.assert_allclose(embedder.encode_turns(TALL, questions), want_ND, atol=1e-5, rtol=0)


def test_the_newline_matters(released: Path, expected: np.ndarray) -> None:
    """Without this, the tolerance above would prove nothing."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(released, dtype=torch.float32).eval()
    stripped_D = stock_embedding(released, model, f"{BEFORE}a dog{BEHIND}", [], ["<|emb|>"], PIXELS)
    assert np.abs(stripped_D - expected[0]).max() > 1e-3


def test_a_released_adapter_is_added_to_its_backbone(released: Path, tmp_path: Path) -> None:
    """As the released code trains: DoRA in the whole model, two rows of the table, no tokenizer beside them."""
    from peft import LoraConfig, get_peft_model

    model = Qwen2VLForConditionalGeneration.from_pretrained(released, dtype=torch.float32)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if "lm_head" not in name and "visual" not in name]
    tokenizer = AutoTokenizer.from_pretrained(released)
    rows = tokenizer.convert_tokens_to_ids(["<|emb|>", "<|mask|>"])
    options: dict[str, Any] = {"target_modules": targets, "trainable_token_indices": {"embed_tokens": rows}}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, use_dora=True, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator) * ("magnitude" not in name)
    adapted.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(released)}))

    got_ND = Embedder.from_pretrained(tmp_path / "adapter", device="cpu").encode([item for item, _, _ in ITEMS])
    merged = adapted.merge_and_unload().eval()
    for got_D, (_, text, images) in zip(got_ND, ITEMS, strict=True):
        want_D = stock_embedding(released, merged, BEFORE + text + BEHIND, images, ["<|emb|>"], PIXELS)
        np.testing.assert_allclose(got_D, want_D, atol=1e-5, rtol=0)

    backbone = tmp_path / "backbone"  # of the same names and sizes, but without the tokens
    shutil.copytree(model_folder("qwen2_vl"), backbone)
    again_ND = Embedder.from_pretrained(tmp_path / "adapter", device="cpu", base=backbone).encode(["a dog"])
    np.testing.assert_allclose(again_ND, got_ND[:1], atol=1e-5, rtol=0)
    add_tokens(backbone, ["<|other|>"])
    with pytest.raises(UserError, match=r"trained row \d+ of the vocabulary, which is no embedding token"):
        Embedder.from_pretrained(tmp_path / "adapter", device="cpu", base=str(backbone))

    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "Qwen/Qwen2-VL-2B"}))
    with pytest.raises(UserError, match=r"adapter of 'Qwen/Qwen2-VL-2B', which is no folder here: .* base"):
        Embedder.from_pretrained(tmp_path / "adapter", device="cpu")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = sorted(tensors)[-1]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights)
    with pytest.raises(UserError, match=re.escape(f"lacks the weight '{lost}'")):
        Embedder.from_pretrained(tmp_path / "adapter", device="cpu", base=str(released))
    save_file({**tensors, "base_model.model.model.other": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match=r"'base_model\.model\.model\.other' has no place"):
        Embedder.from_pretrained(tmp_path / "adapter", device="cpu", base=str(released))


def test_a_released_coma_folder_is_read_through_its_compression_tokens(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("qwen2_5_vl"), tmp_path / "CoMa"))
    tokens = [f"<|ctoken_pad_{i}|>" for i in range(32)]
    add_tokens(folder, tokens)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    size = PIXELS | {"longest_edge": 1024 * 28 * 28}
    got_ND = Embedder.from_pretrained(folder, device="cpu").encode(["a dog", {"text": "Where?", "image": TALL}])
    for got_D, text, images in zip(got_ND, ("a dog", f"{IMAGE}\nWhere?"), ([], [TALL]), strict=True):
        want_D = stock_embedding(folder, model, text + "".join(tokens), images, tokens, size)
        np.testing.assert_allclose(got_D, want_D, atol=1e-5, rtol=0)


def test_a_release_that_there_is_none_of_is_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(model_folder("qwen3_vl"), tmp_path / "other"))
    add_tokens(folder, ["<|emb|>"])
    with caplog.at_level("INFO", "muco_ds"):
        Embedder.from_pretrained(folder, device="cpu")
    said = [(record.levelname, record.message) for record in caplog.records if record.message.startswith(str(folder))]
    assert [level for level, _ in said] == ["INFO", "WARNING"] and "template='muco'" in said[0][1]
    assert "is read as MuCo's release, which there is none of for qwen3_vl" in said[1][1]


def test_compression_tokens_are_all_there_or_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("qwen2_vl"), tmp_path / "CoMa"))
    add_tokens(folder, [f"<|ctoken_pad_{i}|>" for i in range(1, 9)])
    with pytest.raises(UserError, match=r"has 8 compression tokens but no <\|ctoken_pad_0\|>: copy"):
        recognise(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_backbone_embeds_with_one_warning(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(model_folder(kind), tmp_path / "Qwen"))
    images = json.loads((folder / "preprocessor_config.json").read_text())
    del images["size"]
    images |= {"min_pixels": 56 * 56, "max_pixels": 140 * 140}  # as the older releases spell it
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    embedder = Embedder.from_pretrained(folder, device="cpu")
    (record,) = (record for record in caplog.records if record.name.startswith("muco_ds"))
    assert "never trained to embed" in record.message
    got_ND = embedder.encode(["a dog", {"image": TALL, "text": "Where?"}])
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    size = {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
    for got_D, text, pictures in zip(got_ND, ("a dog", f"{IMAGE}\nWhere?"), ([], [TALL]), strict=True):
        # The end of an empty answer.
        prompt = f"{BEFORE}{text}<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
        want_D = stock_embedding(folder, model, prompt, pictures, None, size)
        np.testing.assert_allclose(got_D, want_D, atol=1e-5, rtol=0)


def test_an_exported_folder_says_itself_what_it_is(tmp_path: Path, released: Path) -> None:
    assert recognise(str(released)).settings == Settings("<|emb|>", *PIXELS.values(), None, template="muco")
    found = recognise(str(export(tmp_path / "model")))
    assert not found.doubt and found.settings.template == "chat" and found.settings.pool_token == "<|emb|>"


def test_other_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no folder: .*hf download"):
        Embedder.from_pretrained("naver-ai/MuCo-2B")
    (tmp_path / "bert").mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Embedder.from_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a 'bert' model; supported: qwen2_vl"):
        Embedder.from_pretrained(tmp_path / "bert")
    for content, message in {
        "[" * 99_999: "no JSON object",
        '{"model_type": "qwen2_vl", "text_config": 3}': "load",
    }.items():
        (tmp_path / "bert" / "config.json").write_text(content)
        with pytest.raises(UserError, match=rf"holds a config\.json that .*{message}"):
            Embedder.from_pretrained(tmp_path / "bert")
    folder = Path(shutil.copytree(model_folder("qwen2_vl"), tmp_path / "model"))
    with pytest.raises(UserError, match="device foo: give cpu, cuda or cuda:N"):
        Embedder.from_pretrained(folder, device="foo")
    with pytest.raises(UserError, match="is no adapter, leave its base out"):
        Embedder.from_pretrained(folder, base=str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|im_end|>", "<|end|>"))
    with pytest.raises(UserError, match=r"has neither <\|emb\|> nor compression tokens: how this qwen2_vl model pools"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [*(item for item, _, _ in ITEMS if not isinstance(item, Image.Image)), ""],
)
def test_the_muco_chat_template_renders_the_same_prompt(content: Any, released: Path) -> None:
    """Jinja's, for other libraries, and ours; the count of tokens is exact."""
    tokenizer = load_tokenizer(str(released), "<|emb|>")
    template = ChatTemplate(tokenizer, "<|emb|>", template="muco")
    item = content if isinstance(content, dict) else {"text": content, **({} if content else {"image": [WIDE]})}
    images = item.get("image", [])
    images = images if isinstance(images, list) else [images]
    parts = [{"type": "text", "text": item["text"]}, *({"type": "image", "image": "x.png"} for _ in images)]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=chat_template("<|emb|>", template="muco"),
        tokenize=False,
    )
    (ids,) = template.encode_texts([item["text"]])
    trained = template.render([ids], [(1, 2, 2)] * len(images), merge_size=2, history=False)
    assert tokenizer(prompt)["input_ids"] == trained.ids_L.tolist()
    one = np.ones(1, np.int64)
    (count,), _ = template.count(one * len(ids), one, one * 3 * len(images), one < 0)
    assert count == len(trained.ids_L)


def test_facts_change_with_what_decides_alone(tmp_path: Path) -> None:
    export(tmp_path / "backbone")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "backbone")}))
    shutil.copy(tmp_path / "backbone" / "muco_ds.json", adapter)
    for model in (tmp_path / "backbone", adapter):
        before = recognise(str(model)).facts()
        for name in ("README.md", "results.json"):
            (model / name).write_text("scores")
        assert recognise(str(model)).facts() == before
        os.utime(tmp_path / "backbone" / "model.safetensors", (1, len(before)))
        assert recognise(str(model)).facts() != before
