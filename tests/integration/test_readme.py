"""Every command and every Python block of the README and the guides runs, cut down, in a copy of the repository."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from muco_ds.eval.suite import scores_of

from programs import REPOSITORY, Programs

GUIDES = ("README.md", "docs/embedder.md", "docs/evaluation.md", "docs/pages.md", "docs/training.md", "docs/coma.md")
README, EMBEDDER, EVALUATION, PAGES, TRAINING, COMA = (REPOSITORY / name for name in GUIDES)
COPIED = ("launch", "tools", "ds_configs", "muco_ds")
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTERS = ("bash", "python", "deepspeed", "torchrun", "tensorboard")

NOT_RUN = {
    "bash tests/run.sh": "it is what runs this test",
    "tensorboard --logdir runs": "it serves until it is ended",
    "python tools/search.py --model runs/demo/model --input demo/items.jsonl --images demo/data/images "
    "--embeddings demo/embeddings": "it serves until it is ended",
}

SHORT = "--run.max_steps 2 --optim.warmup_steps 1 --batch.images 8 --validation.rows 2 --data.workers 1"
# First words of a command -> what is appended to make it small. A command that begins otherwise runs as it is written.
CUT = {
    "bash launch/quickstart.sh": SHORT,
    "deepspeed launch/train.py": SHORT,
    "torchrun --nproc_per_node": SHORT,
    "python tools/make_demo.py": "--scenes 64 --test_scenes 6",
}


def blocks(document: Path) -> list[tuple[str, str]]:
    """(language, content) of a document's blocks that a user is meant to run, in order."""
    return BLOCK.findall(document.read_text(encoding="utf-8"))


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith(STARTERS)]


def cut(command: str) -> str:
    return " ".join([command, *(more for first, more in CUT.items() if command.startswith(first))])


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands need of the repository; its quickstart makes a small demo."""
    folder = tmp_path_factory.mktemp("readme") / "muco_ds"
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = folder / "launch" / "quickstart.sh"
    written = script.read_text()
    make_demo = "python tools/make_demo.py demo"
    assert written.count(make_demo + "\n") == 1
    script.write_text(written.replace(make_demo, cut(make_demo)))
    return folder


def run(command: str, copy: Path, programs: Programs) -> None:
    """As written where the program is a script of its own; Python programs in forks, which saves their starts."""
    words = shlex.split(cut(command))
    if words[0] == "python":
        programs.run([copy / words[1], *words[2:]], cwd=copy).check()
    elif words[0] == "deepspeed" and words[1].endswith(".py"):
        programs.run([copy / words[1], *words[2:]], cwd=copy, ranks=2).check()
    else:
        environment = programs.environment | {"PYTHONPATH": str(copy)}
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        programs.launch(words, cwd=copy, env=environment | {"PATH": path}).check()


def run_all(document: Path, copy: Path, programs: Programs) -> list[str]:
    ran = []
    for language, content in blocks(document):
        if language == "python":
            script = copy / "readme_block.py"
            script.write_text(content)
            programs.run([script], cwd=copy).check()
            continue
        for command in commands(content):
            if command not in NOT_RUN:
                run(command, copy, programs)
            ran.append(command)
    return ran


def test_every_command_of_the_readme_runs(copy: Path, programs: Programs) -> None:
    ran = run_all(README, copy, programs)
    assert ran[:2] == ["bash launch/quickstart.sh", "bash tests/run.sh"], "the two commands come first"
    assert (copy / "runs" / "demo" / "evaluation" / "results.json").is_file()


def test_every_command_of_the_guide_to_training_runs(copy: Path, programs: Programs) -> None:
    """After the README's, whose data and model they go on with."""
    assert (copy / "runs" / "demo" / "model").is_dir(), "run the README's commands first: the whole file"
    run_all(TRAINING, copy, programs)
    assert (copy / "demo" / "data" / "pairs_mined.parquet").is_file()
    assert (copy / "runs" / "demo_finetune" / "evaluation" / "results.json").is_file()


def test_every_command_of_the_guide_to_coma_runs(copy: Path, programs: Programs) -> None:
    """After the README's, whose data it goes on with."""
    assert (copy / "demo" / "data" / "train.parquet").is_file(), "run the README's commands first: the whole file"
    run_all(COMA, copy, programs)
    assert (copy / "runs" / "demo_coma_match" / "evaluation" / "results.json").is_file()
    assert (copy / "demo" / "data" / "talks.jsonl").is_file()


def test_every_command_about_models_at_work_runs(copy: Path, programs: Programs) -> None:
    """After the README's, whose model they go on with."""
    assert (copy / "runs" / "mine" / "model").is_dir(), "run the README's commands first: the whole file"
    for document in (EMBEDDER, EVALUATION, PAGES):
        run_all(document, copy, programs)
    for suite in ("mmeb", "mbeir"):
        results = json.loads((copy / "runs" / "demo" / suite / "results.json").read_text())
        assert 0 <= next(iter(scores_of(results["overall"]).values())) <= 1
    assert "mmeb/overall/precision@1" in (copy / "runs" / "judged" / "metrics.jsonl").read_text()
    assert (copy / "demo" / "report.html").is_file()


@pytest.mark.parametrize("document", [REPOSITORY / name for name in GUIDES], ids=lambda path: path.stem)
def test_only_named_commands_are_left_out(document: Path) -> None:
    written = [command for language, content in blocks(document) if language == "bash" for command in commands(content)]
    lines = [
        line
        for language, content in blocks(document)
        if language == "bash"
        for line in content.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert len(lines) == len(written), "a bash block holds a line that no test runs: write it as sh, or run it here"
