"""Is the run that wants to go on the run that was saved?"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from muco_ds.checkpoint import UNIVERSAL, read_meta
from muco_ds.config import ModelOptions
from muco_ds.data.index import Index
from muco_ds.errors import UserError
from muco_ds.models.lora import base_digest
from muco_ds.reshard import is_sharded

log = logging.getLogger(__name__)

# What changes speed, memory, logging or where things lie, but not what is learned.
MAY_CHANGE = (
    *("run.dir", "run.max_steps", "run.epochs", "run.deadline_s", "run.timeout_s"),
    *("model.activation_checkpointing", "model.attention", "model.kernels"),
    *("data.images", "data.val", "data.index_dir", "data.workers", "batch.pack_tokens"),
    *("optim.max_skipped", "loss.key_exchange", "validation", "evaluation", "checkpoint", "log"),
)

_LISTED_IMAGES = re.compile(r"data\.train\[\d+\]\.images")

ADJUSTABLE = ("optim.lr",)
"""Changes what is learned, and is the cure where a run diverges: it may change, and the log says so."""

PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest allowed L2 distance between embeddings (unit vectors) before saving and after loading.

The same kernels give 0. What may change between the two, packing and attention, gives 2e-6 in fp32 with 28 layers and
0.036 in bf16; weights that are partly another model's give 1.
"""


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from. `universal`: through the form that any number of ranks loads."""

    checkpoint: Path
    step: int
    stage: int
    universal: bool
    nonfinite: dict[str, int]
    temperature: dict[str, float]

    @classmethod
    def of(cls, checkpoint: Path, world_size: int) -> Start:
        """Raises UserError for a folder that is no complete checkpoint."""
        meta = read_meta(checkpoint)
        universal = is_sharded(meta) and meta["world_size"] != world_size
        return cls(checkpoint, meta["step"], meta["zero_stage"], universal, meta["nonfinite"], meta["temperature"])

    def check_stage(self, stage: int) -> None:
        """Raises UserError when the engine's ZeRO stage is not that of the checkpoint."""
        if stage != self.stage:
            raise UserError(
                f"ZeRO stage {stage} but {self.checkpoint} was written under stage {self.stage}: change the DeepSpeed "
                "JSON back, or set run.name to begin another run"
            )

    def check_probe(self, probe_ND: torch.Tensor, precision: str) -> None:
        """Does the loaded model give the embeddings of the saved one?

        Raises:
            UserError: no.
        """
        saved_ND = load_file(self.checkpoint / "probe.safetensors")["probe_ND"]
        difference = (probe_ND - saved_ND).norm(dim=-1).max().item()
        limit = PROBE_TOLERANCE[precision]
        if not difference <= limit:  # also catches NaN
            folder = self.checkpoint / UNIVERSAL if self.universal else self.checkpoint
            raise UserError(
                f"{folder}: the loaded model's embeddings differ from the saved one's by {difference:.1e} (limit "
                f"{limit:.0e}): its files were changed, or the weights in model.path were; remove it to start again "
                f"{'by converting anew' if self.universal else 'from an older checkpoint'}"
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
    saved, given = _flat(meta["config"]), _flat(config)
    gone = [key for key in saved if key.startswith("data.train") and key not in given]
    for key in [*given, *gone]:
        if _LISTED_IMAGES.fullmatch(key) or any(key == name or key.startswith(name + ".") for name in MAY_CHANGE):
            continue
        if key in saved and key in given and saved[key] == given[key]:
            continue
        if key in ADJUSTABLE and key in saved:
            log.warning("%s=%s from here on, %s until %s", key, given[key], saved[key], checkpoint)
            continue
        before = f"trained with {saved[key]}" if key in saved else "written where there was none"
        cure = "change it back" if key in saved else "finish it with the version that wrote it"
        raise UserError(
            f"{key}={given.get(key)} but {checkpoint} was {before}: {cure}, or set run.name to begin another run"
        )


def check_base(checkpoint: Path, path: str, digest: str | None) -> None:
    """Is `path` the backbone whose adapter the checkpoint holds?

    Args:
        digest: what `describe_base` says of it.
    Raises:
        UserError: no.
    """
    if digest != read_meta(checkpoint)["base"]:
        raise UserError(
            f"{path}: is another model than the one whose adapter {checkpoint} holds: restore that one, or set "
            "run.name to begin another run"
        )


def describe_base(model: ModelOptions) -> str | None:
    """The digest of the backbone, where a checkpoint without its weights depends on it."""
    return base_digest(model.path) if model.lora.rank else None


def describe_data(index: Index) -> dict[str, Any]:
    """Number and digest of the training rows: the plan gives the same examples only over the same rows."""
    digest = hashlib.blake2b(digest_size=16)
    turns_S = np.diff(index.samples["turn_end"], prepend=0)
    pictured_N = np.repeat(index.samples["target_images"] > 0, turns_S)
    # A picture's path holds its folder, which may move; what else is known of those targets are their sizes.
    hashes = (
        np.where(pictured_N, 0, index.turns["target_hash"]),
        np.where(index.negatives["images"] > 0, 0, index.negatives["target_hash"]),
    )
    sizes = (index.turns["target_tokens"], index.negatives["tokens"], index.question_tokens, index.word_tokens)
    for values in (index.samples["row"], *hashes, *sizes):
        for start in range(0, len(values), 2**20):
            digest.update(np.ascontiguousarray(values[start : start + 2**20]).tobytes())
    return {"rows": len(index), "digest": digest.hexdigest()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not all(str(name).isdigit() for name in value):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):  # a mixture's data sets
            for i, item in enumerate(value):
                flat.update(_flat(item, f"{prefix}{key}[{i}]."))
        elif isinstance(value, dict):  # numbers by number, which JSON has by text
            flat[f"{prefix}{key}"] = {str(name): item for name, item in value.items()}
        else:
            flat[f"{prefix}{key}"] = value
    return flat
