"""Contrastive losses: pure functions of embeddings and ids, with no knowledge of ranks."""

from muco_ds.losses.info_nce import InfoNCE, RowIds, info_nce, info_nce_dense

__all__ = ["InfoNCE", "RowIds", "info_nce", "info_nce_dense"]
