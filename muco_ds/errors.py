"""The one exception that means: the user's input is wrong, and here is the cure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in the user's input: one line that names the file, row or key and says what to change.

    Programs under launch/ and tools/ print it without a traceback and exit with status 2.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into `error: ...` on stderr, said by rank 0 alone, and exit status 2 on every rank.

    Works as a context manager and as a decorator. Every rank must meet the error: one that only a single rank
    can see has to be agreed on with the others first.
    """
    try:
        yield
    except UserError as error:
        # LOCAL_RANK too, for programs that the launcher starts but that never form a group.
        if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
