"""Fused operations, each with its plain torch twin. Importing this needs neither triton nor a GPU."""

from muco_ds.ops.pool_normalize import pool_normalize, pool_normalize_reference

__all__ = ["pool_normalize", "pool_normalize_reference"]
