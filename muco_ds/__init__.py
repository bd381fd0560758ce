"""muco_ds: DeepSpeed training of multimodal embedding models with multi-turn contrastive learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muco_ds.models.embedder import Embedder

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: `muco_ds.config` must not cost the seconds that importing torch and transformers takes.
    if name == "Embedder":
        from muco_ds.models.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
