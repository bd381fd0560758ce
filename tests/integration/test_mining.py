"""tools/mine_negatives.py and launch/rounds.sh as a user runs them."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from programs import REPOSITORY, TRAIN, Demo, Programs, refusal

MINE = str(REPOSITORY / "tools" / "mine_negatives.py")


@pytest.fixture(scope="module")
def model(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained model, as tools/convert_ckpt.py leaves a trained one."""
    from transformers import AutoConfig

    from muco_ds.models.folder import Processing, Settings

    folder = tmp_path_factory.mktemp("exported") / "model"
    made = Processing.load(str(demo.model), Settings("<|emb|>", 3136, 7056, None))
    made.save(folder, AutoConfig.from_pretrained(demo.model))
    shutil.copy(demo.model / "model.safetensors", folder)
    return folder


def mining(demo: Demo, model: Path, output: Path, *more: object) -> list[str]:
    """Command line; an untrained model's own targets are not the nearest, so that a limit would leave nothing."""
    data = str(demo.data / "pairs_train.parquet")
    argv = [MINE, "--model", str(model), "--data", data, "--output", str(output), "--max_share", "inf"]
    return [*argv, "--pack_tokens", "2000", *map(str, more)]


def test_two_ranks_mine_what_one_does_and_training_reads_it(
    demo: Demo, model: Path, programs: Programs, tmp_path: Path
) -> None:
    one, two = tmp_path / "one" / "mined.parquet", tmp_path / "two" / "mined.parquet"
    alone = programs.run(mining(demo, model, one)).check()
    programs.run(mining(demo, model, two, "--local_rank={rank}"), ranks=2).check()
    assert pq.read_table(one).equals(pq.read_table(two))
    reports = [json.loads(Path(f"{path}.json").read_text()) for path in (one, two)]
    scores = [report.pop("mean_score") for report in reports]
    assert reports[0] == reports[1] and scores[0] == pytest.approx(scores[1])
    assert reports[0]["model"] == str(model) and reports[0]["rule"]["negatives"] == 4
    rows = reports[0]["rows"]
    assert rows == {"usable": 64, "full": 64, "fewer": 0, "none": 0} and "64 with 4 negatives" in alone.stdout[0]
    assert {path.name for path in one.parent.iterdir()} == {"mined.parquet", "mined.parquet.json"}

    argv = [TRAIN, "--config", "launch/recipes/demo_finetune.yaml", "--model.path", str(model), "--task.negatives", "3"]
    argv += ["--data.train", str(one), "--data.images", str(demo.data / "images"), "--data.workers", "0"]
    argv += ["--data.val", "null", "--validation.every", "0", "--run.max_steps", "2", "--optim.warmup_steps", "1"]
    programs.run([*argv, "--run.dir", str(tmp_path), "--batch.images", "8", "--log.every", "1"]).check()
    assert (tmp_path / "demo_finetune" / "checkpoints" / "step_0000002").is_dir()


def test_a_signal_leaves_what_was_there(demo: Demo, model: Path, programs: Programs, tmp_path: Path) -> None:
    output = tmp_path / "mined.parquet"
    output.write_bytes(b"what was there")
    job = programs.start(mining(demo, model, output, "--overwrite"), ranks=1)
    deadline = time.monotonic() + 60
    while not any(path.is_dir() for path in tmp_path.iterdir()):  # the folder of embeddings
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.signal(0, signal.SIGTERM)
    assert job.wait().codes == [128 + signal.SIGTERM]
    assert [path.name for path in tmp_path.iterdir()] == ["mined.parquet"] and output.read_bytes() == b"what was there"


@pytest.mark.parametrize(
    "more, said",
    [
        (["--model", "absent"], "'absent' is no folder: give a model's folder"),
        (["--output", "{there}"], "exists: give --overwrite"),
        (["--output", "mined"], "end it in .parquet"),
        (["--negatives", "0"], "--negatives 0"),
        (["--depth", "4"], "--depth 4: give at least 5"),
        (["--data", "absent.parquet"], "--data: no parquet file at 'absent.parquet'"),
        (["--corpus", "absent.parquet"], "--corpus: no parquet file at 'absent.parquet'"),
        (["--output", "{file}/mined.parquet"], "can't write to"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], said: str, demo: Demo, model: Path, programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "there.parquet").touch()
    (tmp_path / "file").touch()
    places = {"there": tmp_path / "there.parquet", "file": tmp_path / "file"}
    options = [option.format(**places) for option in more]
    argv = mining(demo, model, tmp_path / "mined.parquet", "--images", demo.data / "images")
    assert said in refusal(programs.run([*argv, *options], ranks=2 if "--corpus" in more else None))
    assert not (tmp_path / "mined.parquet").exists()


def test_rounds_go_on_where_they_ended(demo: Demo, model: Path, programs: Programs, tmp_path: Path) -> None:
    def run(rounds: int) -> str:
        command = ["bash", REPOSITORY / "launch" / "rounds.sh", model, "launch/recipes/demo_finetune.yaml", rounds]
        sizes = {"run.max_steps": 2, "optim.warmup_steps": 1, "batch.images": 8, "run.dir": tmp_path, "data.workers": 0}
        paths = {"data.train": demo.data / "pairs_train.parquet", "data.images": demo.data / "images"}
        held_out = {"data.val": "null", "validation.every": 0}
        options = [word for key, value in (sizes | paths | held_out).items() for word in (f"--{key}", value)]
        environment = programs.environment | {"MINE": "--max_share inf --negatives 2"}
        return programs.launch([*command, *options], env=environment, timeout=400).check().output

    first = run(1)
    assert "round 1 of 1: mining with" in first and "round 1 of 1: training" in first
    second = run(2)
    assert "model is there" in second and second.count(": training") == second.count(": mining with") == 1
    for number in (1, 2):
        folder = tmp_path / f"demo_finetune_round{number}"
        report = json.loads((folder / "mined.parquet.json").read_text())
        assert report["model"] == str(model if number == 1 else tmp_path / "demo_finetune_round1" / "model")
        assert report["rule"]["negatives"] == 2 and (folder / "model" / "muco_ds.json").is_file()


def test_rounds_refuse_a_recipe_without_negatives(model: Path, programs: Programs) -> None:
    command = ["bash", REPOSITORY / "launch" / "rounds.sh", model, "launch/recipes/demo.yaml"]
    assert "usage: bash launch/rounds.sh" in programs.launch(command).stderr[0]
    result = programs.launch([*command, "1"])
    assert result.codes == [2] and result.stderr[0].startswith("error: task.negatives=0")
