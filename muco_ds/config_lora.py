"""The adapter's section of the configuration, `model.lora`, and what it asks of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from muco_ds.errors import UserError


@dataclass
class LoraOptions:
    """Low-rank adapters (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353) beside weights that stay as they are.

    Args:
        rank: Rank of each linear layer's update; 0: no adapter, the weights themselves are trained (paper: 64).
        alpha: The update is scaled by alpha / rank (paper: 64).
        dropout: Probability in [0, 1) that an entry of an adapter's input is left out (paper's code: 0.1).
        dora: Train the length of each row of a weight apart from its direction: DoRA (paper's code: yes).
        targets: Which linear layers: those of the "text" tower (MuCo), the queries, keys, values and outputs of its
            "attention" (CoMa), or "all", which needs freeze_vision=false; "tokens": none, only the embedding table.
        train_embeddings: What is trained of the embedding table: the rows of the "new" tokens (MuCo's code), "all"
            rows, in full (CoMa), or "none".
    """

    rank: int = 0
    alpha: int = 64
    dropout: float = 0.0
    dora: bool = False
    targets: Literal["text", "attention", "all", "tokens"] = "text"
    train_embeddings: Literal["none", "new", "all"] = "new"


def check_adapter(lora: LoraOptions, freeze_vision: bool, vision_lr: float | None) -> None:
    """Do the options agree about what is trained? Raises UserError."""
    if vision_lr is not None and freeze_vision:
        raise UserError(
            f"optim.vision_lr is {vision_lr:g} but model.freeze_vision is true: set the one to null or the other false"
        )
    if lora.rank and freeze_vision == (lora.targets == "all"):
        cure = "false, or model.lora.targets=text" if lora.targets == "all" else "true, or model.lora.targets=all"
        raise UserError(
            f"model.freeze_vision is {str(freeze_vision).lower()} with model.lora.targets={lora.targets}: set it to "
            f"{cure} (beside an adapter no tower is trained in full)"
        )
    if lora.rank and lora.targets == "tokens" and lora.train_embeddings == "none":
        raise UserError(
            "model.lora.targets is tokens but model.lora.train_embeddings is none: nothing would be trained, set the "
            "latter to new or all"
        )
