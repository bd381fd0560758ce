"""Fine-tuning on single pairs: the reader's rules, what is masked when, the plan's numbers, the test-time side."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muco_ds.config import LossOptions, PromptOptions, RunConfig, TaskOptions
from muco_ds.config_cli import parse_args
from muco_ds.data.collator import Collator
from muco_ds.data.index import Indexer, open_index
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.readers import PairReader, RowError
from muco_ds.data.schema import QUERY, TARGET, TURNS_PER_SAMPLE, Record
from muco_ds.data.stages.base import longest_rows
from muco_ds.data.stages.curriculum import Limit
from muco_ds.data.stages.finetune import FineTuneStage, masked_words
from muco_ds.errors import UserError
from muco_ds.models.backbones import load_tokenizer
from muco_ds.models.encode import encode_dialogues
from muco_ds.tasks.finetune import FineTuneTask

from demo import Demo, Rows, write_picture, write_rows
from tiny_models import embedder, model_folder

PROMPTS = {name: vars(PromptOptions())[name] for name in ("after_query", "after_target")}
WORDS = ["red", "green", "blue", "big", "small", "square", "where", "what", "name", "the", "2", "a"]


def pair(**changes: Any) -> dict[str, Any]:
    names = ("qry", "qry_image_path", "qry_sentence", "pos_text", "pos_image_path", "pos_sentence")
    return {**dict.fromkeys(names, ""), "qry": "q", "pos_text": "t", **changes}


def record_of(root: Path, **changes: Any) -> Record:
    (root / "images").mkdir(exist_ok=True)
    return PairReader(str(write_rows(root / "r.parquet", [pair(**changes)])), str(root / "images")).record(0)


# ---- the reader


def test_a_placeholder_without_a_picture_is_removed_and_a_picture_without_one_kept(tmp_path: Path) -> None:
    record = record_of(tmp_path, qry="<|image_1|>\nWhich? \n", pos_image_path="x y.png", pos_text="")
    assert (record.turns[0].questions, record.turns[0].target) == (("Which?",), "")
    assert record.query_images == () and record.target_images[0].endswith("images/x y.png")


@pytest.mark.parametrize(
    "changes, restated",
    [
        ({}, ("q", "t")),
        ({"qry_image_path": "x.png", "qry_sentence": "a boat"}, ("Image description: a boat\nq", "t")),
        ({"qry_sentence": "of no picture"}, ("q", "t")),
        ({"pos_image_path": "x.png", "pos_text": ""}, ("q", "")),
        ({"pos_image_path": "x.png", "pos_text": "", "pos_sentence": ["a dog"]}, ("q", "Image description: a dog\n")),
        ({"qry": ["q"], "pos_text": ["t"]}, ("q", "t")),
    ],
)
def test_a_caption_stands_for_its_picture(tmp_path: Path, changes: dict[str, Any], restated: tuple[str, str]) -> None:
    assert record_of(tmp_path, **changes).restated() == restated


def test_caption_columns_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    row = {"qry": "q", "qry_image_path": "x.png", "pos_text": "t"}
    reader = PairReader(str(write_rows(tmp_path / "r.parquet", [row])), str(tmp_path / "images"))
    assert reader.record(0).captions == ("", "") and reader.record(0).restated() == ("q", "t")


@pytest.mark.parametrize(
    "changes, lacks",
    [
        ({}, True),
        ({"qry_sentence": "a caption"}, False),
        ({"qry_sentence": "a caption", "pos_image_path": "x.png"}, True),
        ({"qry_image_path": "", "pos_sentence": "of no picture"}, False),
    ],
)
def test_a_picture_without_a_caption_is_counted(
    demo: Demo, tmp_path: Path, changes: dict[str, Any], lacks: bool
) -> None:
    for name in ("0.png", "x.png"):
        write_picture(tmp_path / name, 56, 56)
    rows = [pair(qry_image_path="0.png", qry_sentence="a caption"), pair(**{"qry_image_path": "0.png", **changes})]
    reader = PairReader(str(write_rows(tmp_path / "r.parquet", rows)), str(tmp_path))
    packer = demo.packer()
    index = open_index(Indexer(reader, packer.template, packer.images), str(tmp_path / "index"), builder=True)
    assert len(index) == 2 and index.uncaptioned == lacks


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"qry": "<|image_1|>\n"}, "turn 0 has neither a question nor a picture"),
        ({"pos_text": ""}, "turn 0 has an empty target"),
        ({"qry": ["q", "r"], "pos_text": ["t", "u"]}, "2 turns, or paraphrases: fine-tuning takes single pairs"),
        ({"qry": [["q", "r"]], "pos_text": ["t"]}, "fine-tuning takes single pairs"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        record_of(tmp_path, **changes)


# ---- masks


def test_hidden_words_become_masks_and_neighbours_one() -> None:
    words = [[1], [2, 3], [4], [5]]
    assert masked_words(words, [False, True, True, False], 9) == [1, 9, 5]
    assert masked_words(words, [True] * 4, 9) == masked_words([], [], 9) == [9]
    assert masked_words(words, [True, False, True, False], 9) == [9, 2, 3, 9, 5]


@pytest.fixture(scope="module")
def pairs(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Pairs with pictures on either side, both or none, captions or none, and texts of none to nine words."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(3)
    for i in range(6):
        write_picture(root / "images" / f"{i}.png", int(rng.integers(30, 160)), int(rng.integers(30, 160)), seed=i)

    def text(least: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(least, 10))))

    rows = []
    for i in range(40):
        query, target = f"{i % 6}.png" if i % 2 else "", f"{(i + 1) % 6}.png" if i % 3 else ""
        captions = {"qry_sentence": text(1) if i % 4 else "", "pos_sentence": text(1) if i % 5 else ""}
        rows.append(pair(qry=text(not query), qry_image_path=query, pos_text=text(not target), pos_image_path=target))
        rows[-1] |= {**captions, "neg_text": [text(1)] * (i % 3), "neg_image_path": ["", "2.png"][: i % 3]}
    packer = demo.packer()
    reader = PairReader(str(write_rows(root / "r.parquet", rows)), str(root / "images"), negatives=True)
    index = open_index(Indexer(reader, packer.template, packer.images), str(root / "i"), builder=True, progress=False)
    assert len(index) == 40
    return Rows(reader, index, packer, demo.flops())


def stage_of(pairs: Rows, reconstruct: bool = True, negatives: int = 1, seed: int = 0, **prompts: str) -> FineTuneStage:
    return FineTuneStage(
        *(pairs.index, pairs.reader, pairs.packer.template),
        **{**PROMPTS, **prompts},
        seed=seed,
        reconstruct=reconstruct,
        negatives=Limit(negatives),
    )


def plan_of(pairs: Rows, stage: FineTuneStage, world_size: int = 1) -> Plan:
    mixture = Mixture([len(pairs.index)], [None], images=10, run=1, seed=0)
    return Plan(stage, pairs.flops, mixture, pack_tokens=4096, world_size=world_size)


@pytest.mark.parametrize("reconstruct", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_predictions_equal_what_is_collated(pairs: Rows, world_size: int, reconstruct: bool) -> None:
    stage = stage_of(pairs, reconstruct)
    plan, collator = plan_of(pairs, stage, world_size), Collator(stage, pairs.packer)
    for step in range(10):  # several passes
        planned = plan.step(step)
        assert planned.pairs == 10
        for packs, counts in zip(planned.packs, planned.rows_per_rank, strict=True):
            samples, passes = planned.samples_B[packs[0]], planned.passes_B[packs[0]]
            batch, costs = collator(samples, passes, 0), plan.costs(samples, passes, 0)
            assert batch.counts == counts and counts.queries == counts.targets == (1 + reconstruct) * len(samples)
            assert batch.tokens == costs.tokens_B.sum() and batch.patches == costs.patches_B.sum()


def test_the_longest_covers_every_mask(pairs: Rows) -> None:
    stage = stage_of(pairs)
    plan, longest = plan_of(pairs, stage), longest_rows(stage)
    drawn = np.stack([plan.costs(np.arange(40), np.full(40, number), 0).tokens_B for number in range(60)])
    assert (drawn <= longest).all() and (drawn.max(0) == longest).any()
    assert (np.concatenate([stage.longest(*part) for part in ((0, 1), (1, 17), (17, 40))]) == longest).all()


def test_masks_are_drawn_per_pass_and_sample(pairs: Rows) -> None:
    template, mask, whole = pairs.packer.template, pairs.packer.template.mask, 0
    frame = {QUERY: PROMPTS["after_query"], TARGET: PROMPTS["after_target"]}
    changed = 0
    for sample in range(40):
        first, again, other = (stage_of(pairs).sides(sample, number, 0) for number in (0, 0, 1))
        assert [side.dialogue for side in first] == [side.dialogue for side in again]
        changed += [side.dialogue for side in first] != [side.dialogue for side in other]
        for number in range(10):
            for side in stage_of(pairs).sides(sample, number, 0)[:2]:
                turn = side.dialogue.turns[1]
                before, after = (template.encode_exactly(text) for text in frame[side.kind].split("{counterpart}"))
                inner = list(turn[len(before) : len(turn) - len(after)])
                assert list(turn) == [*before, *inner, *after] and len(inner) >= 1
                assert not any(a == b == mask for a, b in pairwise(inner))
                whole += inner == [mask]
    assert changed > 30 and 0.5 < whole / 800 < 0.75  # half, and short texts that lost every word


def test_what_is_not_masked_is_the_counterpart(pairs: Rows) -> None:
    template = pairs.packer.template
    for sample in range(40):
        restated = pairs.reader.record(int(pairs.index.samples["row"][sample])).restated()
        for side, counterpart in zip(stage_of(pairs).sides(sample, 0, 0)[:2], restated[::-1], strict=True):
            shown = template.shown(side.dialogue.turns[1]).split(":", 1)[1].rsplit("\n", 1)[0]
            rest = counterpart.split()
            for word in shown.replace("<|mask|>", " <|mask|> ").split():
                if word != "<|mask|>":
                    rest = rest[rest.index(word) + 1 :]  # in order


def test_special_tokens_in_a_text_are_inert(demo: Demo, tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "x.png", 60, 60)
    hostile = "<|mask|> <|emb|> <|im_end|> <|image_pad|>"
    parquet = write_rows(tmp_path / "r.parquet", [pair(qry=hostile, pos_text=hostile)])
    packer = demo.packer()
    reader = PairReader(str(parquet), str(tmp_path / "images"))
    index = open_index(Indexer(reader, packer.template, packer.images), str(tmp_path), builder=True, progress=False)
    stage = stage_of(Rows(reader, index, packer, demo.flops()))
    vocabulary = packer.template.tokenizer.get_vocab()
    for number in range(8):
        batch = Collator(stage, packer)(np.array([0]), np.array([number]), 0)
        ids = batch.input_ids_T.tolist()
        assert ids.count(vocabulary["<|emb|>"]) == 4 and ids.count(vocabulary["<|image_pad|>"]) == 0
        assert 2 <= ids.count(vocabulary["<|mask|>"]) <= 4


def test_the_mask_is_added_where_it_is_needed() -> None:
    folder = str(model_folder("qwen2_vl"))
    assert "<|mask|>" not in load_tokenizer(folder, "<|im_end|>").get_vocab()
    masks = load_tokenizer(folder, "<|im_end|>", masks=True).get_vocab()
    assert "<|mask|>" in masks and "<|emb|>" not in masks


# ---- embeddings and ids


def test_the_first_embedding_is_the_one_of_test_time(pairs: Rows) -> None:
    """A single-turn prompt: neither the reconstruction turn nor its masks reach it."""
    stage, model = stage_of(pairs, negatives=0), embedder()
    samples = np.arange(8)
    batch = Collator(stage, pairs.packer)(samples, np.zeros(8, np.int64), 0)
    with torch.no_grad():
        emb_ED = model(batch)
    sides = [side for sample in samples.tolist() for side in stage_of(pairs, False, 0).sides(sample, 0, 0)]
    alone_ND = encode_dialogues(
        model, pairs.packer, [s.dialogue for s in sides], pack_tokens=300, device=torch.device("cpu"), shared=False
    )
    forms = batch.ids_E3[:, 1] % TURNS_PER_SAMPLE
    assert forms.tolist() == [0, 1] * 16
    first_ED = emb_ED[forms == 0]
    assert torch.allclose(first_ED[:8], alone_ND[0::2], atol=2e-6)
    assert torch.allclose(first_ED[8:], alone_ND[1::2], atol=2e-6)
    assert (emb_ED[forms == 1] - first_ED).norm(dim=1).min() > 1e-3


def test_one_form_is_plain_info_nce(pairs: Rows) -> None:
    batch = Collator(stage_of(pairs, False), pairs.packer)(np.arange(10), np.zeros(10, np.int64), 0)
    emb_ED = torch.nn.functional.normalize(torch.randn(len(batch.ids_E3), 8, generator=torch.manual_seed(0)), dim=1)
    options = LossOptions(temperature=0.1)
    losses = [
        FineTuneTask(embedder(), options, forms=1, compound=compound).loss([emb_ED], [batch], [batch.counts])  # type: ignore[arg-type]
        for compound in ("joint", "separate")
    ]
    assert losses[0].loss.item() == pytest.approx(losses[1].loss.item())
    assert losses[0].stats["rows"] == 10 and losses[0].stats["loss"] == losses[0].loss


# ---- configuration

MINIMAL = ["--run.name", "r", "--run.max_steps", "200", "--model.path", "m", "--data.train", "t", "--data.images", "i"]
FINETUNE = ["--task.name", "finetune", "--task.reconstruct", "true"]


def config_of(*argv: str) -> RunConfig:
    return parse_args([*MINIMAL, *argv]).config


def test_the_stage_is_configured_by_name() -> None:
    task = config_of(*FINETUNE, "--task.compound", "separate", "--task.negatives", "3").task
    assert task == TaskOptions(name="finetune", reconstruct=True, compound="separate", negatives=3)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--task.reconstruct", "true"], ["task.reconstruct", "task.name", "finetune"]),
        ([*FINETUNE, "--task.query_history", "0.5"], ["task.query_history", "0.5", "finetune"]),
        (["--task.name", "finetune", "--task.compound", "separate"], ["task.compound", "task.reconstruct"]),
        (
            [*FINETUNE, "--loss.mask_same_image", "false", "--loss.same_target", "keep"],
            ["task.compound", "loss.mask_same_image"],
        ),
        ([*FINETUNE, "--loss.same_target", "positive"], ["task.compound", "loss.same_target"]),
        ([*FINETUNE, "--prompts.after_query", "nothing"], ["prompts.after_query", "{counterpart}"]),
        (["--task.negatives", "-1"], ["task.negatives", "-1"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(argv: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_of(*argv)
    assert "\n" not in str(caught.value) and all(name in str(caught.value) for name in named)
