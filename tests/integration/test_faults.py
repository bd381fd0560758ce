"""The fault campaign, a short one: `fault_campaign.py` is the long one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fault_arena import Arena
from fault_clock import set_back
from fault_kills import kills
from fault_pictures import pictures
from fault_ranks import killed_worker, out_of_memory, stopped
from fault_storage import altered_checkpoints, altered_rows, can_mount, filled_while_writing, read_only, short_of_space
from programs import Demo, Programs


@pytest.fixture(scope="module")
def arena(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    seed = time.time_ns() % 10**6
    print(f"seed of the faults: {seed}")
    return Arena(demo, programs, tmp_path_factory.mktemp("faults"), seed)


@pytest.fixture
def disks(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("small disks (tmpfs) can't be mounted here: needs root")


def test_kill_9_changes_no_loss(arena: Arena) -> None:
    outcomes = kills(arena, 6)
    assert sum(outcome.tries for outcome in outcomes) == 6


def test_a_disk_short_of_space_is_refused_before_writing(arena: Arena, disks: None) -> None:
    short_of_space(arena)


def test_a_disk_that_others_fill_is_said_and_costs_nothing(arena: Arena, disks: None) -> None:
    filled_while_writing(arena, 1)


def test_a_read_only_folder_is_refused_at_once(arena: Arena, disks: None) -> None:
    read_only(arena)


def test_altered_files_are_never_trained_from(arena: Arena) -> None:
    altered_checkpoints(arena, 2)
    altered_rows(arena, 2)


def test_a_clock_that_jumps_back_changes_nothing_and_no_secret_is_written(arena: Arena) -> None:
    set_back(arena)


def test_hostile_pictures_are_replaced_and_counted(arena: Arena) -> None:
    pictures(arena)


def test_what_befalls_one_process_ends_all_and_is_named_and_the_run_goes_on(arena: Arena) -> None:
    out = arena.new("one_process")
    stopped(arena, out, timeout_s=8)
    out_of_memory(arena, out)
    killed_worker(arena, out)
    arena.finish(out)
