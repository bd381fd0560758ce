"""Runs of tools/build_turns.py on six painted pictures, in this process or as a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muco_ds.factory.build import Build, BuildOptions
from muco_ds.factory.endpoint import EndpointOptions

from local_server import Answer, Asked, Request, Server, asked, completion, good_reply
from programs import REPOSITORY

PICTURES = 6
TOOL = REPOSITORY / "tools" / "build_turns.py"


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
