"""The package's structure: imports point one way, collectives live in one place, files and functions stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# The parts of muco_ds from the leaves up: a part imports from its own level and from lower ones.
LEVELS = [
    {
        "ends",
        "lost_threads",
        "errors",
        "causes",
        "compression_pooling",
        "config",
        "config_activations",
        "config_checkpoint",
        "config_cli",
        "config_curriculum",
        "config_evaluation",
        "config_lora",
        "config_loss",
        "config_matryoshka",
        "config_optim",
        "config_task",
        "ds_config",
        "ops",
        "losses",
        "data",
        "distributed",
        "metrics",
        "families",
        "files",
        "flops",
        "health",
        "heartbeat",
        "manifest",
        "optim",
        "rank_log",
        "run_status",
        "safe_load",
        "search",
        "temperature",
        "versions",
    },
    {"models"},
    {"memory", "memory_activations", "tasks"},
    {"snapshot"},
    {"checkpoint", "eval", "factory", "mining", "mteb_model"},
    {
        "nonfinite",
        "build",
        "export",
        "export_adapter",
        "export_st",
        "model_card",
        "model_card_snippets",
        "pages",
        "reshard",
        "resume",
    },
    {"preflight", "sizing", "slurm", "trainer", "tune", "tune_try"},
    {"launch", "tools"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
COLLECTIVES = ("torch.distributed", "deepspeed.comm")
# Pure functions of their arguments: what is gathered is handed to them.
NO_COLLECTIVES = ("ops", "losses", "data")

SOURCES = sorted(path for folder in ("muco_ds", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    """`muco_ds/ops/pool.py` -> "ops", `muco_ds/trainer.py` -> "trainer", `tools/x.py` -> "tools"."""
    folder, name = path.relative_to(ROOT).parts[:2]
    return Path(name).stem if folder == "muco_ds" else folder


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every imported module, also inside functions; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: the checks below read absolute ones"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names such as `torch.distributed.all_reduce`, which need no import of their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    if path == ROOT / "muco_ds" / "__init__.py":
        return  # its one import is the lazy public name
    part = part_of(path)
    assert part in LEVEL_OF, f"place {part!r} in LEVELS"
    for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
        if module.startswith("muco_ds."):
            imported = module.split(".")[1]
            if imported in LEVEL_OF:  # else a name such as muco_ds.Embedder
                assert LEVEL_OF[imported] <= LEVEL_OF[part], f"{part} imports {module}, which is above it"
                assert not (part in NO_COLLECTIVES and imported == "distributed"), f"{part} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_distributed_uses_collectives(path: Path) -> None:
    if part_of(path) == "distributed":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name in [*imported_modules(tree), *used_names(tree)]:
        assert not any(is_within(name, package) for package in COLLECTIVES), f"{name}: go through muco_ds.distributed"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


def test_a_violation_is_found() -> None:
    tree = ast.parse("def f():\n    from torch import distributed\ntorch.distributed.barrier()")
    assert "torch.distributed" in set(imported_modules(tree))
    assert "torch.distributed.barrier" in set(used_names(tree))
