"""tools/preflight.py as a user runs it: on any number of ranks, in agreement with a run, and clear about mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import REPOSITORY, Demo, Programs, Result, metrics, refusal

PREFLIGHT = str(REPOSITORY / "tools" / "preflight.py")


def preflight(programs: Programs, demo: Demo, *options: object) -> Result:
    return programs.run([PREFLIGHT, "--config", demo.recipe, *map(str, options)])


def report(result: Result) -> dict[str, Any]:
    lines = result.stdout[0].splitlines()
    assert len(lines) == 1, result.output  # one JSON object and nothing else
    return json.loads(lines[0])


def test_one_rank_in_words(demo: Demo, programs: Programs) -> None:
    result = preflight(programs, demo, "--ranks", 1).check()
    text = result.stdout[0]
    assert "rows            64 usable, 0 bad" in text
    assert "steps           4 in the run, 8 an epoch; 4 looked at" in text
    assert "a step          8 images, 56 pairs" in text
    assert text.count("fits 80 GiB") == 1 and "does not fit" not in text
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "embeddings", "allowance", "total"):
        assert f"\n  {part}" in text
    assert "planning" in result.stderr[0]  # the progress bar stays out of the output


@pytest.mark.parametrize("ranks", [2, 8])
def test_many_ranks_plan_the_same_batches(ranks: int, demo: Demo, programs: Programs) -> None:
    one, many = (report(preflight(programs, demo, "--ranks", n, "--json").check()) for n in (1, ranks))
    for name in ("rows", "bad_rows", "steps_per_epoch", "steps", "images"):
        assert one[name] == many[name]
    assert [step["llm_tokens"] for step in one["planned"]] == [step["llm_tokens"] for step in many["planned"]]
    assert 1 <= many["imbalance"]["mean"] <= many["imbalance"]["worst"] < 1.6
    assert many["memory"]["optimizer"] < one["memory"]["optimizer"] / ranks * 1.01
    assert many["memory"]["activations"] < one["memory"]["activations"]
    total = many["memory"].pop("total")
    parts = {name: size for name, size in many["memory"].items() if name not in ("host", "update", "checkpoint")}
    assert total == pytest.approx(sum(parts.values()), rel=1e-6) and many["fits"]


def test_in_agreement_with_a_run(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """Two ranks and two packs each: what is announced is what is logged."""
    options = {"batch.pack_tokens": 600, "data.workers": 0}
    programs.run(demo.train(tmp_path, options), ranks=2).check()
    argv = [part for key, value in options.items() for part in (f"--{key}", value)]
    announced = report(preflight(programs, demo, "--ranks", 2, "--json", *argv).check())
    assert [step["step"] for step in announced["planned"]] == [1, 2, 3, 4]
    assert announced["packs"]["worst"] >= 2
    shards = [file.stat().st_size for file in (tmp_path / "run/checkpoints/step_0000004/model").glob("*states.pt")]
    assert 2 * announced["memory"]["checkpoint"] == pytest.approx(sum(shards), rel=0.1)
    assert announced["pack_fill"]["worst"] == min(step["pack_fill"] for step in announced["planned"])
    assert announced["imbalance"]["worst"] == max(step["imbalance"] for step in announced["planned"])
    for step, line in zip(announced["planned"], metrics(tmp_path), strict=True):
        for name in ("step", "pairs", "llm_tokens", "vit_patches", "imbalance", "pack_fill"):
            assert step[name] == pytest.approx(line[name], rel=1e-9), name


def test_steps_are_spread_over_the_run(demo: Demo, programs: Programs) -> None:
    options = ("--run.max_steps", 1000, "--steps", 3)
    planned = report(preflight(programs, demo, "--ranks", 2, "--json", *options).check())["planned"]
    assert [step["step"] for step in planned] == [1, 501, 1000]


LARGE = ("--batch.images", 64, "--batch.pack_tokens", 32768)


def test_what_does_not_fit_comes_with_advice(demo: Demo, programs: Programs) -> None:
    result = preflight(programs, demo, "--ranks", 1, "--gpu_memory", 2.0, *LARGE)
    assert result.codes == [1]
    text = result.stdout[0]
    assert "does not fit 2 GiB" in text
    assert "advice: model.activation_checkpointing.text=" in text
    hopeless = preflight(programs, demo, "--ranks", 1, "--gpu_memory", 0.5)
    assert hopeless.codes == [1] and "advice: no single change suffices" in hopeless.stdout[0]


def test_poor_fill_comes_with_the_budget_that_suffices(demo: Demo, programs: Programs) -> None:
    first = report(preflight(programs, demo, "--ranks", 2, "--json").check())
    assert first["pack_fill"]["worst"] < 0.5
    (line,) = first["advice"]
    budget = int(line.removeprefix("batch.pack_tokens=").split()[0])
    again = report(preflight(programs, demo, "--ranks", 2, "--json", "--batch.pack_tokens", budget).check())
    assert again["packs"] == first["packs"] and again["pack_fill"]["worst"] > 0.9 and not again["advice"]
    assert f"fill of {again['pack_fill']['mean']:.2f}" in line


def test_mistakes_are_one_line(demo: Demo, programs: Programs) -> None:
    cases = {
        ("--ranks", 1024): "error: batch.images=8 is less than 1024 ranks: raise it or use fewer ranks",
        ("--ranks", 0): "error: --ranks 0: give more than 0",
        ("--ranks", 2, "--gpu_memory", -1): "error: --gpu_memory -1.0: give more than 0",
        ("--ranks", 2, "--steps", 0): "error: --steps 0: give more than 0",
        ("--ranks", 2, "--batch.image", 4): "error: unknown key 'batch.image' in the command line: did you mean",
        ("--ranks", 2, "--data.train", "nowhere.parquet"): "error: data.train: no such file",
        ("--ranks", 2, "--batch.pack_tokens", 100): "error: data.train row",
        ("--ranks", 2, "--deepspeed", "nowhere.json"): "error: deepspeed: no such file",
    }
    for options, message in cases.items():
        assert refusal(preflight(programs, demo, *options)).startswith(message)


def test_tuning_ends_in_a_recipe_that_trains(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """One try of the real run, in a process of its own; what it says goes on top of the recipe."""
    options = ("--ranks", 2, "--tune", "--tries", 1, "--output", tmp_path / "tuned.yaml")
    text = preflight(programs, demo, *options).check().stdout[0]
    assert "for 2 ranks of 80 GiB" in text and "best: --batch.pack_tokens" in text
    programs.run([*demo.train(tmp_path), "--config", str(tmp_path / "tuned.yaml")], ranks=2).check()
    line = metrics(tmp_path)[0]
    assert line["pack_fill"] > 0.9 and not (demo.folder / "runs").exists()
