"""docs/operations.md and docs/troubleshooting.md name files, programs, options and keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("operations", "troubleshooting")
OF_OTHERS = {
    *(
        "nodes",
        "gpus-per-node",
        "ntasks-per-node",
        "cpus-per-task",
        "time",
        "jobs",
        "signal",
        "dependency",
        "gpus-per-task",
    ),
    *("hostfile", "master_addr", "master_port", "no_ssh", "node_rank", "nnodes", "nproc_per_node", "max_restarts"),
    *("rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "local_addr", "shm-size", "qos", "exclude"),
    *("num_gpus", "job-name", "array", "logdir"),
}
SOURCES = [
    path for folder in ("launch", "tools", "tests") for path in sorted((ROOT / folder).rglob("*")) if path.is_file()
]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_programs_exist(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    paths = set(re.findall(r"\b(?:launch|tools|tests|docs|muco_ds|benchmarks)/[\w./]+\w", text))
    assert len(paths) > 2 and not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_options_are_those_of_the_programs(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    programs = "\n".join(
        path.read_text(errors="replace") for path in SOURCES if path.suffix in (".py", ".sh", ".sbatch")
    )
    options = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)(?!\.|\w)", text))
    unknown = {name for name in options - OF_OTHERS if f'"--{name}"' not in programs}
    assert len(options) > 5 and not unknown


@pytest.mark.parametrize("page", PAGES)
def test_keys_are_those_of_the_configuration(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    sections = "run|model|data|batch|optim|checkpoint|validation|evaluation|log"
    named = set(re.findall(rf"(?<![\w/.])(?:--)?((?:{sections})\.[a-z_]+)(?![\w.]*/|\.(?:py|md|json))", text))
    config = "\n".join(path.read_text() for path in (ROOT / "muco_ds").glob("config*.py"))
    unknown = {key for key in named - {"log.md"} if not re.search(rf"^    {key.partition('.')[2]}: ", config, re.M)}
    assert len(named) > 3 and not unknown, unknown
