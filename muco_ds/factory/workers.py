"""Many pictures at once, ended cleanly by a signal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def run_workers(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> int:
    """Await `work(item)` for every item, `concurrency` of them at a time, in order of their start.

    Returns:
        0, or the number of the signal that ended it: what was under way is then cancelled.

    Raises:
        Exception: the first that `work` raises, once the others are cancelled.
    """
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:
            await work(item)

    ended_by: list[int] = []
    tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]

    def end(number: int) -> None:
        ended_by.append(number)
        for task in tasks:
            task.cancel()

    loop = asyncio.get_running_loop()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, end, number)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for number, handler in handlers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if errors:
        raise errors[0]
    return ended_by[0] if ended_by else 0
