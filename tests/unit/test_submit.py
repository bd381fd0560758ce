"""launch/slurm/submit.py: a wrong option ends in one line, sbatch gets what the job needs, stages follow each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from muco_ds.config_cli import load_config
from muco_ds.errors import UserError
from muco_ds.slurm.chain import OPTIONS, read_chain
from muco_ds.slurm.jobs import seconds_of

from demo import Demo, run_here

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "launch" / "slurm" / "submit.py"
CPUS = ("--gpus_per_node", "0", "--ranks_per_node", "1", "--no_preflight")


@pytest.fixture
def recipe(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the current directory, with a SLURM that numbers jobs from 100 and knows two partitions."""
    monkeypatch.chdir(tmp_path)
    tree = {
        "run": {"name": "first", "max_steps": 8, "precision": "fp32"},
        "model": {"path": str(demo.model)},
        "data": {"train": str(demo.train), "images": str(demo.images)},
        "batch": {"images": 4},
        "optim": {"warmup_steps": 2},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "sbatch": 'printf "%s\\n" "$@" "" >>sbatch.log; env >sbatch.env; echo $((99 + $(grep -c ^$ sbatch.log)))',
        "sinfo": 'echo "gpu 4"; echo "gpu 4"; echo "small 1"',
        "sacctmgr": "echo mine",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run_here(monkeypatch, SUBMIT, *words) == 2
    said = capsys.readouterr().err.splitlines()  # the planning's progress bars come first
    assert said[-1].startswith("error: ") and sum("error: " in line for line in said) == 1
    assert not Path("sbatch.log").exists()
    return said[-1]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--nodes", "0"], "nodes is 0"),
        (["--nodes", "5", "--partition", "small"], "nodes is 5 but partition small has 1"),
        (["--nodes", "9"], "nodes is 9 but no partition has more than 8"),
        (["--partition", "gp"], "partition is 'gp', which SLURM does not know: it has gpu, small"),
        (["--account", "yours"], "account is 'yours', which is not yours: you have mine"),
        (["--time", "1:2:3:4"], "time is '1:2:3:4': give minutes, HH:MM:SS or D-HH:MM:SS"),
        (["--time", "10"], "time is 10, 600 s, but ranks are told to save 300 s before"),
        (["--gpus_per_node", "0"], "gpus_per_node is 0: give ranks_per_node"),
        (["--gpus_per_node", "8", "--ranks_per_node", "4"], "each rank has one GPU"),
        (["--sbatch", '--qos="long'], '--sbatch --qos="long: no closing quotation: quote'),
        (["--partition", ""], "partition is ''"),
        (["--cpus_per_rank", "0"], "cpus_per_rank is 0"),
        (["--max_failures", "0"], "--max_failures 0"),
        (["--from", "2"], "--from 2: the chain has stages 1 to 1"),
        (["--run.nme", "x"], "unknown key 'run.nme' in the command line: did you mean 'run.name'"),
        (["--run.name"], "--run.name needs a value"),
        (["other"], "unexpected argument 'other'"),
        (["--data.train", "none.parquet"], "data.train: no such file or folder"),
        (["--run.dir", "/proc/nowhere", *CPUS], "can't write to '/proc/nowhere/first/job'"),
        (["--nodes", "8"], "batch.images=4 is less than 64 ranks"),
        (["--gpus_per_node", "1", "--gpu_memory", "0.001"], "first: does not fit 0.001 GiB: "),
        (["--chain", "c.yaml"], "recipe.yaml beside --chain: a chain's recipes and their keys stand in its file"),
        (["--nodes", "two"], "argument --nodes: invalid int value: 'two': see --help"),
        (
            ["--sbatch", "--qos=a", "--sbatch", "--job-name=b"],
            "--sbatch --job-name=b: a run is kept from being",
        ),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], names: str
) -> None:
    assert names in refusal(monkeypatch, capsys, "recipe.yaml", *words)


