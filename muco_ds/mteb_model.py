"""An Embedder as mteb (2.26) evaluates models: texts, pictures and both, the picture always first.

Shape suffixes: N items, D embedding size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from muco_ds.models.embedder import Embedder

log = logging.getLogger(__name__)

_BLANK = "."
"""In place of a document that has nothing in it: some tasks have such."""


class MtebModel(AbsEncoder):
    """What `mteb.evaluate` takes as a model.

    mteb hands over batches of its own size; they are read through, so that packs are filled over all of them, and no
    more of them are held than a window.

    Args:
        name: of the model in results, "organisation/name".
        revision: another one where the model or anything below is another, or old results would be taken for its own.
        pack_tokens, dim: as of `Embedder.encode`.
    """

    def __init__(
        self, embedder: Embedder, *, name: str, revision: str, pack_tokens: int | None = None, dim: int | None = None
    ) -> None:
        self.model = embedder
        self.embedder, self.pack_tokens, self.dim = embedder, pack_tokens, embedder.check_dim(dim)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "embed_dim": self.dim,
                "similarity_fn_name": ScoringFunction.COSINE,
                "modalities": ["text", "image"],
                "use_instructions": True,
                "framework": ["PyTorch"],
            }
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Embeddings of all batches, float32 [N, D].

        Args:
            inputs: a DataLoader of {"text": [...], "image": [...]}, either of which may be absent.
            task_metadata: its `prompt` goes before each query's text (`instruction_of`).
            kwargs: hf_split, hf_subset and batch_size change nothing.
        """
        return self.embedder.encode(
            _items(inputs),
            instruction=instruction_of(task_metadata, prompt_type),
            pack_tokens=self.pack_tokens,
            progress=bool(kwargs.get("show_progress_bar")),
            dim=self.dim,
        )


def instruction_of(task_metadata: Any, prompt_type: PromptType | None) -> str | None:
    """A task's own prompt for one side. One that is for no side in particular is not for documents; the stand-ins that
    mteb has for tasks without a prompt are not used."""
    prompt, side = task_metadata.prompt, (prompt_type or PromptType.query).value
    if isinstance(prompt, dict):
        return prompt.get(side)
    return None if prompt_type == PromptType.document else prompt


def _items(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    blank = 0
    for batch in batches:
        columns = {name: batch[name] for name in ("text", "image") if name in batch}
        for values in zip(*columns.values(), strict=True):
            item = dict(zip(columns, values, strict=True))
            if item.get("image") is None and not (item.get("text") or "").strip():
                item, blank = {"text": _BLANK}, blank + 1
            yield item
    if blank:
        log.warning("%d items have neither text nor picture: encoded as '%s'", blank, _BLANK)
