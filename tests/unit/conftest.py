"""Session-wide demo data; `datasets` keeps its converted files in a folder that goes away with the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="muco_ds_tests_")  # read when `datasets` is first imported

import pytest

from demo import Demo, Rows, build_demo_folder, open_data, write_mixed

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return build_demo_folder(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def scenes(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The demo's training rows: one picture and seven turns each. Read only."""
    return open_data(demo, demo.train, demo.images, tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="session")
def mixed(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Ragged rows with and without pictures. Read only."""
    root = tmp_path_factory.mktemp("mixed")
    return open_data(demo, *write_mixed(root), root / "index")
