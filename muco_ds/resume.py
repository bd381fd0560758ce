"""Is the run that wants to go on the run that was saved?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muco_ds.checkpoint import read_meta
from muco_ds.errors import UserError

# What changes speed, memory, logging or where things lie, but not what is learned.
MAY_CHANGE = (
    *("run.dir", "run.max_steps", "run.epochs", "model.activation_checkpointing", "model.attention"),
    *("data.images", "data.val", "data.index_dir", "data.workers", "batch.pack_tokens"),
    *("validation", "checkpoint", "log"),
)


def check_same_run(checkpoint: Path, config: dict[str, Any]) -> None:
    """Raises UserError naming the first key that would make the resumed run another run."""
    saved = _flat(read_meta(checkpoint)["config"])
    for key, value in _flat(config).items():
        if any(key == name or key.startswith(name + ".") for name in MAY_CHANGE):
            continue
        if key not in saved or saved[key] != value:
            raise UserError(
                f"{key}={value} but {checkpoint} was trained with {saved.get(key)}: "
                "change it back, or set run.name to begin another run"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
