"""The loss over several prefixes of the embedding (Matryoshka representation learning, arXiv 2205.13147).

A model trained so puts what matters most into the first components: cut to a trained size and brought to unit length
again, its embeddings can be searched as if that were their size.

Shape legend: N embeddings, D embedding width, P a prefix's width, S sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from muco_ds.losses.info_nce import InfoNCE


def prefix(emb_ND: torch.Tensor, size: int) -> torch.Tensor:
    """The first `size` components of unit-length embeddings at unit length, emb_NP in float32 (float64 for float64).

    The whole width is returned as it is.
    """
    if size == emb_ND.shape[-1]:
        return emb_ND
    emb_ND = emb_ND.to(torch.promote_types(emb_ND.dtype, torch.float32))
    return torch.nn.functional.normalize(emb_ND[..., :size], dim=-1)


def over_sizes(loss: Callable[..., InfoNCE], embeddings: Sequence[torch.Tensor], sizes: Sequence[int]) -> InfoNCE:
    """`loss` of every prefix of some embeddings; the statistics are those of the whole ones.

    Args:
        loss: embeddings of one width, as many as given (rows, keys) -> their loss. May be collective: it is called
            once per size, in their order.
        sizes: ascending, the last one D.
    Returns:
        `loss_sum` has one entry per size, loss_S.
    """
    results = [loss(*(prefix(emb_ND, size) for emb_ND in embeddings)) for size in sizes]
    return replace(results[-1], loss_sum=torch.stack([result.loss_sum for result in results]))
