"""A small demo and a way to run the programs on it, made once for all integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from build_runs import PICTURES, name_of
from local_server import paint
from programs import Demo, Programs


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """64 training and 6 held-out scenes, a tiny model with its tokenizer, and a recipe."""
    return Demo.build(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    server = Programs(tmp_path_factory.mktemp("programs") / "jobs")
    yield server
    server.close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of painted pictures in a folder of their own; half of them lie deeper."""
    folder = tmp_path / "images"
    for i in range(PICTURES):
        path = folder / name_of(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        paint(i).save(path)
    return folder
