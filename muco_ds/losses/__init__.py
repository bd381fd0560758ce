"""Contrastive losses: pure functions of embeddings and ids, with no knowledge of ranks."""

from muco_ds.losses.ids import RowIds
from muco_ds.losses.info_nce import InfoNCE, false_negative_limit, info_nce, info_nce_dense

__all__ = ["InfoNCE", "RowIds", "false_negative_limit", "info_nce", "info_nce_dense"]
