"""tools/build_turns.py against a server that is slow, gone or of no use, and when it is stopped and started again."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from muco_ds.errors import UserError
from muco_ds.factory.prompts import Prompts

from build_runs import PICTURES, build, chat, conversations, failures, name_of, pictures_of, well
from local_server import Answer, Asked, Program, Request, Server, completion, error, good_reply, paint
from programs import refusal


def test_rate_limits_are_waited_for(images: Path) -> None:
    """No request of any picture starts before Retry-After has passed, and nothing fails for it."""
    limited: list[float] = []
    times: list[float] = []

    def respond(request: Request, about: Asked) -> Answer:
        times.append(time.monotonic())
        if request.number == 3:
            limited.append(time.monotonic())
            return error(429, "slow down", **{"Retry-After": "1"})
        if request.number in (8, 9):
            return error(503, "overloaded", **{"Retry-After": "0.1"})
        return completion(good_reply(about))

    with chat(respond).running() as server:
        run = build(images, server, concurrency=2)
        assert run.run() == 0
    assert run.report["endpoint"]["rate_limited"] == 1 and run.report["done"] == PICTURES
    assert run.report["endpoint"]["requests"] == len(server.requests) == 2 * PICTURES + 1 + 3
    # One may have been on its way.
    assert sum(limited[0] < at < limited[0] + 0.95 for at in times) <= 1


def test_requests_per_minute(images: Path) -> None:
    times: list[float] = []

    def respond(_request: Request, about: Asked) -> Answer:
        times.append(time.monotonic())
        return completion(good_reply(about))

    with chat(respond).running() as server:
        assert build(images, server, requests_per_minute=1200, limit=4).run() == 0
    assert len(times) == 9 and times[-1] - times[0] > 8 * 0.05 * 0.9


def test_failures_of_the_server_are_told_apart(images: Path) -> None:
    def respond(_request: Request, about: Asked) -> Answer:
        if about.task == "check" or about.picture > 3:
            return completion(good_reply(about))
        return [
            completion(good_reply(about), stall=3.0),
            Answer(drop=True),
            error(500, "out of memory"),
            error(400, "the picture is too long"),
        ][about.picture]

    (images / "6.png").write_bytes((images / "0.png").read_bytes()[:60])
    with chat(respond).running() as server:
        run = build(images, server, timeout=0.8, request_retries=1)
        assert run.run() == 0
    kinds = ["timeout", "connection", "server error", "refused"]
    assert failures(images) == {name_of(i): kind for i, kind in enumerate(kinds)} | {"6.png": "picture"}
    assert Counter(pictures_of(server, "caption")) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}
    # What failed is tried again by the next run, and only that.
    with chat().running() as server:
        assert build(images, server).run() == 0
    assert failures(images) == {"6.png": "picture"} and pictures_of(server, "caption") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (Answer(drop=True), "connection"),
        (error(400, "too long"), "refused"),
        (completion("I am tired."), "nonsense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_endpoint_that_fails_all_the_time_ends_the_run(images: Path, last: Answer, reason: str) -> None:
    for i in range(PICTURES, 40):
        paint(0).save(images / f"{i}.png")
    server = chat(lambda request, about: well(request, about) if request.number < 4 else last)
    with server.running():
        run = build(images, server, request_retries=0, retries=0, concurrency=2)
        with pytest.raises(
            UserError, match=rf"failed 10 pictures in a row, the last: {reason}.*the same command goes on"
        ):
            run.run()
    assert not (images.parent / "out.parquet").exists()
    assert not run.report["complete"] and run.report["done"] >= 1 and run.report["failed"][reason] >= 10


def finished(progress: Path) -> list[str]:
    """Pictures whose lines are complete."""
    lines = progress.read_text().split("\n")[1:-1] if progress.exists() else []
    return [json.loads(line)["image"] for line in lines]


def stalling(*answered: int) -> Server:
    """Answers about these pictures alone."""
    return chat(
        lambda _request, about: completion(good_reply(about), stall=0.0 if about.picture in (-1, *answered) else 60.0)
    )


def test_a_killed_run_goes_on(images: Path) -> None:
    """SIGKILL in the middle, with a torn last line: finished pictures are not asked for again, and no row is lost."""
    progress = images.parent / "out.jsonl.progress.jsonl"
    options = ["--concurrency", str(PICTURES)]
    with stalling(0, 1, 2).running() as server:
        program = Program(conversations(images, server, *options))
        result = program.stop_once(lambda: len(finished(progress)) == 3, signal.SIGKILL)
    assert result.codes == [-signal.SIGKILL] and not (images.parent / "out.jsonl").exists()
    *kept, torn = finished(progress)
    progress.write_text(progress.read_text()[:-20])  # as if the kill had met the writing of the third
    with chat().running() as server:
        result = Program(conversations(images, server, *options)).wait().check()
    assert "6 of 6 done, 2 of them before" in result.output
    assert set(pictures_of(server, "questions")) == {int(Path(torn).stem), 3, 4, 5}
    rows = [json.loads(line) for line in (images.parent / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == sorted(name_of(i) for i in range(PICTURES)) and len(kept) == 2
    # Nothing is left to do: no request at all, and the same file.
    written = (images.parent / "out.jsonl").read_bytes()
    with chat().running() as server:
        Program(conversations(images, server, *options)).wait().check()
        assert not server.requests
    assert (images.parent / "out.jsonl").read_bytes() == written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(images: Path, number: signal.Signals) -> None:
    progress = images.parent / "out.jsonl.progress.jsonl"
    with stalling(0).running() as server:
        program = Program(conversations(images, server))
        result = program.stop_once(lambda: len(finished(progress)) == 1, number)
    assert result.codes == [128 + number] and "Traceback" not in result.output, result.output
    assert f"stopped by {number.name}: the same command goes on" in result.output
    assert json.loads((images.parent / "out.jsonl.report.json").read_text())["complete"] is False
    assert sorted(path.name for path in images.parent.iterdir()) == [
        "images",
        "out.jsonl.progress.jsonl",
        "out.jsonl.report.json",
    ]


REFUSED: dict[str, tuple[Callable[[Request, Asked], Answer], str]] = {
    "wrong key": (lambda request, about: error(401, "wrong key"), "set OPENAI_API_KEY to a valid one"),
    "no such model": (lambda request, about: error(404, "no model painter"), "no model 'painter' or no chat endpoint"),
    "no pictures": (lambda request, about: error(400, "text only"), "refused at a request with a picture.*text only"),
    "a web page": (lambda request, about: Answer(body=b"<html>"), "the reply is no chat completion"),
    "broken JSON": (
        lambda request, about: Answer(body=b'{"choices"', headers={"Content-Type": "application/json"}),
        "the reply is no chat completion",
    ),
}


@pytest.mark.parametrize(("respond", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_endpoint_that_is_of_no_use(images: Path, respond: Any, message: str) -> None:
    with chat(respond).running() as server:
        with pytest.raises(UserError, match=message):
            build(images, server).run()
        assert len(server.requests) <= 2
    assert not (images.parent / "out.parquet").exists()


def test_refusals_are_one_line_each(images: Path) -> None:
    with chat(lambda request, about: error(401, "wrong key")).running() as server:
        assert "the key is refused" in refusal(Program(conversations(images, server)).wait())
    gone = Program(conversations(images, server, "--request_retries", "0")).wait()
    assert "connection at a request" in refusal(gone)


def test_another_model_or_wording_is_refused(images: Path) -> None:
    with chat().running() as server:
        build(images, server).run()
        for change, message in (
            ({"model": "sculptor"}, "was begun with model = 'painter', not 'sculptor'"),
            ({"paraphrases": 2}, "was begun with paraphrases = 3, not 2"),
            ({"prompts": Prompts(caption='What is it? {"caption": ...}')}, "was begun with prompts.caption = another"),
        ):
            with pytest.raises(UserError, match=message):
                build(images, server, **change)  # type: ignore[arg-type]
        assert len(pq.read_table(images.parent / "out.parquet")) == PICTURES


def test_two_runs_do_not_write_one_output(images: Path) -> None:
    first = build(images, chat())
    with pytest.raises(UserError, match="is in use: another run"):
        build(images, chat())
    first.journal.close()


def test_a_damaged_line_and_a_strange_output_are_named(images: Path) -> None:
    with chat().running() as server:
        build(images, server).run()
    progress = images.parent / "out.parquet.progress.jsonl"
    lines = progress.read_text().splitlines()
    progress.write_text("\n".join([*lines[:2], "{broken", *lines[2:], ""]))
    with pytest.raises(UserError, match=r"progress\.jsonl, line 3 is damaged"):
        build(images, server)
    progress.unlink()
    with pytest.raises(UserError, match=r"is there without its 'out\.parquet\.progress\.jsonl'"):
        build(images, server)
