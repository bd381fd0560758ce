"""The one exception that means: the user's input is wrong, and here is the cure."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_GRACE_S = 5.0


class UserError(ValueError):
    """A mistake in the user's input: one line that names the file, row or key and says what to change.

    Programs under launch/ and tools/ print it without a traceback and exit with status 2.

    Args:
        message: the line.
        on_every_rank: every rank is known to raise it, by `distributed.env.agree` or because it follows from what is
            equal on all of them; then rank 0 alone says it.
    """

    def __init__(self, message: str, *, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into `error: ...` on stderr and exit status 2, in one voice. A context manager and a decorator.

    Rank 0 speaks at once. Another rank speaks only where rank 0 may not know: it gives the launcher time to end it,
    which happens where rank 0 met the same mistake, and if it is still there then it says the line with its rank.
    """
    try:
        yield
    except UserError as error:
        # LOCAL_RANK too, for programs that the launcher starts but that never form a group.
        rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not error.on_every_rank:
            time.sleep(_GRACE_S)
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            # The interpreter's own end destroys the collectives' threads while other ranks may still be using them,
            # which now and then aborts the process instead (seen with gloo: status -6).
            sys.stdout.flush()
            os._exit(2)
        sys.exit(2)
