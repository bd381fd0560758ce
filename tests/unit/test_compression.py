"""Conversations as tokens: planned as collated, labels in their places, and answers that see nothing but the tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muco_ds.config import DataOptions, ModelOptions, PromptOptions, RunConfig, RunOptions, TaskOptions, validate
from muco_ds.config_task import Seen
from muco_ds.data.collator import Collator, Packer
from muco_ds.data.compression import ConversationTemplate
from muco_ds.data.conversations import ConversationReader
from muco_ds.data.images import ImageError
from muco_ds.data.index import Indexer, open_index
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.schema import QUERY, Conversation, PackedBatch, Side
from muco_ds.data.segments import SegmentPlan
from muco_ds.data.stages.compress import CompressStage
from muco_ds.data.stages.curriculum import Limit
from muco_ds.errors import UserError
from muco_ds.eval.answers import AnswerValidation, generate
from muco_ds.models import attention
from muco_ds.models.backbones import compression_ids, draw_rows, load_backbone, unknown_compression_ids
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Processing
from muco_ds.models.head import VocabularyHead, vocabulary_head
from muco_ds.models.lora import TrainedRows
from muco_ds.tasks.compress import CompressTask

from demo import Demo, write_picture
from tiny_models import model_folder, settings

TOKENS = 5
SEEN: tuple[Seen, ...] = ("tokens", "prompt", "all", "nothing")


def packer(answers_see: Seen = "tokens", train_questions: bool = False, kind: str = "qwen2_5_vl") -> Packer:
    processing = Processing.load(str(model_folder(kind)), replace(settings(), compression_tokens=TOKENS))
    made, prompts = processing.packer(), PromptOptions()
    made.conversations = ConversationTemplate(
        made.template,
        picture_prompt=prompts.compress_picture,
        text_prompt=prompts.compress_text,
        answers_see=answers_see,
        train_questions=train_questions,
    )
    return made


def model_of(kind: str = "qwen2_5_vl") -> CompressTask:
    path = str(model_folder(kind))
    vocabulary = len(packer(kind=kind).template.tokenizer)
    backbone = load_backbone(path, dtype=torch.float32, attention="sdpa", vocabulary=vocabulary)
    head = vocabulary_head(backbone, path, trained=True)
    return CompressTask(Embedder(backbone, freeze_vision=False), head).eval()


def packed(packer: Packer, *conversations: Conversation) -> PackedBatch:
    sides = [Side(QUERY, conversation, True, np.zeros((0, 3), np.int64)) for conversation in conversations]
    return packer.pack(sides, replace_broken=False)


def picture(seed: int) -> Image.Image:
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    return Image.fromarray(noise_HWC)


@pytest.fixture(scope="module")
def rows(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConversationReader, Any]:
    """Ragged conversations: pictures of many sizes, several, or none; with context and without."""
    root, rng = tmp_path_factory.mktemp("conversations"), np.random.default_rng(0)
    for i in range(6):
        write_picture(root / "images" / f"{i}.png", int(rng.integers(30, 200)), int(rng.integers(30, 200)), seed=i)
    lines = []
    for i in range(30):
        texts = [
            " ".join(rng.choice(["red", "a", "where", "7"], int(rng.integers(1, 9)))) for _ in range(2 * (i % 4 + 1))
        ]
        talk = [{"from": ("human", "gpt")[j % 2], "value": text} for j, text in enumerate(texts)]
        row: dict[str, Any] = {"image": [f"{i % 6}.png", f"{(i + 1) % 6}.png"][: 1 + i % 2], "conversations": talk}
        if i % 3 == 0:
            row |= {"image": None}
        if i % 3 == 0 or i % 5 == 1:
            row |= {"compression": json.dumps({"query": "some words of context"})}
        lines.append(json.dumps(row))
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    reader = ConversationReader(str(root / "rows.jsonl"), str(root / "images"))
    template = packer()
    index = open_index(
        Indexer(reader, template.template, template.images), str(root / "i"), builder=True, progress=False
    )
    assert len(index) == 30
    return reader, index


def stage_of(rows: tuple[ConversationReader, Any], packer: Packer, turns: int = 99) -> CompressStage:
    reader, index = rows
    assert packer.conversations is not None
    return CompressStage(index, reader, packer.conversations, seed=0, turns=Limit(turns))


@pytest.mark.parametrize("train_questions", [False, True])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("turns", [2, 99])
def test_predictions_equal_what_is_collated(
    rows: tuple[ConversationReader, Any], seen: Seen, train_questions: bool, turns: int
) -> None:
    made = packer(seen, train_questions)
    stage = stage_of(rows, made, turns)
    samples_B = np.arange(len(stage.index))
    sizes = stage.sizes(samples_B, np.zeros_like(samples_B), 0)
    collator = Collator(stage, made)
    for sample in samples_B:
        pack = collator(np.array([sample]), np.array([0]), 0)
        assert pack.tokens == sizes.tokens_B[sample] == stage.longest(sample, sample + 1)[0]
        assert pack.counts.queries == len(pack.emb_index_E) == sizes.predicted_B[sample] == sizes.rows_B3[sample, 0]
        assert pack.segments.cu_k_S1[-1] == pack.tokens + sizes.repeated_B[sample]
        attended = pack.segments.dense_mask().sum().item() - pack.tokens / 2  # half of the diagonal
        assert attended == pytest.approx(sizes.attention_B[sample])
        assert pack.patches == sizes.patches_B[sample]
        (side,) = stage.sides(int(sample), 0, 0)
        assert isinstance(side.dialogue, Conversation) and len(side.dialogue.answers) == sizes.pairs_B[sample] <= turns


def test_what_is_predicted_are_the_answers_and_their_ends() -> None:
    made = packer()
    talk = Conversation(("What is it?", "And here?"), ("a red ring", "nothing"), (picture(0),), "beside it")
    pack = packed(made, talk, replace(talk, images=()))
    assert pack.labels_E is not None and pack.ids_E3.shape == (0, 3)
    shown = made.template.tokenizer.decode(pack.labels_E.tolist())
    assert shown == "a red ring<|im_end|>nothing<|im_end|>" * 2
    assert torch.equal(pack.input_ids_T[pack.emb_index_E + 1], pack.labels_E)
    whole = made.template.tokenizer.decode([t for t in pack.input_ids_T.tolist() if t != made.template.image_pad])
    prompts, tokens = PromptOptions(), "".join(f"<|ctoken_pad_{i}|>" for i in range(TOKENS))
    said = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\na red ring<|im_end|>\n"
    said += "<|im_start|>user\nAnd here?<|im_end|>\n<|im_start|>assistant\nnothing<|im_end|>"
    first = f"<|vision_start|><|vision_end|>\nbeside it\n{prompts.compress_picture}{tokens}{said}"
    assert whole == f"{first}beside it\n{prompts.compress_text}{tokens}{said}"


@contextmanager
def kept_tokens(pack: PackedBatch, kept: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys and values of the compression rows in every layer: recorded where `kept` is empty, else put in place."""
    ids = pack.input_ids_T
    rows_K = torch.isin(ids, torch.tensor(compression_ids(packer().template.tokenizer))).nonzero()[:, 0]
    replacing, turn = bool(kept), iter(kept)
    plain = attention._FUNCTIONS["sdpa"]

    def wrapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan, *rest: Any) -> torch.Tensor:
        if not plan.causal:
            return plain(q, k, v, plan, *rest)  # the vision tower's
        if not replacing:
            kept.extend((k[rows_K], v[rows_K]))
        else:
            k, v = k.index_copy(0, rows_K, next(turn)), v.index_copy(0, rows_K, next(turn))
        return plain(q, k, v, plan, *rest)

    with monkeypatch.context() as patched:
        patched.setitem(attention._FUNCTIONS, "sdpa", wrapped)
        yield


