"""The real Trainer in a part of the grid of `exactness.py`, each cell against a plain loop in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from exactness import Setting, measure, write_rows

pytestmark = pytest.mark.distributed

CELLS = {
    1: [Setting(3, 0, checkpointing=1, frozen=False), Setting(3, 3, checkpointing=0, frozen=True)],
    2: [
        Setting(1, 0, checkpointing=0, frozen=False),
        Setting(3, 3, checkpointing=1, frozen=True),
        Setting(3, 2, checkpointing=0, frozen=False),
        Setting(3, 3, checkpointing=0, frozen=False, finetune=True),
        Setting(1, 3, checkpointing=0.5, frozen=False),
    ],
    4: [Setting(3, 3, checkpointing=0, frozen=False), Setting(1, 2, checkpointing=1, frozen=True)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exactness")
    write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exactness_qwen3")
    write_rows(folder, kind="qwen3_vl")
    return folder


QWEN3_CELLS = [Setting(3, 3, checkpointing=1, frozen=False), Setting(3, 3, checkpointing=0, frozen=True)]


def test_deep_stacked_features_go_through_the_gradient_cache_exactly(qwen3_folder: Path) -> None:
    for setting, found in zip(QWEN3_CELLS, measure(qwen3_folder, 2, QWEN3_CELLS), strict=True):
        assert found.worst() < 1e-5, f"{setting}: {found}"


@pytest.mark.parametrize("ranks", CELLS)
def test_loss_gradients_and_weights_are_those_of_one_process(ranks: int, folder: Path) -> None:
    for setting, found in zip(CELLS[ranks], measure(folder, ranks, CELLS[ranks]), strict=True):
        assert found.worst() < 1e-5, f"{setting}: {found}"
