"""Is the run that wants to go on the run that was saved?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from muco_ds.checkpoint import read_meta
from muco_ds.data.index import Index
from muco_ds.errors import UserError

# What changes speed, memory, logging or where things lie, but not what is learned.
MAY_CHANGE = (
    *("run.dir", "run.max_steps", "run.epochs", "model.activation_checkpointing", "model.attention"),
    *("data.images", "data.val", "data.index_dir", "data.workers", "batch.pack_tokens"),
    *("validation", "checkpoint", "log"),
)


def check_same_run(checkpoint: Path, config: dict[str, Any], data: dict[str, Any]) -> None:
    """Would this be the run that was saved?

    Args:
        config: this run's configuration.
        data: what `describe_data` says of this run's training rows.
    Raises:
        UserError: naming the first key, or the change of the rows, that makes it another run.
    """
    meta = read_meta(checkpoint)
    if meta["data"] != data:
        raise UserError(
            f"data.train holds {data['rows']} usable rows but {checkpoint} was trained on {meta['data']['rows']}, or "
            "their targets changed: restore them (and the length index), or set run.name to begin another run"
        )
    saved = _flat(meta["config"])
    for key, value in _flat(config).items():
        if any(key == name or key.startswith(name + ".") for name in MAY_CHANGE):
            continue
        if key not in saved or saved[key] != value:
            raise UserError(
                f"{key}={value} but {checkpoint} was trained with {saved.get(key)}: "
                "change it back, or set run.name to begin another run"
            )


def describe_data(index: Index) -> dict[str, Any]:
    """Number and digest of the training rows: the plan gives the same examples only over the same rows."""
    digest = hashlib.blake2b(digest_size=16)
    for values in (index.samples["row"], index.turns["target_hash"]):
        for start in range(0, len(values), 2**20):
            digest.update(np.ascontiguousarray(values[start : start + 2**20]).tobytes())
    return {"rows": len(index), "digest": digest.hexdigest()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
