"""torchvision beside a CPU build of torch, for programs that need it; called before transformers is imported."""

from __future__ import annotations

import sys

import torch


def prepare_torchvision() -> list[torch.library.Library]:
    """Declare the two operators that torchvision's PyPI wheel misses beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401

        return []
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
        library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")
        return [library]