@pytest.mark.parametrize(("seen", "differ"), [("tokens", False), ("prompt", True), ("all", True), ("nothing", False)])
@torch.no_grad()
def test_answers_see_the_picture_through_the_tokens_alone(
    seen: Seen, differ: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = packer(seen), model_of()
    talk = Conversation(("What is it?", "x"), ("a red ring", "y"), (picture(0),))
    packs = [packed(made, replace(talk, images=(picture(seed),))) for seed in (0, 1)]
    free = [model.embedder(pack) for pack in packs]
    assert torch.equal(*free) == (seen == "nothing")  # through the tokens the picture does matter
    kept: list[torch.Tensor] = []
    states = []
    for pack in packs:
        with kept_tokens(pack, kept, monkeypatch):
            states.append(model.embedder(pack))
    assert len(kept) == 2 * model.embedder.model.config.text_config.num_hidden_layers
    assert torch.equal(states[0], free[0])
    assert torch.equal(*(model.head(state, None) if not differ else state for state in states)) != differ
    assert torch.equal(*states) != differ


@torch.no_grad()
def test_an_unfinished_answer_asks_for_what_comes_next() -> None:
    made, model = packer(), model_of()
    talk = Conversation(("What is it?",), ("a red ring with a hole",), (picture(0),))
    whole = packed(made, talk)
    logits_ED = model.embedder(whole)
    (ids,) = made.template.encode_texts([str(talk.answers[0])])
    for length in range(len(ids) + 1):
        pack = packed(made, replace(talk, answers=(tuple(ids[:length]),), unfinished=True))
        assert len(pack.emb_index_E) == 1
        torch.testing.assert_close(model.embedder(pack)[0], logits_ED[length], rtol=1e-4, atol=1e-4)
        assert int(model(pack, predict=True)) == int(model.head(logits_ED[length : length + 1], None))


def test_answers_are_continued_until_they_end() -> None:
    made = packer()
    (end,) = made.template.markup("<|im_end|>")
    said = [made.template.encode_texts([text])[0] for text in ("blue square", "a big ring", "no end " * 9)]
    script = [[*ids, end, said[0][0]] if n < 2 else [*ids] for n, ids in enumerate(said)]
    talks = [Conversation((f"question {n}", "later"), ("?", "?"), (picture(n),)) for n in range(3)]
    seen: list[int] = []

    def model(pack: PackedBatch, *, predict: bool) -> torch.Tensor:
        assert predict and pack.counts.queries == 3
        seen.append(pack.tokens)
        step = len(seen) - 1
        return torch.tensor([ids[step] if step < len(ids) else end for ids in script])

    answers = generate(model, made, talks, torch.device("cpu"), longest=8)
    assert answers[:2] == ["blue square", "a big ring"] and "no end no end".startswith(answers[2].strip()[:6])
    assert len(seen) == 8  # the third never ended
    assert all(b > a for a, b in pairwise(seen))


@torch.no_grad()
def test_validation_is_the_mean_over_all_held_out_tokens(rows: tuple[ConversationReader, Any], demo: Demo) -> None:
    made, model = packer(), model_of()
    stage = stage_of(rows, made)
    mixture = Mixture([len(stage.index)], [None], images=12, run=12, seed=0)
    plan = Plan(stage, demo.flops(), mixture, pack_tokens=400, world_size=1)
    found = AnswerValidation(plan, Collator(stage, made), answered=2)(model, torch.device("cpu"))
    step = plan.step(0)
    assert len(step.packs[0]) > 1
    total, tokens = 0.0, 0
    for sample in step.samples_B:
        pack = made.pack(stage.sides(int(sample), 0, 0), replace_broken=False)
        total, tokens = total + float(model(pack)), tokens + pack.counts.queries
    assert found.values["val/loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found.values["val/replaced_images"] == 0
    assert found.values["val/perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-5)
    table = str(found.shown["val/answers"]).splitlines()
    assert len(table) == 4 and table[0] == "| question | from the tokens | true |"
    (first,) = stage.sides(int(step.samples_B[0]), 0, 0)
    assert isinstance(first.dialogue, Conversation)
    assert table[2].startswith(f"| {first.dialogue.questions[0]} |") and str(first.dialogue.answers[0]) in table[2]


@torch.no_grad()
def test_validation_counts_what_does_not_decode_and_names_what_changed(
    rows: tuple[ConversationReader, Any], demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = packer(), model_of()
    stage = stage_of(rows, made)
    mixture = Mixture([len(stage.index)], [None], images=9, run=9, seed=0)
    plan = Plan(stage, demo.flops(), mixture, pack_tokens=400, world_size=1)
    validation = AnswerValidation(plan, Collator(stage, made))
    pictured = sum(len(validation.sides[place].dialogue.images) for place in range(9))
    monkeypatch.setattr(made.images, "patches", refuse)
    assert validation(model, torch.device("cpu")).values["val/replaced_images"] == pictured > 0
    record = stage.reader.record
    monkeypatch.setattr(stage.reader, "record", lambda row: replace(record(row), turns=()))
    with pytest.raises(UserError, match=r"data\.train row \d+: has 0 turns, \d were indexed: it changed after"):
        AnswerValidation(plan, Collator(stage, made))


def refuse(_picture: object) -> None:
    raise ImageError("cut off")


def test_only_as_many_answers_as_fit_a_pack(rows: tuple[ConversationReader, Any], demo: Demo) -> None:
    made = packer()
    stage = stage_of(rows, made)
    for pack_tokens, answered in ((250, range(1, 3)), (4000, range(4, 5))):
        mixture = Mixture([len(stage.index)], [None], images=9, run=9, seed=0)
        plan = Plan(stage, demo.flops(), mixture, pack_tokens=pack_tokens, world_size=1)
        assert len(AnswerValidation(plan, Collator(stage, made)).answered) in answered


def test_a_conversation_that_exceeds_a_pack_is_named(rows: tuple[ConversationReader, Any], demo: Demo) -> None:
    stage = stage_of(rows, packer())
    worst = int(np.argmax(stage.longest(0, len(stage.index))))
    mixture = Mixture([len(stage.index)], [None], images=4, run=4, seed=0)
    with pytest.raises(UserError, match=rf"data\.train row {worst} needs up to \d+ tokens .* raise batch\.pack_tokens"):
        Plan(stage, demo.flops(), mixture, pack_tokens=60, world_size=1)


def test_a_row_that_changed_is_named(rows: tuple[ConversationReader, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = packer()
    stage = stage_of(rows, made)
    record = stage.reader.record(1)
    monkeypatch.setattr(stage.reader, "record", lambda _row: replace(record, turns=record.turns[:1]))
    with pytest.raises(ValueError, match=r"data\.train row 1: has 1 turns, 2 were indexed"):
        Collator(stage, made)(np.array([1]), np.array([0]), 0)


def test_a_tied_head_of_trained_rows_is_the_merged_table() -> None:
    table = torch.nn.Embedding(12, 4)
    rows = TrainedRows(table, [3, 7])
    with torch.no_grad():
        rows.trained_rows += 1.0
    merged_VD = table.weight.detach().index_copy(0, torch.tensor([3, 7]), rows.trained_rows.detach()).requires_grad_()
    head = VocabularyHead(table.weight, rows.trained_rows, rows.ids_R)
    state_ND, label_N = torch.randn(6, 4), torch.tensor([3, 0, 7, 7, 11, 1])
    loss = head(state_ND, label_N)
    expected = torch.nn.functional.cross_entropy(state_ND @ merged_VD.T, label_N, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, rows.trained_rows)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, merged_VD)[0][[3, 7]])
    assert torch.equal(head(state_ND, None), (state_ND @ merged_VD.T).argmax(-1))


def test_unknown_tokens_begin_with_distinct_rows_like_the_others() -> None:
    path = str(model_folder("qwen2_vl"))
    tokenizer = Processing.load(path, replace(settings(), compression_tokens=32)).tokenizer
    rows = unknown_compression_ids(path, tokenizer)
    assert rows == compression_ids(tokenizer) and len(rows) == 32
    model = load_backbone(path, dtype=torch.float32, attention="sdpa", vocabulary=len(tokenizer))
    before_VD = model.get_input_embeddings().weight.detach().clone()
    draw_rows(model, rows, seed=1)
    after_VD = model.get_input_embeddings().weight.detach()
    others = [row for row in range(len(before_VD)) if row not in rows]
    assert torch.equal(after_VD[others], before_VD[others])
    drawn_RD = after_VD[rows]
    distances = torch.cdist(drawn_RD, drawn_RD) + 9 * torch.eye(32)
    assert distances.min() > 0.5 * before_VD.std() * drawn_RD.shape[1] ** 0.5
    assert float(drawn_RD.std() / before_VD[: min(rows)].std()) == pytest.approx(1, abs=0.1)
    draw_rows(model, rows, seed=1)
    assert torch.equal(model.get_input_embeddings().weight, after_VD)


def test_a_pack_without_conversations_has_a_loss_of_zero_that_reaches_every_weight() -> None:
    model = model_of()
    pack = packer().pack([], replace_broken=False)
    loss = model(pack)
    assert loss.item() == 0 and pack.counts.queries == 0
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing and all(not parameter.grad.any() for parameter in model.parameters())


COMPRESS = TaskOptions(name="coma_compress")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"compression_tokens": 0}}, "model.compression_tokens is 0 but task.name is coma_compress"),
        ({"task": {"name": "coma_match"}, "model": {"compression_tokens": 0}}, "but task.name is coma_match: set it"),
        ({"task": {"name": "muco", "answers_see": "all"}}, "task.answers_see is all"),
        ({"task": {"name": "finetune", "train_questions": True}}, "task.train_questions true but"),
        ({"task": {"reconstruct": True}}, "task.reconstruct is true but task.name is coma_compress"),
        ({"task": {"query_history": 0.0}}, "task.name is coma_compress, whose turns always do: leave both at 1"),
        ({"task": {"name": "coma_match", "turns": 2}}, "task.name is coma_match, whose rows are single pairs"),
        ({"task": {"negatives": 1}}, "task.negatives mean nothing to task.name=coma_compress"),
        ({"task": {"turn_weights": {1: 2.0}}}, "task.turn_weights and task.negatives mean nothing"),
        ({"loss": {"temperature": 0.05}}, "loss.temperature is 0.05 but task.name is coma_compress"),
        ({"loss": {"matryoshka": [8]}}, "loss.matryoshka is [8] but"),
        ({"temperature": {"schedule": "learned"}}, "temperature.schedule is learned but"),
        ({"curriculum": {"steps": 5, "negatives": 0}}, "curriculum.negatives is set but task.name is coma_compress"),
        (
            {"task": {"name": "coma_match"}, "curriculum": {"steps": 5, "turns": 1}},
            "task.name is coma_match, whose rows",
        ),
        ({"model": {"compression_tokens": -1}}, "model.compression_tokens is -1"),
    ],
)
def test_what_a_stage_cannot_use_is_named(sections: dict[str, dict[str, Any]], words: str) -> None:
    config = RunConfig(
        run=RunOptions(name="r", max_steps=200),
        model=ModelOptions(path="m", compression_tokens=8),
        data=DataOptions(train="rows.jsonl", images="images"),
        task=COMPRESS,
    )
    validate(config)
    for section, values in sections.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(UserError) as caught:
        validate(config)
    assert words in str(caught.value)


def test_the_first_turns_grow_with_the_steps(rows: tuple[ConversationReader, Any]) -> None:
    reader, index = rows
    made = packer()
    assert made.conversations is not None
    stage = CompressStage(index, reader, made.conversations, seed=0, turns=Limit(4, first=1, steps=10))
    samples_B = np.arange(len(index))
    turns_B = np.diff(index.samples["turn_end"], prepend=0)
    for step, mean in ((0, 1.0), (5, 2.5), (10, 4.0)):
        used_B = stage.sizes(samples_B, np.zeros_like(samples_B), step).pairs_B
        assert (used_B <= turns_B).all() and used_B.max() <= np.ceil(mean)
        assert used_B[turns_B == 4].mean() == pytest.approx(mean, abs=0.5)