def test_a_missing_recipe_and_a_missing_sbatch_are_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot read 'none.yaml'" in refusal(monkeypatch, capsys, "none.yaml")
    monkeypatch.setenv("PATH", str(recipe))
    assert "no sbatch in PATH" in refusal(monkeypatch, capsys, "recipe.yaml", *CPUS)


def test_what_sbatch_says_is_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '#!/bin/sh\necho "sbatch: error: no such QOS" >&2; echo "sbatch: error: Batch job failed" >&2; exit 1\n'
    (recipe / "bin" / "sbatch").write_text(text)
    said = refusal(monkeypatch, capsys, "recipe.yaml", *CPUS)
    assert "sbatch refuses the job (no such QOS; Batch job failed)" in said


def test_a_training_is_written_down_and_submitted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--nodes",
        "2",
        "--time",
        "1-00:00:00",
        "--partition",
        "gpu",
        "--account",
        "mine",
        "--sbatch",
        "--qos=long",
    ]
    assert run_here(monkeypatch, SUBMIT, "recipe.yaml", *words, *CPUS, "--optim.lr", "0.5", "--run.seed=3") == 0
    given = Path("sbatch.log").read_text().splitlines()
    for word in (
        *("--job-name=first", "--dependency=singleton", "--nodes=2", "--ntasks-per-node=1", "--time=1-00:00:00"),
        *("--partition=gpu", "--account=mine", "--qos=long", "--signal=USR1@300", "--cpus-per-task=3"),
    ):
        assert word in given
    assert not any(word.startswith("--gpus") for word in given)
    script, saved = given[-3:-1]
    assert Path(script) == SUBMIT.parent / "train.sbatch" and saved == "runs/first/job/1_train.yaml"
    config = load_config(saved)
    assert (config.optim.lr, config.run.seed) == (0.5, 3)
    environment = Path("sbatch.env").read_text()
    assert f"MUCO_DS_REPOSITORY={ROOT}\n" in environment and "MAX_FAILURES=3\n" in environment
    shell = Path("runs/first/job/1_train.sh").read_text()
    assert "--signal=USR1@300" in shell and subprocess.run(["bash", "-n"], input=shell, text=True).returncode == 0
    said = capsys.readouterr().out
    assert "job 100: train runs/first" in said and "scancel 100" in said and "tools/status.py runs/first" in said
    # A queued job's recipe is not replaced by a later one's.
    assert run_here(monkeypatch, SUBMIT, "recipe.yaml", "--gpus_per_node", "4", "--no_preflight") == 0
    assert {"--gpus-per-node=4", "--ntasks-per-node=4"} < set(Path("sbatch.log").read_text().splitlines())
    assert load_config(saved).optim.lr == 0.5 and Path("runs/first/job/2_train.yaml").exists()


def test_a_dry_run_plans_and_leaves_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, SUBMIT, "recipe.yaml", "--gpus_per_node", "1", "--nodes", "2", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "8 steps of 4 images on 2 ranks" in said and "--gpus-per-node=1" in said
    assert not Path("runs").exists() and not Path("sbatch.log").exists()


CHAIN = """
nodes: 2
gpus_per_node: 4
stages:
  - train: {recipe: recipe.yaml}
  - convert:
  - mine: {negatives: 2, gpus_per_node: 2}
  - train: {recipe: recipe.yaml, run.name: second, task.negatives: 1, optim.lr: 0.1}
  - convert: {dtype: fp32}
  - evaluate: {suite: m3t, data: DATA, time: "60"}
"""


