"""A small HTTP server on this machine, whose answers a test writes, and the tools that ask it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from programs import REPOSITORY, Result

STEP = 20
"""Picture i is painted in the grey 20 * (i + 1), by which the server knows it again."""

TURNS = ("classification", "global_1", "global_2", "local_1", "local_2", "creative", "retrieval")


@dataclass
class Answer:
    """What a request gets: `drop` closes the connection in place of an answer, `stall` waits so many seconds first."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stall: float = 0.0
    drop: bool = False


@dataclass(frozen=True)
class Request:
    """`number` counts the requests from 0."""

    number: int
    path: str
    headers: dict[str, str]
    body: bytes


class Server:
    """Answers each request as `respond` says; counts them."""

    def __init__(self, respond: Callable[[Request], Answer]) -> None:
        self.respond = respond
        self.requests: list[Request] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with server._lock:
                    request = Request(len(server.requests), self.path, dict(self.headers), body)
                    server.requests.append(request)
                answer = server.respond(request)
                server.ended.wait(answer.stall)
                if answer.drop:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                length = {} if "Transfer-Encoding" in answer.headers else {"Content-Length": str(len(answer.body))}
                for name, value in {**length, **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            do_GET = do_POST = _serve

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError):  # the client has gone, which many of these tests are about
                    super().handle()

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            self._http.shutdown()
            self._http.server_close()
            thread.join()


def paint(index: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Picture `index`, of one grey."""
    grey = STEP * (index + 1)
    return Image.new("RGB", size, (grey, grey, grey))


@dataclass(frozen=True)
class Asked:
    """A chat request. `task`: what is asked for, "check", "caption", "pairs", "questions" or "answer"."""

    task: str
    picture: int
    messages: list[dict[str, Any]]
    request: dict[str, Any]


def asked(request: Request) -> Asked:
    """What a chat request is about. Its picture is told by its grey, or by the caption that `good_reply` gives."""
    data = json.loads(request.body)
    texts, picture = [], -1
    for message in data["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                encoded = part["image_url"]["url"].partition("base64,")[2]
                with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
                    picture = round(image.convert("L").getpixel((0, 0)) / STEP) - 1  # type: ignore[operator]
    everything = "\n".join(texts)
    if captioned := re.search(r"room number (\d+)", everything):
        picture = int(captioned.group(1))
    keys = {"check": '"ready"', "caption": '"caption"', "pairs": '"local_1"', "questions": '"questions"'}
    last = everything if "can't be used" in texts[-1] else texts[-1]
    task = next((task for task, key in keys.items() if key in last), "answer")
    return Asked(task, -1 if task == "check" else picture, data["messages"], data)


def good_reply(about: Asked) -> dict[str, Any]:
    """A reply that can be used, different for each picture."""
    i = about.picture
    if about.task == "caption":
        return {"caption": f"A grey wall in room number {i}."}
    if about.task == "pairs":
        return {
            turn: {"questions": [f"{turn} {word} of {i}?" for word in ("one", "two", "three")], "answer": f"{turn} {i}"}
            for turn in TURNS
        }
    if about.task == "questions":
        return {"questions": [f"What is thing {k} of {i}?" for k in range(3 + i % 3)]}
    if about.task == "answer":
        turn = sum(message["role"] == "user" for message in about.messages) - 1
        return {"answer": f"Thing {turn} of {i} is grey."}
    return {"ready": True}


def completion(reply: str | dict[str, Any], finish_reason: str = "stop", **answer: Any) -> Answer:
    """A chat completion with this text, or this JSON object, that took 10 and 5 tokens."""
    text = reply if isinstance(reply, str) else json.dumps(reply)
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "painter",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
    return Answer(body=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, **answer)


def error(status: int, message: str, **headers: str) -> Answer:
    """An error in the form of the OpenAI API."""
    body = json.dumps({"error": {"message": message, "type": "invalid", "code": status}}).encode()
    return Answer(status, body, {"Content-Type": "application/json", **headers})


class Program:
    """One of the tools as a user starts it, in a process group of its own."""

    def __init__(self, argv: Sequence[str | Path]) -> None:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment},
            start_new_session=True,
        )

    def wait(self, timeout: float = 60.0) -> Result:
        """How it ended; after `timeout` seconds it is killed and the test fails."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            stdout, stderr = self.process.communicate()
            raise AssertionError(f"still running after {timeout:g} s\n{stdout}{stderr}") from None
        return Result([self.process.returncode], [stdout], [stderr])

    def stop_once(self, ready: Callable[[], bool], number: signal.Signals) -> Result:
        """Send it a signal as soon as `ready()`."""
        deadline = time.monotonic() + 30
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"it never came so far\n{self.wait().output}")
            time.sleep(0.01)
        self.process.send_signal(number)
        return self.wait(20)
