"""Losses: pure functions of embeddings and ids, or of hidden states and labels, with no knowledge of ranks."""

from muco_ds.losses.ids import RowIds
from muco_ds.losses.info_nce import InfoNCE, false_negative_limit, info_nce, info_nce_dense
from muco_ds.losses.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

__all__ = [
    "InfoNCE",
    "RowIds",
    "false_negative_limit",
    "info_nce",
    "info_nce_dense",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
]
