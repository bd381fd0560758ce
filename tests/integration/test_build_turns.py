"""tools/build_turns.py against a server that answers sense or nonsense: what the files hold."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import RecordTurn
from muco_ds.errors import UserError
from muco_ds.factory.endpoint import EndpointOptions
from muco_ds.factory.prompts import Prompts

from build_runs import PICTURES, build, chat, failures, name_of
from local_server import TURNS, Answer, Asked, Request, asked, completion, error, good_reply


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
