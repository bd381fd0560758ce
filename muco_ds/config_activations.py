"""The section `model.activation_checkpointing`: how many layers of each tower are recomputed in the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

from muco_ds.errors import UserError

RANGES: dict[str, tuple[float, bool, float]] = {
    "model.activation_checkpointing.text": (0, True, 1),
    "model.activation_checkpointing.vision": (0, True, 1),
}


@dataclass
class ActivationCheckpointing:
    """Recompute layers in the backward pass in place of keeping their activations: less memory, more compute.

    Args:
        text: Share of the text tower's layers, from 0 (none) to 1 (all but the last, where it would gain nothing).
        vision: Share of a trained vision tower's layers; null: as `text`. A frozen one keeps nothing to begin with.
    """

    text: float = 1.0
    vision: float | None = None

    def text_layers(self, layers: int) -> int:
        """How many of the first layers of a text tower are recomputed.

        First ones, because when the backward pass reaches them, what the layers above kept is gone and leaves room for
        what is recomputed. The last layer's backward pass comes first: it would need at once what it let go.
        """
        return min(_layers(self.text, layers), layers - 1)

    def vision_layers(self, layers: int) -> int:
        """How many of the first layers of a trained vision tower are recomputed; between its last layer's forward and
        backward pass lies the whole text tower."""
        return _layers(self.text if self.vision is None else self.vision, layers)

    @classmethod
    def of_layers(cls, text: int, of_text: int, vision: int | None, of_vision: int) -> ActivationCheckpointing:
        """The shares, to three places, that choose so many layers. `vision`: None where the tower is frozen."""
        return cls(
            1.0 if text == of_text - 1 else _share(text, of_text),
            None if vision is None else _share(vision, of_vision),
        )


def check_activations(options: ActivationCheckpointing, freeze_vision: bool) -> None:
    """Does the frozen vision tower have a share of its own? Raises UserError."""
    if options.vision and freeze_vision:
        raise UserError(
            f"model.activation_checkpointing.vision is {options.vision:g} but model.freeze_vision is true, and a "
            "frozen tower keeps no activations: set the one to null or the other false"
        )


def _layers(share: float, layers: int) -> int:
    return math.ceil(round(share * layers, 6))


def _share(chosen: int, layers: int) -> float:
    """Rounded down, or it would choose one more."""
    return math.floor(1000 * chosen / layers) / 1000
