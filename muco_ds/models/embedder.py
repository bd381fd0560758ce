"""Embedder: a stock Qwen2-VL-class model that turns one packed row into one embedding per pooled token.

Shape suffixes: T rows of the pack, E pooled rows, D hidden size, N items, P patches, C values of a patch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from muco_ds.config_matryoshka import sizes_of
from muco_ds.data.collator import Packer
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.families import reads_last_layer
from muco_ds.losses.matryoshka import prefix
from muco_ds.models.adapters import with_adapter
from muco_ds.models.backbones import load_backbone
from muco_ds.models.device import device_of
from muco_ds.models.encode import encode_windows, windows_of
from muco_ds.models.folder import SETTINGS_FILE
from muco_ds.models.items import Item, Picture, asked, dialogues_of
from muco_ds.models.last_layer import LastLayer
from muco_ds.models.liger import use_liger
from muco_ds.models.recognise import recognise
from muco_ds.ops import pool_normalize
from muco_ds.ops.patches import patch_values

log = logging.getLogger(__name__)


class PoolingNorm(nn.Module):
    """Takes the place of the text tower's final norm: works on the rows that are read, and pools them.

    Behind a `LastLayer` these are all it is given, else it takes them out of the whole row. It keeps the norm's own
    weight under the norm's own name, so checkpoints are those of the stock model, and because the weight is used in the
    forward of the module that owns it, ZeRO-3 gathers it there.
    """

    def __init__(self, norm: nn.Module, *, takes_rows: bool) -> None:
        super().__init__()
        self._takes_rows = takes_rows
        self.weight: torch.Tensor = norm.weight  # type: ignore[assignment]
        self.variance_epsilon: float = norm.variance_epsilon  # type: ignore[assignment]
        self._stock = type(norm).forward
        self._pack: PackedBatch | None = None

    @contextmanager
    def reading(self, pack: PackedBatch) -> Iterator[None]:
        """Read the rows that this pack lists, in the forward run inside the context."""
        self._pack = pack
        try:
            yield
        finally:
            self._pack = None

    def forward(self, hidden_1ND: torch.Tensor) -> torch.Tensor:
        assert self._pack is not None, "call inside `reading(pack)`"
        pack, hidden_ND = self._pack, hidden_1ND[0]
        span = 1 if pack.labels_E is not None else pack.span
        index_E: torch.Tensor | None = pack.emb_index_E
        if not self._takes_rows:
            pooled = len(pack.emb_index_E) * span
            hidden_ND = hidden_ND if len(hidden_ND) == pooled else hidden_ND[:pooled]  # one row stands for none
            index_E = None
        if pack.labels_E is not None:
            return self._stock(self, hidden_ND if index_E is None else hidden_ND.index_select(0, index_E))
        return pool_normalize(hidden_ND, index_E, self.weight, self.variance_epsilon, span=span)


KEPT_ON_DEVICE = 2 * 2**30
"""Bytes of one step's vision features that stay on the device; what is beyond waits in pinned host memory."""


@dataclass
class DeviceRoom:
    """Bytes that the packs of one step may still keep on the device."""

    left: int = KEPT_ON_DEVICE


Features = tuple[torch.Tensor, ...]
"""What the vision tower hands to the text tower, each [N, D] for N `<|image_pad|>` tokens: the inputs of these tokens,
then, where the family has them (Qwen3-VL), what is added to them behind the first, the second, ... layer."""


class KeptVision:
    """Output of a frozen vision tower for one pack, between the two passes of a gradient cache."""

    def __init__(self, room: DeviceRoom) -> None:
        self._room = room
        self._features: Features | None = None

    @property
    def filled(self) -> bool:
        """Whether the tower has run, and pixels are not needed any more."""
        return self._features is not None

    def put(self, features: Features) -> None:
        """Keep the features, on their device while there is room for them."""
        self._features = tuple(self._placed(features_ND) for features_ND in features)

    def _placed(self, features_ND: torch.Tensor) -> torch.Tensor:
        if features_ND.nbytes <= self._room.left:
            self._room.left -= features_ND.nbytes
            return features_ND
        host_ND = torch.empty_like(features_ND, device="cpu", pin_memory=features_ND.is_cuda)
        # Both copies are queued on the stream that computes: neither is waited for, and their order is kept.
        return host_ND.copy_(features_ND, non_blocking=True)

    def get(self, device: torch.device) -> Features | None:
        """What was put, on `device`; None before."""
        if self._features is None:
            return None
        return tuple(features_ND.to(device, non_blocking=True) for features_ND in self._features)


