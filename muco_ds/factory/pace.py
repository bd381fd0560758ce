"""How fast requests may start."""

from __future__ import annotations

import asyncio


class Pace:
    """Spaces the starts of requests evenly, at most `per_minute` of them (0: no limit), and pauses all on demand."""

    def __init__(self, per_minute: float) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Return when the next request may start."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + self._interval
        if start > now:
            await asyncio.sleep(start - now)

    def pause(self, seconds: float) -> None:
        """No request starts before that, except those that already wait."""
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)
