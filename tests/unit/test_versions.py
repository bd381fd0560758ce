"""Known bad versions are named with their cure before anything of them is imported."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from muco_ds.errors import UserError
from muco_ds.versions import check_versions, problems

ROOT = Path(__file__).parents[2]
GOOD = {
    **{"torch": "2.13.0", "triton": "3.7.1", "deepspeed": "0.19.8", "transformers": "5.23.0", "pyarrow": "26.0.1"},
    **{"pillow": "13.0.0", "huggingface-hub": "2.4.0", "tokenizers": "0.23.3", "safetensors": "0.8.0"},
}
REQUIRES = {
    "torch": ["filelock", 'triton==3.7.1; platform_system == "Linux"', 'opt-einsum; extra == "opt-einsum"'],
    "transformers": ["huggingface-hub<3.0,>=1.31.0", "tokenizers<0.24.0,>=0.23.1", 'torch>=99; extra == "torch"'],
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Package -> version, to be changed."""
    versions = dict(GOOD)

    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda package: REQUIRES.get(package))
    return versions


def test_good_ones_are_not_mentioned(installed: dict[str, str]) -> None:
    assert list(problems()) == []
    installed.update({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu", "triton": "3.7.1"})
    assert list(problems()) == []
    installed.clear()  # nothing is known of packages without metadata
    assert list(problems()) == []


@pytest.mark.parametrize(
    ("package", "version", "cure"),
    [
        ("torch", "2.9.1", "torch>=2.10"),
        ("deepspeed", "0.19.7", "deepspeed>=0.19.8"),
        ("transformers", "5.18.0", "transformers>=5.20"),
        ("pyarrow", "14.0.0", "pyarrow>=14.0.1"),
        ("huggingface-hub", "3.0.0", "huggingface-hub<3.0,>=1.31.0"),
        ("tokenizers", "0.22.2", "tokenizers<0.24.0,>=0.23.1"),
    ],
)
def test_what_no_run_can_start_with(installed: dict[str, str], package: str, version: str, cure: str) -> None:
    installed[package] = version
    with pytest.raises(UserError) as error:
        check_versions()
    assert f"{package} {version} " in str(error.value) and f"pip install '{cure}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torchvision_for_cuda_beside_a_torch_without(installed: dict[str, str]) -> None:
    installed.update({"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    with pytest.raises(UserError, match="pip uninstall torchvision"):
        check_versions()


@pytest.mark.parametrize(
    ("package", "version", "cure"),
    [
        ("transformers", "5.22.2", "transformers>=5.23"),
        ("triton", "3.9.0", "triton==3.7.1"),
        ("pillow", "10.4.0", "pillow>=11.0"),
    ],
)
def test_what_is_only_warned_of(
    installed: dict[str, str], caplog: pytest.LogCaptureFixture, package: str, version: str, cure: str
) -> None:
    installed[package] = version
    with caplog.at_level(logging.WARNING, "muco_ds"):
        check_versions()
    (record,) = caplog.records
    assert f"{package} {version} " in record.getMessage() and f"pip install '{cure}'" in record.getMessage()


def test_what_is_looked_at_is_not_imported() -> None:
    program = "import sys, muco_ds.versions as v; v.check_versions(); print({*sys.modules} & {'torch', 'transformers'})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", done


def test_one_of_several_ranks_warns(
    installed: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["pillow"] = "10.4.0"
    monkeypatch.setenv("RANK", "1")
    check_versions()
    assert not caplog.records


MODELS = ["--model", "none"]
DEMO = ["--config", "launch/recipes/demo.yaml"]
PROGRAMS = {
    "launch/train.py": DEMO,
    "launch/evaluate.py": [*MODELS, "--suite", "m3t", "--data", "none", "--output", "none"],
    "tools/preflight.py": ["--ranks", "1", *DEMO],
    "tools/convert_ckpt.py": ["none", "none"],
    "tools/encode.py": [*MODELS, "--input", "none", "--output", "none"],
    "tools/mine_negatives.py": [*MODELS, "--data", "none", "--output", "none"],
    "tools/evaluate_mteb.py": [*MODELS, "--tasks", "none", "--output", "none"],
    "tools/search.py": [*MODELS, "--input", "none", "--embeddings", "none"],
}
ALL_WITH_AN_OLD_DEEPSPEED = """
import json, runpy, sys
from importlib import metadata
found = metadata.version
metadata.version = lambda package: "0.19.7" if package == "deepspeed" else found(package)
sys.path[0] = "."
for program, options in json.loads(sys.argv[1]).items():
    sys.argv = [program, *options]
    print(program, file=sys.stderr)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, file=sys.stderr)
"""


def test_every_program_that_uses_a_model_looks() -> None:
    argv = [sys.executable, "-c", ALL_WITH_AN_OLD_DEEPSPEED, json.dumps(PROGRAMS)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True)
    for program in PROGRAMS:
        said = done.stderr.split(f"{program}\n")[1].split("status 2")[0]
        assert "error: deepspeed 0.19.7 " in said, f"{program}: {said}"
