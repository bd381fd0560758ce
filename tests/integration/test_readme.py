"""Every command and every Python block of the README runs, with the sizes cut down, in a copy of the repository."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from programs import REPOSITORY, Programs

README = REPOSITORY / "README.md"
COPIED = ("launch", "tools", "ds_configs", "muco_ds")
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTERS = ("bash", "python", "deepspeed", "torchrun", "tensorboard")

NOT_RUN = {
    "bash tests/run.sh": "it is what runs this test",
    "tensorboard --logdir runs": "it serves until it is ended",
}

SHORT = "--run.max_steps 2 --optim.warmup_steps 1 --batch.images 8 --validation.rows 2 --data.workers 1"
# First words of a command -> what is appended to make it small. A command that begins otherwise runs as it is written.
CUT = {
    "bash launch/quickstart.sh": SHORT,
    "deepspeed launch/train.py": SHORT,
    "torchrun --nproc_per_node": SHORT,
    "python tools/make_demo.py": "--scenes 64 --test_scenes 6",
}


def blocks() -> list[tuple[str, str]]:
    """(language, content) of the README's blocks that a user is meant to run, in order."""
    return BLOCK.findall(README.read_text(encoding="utf-8")) if README.is_file() else []


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


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")
def test_every_command_of_the_readme_runs(copy: Path, programs: Programs) -> None:
    ran = []
    for language, content in blocks():
        if language == "python":
            script = copy / "readme_block.py"
            script.write_text(content)
            programs.run([script], cwd=copy).check()
            continue
        for command in commands(content):
            if command not in NOT_RUN:
                run(command, copy, programs)
            ran.append(command)
    assert ran[:2] == ["bash launch/quickstart.sh", "bash tests/run.sh"], "the two commands come first"
    assert (copy / "runs" / "demo" / "evaluation" / "results.json").is_file()


def test_only_named_commands_are_left_out() -> None:
    written = [command for language, content in blocks() if language == "bash" for command in commands(content)]
    lines = [
        line
        for language, content in blocks()
        if language == "bash"
        for line in content.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert len(lines) == len(written), "a bash block holds a line that no test runs: write it as sh, or run it here"
