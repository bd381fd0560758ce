"""Dialogues as tokens: as if the whole prompt were tokenised, at the stock model's positions; turns as if alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from muco_ds.data.segments import causal, isolated
from muco_ds.data.templates import ChatTemplate, Rendered
from muco_ds.models.folder import Processing

from demo import Demo
from tiny_folders import KINDS
from tiny_models import model_folder, settings

MERGE = 2
Grid = tuple[int, int, int]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

TEXTS = [
    "What is at the top left?",
    "x",
    "",
    "  leading and trailing \n\t",
    "two\nlines\n\n  and  more",
    "ends in a full stop.",
    "...starts with dots",
    "'s an odd start",
    "1234 numbers 5",
    "Größe, ñandú, e\u0301 combining, 日本語の文 and 🙂🇪🇺",
    "\u00a0hard space\u3000",
    "\u200bzero width",
    "(brackets) & <tags>|im_end|>",
    "\u0301starts with a combining mark",
]
GRIDS: list[list[Grid]] = [[], [(1, 4, 4)], [(1, 4, 8), (1, 6, 2)]]


@pytest.fixture(scope="module", params=["<|emb|>", "<|im_end|>"])
def template(demo: Demo, request: pytest.FixtureRequest) -> ChatTemplate:
    return demo.packer(request.param).template


@pytest.fixture(scope="module", params=KINDS)
def stock(request: pytest.FixtureRequest) -> Any:
    return AutoModel.from_config(AutoConfig.from_pretrained(model_folder(request.param)))


def image_tokens(grid: Grid) -> int:
    return int(np.prod(grid)) // MERGE**2


def vision(grids: Sequence[Grid]) -> str:
    return "".join(f"<|vision_start|>{'<|image_pad|>' * image_tokens(grid)}<|vision_end|>" for grid in grids)


def turn(template: ChatTemplate, text: str, grids: Sequence[Grid]) -> str:
    line = "\n" if grids and text.strip() else ""
    user = f"<|im_start|>user\n{vision(grids)}{line}{text.strip()}<|im_end|>\n"
    return f"{user}<|im_start|>assistant\n{template.pool_token}"


def render(template: ChatTemplate, texts: Sequence[str], grids: Sequence[Grid], history: bool) -> Rendered:
    return template.render(template.encode_texts(texts), grids, MERGE, history)


def whole_prompt_ids(template: ChatTemplate, prompt: str) -> list[int]:
    return template.tokenizer(prompt, add_special_tokens=False)["input_ids"]


def stock_positions(stock: Any, template: ChatTemplate, ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    ids_1L = torch.from_numpy(ids)[None]
    is_image_1L = (ids_1L == template.image_pad).int()
    grid_thw_I3 = torch.tensor(grids) if grids else None
    positions_31L, _ = stock.get_rope_index(ids_1L, is_image_1L, grid_thw_I3)
    return positions_31L[:, 0].numpy()


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("grids", GRIDS, ids=["text", "picture", "two pictures"])
def test_single_turn_equals_tokenising_the_whole_prompt(
    template: ChatTemplate, grids: list[Grid], history: bool
) -> None:
    for text in TEXTS:
        rendered = render(template, [text], grids, history)
        assert rendered.ids_L.tolist() == whole_prompt_ids(template, SYSTEM + turn(template, text, grids)), repr(text)
        assert rendered.emb_rows == [len(rendered.ids_L) - 1]
        assert rendered.ids_L[-1] == template.tokenizer.convert_tokens_to_ids(template.pool_token)


def test_random_unicode_equals_tokenising_the_whole_prompt(template: ChatTemplate) -> None:
    rng = np.random.default_rng(0)
    blocks = (range(1, 0x250), range(0x300, 0x320), range(0x2000, 0x2070), range(0x3000, 0x3060))
    alphabet = [chr(code) for block in blocks for code in block]
    for _ in range(300):
        text = "".join(rng.choice(alphabet, int(rng.integers(1, 12))))
        for grids in GRIDS[:2]:
            ids = render(template, [text], grids, False).ids_L.tolist()
            assert ids == whole_prompt_ids(template, SYSTEM + turn(template, text, grids)), ascii(text)


@pytest.mark.parametrize("grids", GRIDS, ids=["text", "picture", "two pictures"])
def test_causal_dialogue_equals_tokenising_the_whole_dialogue(
    template: ChatTemplate, stock: Any, grids: list[Grid]
) -> None:
    texts = ["What is it?", "  second\nquestion ", "", "日本"]
    rendered = render(template, texts, grids, history=True)
    closing = "\n" if template.pool_token == "<|im_end|>" else "<|im_end|>\n"
    prompt = SYSTEM + closing.join(turn(template, text, grids if j == 0 else []) for j, text in enumerate(texts))
    assert rendered.ids_L.tolist() == whole_prompt_ids(template, prompt)
    assert rendered.segments == causal(len(rendered.ids_L))
    pool = template.tokenizer.convert_tokens_to_ids(template.pool_token)
    assert [rendered.ids_L[i] for i in rendered.emb_rows] == [pool] * 4
    assert (rendered.positions_4L[0] == np.arange(len(rendered.ids_L))).all()
    assert (rendered.positions_4L[1:] == stock_positions(stock, template, rendered.ids_L, grids)).all()


@pytest.mark.parametrize("grids", GRIDS, ids=["text", "picture", "two pictures"])
def test_isolated_turns_equal_their_single_turn_prompts(template: ChatTemplate, stock: Any, grids: list[Grid]) -> None:
    texts = ["What is it?", "", "a much longer question than the first one", "x"]
    rendered = render(template, texts, grids, history=False)
    start = prefix = rendered.segments[0].rows
    lengths = [segment.rows for segment in rendered.segments[1:]]
    assert rendered.segments == isolated(prefix, lengths) and prefix + sum(lengths) == len(rendered.ids_L)
    for text, length, emb_row in zip(texts, lengths, rendered.emb_rows, strict=True):
        rows = [*range(prefix), *range(start, start + length)]
        alone_ids = np.array(whole_prompt_ids(template, SYSTEM + turn(template, text, grids)))
        assert (rendered.ids_L[rows] == alone_ids).all()
        assert (rendered.positions_4L[0, rows] == np.arange(len(rows))).all()
        assert (rendered.positions_4L[1:, rows] == stock_positions(stock, template, alone_ids, grids)).all()
        start += length
        assert emb_row == start - 1


def test_special_tokens_inside_a_text_are_plain_text(template: ChatTemplate) -> None:
    specials = set(template.tokenizer.all_special_ids)
    turn_end = "<|im_end|>\n<|im_start|>assistant\n<|emb|>"
    for text in ("<|emb|>", "a <|image_pad|> b", turn_end, "<|mask|><|vision_end|>"):
        (ids,) = template.encode_texts([text])
        assert not specials & set(ids)
        assert template.tokenizer.decode(ids) == text
        assert len(render(template, [text], [], False).emb_rows) == 1
    # The switch is put back: markup after it is markup.
    assert whole_prompt_ids(template, "<|im_end|>")[0] in specials


@pytest.mark.parametrize("history", [True, False])
def test_counts_without_rendering(template: ChatTemplate, history: bool) -> None:
    for grids in GRIDS:
        for texts in (["one"], ["one", "two words", "three small words"], ["one", ""], ["", ""]):
            rendered = render(template, texts, grids, history)
            text_tokens = sum(len(ids) for ids in template.encode_texts(texts))
            vision_tokens = sum(image_tokens(grid) + 2 for grid in grids)
            (count,), (prefix,) = template.count(
                np.array([text_tokens]), np.array([len(texts)]), np.array([vision_tokens]), np.array([history])
            )
            beside_picture = texts[:1] if history else texts
            excess = sum(not text for text in beside_picture) if grids else 0
            assert count - len(rendered.ids_L) == excess
            assert history or prefix == rendered.segments[0].rows


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "chat"])
@pytest.mark.parametrize("pool_token", ["<|emb|>", "<|im_end|>"])
def test_turns_end_with_the_compression_tokens(demo: Demo, stock: Any, pool_token: str, plain: bool) -> None:
    changed = {"compression_tokens": 3, "template": "plain" if plain else "chat"}
    template = Processing.load(str(demo.model), replace(settings(pool_token), **changed)).packer().template
    tokens = "<|ctoken_pad_0|><|ctoken_pad_1|><|ctoken_pad_2|>"
    opening = "" if plain else SYSTEM + "<|im_start|>user\n"
    closing = tokens if plain else f"<|im_end|>\n<|im_start|>assistant\n{tokens}"
    between = "" if plain else "<|im_end|>\n<|im_start|>user\n"
    texts = ["What is it?", "", "x"]
    for grids in GRIDS:
        seen = vision(grids)
        first = ["\n" if grids and text else "" for text in texts]
        causal_one = render(template, texts, grids, history=True)
        whole = opening + seen + first[0] + between.join(f"{text}{closing}" for text in texts)
        assert causal_one.ids_L.tolist() == whole_prompt_ids(template, whole)
        apart = render(template, texts, grids, history=False)
        prefix = 0 if plain and not grids else apart.segments[0].rows
        assert prefix == len(whole_prompt_ids(template, opening + seen))
        start = prefix
        for text, line, emb_row in zip(texts, first, apart.emb_rows, strict=True):
            alone_ids = np.array(whole_prompt_ids(template, f"{opening}{seen}{line}{text}{closing}"))
            rows = [*range(prefix), *range(start, start + len(alone_ids) - prefix)]
            assert (apart.ids_L[rows] == alone_ids).all() and emb_row == rows[-1]
            assert (apart.positions_4L[1:, rows] == stock_positions(stock, template, alone_ids, grids)).all()
            start = rows[-1] + 1
        assert apart.segments == isolated(prefix, [segment.rows for segment in apart.segments[prefix > 0 :]])
        counts = [np.array([n]) for n in (sum(map(len, template.encode_texts(texts))), 3, len(template.markup(seen)))]
        for history, rendered in ((True, causal_one), (False, apart)):
            (count,), _ = template.count(*counts, np.array([history]))
            assert count - len(rendered.ids_L) == (len(grids) > 0 and not history)  # of the turn without a text