def test_stages_follow_from_each_other(
    demo: Demo, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(CHAIN.replace("DATA", str(demo.train)))
    assert run_here(monkeypatch, SUBMIT, "--chain", "c.yaml", "--no_preflight") == 0
    jobs = [job.splitlines() for job in Path("sbatch.log").read_text().strip("\n").split("\n\n")]
    waits = [next(word for word in job if word.startswith("--dependency")).partition("afterok:")[2] for job in jobs]
    assert waits == ["", "100", "101", "102", "103", "104"]
    assert jobs[1][-4:] == ["tools/convert_ckpt.py", "runs/first", "runs/first/model", "--overwrite"]
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"} < set(jobs[1])
    mined = " ".join(jobs[2])
    assert f"--model runs/first/model --data {demo.train} --images {demo.images}" in mined
    assert "--output runs/second/mined.parquet --negatives 2 --overwrite" in mined
    assert {"--nodes=1", "--ntasks-per-node=2"} < set(jobs[2])
    config = load_config("runs/second/job/2_train.yaml")
    assert (config.model.path, config.data.train) == ("runs/first/model", "runs/second/mined.parquet")
    assert (config.data.images, config.optim.lr) == (str(demo.images), 0.1)
    assert "--dtype fp32" in " ".join(jobs[4])
    assert f"--model runs/second/model --output runs/second/evaluation --suite m3t --data {demo.train}" in " ".join(
        jobs[5]
    )
    assert "--time=60" in jobs[5] and not any(word.startswith("--time") for word in jobs[0])
    capsys.readouterr()
    Path("sbatch.log").unlink()
    assert run_here(monkeypatch, SUBMIT, "--chain", "c.yaml", "--no_preflight", "--from", "5") == 0
    assert Path("sbatch.log").read_text().count("afterok") == 1


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ("[{tran: {recipe: recipe.yaml}}]", "stage 1: unknown 'tran': did you mean 'train'"),
        ("[{train: {}}]", "stage 1 (train): no recipe"),
        ("[{train: {recipe: none.yaml}}]", "stage 1 (train): --config: cannot read 'none.yaml'"),
        ("[{train: {recipe: recipe.yaml, run.nme: a}}]", "stage 1 (train): unknown key 'run.nme'"),
        ("[convert]", "stage 1 (convert): nothing is trained before it"),
        ("[{train: {recipe: recipe.yaml}}, mine]", "stage 2 (mine): no training after it"),
        ("[mine, {train: {recipe: recipe.yaml}}]", "stage 1 (mine): no model before it"),
        ("[{train: {recipe: recipe.yaml}}, {evaluate: {suite: m3t}}]", "stage 2 (evaluate): no data"),
        ("[{train: {recipe: recipe.yaml}}, {evaluate: {suite: m3t, data: recipe.yaml}}]", "no model before it"),
        ("[{train: {recipe: recipe.yaml}}, convert, {evaluate: {suite: m3t, data: x}}]", "data: no such file"),
        ("[{train: {recipe: recipe.yaml}}, {train: {recipe: recipe.yaml}}]", "runs/first is an earlier stage's"),
        ("[{train: {recipe: recipe.yaml}}, {convert: {dtpe: fp32}}]", "unknown 'dtpe': did you mean 'dtype'"),
        (
            "[{train: {recipe: recipe.yaml, account: 1234}}]",
            "stage 1 (train): account is 1234: give its name",
        ),
        ("[{train: {recipe: recipe.yaml, nodes: }}]", "stage 1 (train): nodes is None"),
        ("[{train: {recipe: recipe.yaml, nodes: yes}}]", "stage 1 (train): nodes is True"),
        (
            "[{train: {recipe: recipe.yaml, time: 24:00:00}}]",
            "stage 1 (train): time is the number 86400: put it",
        ),
        ("[{train: {recipe: recipe.yaml}, convert: {}}]", "stage 1: write one kind with its options"),
        ("[{train: {recipe: recipe.yaml}}, convert, mine, {train: {recipe: recipe.yaml, run.name: b}}]", "negatives=0"),
        ("[]", "a chain has a list of stages"),
        ("[{train: ", "not valid YAML"),
    ],
)
def test_a_chain_that_can_t_work_is_refused_in_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stages: str, names: str
) -> None:
    Path("c.yaml").write_text(f"stages: {stages}\n")
    assert names in refusal(monkeypatch, capsys, "--chain", "c.yaml", "--no_preflight")


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("{evaluate: {suite: m3d, data: recipe.yaml}}", ["evaluate for ", "argument --suite: invalid choice: 'm3d'"]),
        ("{evaluate: {suite: m3t, data: recipe.yaml, rows: all}}", ["argument --rows: invalid int value: 'all'"]),
        ("{convert: {dtype: fp8}}", ["convert for runs/first: argument --dtype: invalid choice: 'fp8'"]),
    ],
)
def test_a_later_stage_s_options_are_read_before_the_first_is_submitted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, names: list[str]
) -> None:
    Path("c.yaml").write_text(f"stages: [{{train: {{recipe: recipe.yaml}}}}, convert, {stage}]\n")
    line = refusal(monkeypatch, capsys, "--chain", "c.yaml", "--no_preflight")
    assert all(name in line for name in names) and "--help" in line and not Path("sbatch.log").exists()


