"""Whatever a recipe or a command line says: a configuration, or one line that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from muco_ds.config import DataOptions, ModelOptions, RunConfig, RunOptions
from muco_ds.config_cli import _known_keys, parse_args
from muco_ds.errors import UserError

from fuzzing import damaged, fuzz, objects, texts, values

USUAL = RunConfig(
    run=RunOptions(name="r", max_steps=10),
    model=ModelOptions(path="model"),
    data=DataOptions(train="train.parquet", images="images"),
)
TREE = asdict(USUAL)
TREE["data"]["train"] = [{"path": "a.parquet", "images": "images", "weight": 1.0}, {"path": "b.parquet"}]
KEYS = sorted(_known_keys())
RECIPE = yaml.safe_dump(asdict(USUAL)).encode()
INJECTED = [
    *[
        "!!python/object/apply:os.system ['touch was_run']",
        "{class_path: os.system, init_args: {command: touch was_run}}",
    ],
    *[
        "!!python/name:os.system",
        "${oc.env:HOME}",
        "&a [*a]",
        "&a {x: *a}",
        "0o17",
        "1e-4",
        ".inf",
        ".nan",
        "1_000",
        "0x10",
    ],
    *["2026-11-22", "yes", "~", "[", "{", "- 1", "a: b: c", "? [a]", "!!binary aGVsbG8=", "!!set {a}", "|\n x", "'\0'"],
]
"""YAML that stands for something else than text, or that some loaders run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def parsed(folder: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    try:
        assert isinstance(parse_args(argv).config, RunConfig)
    except UserError as error:
        assert str(error) and "\n" not in str(error), repr(str(error))
    except SystemExit as error:
        assert error.code == 0 and {"--print_config", "--help", "-h"} & {*argv}
    assert [path.name for path in folder.iterdir()] in ([], ["recipe.yaml"])


@fuzz
@given(tree=objects(TREE))
def test_recipes_with_odd_values(folder: Path, monkeypatch: pytest.MonkeyPatch, tree: Any) -> None:
    try:
        text = yaml.safe_dump(tree, allow_unicode=True).encode()
    except UnicodeEncodeError:  # half a character: only JSON can say it
        text = json.dumps(tree).encode()
    (folder / "recipe.yaml").write_bytes(text)
    parsed(folder, ["--config", "recipe.yaml"], monkeypatch)


@fuzz
@given(content=damaged(RECIPE))
def test_damaged_recipes(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    parsed(folder, ["--config", "recipe.yaml"], monkeypatch)


@fuzz
@given(key=st.sampled_from(KEYS), text=st.sampled_from(INJECTED) | values.map(lambda value: json.dumps(value)))
def test_recipes_that_want_to_be_run(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str) -> None:
    section, _, name = key.rpartition(".")
    lines = [f"{'  ' * i}{part}:" for i, part in enumerate(section.split("."))] if section else []
    lines.append(f"{'  ' * len(lines)}{name}: {text}")
    (folder / "recipe.yaml").write_text("\n".join(lines), errors="replace")
    parsed(folder, ["--config", "recipe.yaml", "--model.path", "m", "--run.name", "r"], monkeypatch)


@fuzz
@given(
    given_=st.dictionaries(
        st.sampled_from(KEYS),
        st.sampled_from(INJECTED) | texts | values.map(lambda value: json.dumps(value)),
        max_size=3,
    ),
    more=st.lists(texts | st.sampled_from([f"--{key}" for key in KEYS]), max_size=2),
)
def test_odd_command_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given_: dict[str, str], more: list[str]
) -> None:
    (folder / "recipe.yaml").write_bytes(RECIPE)
    overrides = [part for key, value in given_.items() for part in (f"--{key}", value)]
    parsed(folder, ["--config", "recipe.yaml", *overrides, *more], monkeypatch)
