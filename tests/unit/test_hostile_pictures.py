"""Broken and hostile pictures: each is refused with one line or decoded right, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import muco_ds.data.decode as decoding
from muco_ds.data.decode import ImageError, StoredPicture, decode, read_size
from muco_ds.data.loader import StepDataset, step_batches
from muco_ds.data.schema import QUERY, Dialogue, Side

from demo import Demo, open_data, row, write_rows
from hostile_pictures import GOOD, write_all

MAX_SECONDS, MAX_GROWTH = 8.0, 1.2e9
"""Of one picture. The largest that is allowed takes 13,377 x 13,377 pixels of 4 bytes, and some of it twice."""


def looked_at(paths: dict[str, Path], answers: Any) -> None:
    """In a child process: what each picture gives, its seconds and the bytes that it added to the largest memory."""
    for name, path in paths.items():
        results, start = [], time.monotonic()
        for look in (read_size, lambda path: decode(str(path)).size):
            try:
                results.append(look(path))
            except ImageError as error:
                results.append(str(error))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.send((name, results, time.monotonic() - start, peak))
    answers.send(None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("hostile") / "pictures")


def test_each_is_refused_in_one_line_or_decoded(pictures: dict[str, Path]) -> None:
    assert len(pictures) >= 30
    context = get_context("fork")
    answers, sending = context.Pipe(duplex=False)
    child = context.Process(target=looked_at, args=(pictures, sending), daemon=True)
    child.start()
    seen: dict[str, int] = {}
    try:
        while True:
            assert answers.poll(30), f"no answer to what follows {list(seen)[-1:]}"
            if (answer := answers.recv()) is None:
                break
            name, results, seconds, peak = answer
            seen[name] = peak
            assert seconds < MAX_SECONDS and peak - min(seen.values()) < MAX_GROWTH, answer
            if name in GOOD:
                assert results == [GOOD[name]] * 2, name
                continue
            header, refusal = results
            assert isinstance(refusal, str) and "\n" not in refusal and 0 < len(refusal) < 300, answer
            assert isinstance(header, tuple) or header == refusal, answer
    finally:
        child.kill()
        child.join()
    assert seen.keys() == pictures.keys()


def test_a_socket_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        with pytest.raises(ImageError, match="is not a picture that can be read"):
            read_size("socket.png")


def test_stored_bytes_have_the_limits_of_files(pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(name: str) -> StoredPicture:
        return StoredPicture(name, lambda: open(pictures[name], "rb"))

    with pytest.raises(ImageError, match="20006 scans are over the limit of 100"):
        decode(stored("bomb_of_scans.jpg"))
    assert decode(stored("cmyk.jpg")).size == GOOD["cmyk.jpg"]
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 500)
    for look in (read_size, decode):
        with pytest.raises(ImageError, match="bytes are over the limit of 500"):
            look(stored("cmyk.jpg"))  # type: ignore[operator]


def test_training_steps_replace_what_breaks_and_count_it(demo: Demo, pictures: dict[str, Path], tmp_path: Path) -> None:
    names = [name for name in pictures if GOOD.get(name, (1, 1)) < (1000, 1000)]  # the largest take seconds
    data = write_rows(tmp_path / "rows.parquet", [row([["what?"]], [f"a {i}"], name) for i, name in enumerate(names)])
    rows = open_data(demo, data, pictures["empty.png"].parent, tmp_path / "index")
    usable = [names[i] for i in rows.index.samples["row"].tolist()]
    assert set(usable) >= {name for name in names if name in GOOD}
    reasons = [json.loads(line)["reason"] for line in (rows.index.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert len(reasons) == len(names) - len(usable) and not any("\n" in reason for reason in reasons)
    dataset = StepDataset(rows.plan(images=len(usable)), rows.collator(), rank=0, max_steps=1)
    (batch,) = step_batches(dataset, 0, workers=1, pin_memory=False)
    broken = sum(name not in GOOD for name in usable)
    assert sum(pack.replaced_images for pack in batch.packs) == broken > 5


def test_a_file_that_becomes_a_pipe_after_indexing_is_replaced(demo: Demo, tmp_path: Path) -> None:
    path = tmp_path / "changing.png"
    Image.new("RGB", (64, 64)).save(path)
    side = Side(QUERY, Dialogue(("what?",), (str(path),)), history=True, ids_k3=np.zeros((1, 3), np.int64))
    assert demo.packer().pack([side], replace_broken=True).replaced_images == 0
    path.unlink()
    os.mkfifo(path)
    assert demo.packer().pack([side], replace_broken=True).replaced_images == 1