def test_options_of_stages_are_those_of_their_programs() -> None:
    programs = {"convert": "tools/convert_ckpt.py", "mine": "tools/mine_negatives.py", "evaluate": "launch/evaluate.py"}
    for kind, program in programs.items():
        taken = set(re.findall(r'"--(\w+)"', (ROOT / program).read_text())) - {"local_rank", "overwrite"}
        assert set(OPTIONS[kind]) == taken


def test_the_shipped_chain_is_one() -> None:
    shared, stages = read_chain(SUBMIT.parent / "demo_chain.yaml")
    assert [stage.kind for stage in stages] == ["train", "convert", "mine", "train", "convert", "evaluate"]
    assert shared == {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1}


def test_an_evaluation_of_another_model_stays_beside_it(
    demo: Demo, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"{{suite: m3t, data: {demo.train}, model: other/model}}"
    here = f"{{suite: m3t, data: {demo.train}, model: other/model, output: out}}"
    stages = f"[{{train: {{recipe: recipe.yaml}}}}, convert, {{evaluate: {own}}}, {{evaluate: {here}}}]"
    Path("c.yaml").write_text(f"stages: {stages}\n")
    assert run_here(monkeypatch, SUBMIT, "--chain", "c.yaml", "--no_preflight") == 0
    jobs = [job.splitlines() for job in Path("sbatch.log").read_text().strip("\n").split("\n\n")]
    assert "other/evaluation" in jobs[2] and "--job-name=other" in jobs[2]
    assert f"--job-name={recipe.name}" in jobs[3], "a job without a name waits for every other without one"


def test_a_percent_sign_in_a_name_is_not_sbatch_s(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, SUBMIT, "recipe.yaml", *CPUS, "--run.name", "9%j") == 0
    assert "--output=runs/9%%j/job/1_train-%j.log" in Path("sbatch.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SLURM_ARRAY_JOB_ID", "7", "error: this is a job array or a heterogeneous job: submit one plain job"),
        ("SLURM_HET_SIZE", "2", "error: this is a job array or a heterogeneous job: submit one plain job"),
        ("MAX_FAILURES", "none", "error: MAX_FAILURES=none: give a whole number of at least 1"),
        # Found from the repository's folder alone, which is not where programs look.
        ("PYTHONNOUSERSITE", "1", "can't import muco_ds: submit from the environment it is installed in"),
    ],
)
def test_what_a_job_can_t_work_with_ends_it_before_it_starts(
    tmp_path: Path, variable: str, value: str, said: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MUCO_DS_REPOSITORY": str(ROOT), "SLURM_JOB_ID": "7"}
    script = ["bash", SUBMIT.parent / "train.sbatch", "recipe.yaml"]
    done = subprocess.run(script, env=environment | {variable: value}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("2-1", 176400), ("2-1:30", 178200), ("2-1:30:05", 178205)],
)
def test_times_are_sbatch_s(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
    with pytest.raises(UserError, match="give minutes"):
        seconds_of(f"{time}:x")


@pytest.mark.parametrize("name", ["train.sbatch", "evaluate.sbatch", "tool.sbatch", "settings.sh"])
def test_the_scripts_are_bash_and_say_that_they_need_a_job(name: str) -> None:
    script = SUBMIT.parent / name
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    environment = {"PATH": "/usr/bin:/bin", "MUCO_DS_REPOSITORY": str(ROOT)}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no SLURM job: submit this file with sbatch")
