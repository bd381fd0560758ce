"""tools/build_turns.py against a server that answers well, badly, late or not at all."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import RecordTurn
from muco_ds.errors import UserError
from muco_ds.factory.build import Build, BuildOptions
from muco_ds.factory.endpoint import EndpointOptions
from muco_ds.factory.prompts import Prompts

from local_server import TURNS, Answer, Asked, Program, Request, Server, asked, completion, error, good_reply, paint
from programs import REPOSITORY, refusal

PICTURES = 6
TOOL = REPOSITORY / "tools" / "build_turns.py"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for i in range(PICTURES):
        paint(i).save(folder / ("deeper" if i % 2 else ".") / f"{i}.png")
    return folder


def name_of(i: int) -> str:
    return f"deeper/{i}.png" if i % 2 else f"{i}.png"


def well(_request: Request, about: Asked) -> Answer:
    return completion(good_reply(about))


def chat(respond: Callable[[Request, Asked], Answer] = well) -> Server:
    return Server(lambda request: respond(request, asked(request)))


def build(images: Path, server: Server, kind: str = "m3t", **options: Any) -> Build:
    """In this process. Options of the endpoint are given by their names too."""
    of_endpoint = {name: options.pop(name) for name in list(options) if name in EndpointOptions.__dataclass_fields__}
    endpoint = EndpointOptions(
        f"{server.url}/v1", **{"model": "painter", "timeout": 5.0, "request_retries": 2, **of_endpoint}
    )
    output = images.parent / ("out.parquet" if kind == "m3t" else "out.jsonl")
    return Build(BuildOptions(images, output, endpoint, kind=kind, **{"concurrency": 4, **options}))  # type: ignore[arg-type]


def conversations(images: Path, server: Server, *more: str) -> list[str]:
    """The command line for conversations, which start and end sooner than parquet files."""
    argv = [str(TOOL), "--kind", "conversations", "--images", str(images), "--output", str(images.parent / "out.jsonl")]
    return [*argv, "--url", f"{server.url}/v1", "--model", "painter", *more]


def failures(images: Path) -> dict[str, str]:
    """Picture -> reason, of the list beside the output."""
    (path,) = images.parent.glob("out.*.failed.jsonl")
    return {entry["image"]: entry["reason"] for entry in map(json.loads, path.read_text().splitlines())}


def pictures_of(server: Server, task: str) -> list[int]:
    return sorted(about.picture for about in map(asked, server.requests) if about.task == task)


def test_m3t_rows_are_what_the_reader_reads(images: Path) -> None:
    with chat().running() as server:
        run = build(images, server)
        assert run.run() == 0
    table = pq.read_table(images.parent / "out.parquet")
    assert table["qry_image_path"].to_pylist() == sorted(name_of(i) for i in range(PICTURES))
    reader = M3TReader(str(images.parent / "out.parquet"), str(images))
    assert len(reader) == PICTURES
    for row in range(PICTURES):
        record = reader.record(row)
        i = int(Path(record.query_images[0]).stem)
        assert Path(record.query_images[0]).is_file()
        assert record.turns == tuple(
            RecordTurn(tuple(f"{turn} {word} of {i}?" for word in ("one", "two", "three")), f"{turn} {i}", kind)
            for kind, turn in enumerate(TURNS)
        )
        assert table["qry_sentence"][row].as_py() == f"A grey wall in room number {i}."
    report = json.loads((images.parent / "out.parquet.report.json").read_text())
    assert report["complete"] and report["done"] == PICTURES and report["failed"] == {}
    assert report["endpoint"] == {
        "model": "painter",
        "requests": 2 * PICTURES + 1,
        "rate_limited": 0,
        "tokens": {"prompt": 10 * (2 * PICTURES + 1), "completion": 5 * (2 * PICTURES + 1)},
    }
    assert not (images.parent / "out.parquet.failed.jsonl").exists()
    assert all(about.request["response_format"] == {"type": "json_object"} for about in map(asked, server.requests))


@pytest.mark.parametrize("pairs_from", ["caption", "picture"])
def test_pairs_are_written_from_the_caption_or_the_picture(images: Path, pairs_from: str) -> None:
    with chat().running() as server:
        build(images, server, pairs_from=pairs_from).run()
    (request, *_) = [about for about in map(asked, server.requests) if about.task == "pairs"]
    sent = request.messages[-1]["content"]
    if pairs_from == "caption":
        assert isinstance(sent, str) and f"room number {request.picture}" in sent
    else:
        assert sent[0]["type"] == "image_url" and "room number" not in sent[1]["text"]


def test_another_model_writes_the_pairs(images: Path) -> None:
    with chat().running() as server, chat().running() as writer:
        assert build(images, server, pairs_endpoint=EndpointOptions(f"{writer.url}/v1", "writer")).run() == 0
    assert {about.task for about in map(asked, server.requests)} == {"check", "caption"}
    assert {(about.task, about.request["model"]) for about in map(asked, writer.requests)} == {
        ("check", "writer"),
        ("pairs", "writer"),
    }


def test_conversations(images: Path) -> None:
    with chat().running() as server:
        assert build(images, server, "conversations").run() == 0
    rows = [json.loads(line) for line in (images.parent / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == sorted(name_of(i) for i in range(PICTURES))
    for row in rows:
        i = int(Path(row["image"]).stem)
        assert row.keys() == {"id", "image", "conversations"} and row["id"] == row["image"]
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (3 + i % 3)
        assert turns[0]["value"] == f"<image>\nWhat is thing 0 of {i}?"
        assert [turn["value"] for turn in turns[2::2]] == [f"What is thing {k} of {i}?" for k in range(1, 3 + i % 3)]
        assert [turn["value"] for turn in turns[1::2]] == [f"Thing {k} of {i} is grey." for k in range(3 + i % 3)]
    # Each turn is asked with those before it, the picture once.
    last = max(
        (about for about in map(asked, server.requests) if about.task == "answer"), key=lambda a: len(a.messages)
    )
    assert [m["role"] for m in last.messages] == ["system", *["user", "assistant"] * 4, "user"]
    assert [isinstance(m["content"], list) for m in last.messages if m["role"] == "user"] == [True, *[False] * 4]


def pairs_with(about: Asked, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    reply = good_reply(about)
    change(reply)
    return reply


NONSENSE: dict[str, Callable[[Asked], str | dict[str, Any]]] = {
    "no JSON": lambda about: "I am sorry, but I can't help with that.",
    "cut JSON": lambda about: json.dumps(good_reply(about))[:-40],
    "a turn is missing": lambda about: pairs_with(about, lambda reply: reply.pop("creative")),
    "an empty answer": lambda about: pairs_with(about, lambda reply: reply["local_2"].update(answer=" ... ")),
    "an answer that is no text": lambda about: pairs_with(about, lambda reply: reply["local_2"].update(answer=3)),
    "too few wordings": lambda about: pairs_with(about, lambda reply: reply["creative"]["questions"].pop()),
    "the answer is the question": lambda about: pairs_with(
        about, lambda reply: reply["global_1"].update(answer=reply["global_1"]["questions"][0].upper())
    ),
    "an answer twice": lambda about: pairs_with(
        about, lambda reply: reply["global_1"].update(answer=reply["global_2"]["answer"] + ".")
    ),
    "a question twice": lambda about: pairs_with(
        about, lambda reply: reply["global_1"].update(questions=reply["global_2"]["questions"])
    ),
    "endless": lambda about: pairs_with(about, lambda reply: reply["retrieval"].update(answer="grey " * 1000)),
    "a pooling token": lambda about: pairs_with(about, lambda reply: reply["retrieval"].update(answer="so <|emb|> so")),
    "half a letter": lambda about: pairs_with(about, lambda reply: reply["retrieval"].update(answer="so \ud800 so")),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_asked_again_with_the_reason(
    images: Path, nonsense: Callable[[Asked], str | dict[str, Any]]
) -> None:
    """Picture 1 gets nonsense once and picture 2 always; the others are as ever."""
    replies = Counter[int]()

    def respond(_request: Request, about: Asked) -> Answer:
        if about.task == "pairs":
            replies[about.picture] += 1
            if about.picture == 2 or (about.picture == 1 and replies[1] == 1):
                return completion(nonsense(about))
        return completion(good_reply(about))

    with chat(respond).running() as server:
        run = build(images, server, retries=1)
        assert run.run() == 0
    assert failures(images) == {name_of(2): "nonsense"}
    assert replies == {0: 1, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}
    names = pq.read_table(images.parent / "out.parquet")["qry_image_path"].to_pylist()
    assert names == sorted(name_of(i) for i in range(PICTURES) if i != 2)
    assert run.report["failed"] == {"nonsense": 1} and run.report["asked_again"] == 2 and run.report["complete"]
    again = [about for about in map(asked, server.requests) if about.picture == 1 and len(about.messages) > 2]
    assert [message["role"] for message in again[-1].messages] == ["system", "user", "assistant", "user"]


def test_a_reply_that_was_cut_off_is_nonsense_though_its_json_is_whole(images: Path) -> None:
    def respond(_request: Request, about: Asked) -> Answer:
        return completion(good_reply(about), finish_reason="length" if about.picture == 1 else "stop")

    with chat(respond).running() as server:
        assert build(images, server, retries=0).run() == 0
    assert failures(images) == {name_of(1): "nonsense"}
    assert "cut off after 2048 tokens" in (images.parent / "out.parquet.failed.jsonl").read_text()


def test_nothing_but_nonsense_writes_nothing(images: Path) -> None:
    (images / os.fsdecode(b"\xff.png")).write_bytes((images / "0.png").read_bytes())
    with chat(lambda request, about: completion("")).running() as server:
        with pytest.raises(UserError, match=r"no picture of 7 gave a row; the first: .*nonsense"):
            build(images, server, retries=0).run()
    assert not (images.parent / "out.parquet").exists()
    assert Counter(failures(images).values()) == {"nonsense": PICTURES, "picture": 1}


def test_nonsense_in_conversations(images: Path) -> None:
    """The same answer to every question, and two questions instead of three."""

    def respond(_request: Request, about: Asked) -> Answer:
        if about.task == "answer" and about.picture == 1:
            return completion({"answer": "It is grey."})
        if about.task == "questions" and about.picture == 2:
            return completion({"questions": ["What is it?", "Where is it?"]})
        return completion(good_reply(about))

    with chat(respond).running() as server:
        assert build(images, server, "conversations", retries=1).run() == 0
    assert failures(images) == {name_of(1): "nonsense", name_of(2): "nonsense"}
    assert len((images.parent / "out.jsonl").read_text().splitlines()) == PICTURES - 2


def test_json_is_found_in_talk_and_without_the_servers_help(images: Path) -> None:
    """A server that refuses response_format, and a model that thinks aloud in braces."""

    def respond(_request: Request, about: Asked) -> Answer:
        if "response_format" in about.request:
            return error(400, "response_format is not supported")
        text = json.dumps(good_reply(about), indent=1)
        return completion(
            f'<think>{{hm}} {{"caption": "a draft"}} perhaps</think>Here you are:\n```json\n{text}\n```\nAnything else?'
        )

    with chat(respond).running() as server:
        assert build(images, server).run() == 0
    assert ["response_format" in about.request for about in map(asked, server.requests)].count(True) == 1


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
    assert not [at for at in times if limited[0] + 0.1 < at < limited[0] + 0.95]


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
        run = build(images, server, timeout=0.3, request_retries=1)
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


def test_prompts_from_a_file(images: Path) -> None:
    path = images.parent / "prompts.yaml"
    path.write_text('caption: "Was ist das? {\\"caption\\": ...} für 5 $$"\n')
    with chat().running() as server:
        assert build(images, server, prompts=Prompts.from_yaml(path)).run() == 0
    captions = [about for about in map(asked, server.requests) if about.task == "caption"]
    assert captions[0].messages[-1]["content"][1]["text"] == 'Was ist das? {"caption": ...} für 5 $$'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("captoin: x", "has 'captoin'"),
        ("caption: 3", "caption: give a text"),
        ("answer: Say something.", r"answer: it needs \$question"),
        ("pairs: for $money", r"pairs: 'money': this text has \$paraphrases"),
        ("- x", "is no mapping"),
        ("a: [", "can't be read as YAML"),
    ],
)
def test_prompts_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        Prompts.from_yaml(tmp_path / "prompts.yaml")
