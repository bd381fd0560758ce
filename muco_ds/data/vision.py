"""What the vision tower must know of a pack's pictures beside their pixels, made where batches are made.

The stock towers work it out from the grids, on the device, and wait for it there, in each forward; but what they are
given by name they take as it is.

Shape suffixes: I pictures, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from muco_ds.data.segments import SegmentPlan, separate

Grid = tuple[int, int, int]
"""A picture's patches: times, rows, columns."""


@dataclass(frozen=True)
class VisionInputs:
    """`given` holds tensors by the names that the stock tower's forward takes them under.

    `pictures` are its attention's segments; `windows` those of the layers that are confined to windows, None in a
    family that has none.
    """

    given: dict[str, torch.Tensor]
    pictures: SegmentPlan
    windows: SegmentPlan | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VisionInputs:
        return replace(
            self,
            given={name: function(tensor) for name, tensor in self.given.items()},
            pictures=self.pictures.map(function),
            windows=None if self.windows is None else self.windows.map(function),
        )


class VisionLayout:
    """Makes `VisionInputs` for the vision tower of a backbone's configuration."""

    def __init__(self, config: PretrainedConfig) -> None:
        vision = config.vision_config
        self.merge_size: int = vision.spatial_merge_size
        self.patch_size: int = vision.patch_size
        self.window_size: int | None = getattr(vision, "window_size", None)
        table = getattr(vision, "num_position_embeddings", None)
        self.table_side: int | None = None if table is None else int(table**0.5)

    def inputs(self, grids: Sequence[Grid]) -> VisionInputs:
        """For pictures of these grids, one after the other."""
        grid_I3, windows = torch.tensor(grids), None
        frames = [high * wide for times, high, wide in grids for _ in range(times)]
        pictures = separate(frames)
        # Its own attention's lengths are not used (`models.vision_tower`), but would be worked out.
        given = {
            "position_ids": get_vision_position_ids(grid_I3, self.merge_size),
            "cu_seqlens": pictures.cu_q_S1,
        }
        if self.window_size is not None:
            index, cu = get_vision_window_index(grid_I3, self.merge_size, self.window_size, self.patch_size)
            windows = separate(np.diff(cu.numpy()))
            given |= {"window_index": index, "cu_window_seqlens": windows.cu_q_S1}
        if self.table_side is not None:
            taps = get_vision_interpolation_indices_and_weights(
                grid_I3, self.table_side, mode="bilinear", align_corners=True, spatial_merge_size=self.merge_size
            )
            given["interp_indices"], given["interp_weights"] = taps
        return VisionInputs(given, pictures, windows)
