"""Names of M-BEIR's figures, and published ones in per cent, to stand beside ours."""

from __future__ import annotations

from muco_ds.eval.report import Published

OFFICIAL = "recall@official"
"""A cell's score: recall@5, of Fashion200K and FashionIQ recall@10. Of several cells, their plain mean."""

UNION = "@union"
"""Behind the name of a cell, or of a mean, over the union pool."""

GROUPS = ("single->single", "single->multi", "multi->single", "multi->multi")
MEANS = ("overall", *GROUPS)


def _published(name: str, *scores: float) -> Published:
    """`scores` in the order of `GROUPS`, then over all. Which of the pools was searched is not known."""
    by_name = dict(zip((*GROUPS, "overall"), scores, strict=True))
    by_name |= {f"{mean}{UNION}": score for mean, score in by_name.items()}
    return Published(name, "arXiv 2602.06393", by_name)


PUBLISHED = (
    _published("MuCo 2B", 49.1, 68.2, 41.6, 64.8, 51.6),
    _published("MuCo 7B", 54.0, 71.6, 47.4, 70.4, 56.6),
)
