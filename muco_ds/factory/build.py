"""From a folder of pictures to a file of turns: many pictures at once, each finished one kept, a report at the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from muco_ds.errors import UserError
from muco_ds.factory.addresses import shown
from muco_ds.factory.endpoint import Endpoint, EndpointOptions
from muco_ds.factory.failures import Failures, PictureError
from muco_ds.factory.journal import Journal
from muco_ds.factory.kinds import KINDS, Author
from muco_ds.factory.output import SUFFIX, WRITE, write_json
from muco_ds.factory.pictures import find_pictures, picture_url
from muco_ds.factory.prompts import Prompts
from muco_ds.factory.workers import run_workers
from muco_ds.files import beside

LEAST_IN_A_ROW = 10
"""So many pictures in a row, or twice those in work at a time, that the endpoint fails are no accident."""


@dataclass(frozen=True)
class BuildOptions:
    """What is made of which pictures.

    Args:
        images: Folder of pictures.
        output: File to write.
        endpoint: Model that sees the pictures.
        kind: "m3t" or "conversations".
        pairs_endpoint: Model that writes M3T's pairs from captions; None: the same.
        pairs_from: What M3T's pairs are written from.
        prompts: Wording of the requests.
        paraphrases: Wordings of each question in M3T's rows.
        retries: How often a request is repeated after a reply that can't be used.
        concurrency: Pictures in work at a time.
        max_side: Longer side of a picture as it is sent, in pixels.
        limit: Only so many pictures, the first by name.
    """

    images: Path
    output: Path
    endpoint: EndpointOptions
    kind: Literal["m3t", "conversations"] = "m3t"
    pairs_endpoint: EndpointOptions | None = None
    pairs_from: Literal["caption", "picture"] = "caption"
    prompts: Prompts = field(default_factory=Prompts)
    paraphrases: int = 3
    retries: int = 2
    concurrency: int = 16
    max_side: int = 1024
    limit: int | None = None

    @property
    def progress(self) -> Path:
        return beside(self.output, "progress.jsonl")

    @property
    def failed(self) -> Path:
        return beside(self.output, "failed.jsonl")

    @property
    def report(self) -> Path:
        return beside(self.output, "report.json")

    def settings(self) -> dict[str, Any]:
        """What a row depends on: one output is made with one of these."""
        settings: dict[str, Any] = {"kind": self.kind, "model": self.endpoint.model, "max_side": self.max_side}
        if self.kind == "m3t":
            writer = self.pairs_endpoint or self.endpoint
            settings |= {"pairs_from": self.pairs_from, "pairs_model": writer.model, "paraphrases": self.paraphrases}
        settings |= {f"prompts.{name}": text for name, text in asdict(self.prompts).items()}
        return settings

    def check(self) -> None:
        """Raises UserError for what can be said before anything is read."""
        if self.output.suffix != SUFFIX[self.kind] or self.output.is_dir():
            raise UserError(
                f"--output: '{self.output}' is no name for --kind {self.kind}: end it in {SUFFIX[self.kind]}"
            )
        if self.output.exists() and not self.progress.exists():
            raise UserError(f"--output: '{self.output}' is there without its '{self.progress.name}': give another name")
        for options in (self.endpoint, self.pairs_endpoint):
            if options is not None and not options.url.startswith(("http://", "https://")):
                raise UserError(
                    f"--url: '{shown(options.url)}' is no http(s) address: give one such as http://localhost:8000/v1"
                )


class Build:
    """One run."""

    def __init__(self, options: BuildOptions) -> None:
        options.check()
        self.options = options
        self.begun = time.monotonic()
        self.names = find_pictures(options.images)[: options.limit]
        self.journal = Journal(options.progress, options.settings())
        self.done_before = sum(name in self.journal.places for name in self.names)
        self.failures = Failures(options.failed)
        self.report: dict[str, Any] = {}
        self._failed_in_a_row = 0

    def run(self) -> int:
        """All pictures that are not finished yet, then the output. Returns 0, or the signal that ended it.

        Raises:
            UserError: the endpoint is not there, refuses everything, or failed too often in a row; no picture is done.
        """
        try:
            signal = asyncio.run(self._ask_for_all())
            if not signal:
                if not self.done:
                    raise UserError(f"no picture of {len(self.names)} gave a row; the first: {self.failures.first}")
                WRITE[self.options.kind](self._rows(), self.options.output)
            return signal
        finally:
            self.journal.close()

    @property
    def done(self) -> int:
        return sum(name in self.journal.places for name in self.names)

    def _rows(self) -> Iterator[dict[str, Any]]:
        return (self.journal.row(name) for name in self.names if name in self.journal.places)

    async def _ask_for_all(self) -> int:
        options = self.options
        todo = [name for name in self.names if name not in self.journal.places]
        async with contextlib.AsyncExitStack() as stack:
            sees = await stack.enter_async_context(Endpoint(options.endpoint))
            writes = sees
            if options.pairs_endpoint is not None:
                writes = await stack.enter_async_context(Endpoint(options.pairs_endpoint))
            author = Author(
                sees, writes, options.prompts, options.paraphrases, options.pairs_from == "caption", options.retries
            )
            signal = 0
            try:
                if todo:
                    await sees.check(pictures=True)
                    if writes is not sees:
                        await writes.check(pictures=False)
                    with tqdm(total=len(self.names), initial=self.done_before, desc="pictures", unit="pic") as bar:
                        signal = await run_workers(todo, lambda name: self._one(name, author, bar), options.concurrency)
            finally:
                self._report(author, complete=not signal and self.done + self.failures.total == len(self.names))
        return signal

    async def _one(self, name: str, author: Author, bar: tqdm) -> None:
        try:
            url = await asyncio.to_thread(picture_url, self.options.images / name, self.options.max_side)
            row = await KINDS[self.options.kind](author, name, url)
        except PictureError as error:
            self.failures.add(error, image=name)
            bar.set_postfix(failed=self.failures.total)
            self._failed_in_a_row += error.kind != "picture"
            limit = max(
                LEAST_IN_A_ROW, 2 * self.options.concurrency
            )  # others in work may fail before the run has ended
            if self._failed_in_a_row >= limit:
                raise UserError(
                    f"the endpoint failed {limit} pictures in a row, the last: {error.kind}: {error}; "
                    f"{self.done} of {len(self.names)} are done: the same command goes on"
                ) from error
        else:
            self._failed_in_a_row = 0
            self.journal.add(name, row)
        bar.update()

    def _report(self, author: Author, *, complete: bool) -> None:
        options = self.options
        endpoints = {"endpoint": author.sees}
        if author.writes is not author.sees:
            endpoints["pairs_endpoint"] = author.writes
        traffic = {
            name: {"model": endpoint.options.model, **asdict(endpoint.traffic)} for name, endpoint in endpoints.items()
        }
        self.report = {
            "complete": complete,
            "kind": options.kind,
            "pictures": len(self.names),
            "done": self.done,
            "done_before": self.done_before,
            "failed": dict(self.failures.counts),
            **traffic,
            "asked_again": author.asked_again,
            "seconds": round(time.monotonic() - self.begun, 1),
        }
        write_json(self.report, options.report)
