"""The embedding's shorter sizes, `loss.matryoshka`: which are allowed, and what they are for a model."""

from __future__ import annotations

from collections.abc import Sequence

from muco_ds.errors import UserError


def check_sizes(sizes: Sequence[int], key: str) -> None:
    """What can be known without the model. Raises UserError naming `key` and the size."""
    for i, size in enumerate(sizes):
        if type(size) is not int or size < 1:  # True is an int, and files of settings may hold anything
            raise UserError(f"{key}[{i}] is {size!r}: a size is a number of leading components, at least 1")
        if size in sizes[:i]:
            raise UserError(f"{key} holds {size} twice: keep one")


def sizes_of(sizes: Sequence[int] | None, width: int, key: str = "loss.matryoshka") -> list[int]:
    """All sizes of a model's embeddings, the smallest first; the whole width is always the last of them.

    Args:
        sizes: as configured; None: no shorter ones.
        width: components of the whole embedding.
    Raises:
        UserError: naming `key` and a size that no embedding of this model has.
    """
    check_sizes(sizes or [], key)
    largest = max(sizes or [width])
    if largest > width:
        raise UserError(f"{key} holds {largest} but the model's embeddings have {width} components: leave it out")
    return sorted({*(sizes or []), width})
