"""The search for packs and recomputation, with devices that are made up; the real one is in test_preflight.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from muco_ds import tune as module
from muco_ds.build import Data, build_data
from muco_ds.config import BatchOptions, DataOptions, ModelOptions, OptimOptions, RunConfig, RunOptions, save_config
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_cli import parse_args
from muco_ds.memory import CONTEXT, GIB
from muco_ds.preflight import Planned, estimated, look_at, worst
from muco_ds.tune import Candidate, Measured, Tuning, budgets, candidates, snippet, tune

from demo import Demo

RANKS = 2


@pytest.fixture(scope="module")
def config(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = DataOptions(str(demo.train), str(demo.images), min_pixels=3136, max_pixels=7056)
    data.index_dir = str(tmp_path_factory.mktemp("index"))
    return RunConfig(
        run=RunOptions("tuned", max_steps=4, precision="fp32"),
        model=ModelOptions(str(demo.model), freeze_vision=False),
        data=data,
        batch=BatchOptions(images=16, pack_tokens=4096),
        optim=OptimOptions(warmup_steps=1),
    )


@pytest.fixture(scope="module")
def data(config: RunConfig) -> Data:
    return build_data(config, RANKS)


@pytest.fixture(scope="module")
def planned(data: Data) -> list[Planned]:
    return [look_at(data.plan, data.plan.step(step)) for step in range(4)]


def device(tried: list[RunConfig], data: Data, holds: Callable[[RunConfig], bool]) -> module.Run:
    """Needs what is estimated for it, and computes at one rate whatever it computes."""

    def run(config: RunConfig, packs: int) -> Measured | None:
        tried.append(config)
        if not holds(config):
            return None
        load = worst([look_at(data.plan, data.plan.step(0))])
        memory = estimated(config, data, 1, load)
        again = config.model.activation_checkpointing.text + 4 * (packs > 1)
        return Measured(1.0 + 0.1 * again, memory.total - memory.allowance, load, 1e9, "a device")

    return run


def test_budgets_are_the_least_for_each_number_of_packs(data: Data, planned: list[Planned], config: RunConfig) -> None:
    found = budgets(data, RANKS, planned)
    assert list(found) == list(range(1, len(found) + 1)) and len(found) > 2
    assert sorted(found.values(), reverse=True) == list(found.values())
    for packs in (1, 2):
        plan = build_data(replace(config, batch=replace(config.batch, pack_tokens=found[packs])), RANKS).plan
        assert max(len(plan.step(step).packs[0]) for step in range(4)) == packs


def test_with_room_for_all_nothing_is_recomputed(config: RunConfig, data: Data) -> None:
    tried: list[RunConfig] = []
    tuning = tune(config, RANKS, 80.0, 4, tries=6, run=device(tried, data, lambda _: True))
    assert tuning.best is not None and tuning.best.candidate.packs == 1
    assert tuning.best.candidate.checkpointing == ActivationCheckpointing(0.0, 0.0)
    assert len(tried) == 1, "nothing that takes more compute is tried"
    assert tried[0].batch.images == 8 and tried[0].checkpoint.resume is False


def test_needed_is_what_was_measured_and_the_difference_of_shards(
    config: RunConfig, data: Data, planned: list[Planned]
) -> None:
    tuning = tune(config, RANKS, 80.0, 4, tries=1, run=device([], data, lambda _: True))
    (trial,) = tuning.trials
    changed = module._with(config, trial.candidate)
    there = estimated(changed, data, RANKS, module._in_packs(planned, trial.candidate))
    assert trial.needed == there.total - there.allowance + CONTEXT, "a device that agrees with the estimate"
    here = estimated(changed, data, 1, module._in_packs(planned, trial.candidate))
    assert there.optimizer < here.optimizer, "two ranks share what one device held"


def test_what_is_too_much_rules_out_more(config: RunConfig, data: Data, planned: list[Planned]) -> None:
    """The device takes two packs and no more, whatever was estimated."""
    tried: list[RunConfig] = []
    two = budgets(data, RANKS, planned)[2]
    tuning = tune(config, RANKS, 80.0, 4, tries=9, run=device(tried, data, lambda c: c.batch.pack_tokens <= two))
    assert [trial.fits for trial in tuning.trials] == [False, True]
    assert tuning.best is not None and tuning.best.candidate.packs == 2
    none = tune(config, RANKS, 80.0, 4, tries=9, run=device([], data, lambda _: False))
    assert none.best is None and not any(trial.fits for trial in none.trials)


def test_a_measurement_corrects_the_estimates_that_follow(
    config: RunConfig, data: Data, planned: list[Planned]
) -> None:
    """Candidates for a larger device are tried until one is measured: here the estimate turns out to be right."""

    def as_estimated(config: RunConfig, packs: int) -> Measured:
        sized = Candidate(packs, config.batch.pack_tokens, config.model.activation_checkpointing, 0, 0.0)
        load = module._in_packs(planned, sized)
        memory = estimated(config, data, 1, load)
        return Measured(1.0, memory.total - memory.allowance, load, 1e9, "a device")

    all_sizes = candidates(config, data, RANKS, planned, 80 * GIB)
    limit = min(candidate.estimated for candidate in all_sizes) / GIB
    tuning = tune(config, RANKS, 0.9 * limit, 4, tries=9, run=as_estimated)
    assert len(tuning.trials) == 1 and not tuning.trials[0].fits


def test_less_memory_asks_for_more_recomputation(
    config: RunConfig, data: Data, planned: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DEVICES", (1.0,))
    everything = [c for c in candidates(config, data, RANKS, planned, 80 * GIB) if c.packs == 1]
    assert [c.checkpointing for c in everything] == [ActivationCheckpointing(0.0, 0.0)]
    tight = candidates(config, data, RANKS, planned, everything[0].estimated - 1)
    (one,) = [c for c in tight if c.packs == 1]
    assert one.estimated < everything[0].estimated and one.flops > everything[0].flops
    assert one.checkpointing.text > 0 or (one.checkpointing.vision or 0) > 0
    assert tight == sorted(tight, key=lambda c: c.flops)


def test_the_result_is_a_recipe_on_top_of_the_run(config: RunConfig, data: Data, tmp_path: Path) -> None:
    tuning = tune(config, RANKS, 80.0, 4, tries=1, run=device([], data, lambda _: True))
    (trial,) = tuning.trials
    shares = ActivationCheckpointing(0.5, 0.25)
    tuning = Tuning(RANKS, 80.0, [replace(trial, candidate=replace(trial.candidate, checkpointing=shares))])
    save_config(config, tmp_path / "run.yaml")
    (tmp_path / "tuned.yaml").write_text(snippet(tuning, "run.yaml"))
    assert set(yaml.safe_load((tmp_path / "tuned.yaml").read_text())) == {"model", "batch"}
    argv = ["--config", str(tmp_path / "run.yaml"), "--config", str(tmp_path / "tuned.yaml")]
    tuned = parse_args(argv).config
    assert tuned.model.activation_checkpointing == shares
    assert tuned.batch == replace(config.batch, pack_tokens=trial.candidate.pack_tokens)
    assert tuned.model.path == config.model.path and not tuned.model.freeze_vision
    frozen = Candidate(1, 99, ActivationCheckpointing(0.5, None), 0, 0.0)
    text = snippet(Tuning(RANKS, 80.0, [replace(trial, candidate=frozen)]), "run.yaml")
    assert "{text: 0.5}" in text and "vision" not in text
