"""Which turns and how many negatives a step uses: the sampler, the limits that grow, and that all parts agree on it."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muco_ds.build import build_data
from muco_ds.config import RunConfig, TaskOptions, save_config
from muco_ds.config_cli import load_config, parse_args
from muco_ds.config_curriculum import CurriculumOptions
from muco_ds.data.collator import Collator
from muco_ds.data.index import Indexer, open_index
from muco_ds.data.loader import StepDataset, step_batches
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan, spread_steps
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.data.schema import NEGATIVE, QUERY, TARGET, TURNS_PER_SAMPLE, StepBatch
from muco_ds.data.stages.base import longest_rows
from muco_ds.data.stages.curriculum import Limit, first_of_each
from muco_ds.data.stages.finetune import FineTuneStage
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.errors import UserError
from muco_ds.preflight import preflight

from demo import Demo, Rows, mixed_rows, open_data, row, synthetic_index, write_picture, write_rows

WEIGHTS = {1: 0.0, 2: 5.0, 3: 0.5}
GROWING = {"turns": Limit(4, 1, 8), "turn_weights": WEIGHTS, "negatives": Limit(3, 0, 8)}


@pytest.fixture(scope="module")
def ragged(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """One to five turns, none to three negatives, and rows in which the picture is the whole question of a turn."""
    root = tmp_path_factory.mktemp("ragged")
    rows = mixed_rows(root / "images")
    for i, entry in enumerate(rows):
        entry["neg_text"] = [rows[(i + k + 1) % len(rows)]["pos_text"][0] for k in range(i % 4)]
        if i % 3 == 0 and entry["qry_image_path"]:
            entry["qry"][0] = ["<|image_1|>\n"]
    reader = M3TReader(str(write_rows(root / "rows.parquet", rows)), str(root / "images"), negatives=True)
    packer = demo.packer()
    index = open_index(Indexer(reader, packer.template, packer.images), str(root / "i"), builder=True, progress=False)
    assert len(index) == len(rows)
    return Rows(reader, index, packer, demo.flops())


def stage_of(rows: Rows, history: float = 0.5, **options: Any) -> MuCoStage:
    draw = {"query_history": history, "target_history": history}
    return MuCoStage(rows.index, rows.reader, rows.packer.template, seed=0, **draw, **options)


def plan_of(rows: Rows, stage: MuCoStage, world_size: int = 1, pack_tokens: int = 8192) -> Plan:
    mixture = Mixture([len(rows.index)], [None], images=10, run=1, seed=0)
    return Plan(stage, rows.flops, mixture, pack_tokens=pack_tokens, world_size=world_size)


def kinds_drawn(stage: MuCoStage, samples: np.ndarray, number: int, step: int = 0) -> list[list[int]]:
    """Kinds of each sample's turns, in order; in the made-up rows a turn's kind is its place."""
    owner_N, turn_N, _ = stage._drawn(samples, np.full(len(samples), number), step)
    return [turn_N[owner_N == i].tolist() for i in range(len(samples))]


# ---- which turns


def test_turns_are_drawn_by_their_weights_without_replacement(scenes: Rows) -> None:
    """How often each turn is among k of seven is what drawing one after the other gives, worked out over all orders."""
    weights = {0: 0.0, 2: 3.0, 5: 0.25}
    weight_of = np.array([weights.get(kind, 1.0) for kind in range(7)])
    for k in (1, 3):
        expected = np.zeros(7)
        for order in permutations(range(7), k):
            left, chance = weight_of.sum(), 1.0
            for kind in order:
                chance, left = chance * weight_of[kind] / left if weight_of[kind] else 0.0, left - weight_of[kind]
            expected[list(order)] += chance
        stage, samples = stage_of(scenes, turns=Limit(k), turn_weights=weights), np.arange(64)
        drawn = [kinds for number in range(200) for kinds in kinds_drawn(stage, samples, number)]
        assert all(len(set(kinds)) == len(kinds) == k for kinds in drawn)
        counts = np.bincount(np.concatenate(drawn), minlength=7)
        assert counts[0] == 0 and expected[0] == 0
        spread = np.sqrt(len(drawn) * expected[1:] * (1 - expected[1:]))
        assert (np.abs(counts[1:] - len(drawn) * expected[1:]) < 4 * spread).all(), (counts, expected)


def test_every_turn_is_used_unless_something_is_said(scenes: Rows) -> None:
    samples = np.arange(64)
    for options in ({}, {"turns": Limit(7)}, {"turns": Limit(100), "turn_weights": {3: 0.1}}):
        stage = stage_of(scenes, **options)
        assert all(sorted(kinds) == list(range(7)) for kinds in kinds_drawn(stage, samples, 0))
        assert kinds_drawn(stage, samples, 3) == kinds_drawn(stage_of(scenes), samples, 3), "the order does not change"
    without = kinds_drawn(stage_of(scenes, turn_weights={3: 0.0}), samples, 0)
    assert all(sorted(kinds) == [0, 1, 2, 4, 5, 6] for kinds in without)


def test_a_pass_draws_the_same_turns_again_and_the_next_pass_others(scenes: Rows) -> None:
    stage, samples = stage_of(scenes, turns=Limit(3)), np.arange(64)
    first, again, other = (kinds_drawn(stage, samples, number) for number in (0, 0, 1))
    assert first == again and np.mean([set(a) != set(b) for a, b in zip(first, other, strict=True)]) > 0.9
    alone = [kinds_drawn(stage, samples[i : i + 1], 0)[0] for i in range(64)]
    assert alone == first
    assert np.bincount([kinds[0] for kinds in first], minlength=7).min() > 0, "any of them comes first"


def test_both_sides_have_the_same_pairs_once(ragged: Rows) -> None:
    stage = stage_of(ragged, turns=Limit(2), turn_weights=WEIGHTS)
    seen = set()
    for sample in range(40):
        record = ragged.reader.record(int(ragged.index.samples["row"][sample]))
        query, target = stage.sides(sample, 1, 0)[:2]
        assert (query.kind, target.kind) == (QUERY, TARGET) and (query.ids_k3 == target.ids_k3).all()
        turns = (query.ids_k3[:, 1] % TURNS_PER_SAMPLE).tolist()
        assert len(turns) == min(2, len(record.turns) - (len(record.turns) > 1)) and 1 not in turns
        assert target.dialogue.turns == tuple(record.turns[j].target for j in turns)
        assert all(text in record.turns[j].questions for text, j in zip(query.dialogue.turns, turns, strict=True))
        first = ragged.index.turn_bounds(sample)[0]
        assert query.ids_k3[:, 2].tolist() == [ragged.index.turns["target_hash"][first + j] for j in turns]
        seen |= {int(pair) for pair in query.ids_k3[:, 1]}
    assert len(seen) == sum(len(stage.sides(sample, 1, 0)[0].dialogue.turns) for sample in range(40))


# ---- limits that grow


def test_a_limit_goes_on_a_line_from_first_to_last() -> None:
    limit = Limit(7, 1, 100)
    assert [limit.at(step) for step in (0, 25, 50, 75, 100, 10**6)] == [1.0, 2.5, 4.0, 5.5, 7.0, 7.0]
    assert Limit(4).at(0) == Limit(4, 0, 0).at(0) == Limit(4, 4, 50).at(7) == 4.0


def test_its_mean_follows_the_line_and_whole_values_are_not_drawn() -> None:
    samples, limit = np.arange(4000), Limit(7, 1, 100)
    for step in (0, 3, 25, 50, 77, 100):
        drawn = limit.drawn(0, samples, np.zeros(4000, int), step, 0)
        exact = limit.at(step)
        assert set(drawn.tolist()) == {int(np.floor(exact)), int(np.ceil(exact))}
        assert abs(drawn.mean() - exact) < 4 * 0.5 / np.sqrt(4000)
    one, same, other, purpose = (
        limit.drawn(0, samples, np.full(4000, number), 25, which) for number, which in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert (one == same).all() and 0.4 < (one == other).mean() < 0.6 and 0.4 < (one == purpose).mean() < 0.6


def test_the_lowest_keys_of_each_owner_are_kept() -> None:
    owner, key = np.array([0, 0, 0, 2, 2, 3]), np.array([3.0, 1.0, 2.0, 9.0, 8.0, 5.0])
    assert first_of_each(owner, key, 2).tolist() == [1, 2, 4, 3, 5]
    assert first_of_each(owner, key, np.array([1, 1, 1, 2, 2, 0])).tolist() == [1, 4, 3]


def test_a_curriculum_starts_easy_and_ends_at_the_task(ragged: Rows) -> None:
    plan, bare = plan_of(ragged, stage_of(ragged, **GROWING)), plan_of(ragged, stage_of(ragged, turn_weights=WEIGHTS))
    planned = [plan.step(step) for step in range(12)]
    rows = [np.sum([[r.queries, r.targets, r.negatives] for r in step.rows_per_rank], 0).tolist() for step in planned]
    assert rows[0] == [10, 10, 0] and planned[0].pairs == 10
    turns_S = np.diff(ragged.index.samples["turn_end"], prepend=0)
    negatives_S = np.diff(ragged.index.samples["negative_end"], prepend=0)
    for step in (8, 11):
        samples = planned[step].samples_B
        assert planned[step].pairs == np.minimum(4, turns_S - (turns_S > 1))[samples].sum() == bare.step(step).pairs
        assert rows[step][2] == negatives_S[samples].sum()
    pairs, negatives = [step.pairs for step in planned], [r[2] for r in rows]
    assert np.mean(pairs[:4]) < np.mean(pairs[4:8]) < np.mean(pairs[8:])
    assert np.mean(negatives[:4]) < np.mean(negatives[4:8]) < np.mean(negatives[8:])


# ---- all parts agree


@pytest.mark.parametrize("options", [GROWING, {"turns": Limit(2)}, {"turn_weights": WEIGHTS}, {}])
@pytest.mark.parametrize("history", [0.0, 0.5, 1.0])
def test_predictions_equal_what_is_collated(ragged: Rows, history: float, options: dict[str, Any]) -> None:
    stage = stage_of(ragged, history, **options)
    plan, collator = plan_of(ragged, stage, 3), Collator(stage, ragged.packer)
    for step in (0, 1, 3, 5, 7, 8, 30):
        planned = plan.step(step)
        for packs, counts in zip(planned.packs, planned.rows_per_rank, strict=True):
            samples, passes = planned.samples_B[packs[0]], planned.passes_B[packs[0]]
            batch, costs = collator(samples, passes, step), plan.costs(samples, passes, step)
            assert batch.counts == counts and batch.tokens == costs.tokens_B.sum()
            assert batch.patches == costs.patches_B.sum()
            ids = batch.ids_E3[:, 1].tolist()
            assert ids[: counts.queries] == ids[counts.queries : 2 * counts.queries]
            assert len(set(ids[: counts.queries])) == counts.queries


@pytest.mark.parametrize("history", [0.0, 0.5, 1.0])
def test_no_step_of_a_curriculum_outgrows_a_pack(scenes: Rows, ragged: Rows, history: float) -> None:
    for rows in (replace(scenes, index=synthetic_index(300)), ragged):
        for most in (1, 3):
            stage = stage_of(rows, history, turns=Limit(most, 1, 10), turn_weights=WEIGHTS, negatives=Limit(1, 0, 10))
            samples, longest = np.arange(len(index := rows.index)), longest_rows(stage)
            plan = plan_of(rows, stage, pack_tokens=int(longest.max()))
            passes = [(number, step) for number in range(80) for step in (0, 7, 10)]
            drawn = np.stack([plan.costs(samples, np.full(len(index), n), s).tokens_B for n, s in passes])
            assert (drawn <= longest).all() and (drawn.max(0) == longest).mean() > 0.2
            with pytest.raises(UserError, match="needs"):
                plan_of(rows, stage, pack_tokens=int(longest.max()) - 1)
            parts = [stage.longest(*part) for part in ((0, 1), (1, 17), (17, len(index)))]
            assert (np.concatenate(parts) == longest).all()


@pytest.mark.parametrize("history", [0.0, 1.0])
@pytest.mark.parametrize("most", [1, 2])
def test_a_picture_that_is_a_question_is_within_the_longest(
    demo: Demo, tmp_path: Path, history: float, most: int
) -> None:
    """No newline follows a picture where the first turn has no text, and which turn is first is drawn."""
    write_picture(tmp_path / "x.png", 60, 60)
    rows = [row([["<|image_1|>\n"], ["a"]], ["red green blue", "red green"], "x.png")]
    data = open_data(demo, write_rows(tmp_path / "rows.parquet", rows), tmp_path, tmp_path)
    stage = stage_of(data, history, turns=Limit(most))
    batches = [Collator(stage, data.packer)(np.array([0]), np.array([number]), 0) for number in range(20)]
    longest = int(longest_rows(stage)[0])
    assert longest - 2 <= max(batch.tokens for batch in batches) <= longest


def batches_of(rows: Rows, world_size: int, start: int = 0, workers: int = 0) -> list[list[StepBatch]]:
    """Of each rank the steps from `start` on, by a stage, a plan and a collator of its own, as after a restart."""
    ranks = []
    for rank in range(world_size):
        stage = stage_of(rows, **GROWING)
        dataset = StepDataset(plan_of(rows, stage, world_size), Collator(stage, rows.packer), rank, max_steps=10)
        ranks.append(list(step_batches(dataset, start, workers=workers, pin_memory=False)))
    return ranks


def test_going_on_in_the_middle_gives_the_same_batches(ragged: Rows) -> None:
    (whole,), (rest,) = batches_of(ragged, 1), batches_of(ragged, 1, start=3, workers=2)
    assert len(rest) == 7
    for a, b in zip(whole[3:], rest, strict=True):
        assert (a.step, a.plan_digest, a.rows_per_rank) == (b.step, b.plan_digest, b.rows_per_rank)
        for x, y in zip(a.packs, b.packs, strict=True):
            assert all(torch.equal(getattr(x, name), getattr(y, name)) for name in ("input_ids_T", "ids_E3"))


def test_another_number_of_ranks_has_the_same_batch(ragged: Rows) -> None:
    def rows_of(batches: tuple[StepBatch, ...]) -> list[tuple]:
        """Kind and ids of every pooled row of all ranks."""
        found = []
        for pack in (pack for batch in batches for pack in batch.packs):
            kinds = np.repeat(
                [QUERY, TARGET, NEGATIVE], [pack.counts.queries, pack.counts.targets, pack.counts.negatives]
            )
            found += [(kind, *ids) for kind, ids in zip(kinds.tolist(), pack.ids_E3.tolist(), strict=True)]
        return sorted(found)

    one, three = (list(zip(*batches_of(ragged, world_size), strict=True)) for world_size in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert rows_of(a) == rows_of(b) and a[0].pairs == b[0].pairs == b[2].pairs
        assert a[0].cost["llm_tokens"] == b[0].cost["llm_tokens"]


# ---- configuration and mistakes

MINIMAL = ["--run.name", "r", "--run.max_steps", "200", "--batch.images", "8", "--optim.warmup_steps", "0"]


def config_of(demo: Demo, folder: Path, *argv: str) -> RunConfig:
    data = ["--model.path", str(demo.model), "--data.train", str(demo.train), "--data.images", str(demo.images)]
    pixels = ["--data.min_pixels", "3136", "--data.max_pixels", "12544", "--data.index_dir", str(folder)]
    return parse_args([*MINIMAL, *data, *pixels, *argv]).config


def test_preflight_sees_the_first_step_and_the_hardest(demo: Demo, tmp_path: Path) -> None:
    argv = ["--task.turns", "5", "--curriculum.steps", "150", "--curriculum.turns", "1", "--run.precision", "fp32"]
    report = preflight(config_of(demo, tmp_path, *argv), 2, 80.0, 3, progress=False)
    assert [step.pairs for step in report.planned][::2] == [8 * 1, 8 * 5]
    assert 3 * 8 < report.planned[1].pairs < 5 * 8  # at step 100, a limit of 3.67
    assert spread_steps(1000, 3) == [0, 500, 999] and spread_steps(1000, 1) == [999] and spread_steps(2, 50) == [0, 1]


def test_the_section_is_read_saved_and_built(demo: Demo, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: {turns: 4, turn_weights: {0: 0, 5: 2.5}}\ncurriculum: {steps: 10, turns: 2, negatives: null}\n"
    )
    config = config_of(demo, tmp_path, "--config", str(recipe))
    assert config.task == TaskOptions(turns=4, turn_weights={0: 0.0, 5: 2.5})
    assert config.curriculum == CurriculumOptions(steps=10, turns=2)
    stage = build_data(config, 1).plan.stage
    assert isinstance(stage, MuCoStage)
    assert stage.turns == Limit(4, 2, 10) and stage.negatives.limit == Limit(0)
    assert stage._weight_of_kind[:7].tolist() == [0, 1, 1, 1, 1, 2.5, 1]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_no_section_is_every_turn_from_the_start(demo: Demo, tmp_path: Path) -> None:
    stage = build_data(config_of(demo, tmp_path, "--task.turns", "6"), 1).plan.stage
    assert isinstance(stage, MuCoStage) and stage.turns.at(0) == 6
    stage = build_data(config_of(demo, tmp_path), 1).plan.stage
    assert isinstance(stage, MuCoStage) and stage.turns == Limit(TURNS_PER_SAMPLE)


STEPS = ["--curriculum.steps", "10"]
FINETUNE = ["--task.name", "finetune"]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--curriculum.turns", "2", "--task.turns", "6"], ["curriculum.turns", "curriculum.steps is 0"]),
        (["--task.turns", "0"], ["task.turns", "0"]),
        (["--task.turn_weights", "{1: -2}"], ["task.turn_weights", "{1: -2.0}"]),
        (["--task.turn_weights", "{-1: 2}"], ["task.turn_weights", "{-1: 2.0}"]),
        (["--task.turn_weights", "{1: .nan}"], ["task.turn_weights", "nan"]),
        (["--task.turn_weights", "{1: .inf}"], ["task.turn_weights", "inf"]),
        (["--task.turn_weights", "[1, 2]"], ["task.turn_weights", "[1, 2]", "dict[int, float]"]),
        (["--task.turn_weights", "{7: 1}"], ["task.turn_weights", "kind 7", "data.train"]),
        (["--task.turn_weights", "{5000: 1}"], ["task.turn_weights", "kind 5000", "data.train"]),
        (STEPS, ["curriculum.steps", "10", "curriculum.turns", "curriculum.negatives"]),
        (["--curriculum.steps", "-1"], ["curriculum.steps", "-1"]),
        ([*STEPS, "--curriculum.turns", "0"], ["curriculum.turns", "0"]),
        ([*STEPS, "--curriculum.turns", "2"], ["curriculum.turns", "2", "task.turns", "null"]),
        ([*STEPS, "--curriculum.turns", "5", "--task.turns", "4"], ["curriculum.turns", "5", "task.turns", "4"]),
        ([*STEPS, "--curriculum.negatives", "1"], ["curriculum.negatives", "1", "task.negatives", "0"]),
        ([*FINETUNE, "--task.turns", "2"], ["task.turns", "task.name", "finetune"]),
        ([*FINETUNE, "--task.turn_weights", "{0: 1}"], ["task.turn_weights", "finetune"]),
        ([*FINETUNE, *STEPS, "--curriculum.turns", "1"], ["curriculum.turns", "finetune"]),
    ],
)
def test_mistakes_are_one_line(demo: Demo, tmp_path: Path, argv: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_data(config_of(demo, tmp_path, *argv), 1)
    assert "\n" not in str(caught.value) and all(name in str(caught.value) for name in named), caught.value


def test_fine_tuning_has_a_curriculum_of_negatives(ragged: Rows, demo: Demo, tmp_path: Path) -> None:
    rows = [{**row(["q"], ["t"]), "qry": "q", "pos_text": f"t {i}", "neg_text": ["a", "b", "c"]} for i in range(12)]  # type: ignore[arg-type]
    (tmp_path / "images").mkdir()
    path = write_rows(tmp_path / "pairs.parquet", rows)
    argv = ["--data.train", str(path), *FINETUNE, "--task.negatives", "3", *STEPS, "--curriculum.negatives", "1"]
    data = build_data(config_of(demo, tmp_path, *argv), 1)
    assert isinstance(data.plan.stage, FineTuneStage)
    assert [data.plan.step(step).rows_per_rank[0].negatives for step in (0, 5, 10, 99)] == [8, 16, 24, 24]
    assert data.steps(6)[5].rows_per_rank[0].negatives == data.steps(6)[5].packs[0].counts.negatives == 16  # type: ignore[union-attr]


def test_a_row_of_which_no_turn_is_used_is_named(ragged: Rows) -> None:
    turns_S = np.diff(ragged.index.samples["turn_end"], prepend=0)
    worst = ragged.index.samples["row"][(turns_S <= 2).argmax()]
    kinds = "0" if turns_S[(turns_S <= 2).argmax()] == 1 else "0, 1"
    message = rf"data\.train row {worst}: task\.turn_weights is 0 for all of its turns \(kinds {kinds}\): give one"
    with pytest.raises(UserError, match=message):
        stage_of(ragged, turn_weights={0: 0.0, 1: 0.0})


def test_a_row_that_lost_a_turn_says_so(ragged: Rows) -> None:
    class Forgetful(M3TReader):
        def record(self, row: int):  # type: ignore[no-untyped-def]
            record = super().record(row)
            return replace(record, turns=record.turns[:1])

    forgetful = Forgetful(ragged.reader.files[0], ragged.reader.images, negatives=True)
    sample = int(np.diff(ragged.index.samples["turn_end"], prepend=0).argmax())
    with pytest.raises(RowError, match="has 1 turns, 5 were indexed"):
        stage_of(replace(ragged, reader=forgetful)).sides(sample, 0, 0)
