"""Published scores on MMEB V1, in per cent, to stand beside ours."""

from __future__ import annotations

from muco_ds.eval.mmeb_datasets import META_TASKS
from muco_ds.eval.report import Published

_MUCO, _COMA = "arXiv 2602.06393", "arXiv 2511.08480"


def _zero_shot(*scores: float) -> dict[str, float]:
    return dict(zip((*META_TASKS, "overall"), scores, strict=True))


def _fine_tuned(*scores: float) -> dict[str, float]:
    return dict(zip((*META_TASKS, "IND", "OOD", "overall"), scores, strict=True))


PUBLISHED = (
    Published("MuCo 2B, zero-shot", _MUCO, _zero_shot(53.6, 59.9, 55.2, 74.6, 58.2)),
    Published("MuCo 7B, zero-shot", _MUCO, _zero_shot(56.0, 64.7, 58.9, 75.7, 61.6)),
    Published("MuCo 2B, fine-tuned", _MUCO, _fine_tuned(66.2, 65.6, 70.1, 85.8, 72.9, 65.0, 69.5)),
    Published("MuCo 7B, fine-tuned", _MUCO, _fine_tuned(68.3, 71.9, 73.7, 90.9, 77.3, 69.1, 73.6)),
    Published("MuCo 2B, released", "naver-ai/muco", {"overall": 70.1}),
    Published("MuCo 7B, released", "naver-ai/muco", {"overall": 74.2}),
    Published("CoMa 3B", _COMA, {"overall": 67.5}),
    Published("CoMa 7B", _COMA, {"overall": 72.2}),
)
