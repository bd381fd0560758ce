"""Which device a model is put on."""

from __future__ import annotations

import torch

from muco_ds.errors import UserError


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of a name; None: CUDA if there is one, else the CPU. Raises UserError for what this machine lacks."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: give cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device {name}: this machine has {count} CUDA devices")
    return device
