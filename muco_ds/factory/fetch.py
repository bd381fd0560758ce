"""The pictures of a data set's URL column, into a folder: what is there already is kept, a report at the end."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from muco_ds.errors import UserError
from muco_ds.factory.addresses import guarded_transport, shown
from muco_ds.factory.download import DownloadOptions, download, load_httpx
from muco_ds.factory.failures import Failures, PictureError
from muco_ds.factory.output import write_json
from muco_ds.factory.pictures import SUFFIXES
from muco_ds.factory.workers import run_workers
from muco_ds.files import beside, replacing

_ROWS_AT_ONCE = 1000

LONGEST_NAME = 240
"""Bytes; file systems allow 255, and the temporary name is a little longer."""

USER_AGENT = "Mozilla/5.0 (compatible; muco_ds fetch_images)"


@dataclass(frozen=True)
class FetchOptions:
    """Which pictures go where.

    Args:
        data: Parquet file.
        output: Folder of the pictures.
        download: How one of them is fetched.
        url_column: Column with the URLs.
        name_column: Column with the paths below `output`.
        named: Without such a column: the copy of `data` to write, with one that is made from the URLs.
        concurrency: Downloads at a time.
    """

    data: Path
    output: Path
    download: DownloadOptions
    url_column: str = "url"
    name_column: str = "qry_image_path"
    named: Path | None = None
    concurrency: int = 32

    @property
    def failed(self) -> Path:
        return beside(self.output, "failed.jsonl")

    @property
    def report(self) -> Path:
        return beside(self.output, "report.json")


def name_of(url: str) -> str:
    """A path that the URL alone decides: `3f/3f0c...e1.jpg`, with the URL's own suffix where that is a picture's."""
    digest = hashlib.sha256(url.encode("utf-8")).hexdigest()[:32]
    try:
        suffix = os.path.splitext(urlsplit(url).path)[1].lower()
    except ValueError:  # no URL at all; fetching it says so
        suffix = ""
    return f"{digest[:2]}/{digest}{suffix if suffix in SUFFIXES else '.jpg'}"


class Fetch:
    """One run."""

    def __init__(self, options: FetchOptions) -> None:
        self.options = options
        self.begun = time.monotonic()
        self.rows, self._has_names = self._columns()
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: can't make the folder '{options.output}' ({error.strerror})") from error
        self.folder = os.path.realpath(options.output)
        self.failures = Failures(options.failed)
        self.counts = {"fetched": 0, "there_before": 0, "without_url": 0, "repeated": 0}
        self.bytes = 0
        self._urls: dict[str, int] = {}  # path -> hash of its URL: there may be millions
        self.report: dict[str, Any] = {}

    def run(self) -> int:
        """All pictures that are not there yet. Returns 0, or the signal that ended it.

        Raises:
            UserError: a file can't be written; not one picture is there at the end.
        """
        signal = 0
        try:
            signal = asyncio.run(self._fetch_all())
        finally:
            self._write_report(complete=not signal)
        if not signal:
            if not self.counts["fetched"] + self.counts["there_before"]:
                reason = self.failures.first or f"no URL in column '{self.options.url_column}'"
                raise UserError(f"{self.options.data}: no picture came; the first: {reason}")
            if self.options.named is not None:
                self._write_named(self.options.named)
        return signal

    def _columns(self) -> tuple[int, bool]:
        """Rows of the data, and whether they have names. Raises UserError."""
        options = self.options
        try:
            with pq.ParquetFile(options.data, page_checksum_verification=True) as file:
                rows, names = file.metadata.num_rows, file.schema_arrow.names
        except (OSError, pa.ArrowException) as error:
            cause = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"--data: '{options.data}' can't be read as parquet ({cause})") from error
        if options.url_column not in names:
            raise UserError(f"{options.data}: no column '{options.url_column}': --url_column, of {', '.join(names)}")
        has_names = options.name_column in names
        if not has_names and options.named is None:
            raise UserError(
                f"{options.data}: no column '{options.name_column}': give --name_column (one of {', '.join(names)}), "
                f"or --named FILE.parquet, where names made of the URLs are written"
            )
        if has_names and options.named is not None:
            raise UserError(f"--named: {options.data} has names in '{options.name_column}' already: leave --named out")
        return rows, has_names

    async def _fetch_all(self) -> int:
        httpx, options = load_httpx(), self.options
        # Certificates and limits of the library; hundreds of hosts, so that connections are seldom used twice.
        limits = httpx.Limits(max_connections=options.concurrency, max_keepalive_connections=options.concurrency)
        transport = guarded_transport(httpx, allow_private=options.download.allow_private, limits=limits)
        client = httpx.AsyncClient(
            follow_redirects=True,
            transport=transport,
            timeout=options.download.timeout,
            headers={"User-Agent": USER_AGENT},
        )
        async with client:
            with tqdm(total=self.rows, desc="pictures", unit="row") as bar:

                async def one(item: tuple[str, str]) -> None:
                    try:
                        await self._one(client, *item)
                    except PictureError as error:
                        self.failures.add(error, name=item[0], url=shown(item[1]))
                        bar.set_postfix(failed=self.failures.total)

                return await run_workers(self._items(bar), one, options.concurrency)

    def _items(self, bar: tqdm) -> Iterator[tuple[str, str]]:
        """(name, URL) of each row that has a URL, in the order of the rows."""
        options = self.options
        columns = [options.url_column, *([options.name_column] if self._has_names else [])]
        with pq.ParquetFile(options.data, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    bar.update()
                    url = row[options.url_column]
                    if not _is_url(url):
                        self.counts["without_url"] += 1
                        continue
                    name = row[options.name_column] if self._has_names else name_of(url)
                    yield name if isinstance(name, str) else "", url

    async def _one(self, client: Any, name: str, url: str) -> None:
        path = self._path(name)
        if str(path) in self._urls:
            if self._urls[str(path)] != hash(url):
                raise PictureError("name", "a row before has this name and another URL")
            self.counts["repeated"] += 1
            return
        self._urls[str(path)] = hash(url)
        if _is_there(path):
            self.counts["there_before"] += 1
            return
        size = await download(client, url, path, self.options.download)
        self.bytes += size  # not in one line with `await`: it would add to what was there before the wait
        self.counts["fetched"] += 1

    def _path(self, name: str) -> Path:
        """Where a picture goes. Raises PictureError for a name that can't be one."""
        path = os.path.normpath(os.path.join(self.folder, name))
        if "\0" in name or path == self.folder or os.path.commonpath([path, self.folder]) != self.folder:
            raise PictureError("name", "it is empty or leaves the folder")
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(path).parts):
            raise PictureError("name", f"a part of it is longer than {LONGEST_NAME} bytes")
        if os.path.isdir(path):
            raise PictureError("name", "a folder has this name")
        return Path(path)

    def _write_named(self, path: Path) -> None:
        """The data with the column of names that the URLs give, '' where there is none."""
        options = self.options
        with pq.ParquetFile(options.data, page_checksum_verification=True) as file:
            schema = file.schema_arrow.append(pa.field(options.name_column, pa.string()))
            with replacing(path) as work, pq.ParquetWriter(work, schema, write_page_checksum=True) as writer:
                for batch in file.iter_batches(_ROWS_AT_ONCE):
                    urls = batch.column(options.url_column).to_pylist()
                    names = pa.array([name_of(url) if _is_url(url) else "" for url in urls], pa.string())
                    writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, names], schema=schema))

    def _write_report(self, *, complete: bool) -> None:
        self.report = {
            "complete": complete,
            "rows": self.rows,
            **self.counts,
            "failed": dict(self.failures.counts),
            "bytes": self.bytes,
            "seconds": round(time.monotonic() - self.begun, 1),
        }
        write_json(self.report, self.options.report)


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_there(path: Path) -> bool:
    """Files appear whole; after a power cut one may be there without its content."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
