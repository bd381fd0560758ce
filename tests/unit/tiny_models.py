"""Tiny random backbones of every family, and what the stock Hugging Face classes make of a prompt by itself.

Shape suffixes: L tokens of a prompt, D embedding size.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.data.collator import Packer
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.schema import QUERY, Dialogue, PackedBatch, Side
from muco_ds.models.backbones import load_backbone
from muco_ds.models.demo_model import write_model
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Processing, Settings

from tiny_folders import change_family, shake

POOL_TOKENS = ("<|emb|>", "<|im_end|>")
MIN_PIXELS, MAX_PIXELS = 56 * 56, 168 * 168
OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tiny_models"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def demo_folder() -> Path:
    """`model` and `data` (20 training and 8 held-out scenes). Read only: shared by all tests of the process."""
    folder = _root() / "demo"
    rows = write_data(folder / "data", 20, 8, seed=0)
    write_model(folder / "model", row_texts(rows), seed=0)
    shake(folder / "model")
    return folder


@cache
def model_folder(kind: str) -> Path:
    """Backbone folder of a kind, with every weight random. Read only."""
    source = demo_folder() / "model"
    if kind == "qwen2_vl":
        return source
    folder = _root() / kind
    shutil.copytree(source, folder)
    change_family(folder, kind)
    return folder


def settings(pool_token: str = "<|emb|>") -> Settings:
    return Settings(pool_token, MIN_PIXELS, MAX_PIXELS, short_side=None)


@cache
def processing(kind: str, pool_token: str = "<|emb|>") -> Processing:
    return Processing.load(str(model_folder(kind)), settings(pool_token))


@cache
def packer(kind: str = "qwen2_vl", pool_token: str = "<|emb|>") -> Packer:
    return processing(kind, pool_token).packer()


def new_embedder(
    kind: str = "qwen2_vl", *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, freeze_vision: bool = False
) -> Embedder:
    """An Embedder of its own, for tests that change it."""
    vocabulary = len(processing(kind).tokenizer)
    model = load_backbone(str(model_folder(kind)), dtype=dtype, attention=attention, vocabulary=vocabulary)
    return Embedder(model, freeze_vision=freeze_vision)


@cache
def embedder(kind: str = "qwen2_vl", attention: str = "sdpa") -> Embedder:
    """A shared Embedder in eval mode. Read only."""
    return new_embedder(kind, attention=attention, freeze_vision=True).eval()


def export(folder: Path, kind: str = "qwen2_vl") -> Path:
    """A folder as tools/convert_ckpt.py leaves it, as far as Embedder.from_pretrained looks."""
    source = model_folder(kind)
    made = processing(kind)
    made.save(folder, embedder(kind).model.config)
    shutil.copy(source / "model.safetensors", folder)
    return folder


def pack(
    dialogues: Sequence[Dialogue], histories: Sequence[bool] | bool, kind: str = "qwen2_vl", pool: str = "<|emb|>"
) -> PackedBatch:
    """One row of query dialogues in their order."""
    flags = [histories] * len(dialogues) if isinstance(histories, bool) else histories
    sides = [
        Side(QUERY, dialogue, history, np.zeros((len(dialogue.turns), 3), np.int64))
        for dialogue, history in zip(dialogues, flags, strict=True)
    ]
    return packer(kind, pool).pack(sides, replace_broken=False)


def picture(seed: int, width: int = 84, height: int = 84) -> Image.Image:
    """Coloured noise, coarse enough to survive resizing."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


# ---- the stock model on a prompt by itself; shares no code with the package under test


def stock_model(kind: str, dtype: torch.dtype) -> Any:
    """A stock model of its own."""
    return AutoModel.from_pretrained(str(model_folder(kind)), dtype=dtype, attn_implementation="eager").eval()


@cache
def _stock(kind: str) -> tuple[Any, Any, Any]:
    folder = str(model_folder(kind))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|emb|>"], special_tokens=True)
    model = stock_model(kind, torch.float32).requires_grad_(False)
    return model, tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder)


def stock_embedding(kind: str, prompt: str, images: Sequence[Image.Image], model: Any = None) -> torch.Tensor:
    """Unit-length state of the prompt's last token, [D]; `{image}` stands for a picture in the prompt.

    With a `model` from `stock_model` it carries a graph.
    """
    frozen, tokenizer, image_processor = _stock(kind)
    model = model or frozen
    extra: dict[str, torch.Tensor] = {}
    if images:
        size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
        pixels = image_processor(images=list(images), size=size, return_tensors="pt")
        extra = {"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["image_grid_thw"]}
        for grid in pixels["image_grid_thw"]:
            marks = "<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>"
            prompt = prompt.replace("{image}", marks, 1)
    ids_1L = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if images:
        extra["mm_token_type_ids"] = (ids_1L == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    model.rope_deltas = None
    out = model(input_ids=ids_1L, use_cache=False, **extra)
    return torch.nn.functional.normalize(out.last_hidden_state[0, -1], dim=-1)


def stock_dialogue(kind: str, pool: str, dialogue: Dialogue, history: bool, model: Any = None) -> list[torch.Tensor]:
    """The stock model's embedding of each turn: alone, or with the turns before it."""
    pictures: list[Any] = list(dialogue.images)
    answer = pool if pool == "<|im_end|>" else f"{pool}<|im_end|>"
    embeddings = []
    for last in range(len(dialogue.turns)):
        prompt = OPENING + "{image}" * len(pictures)
        turns = dialogue.turns[: last + 1] if history else dialogue.turns[last : last + 1]
        for j, text in enumerate(turns):
            if j:
                prompt += f"{answer}\n<|im_start|>user\n"
            newline = "\n" if pictures and text and j == 0 else ""
            prompt += f"{newline}{text}<|im_end|>\n<|im_start|>assistant\n"
        embeddings.append(stock_embedding(kind, prompt + pool, pictures, model))
    return embeddings
