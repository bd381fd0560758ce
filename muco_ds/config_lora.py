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
        targets: Which linear layers: those of the "text" tower (paper), or "all", which needs freeze_vision=false.
        train_new_rows: Train the rows of the embedding table for the tokens that training adds (paper's code: yes).
    """

    rank: int = 0
    alpha: int = 64
    dropout: float = 0.0
    dora: bool = False
    targets: Literal["text", "all"] = "text"
    train_new_rows: bool = True


def check_adapter(lora: LoraOptions, freeze_vision: bool, vision_lr: float | None) -> None:
    """Do the options agree about the vision tower? Raises UserError."""
    if vision_lr is not None and freeze_vision:
        raise UserError(
            f"optim.vision_lr is {vision_lr:g} but model.freeze_vision is true: set the one to null or the other false"
        )
    if lora.rank and freeze_vision != (lora.targets == "text"):
        cure = "true, or model.lora.targets=all" if lora.targets == "text" else "false, or model.lora.targets=text"
        raise UserError(
            f"model.freeze_vision is {str(freeze_vision).lower()} with model.lora.targets={lora.targets}: set it to "
            f"{cure} (beside an adapter nothing is trained in full)"
        )
