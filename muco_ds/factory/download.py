"""One picture from a URL to a file that is whole and decodes, or is not there."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from PIL import Image

from muco_ds.data.decode import ImageError, decode
from muco_ds.errors import UserError
from muco_ds.factory.failures import PictureError

if TYPE_CHECKING:
    import httpx2

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
AGAIN = (408, 425, 429)
"""Statuses besides 5xx after which a request is repeated."""

OPT_OUT = ("noai", "noimageai")
"""X-Robots-Tag directives by which a site keeps its pictures out of training data."""

TYPES = ("image/", "application/octet-stream", "binary/octet-stream")
"""How the Content-Type of a picture begins, where a server gives one."""

KEPT_FORMATS = ("PNG", "WEBP")
"""Formats that a resized picture is written in again; all others become JPEG."""


@dataclass(frozen=True)
class DownloadOptions:
    """How one picture is fetched.

    Args:
        timeout: Seconds for one attempt, from connecting to the last byte.
        retries: Further attempts after a timeout, a lost connection, 429 or 5xx.
        max_bytes: Larger files are given up.
        short_side: Larger pictures are made smaller, to this shorter side in pixels.
        allow_private: Addresses of this machine and of its networks will do, too.
    """

    timeout: float = 30.0
    retries: int = 3
    max_bytes: int = 50_000_000
    short_side: int | None = None
    allow_private: bool = False


def load_httpx() -> ModuleType:
    """The HTTP library. Raises UserError where it is not installed."""
    try:
        import httpx2
    except ImportError as error:
        raise UserError(f"fetching pictures needs httpx2 ({error}): pip install -e '.[factory]'") from error
    return httpx2


class _AgainError(Exception):
    """An attempt that failed for now. `pause`: seconds that the server wants, None where it does not say."""

    def __init__(self, failure: PictureError, pause: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure, self.pause = failure, pause


async def download(client: httpx2.AsyncClient, url: str, path: Path, options: DownloadOptions) -> int:
    """Fetch a picture to `path`, which appears whole. Returns the bytes that came over the wire.

    Raises:
        PictureError: it can't be had, or is no picture.
        UserError: the file can't be written.
    """
    work = path.with_name(f".{path.name}.part")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise PictureError("name", "a part of it is a file") from error
        size = await _attempts(client, url, work, options)
        await asyncio.to_thread(_verify, work, options.short_side)
        os.replace(work, path)
    except OSError as error:
        raise UserError(f"can't write '{path}' ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            work.unlink()
    return size


async def _attempts(client: httpx2.AsyncClient, url: str, work: Path, options: DownloadOptions) -> int:
    for attempt in range(options.retries + 1):
        try:
            return await _attempt(client, url, work, options)
        except _AgainError as error:
            pause = error.pause
            if attempt == options.retries or (pause or 0.0) > LONGEST_PAUSE_S:
                raise PictureError(error.failure.kind, f"{error.failure} (tried {attempt + 1} times)") from error
        backoff = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.75, 1.0)
        await asyncio.sleep(backoff if pause is None else pause)
    raise AssertionError("unreachable")


async def _attempt(client: httpx2.AsyncClient, url: str, work: Path, options: DownloadOptions) -> int:
    httpx = load_httpx()
    try:
        # The client's own limits are for each read: a server that sends a byte now and then would never meet them.
        return await asyncio.wait_for(_receive(client, url, work, options.max_bytes), options.timeout)
    except (asyncio.TimeoutError, httpx.TimeoutException) as error:
        raise _AgainError(PictureError("timeout", f"not complete after {options.timeout:g} s")) from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
        raise PictureError("url", "no URL that can be asked for" if "@" in url else str(error)) from error
    except httpx.HTTPError as error:
        raise _AgainError(PictureError("connection", str(error) or type(error).__name__)) from error


async def _receive(client: httpx2.AsyncClient, url: str, work: Path, max_bytes: int) -> int:
    too_large = PictureError("size", f"more than {max_bytes} bytes (--max_bytes)")
    async with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
        status = response.status_code
        if status in AGAIN or status >= 500:
            failure = PictureError(f"http {status}", response.reason_phrase)
            raise _AgainError(failure, _wanted_pause(response.headers.get("retry-after", "")))
        if status != 200:
            raise PictureError(f"http {status}", response.reason_phrase)
        if any(word in response.headers.get("x-robots-tag", "").lower() for word in OPT_OUT):
            raise PictureError("opt-out", "the site asks not to train on it (X-Robots-Tag)")
        headers = response.headers
        if (kind := headers.get("content-type", "").strip().lower()) and not kind.startswith(TYPES):
            raise PictureError("type", f"the server says it is {kind[:60]!r}")
        if headers.get("content-encoding", "identity").strip().lower() != "identity":  # a few bytes may become many
            raise PictureError("type", "the server compresses it, though it was asked not to")
        announced = response.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > max_bytes:
            raise too_large
        size = 0
        with open(work, "wb") as file:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                file.write(chunk)
    return size


def _wanted_pause(retry_after: str) -> float | None:
    """Seconds of a Retry-After header, which holds them or a date."""
    try:
        if retry_after.isdigit():
            return float(retry_after)
        date = email.utils.parsedate_tz(retry_after)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
    except (ValueError, OverflowError):  # digits of other scripts, a year that no clock has
        return None


def _verify(work: Path, short_side: int | None) -> None:
    """Decode it whole; make it smaller if asked. Raises PictureError."""
    try:
        picture = decode(str(work))
    except ImageError as error:
        raise PictureError("picture", str(error)) from error
    shorter = min(picture.size)
    if short_side is None or shorter <= short_side:
        return
    with Image.open(work) as original:
        kept = original.format if original.format in KEPT_FORMATS else "JPEG"
    width, height = (max(1, round(side * short_side / shorter)) for side in picture.size)
    picture.resize((width, height), Image.Resampling.LANCZOS).save(work, kept, quality=95)