class Embedder(nn.Module):
    """Vision tower once, text tower once with the pack's SegmentPlan, pooled and normalised embeddings.

    Args:
        model: from `backbones.load_backbone`; its final norm is replaced by `PoolingNorm`.
        freeze_vision: the vision tower gets no gradient and builds no graph.
    """

    model: Any  # the stock classes type their submodules as "Tensor or Module"

    def __init__(self, model: PreTrainedModel, *, freeze_vision: bool) -> None:
        super().__init__()
        self.model = model
        self.freeze_vision = freeze_vision
        self.packer: Packer | None = None  # set where the model is used to encode
        self.sizes: list[int] = [model.config.text_config.hidden_size]  # trained ones, ascending, the whole last
        text = self.model.language_model
        if reads := reads_last_layer(model.config):
            text.layers[-1] = LastLayer(text.layers[-1])
        text.norm = PoolingNorm(text.norm, takes_rows=not reads)
        text._deepstack_process = _add_at_rows
        if freeze_vision:
            self.model.visual.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        base: str | os.PathLike[str] | None = None,
    ) -> Embedder:
        """A model folder, ready to encode: one written by tools/convert_ckpt.py, or a released one (`recognise`).

        Args:
            device: default CUDA if there is one, else CPU.
            dtype: default bf16 on CUDA, fp32 on a CPU.
            base: folder of an adapter's backbone; default: the one that the adapter names.
        Raises:
            UserError: a folder of another kind of model, or one with a weight missing; a device that is not there.
        """
        found = recognise(os.fspath(path), None if base is None else os.fspath(base))
        device = device_of(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        processing = found.processing()
        model = load_backbone(found.backbone, dtype=dtype, attention="auto", vocabulary=len(processing.tokenizer))
        if found.adapter is not None:
            model = with_adapter(model, found.adapter)
        if env.is_main():
            log.info("%s: %s", path, found.settings)
            if found.doubt:
                log.warning("%s: %s", path, found.doubt)
        embedder = cls(model, freeze_vision=True).to(device).eval()
        use_liger(model, "auto", device)
        embedder.packer = processing.packer(model.config)
        key = f"{os.path.join(path, SETTINGS_FILE)}: matryoshka"
        embedder.sizes = sizes_of(processing.settings.matryoshka, embedder.sizes[-1], key)
        return embedder

    def encode(
        self,
        items: Iterable[Item],
        *,
        instruction: str | None = None,
        pack_tokens: int | None = None,
        progress: bool = False,
        dim: int | None = None,
    ) -> np.ndarray:
        """Embeddings of the items in their order, float32 [N, D], unit length.

        Items with the same picture (path or object) share it: seven questions about one cost about one picture. An
        iterator is read a few thousand items ahead.

        Args:
            instruction: put before the text of every item without its own.
            pack_tokens: token budget of one forward; default: 16384 on a GPU, 2048 on a CPU.
            dim: the first `dim` components alone, at unit length again, [N, dim]: good where the model was trained for
                that size (`sizes`, `loss.matryoshka`), of lower quality elsewhere.
        Raises:
            UserError: an item of another type or without content, a picture that does not decode (named by its path), a
                `dim` or `pack_tokens` that can't be.
        """
        total = len(items) if isinstance(items, Sized) else None
        return self._encode(dialogues_of(items, instruction), total, pack_tokens, progress, dim)

    def encode_turns(
        self, image: Picture | Sequence[Picture], questions: Iterable[str], *, dim: int | None = None
    ) -> np.ndarray:
        """Embeddings of several questions about one picture (or several seen together), float32 [k, D]; it is encoded
        once. `dim`: see `encode`. Raises UserError as that does."""
        dialogue = asked(image, questions)
        return self._encode([dialogue] if dialogue.turns else [], total=None, pack_tokens=None, progress=False, dim=dim)

    def check_dim(self, dim: int | None) -> int:
        """`dim`, or the whole embedding's. Raises UserError for one that embeddings do not have."""
        dim = self.sizes[-1] if dim is None else dim
        if type(dim) is bool or not isinstance(dim, (int, np.integer)) or not 1 <= dim <= self.sizes[-1]:
            raise UserError(
                f"dim is {dim!r} but embeddings have {self.sizes[-1]} components: give 1 to {self.sizes[-1]}"
            )
        if dim not in self.sizes:
            log.warning("dim=%d: the model was trained for embeddings of %s components", dim, self.sizes)
        return dim

    def _encode(
        self,
        dialogues: Iterable[Dialogue],
        total: int | None,
        pack_tokens: int | None,
        progress: bool,
        dim: int | None,
    ) -> np.ndarray:
        assert self.packer is not None, "an Embedder encodes after from_pretrained"
        dim = self.check_dim(dim)
        device = next(self.parameters()).device
        with tqdm(total=total, desc="encoding", unit="row", disable=not (progress and env.is_main())) as bar:
            parts = encode_windows(
                self,
                self.packer,
                windows_of(dialogues),
                pack_tokens=pack_tokens,
                device=device,
                shared=False,
                progress=bar,
            )
            found = [prefix(part_ND, dim) for part_ND in parts]
        return torch.cat([torch.zeros(0, dim), *found]).numpy()

    def forward(self, batch: PackedBatch, kept: KeptVision | None = None) -> torch.Tensor:
        """Embeddings of every pooled row of a pack, [E, D] float32, unit length.

        Of a pack of conversations: the last layer's states that predict its labels, after the final norm, [E, D].

        Args:
            kept: where the output of a frozen vision tower is left by the first forward of this pack and found by the
                second.
        """
        text = self.model.language_model
        features_ND, *deep = self.features(batch, kept)
        inputs_TD = text.embed_tokens(batch.input_ids_T)
        # By index: what goes by a mask has to wait until the device has counted it.
        inputs_TD = inputs_TD.index_copy(0, batch.image_rows_N, features_ND.to(inputs_TD.dtype))
        deepstack = {"visual_pos_masks": batch.image_rows_N, "deepstack_visual_embeds": deep} if deep else {}
        with text.norm.reading(batch):
            out = text(
                inputs_embeds=inputs_TD[None],
                position_ids=batch.position_ids_41T,
                attention_mask=None,  # attention that has no mask function gets none built: `segments` says it all
                use_cache=False,
                segments=batch.segments,
                read_rows=batch.read_rows_Q,
                read_segments=batch.read_segments,
                **deepstack,
            )
        return out.last_hidden_state

    def features(self, batch: PackedBatch, kept: KeptVision | None = None) -> Features:
        """What the vision tower makes of the pictures of a pack; `kept` as in `forward`."""
        features = None if kept is None else kept.get(batch.input_ids_T.device)
        if features is None:
            visual, vision = self.model.visual, batch.vision
            with torch.no_grad() if self.freeze_vision else nullcontext():
                frames = self.model.config.vision_config.temporal_patch_size
                out = visual(
                    patch_values(batch.pixels_PY, batch.palette_CV, frames, visual.dtype),
                    grid_thw=batch.grid_thw_I3,
                    pictures=vision.pictures,
                    windows=vision.windows,
                    **vision.given,
                )
            features = (out.pooler_output, *getattr(out, "deepstack_features", ()))
            if kept is not None and self.freeze_vision:
                kept.put(features)
        if batch.has_images:
            return features
        # The dummy picture keeps ranks in step (ZeRO-3 gathers, gradient reductions) and must change nothing: none of
        # its rows is used, and yet the output of every merger stays in the graph.
        return tuple(features_ND[:0] for features_ND in features)


def _add_at_rows(hidden_1TD: torch.Tensor, rows_N: torch.Tensor, features_ND: torch.Tensor) -> torch.Tensor:
    """What Qwen3-VL does behind its first layers, with the pictures' rows by index."""
    return hidden_1TD.index_add(1, rows_N, features_ND.to(hidden_1TD.dtype)[None])
