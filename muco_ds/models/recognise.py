"""What a model folder is, from its files: one of ours, a release of MuCo or CoMa, or a backbone as it comes.

A release holds no word about prompts and pooling, but its tokenizer has the tokens that it pools.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from muco_ds.data.templates import END
from muco_ds.errors import UserError
from muco_ds.files import file_facts
from muco_ds.models.adapters import ADAPTER_CONFIG, base_of, trained_ids
from muco_ds.models.backbones import (
    EMB_TOKEN,
    compression_ids,
    load_config,
    load_image_processor,
    load_tokenizer,
    new_rows,
)
from muco_ds.models.folder import SETTINGS_FILE, Processing, Settings, read_settings

MUCO_PIXELS = (256 * 28 * 28, 1280 * 28 * 28)
COMA_PIXELS = (256 * 28 * 28, 1024 * 28 * 28)
"""Smallest and largest pictures: defaults of the released programs, which do not look at the folder's."""


_MADE_OF = {".safetensors", ".bin", ".json", ".jinja", ".txt", ".model", ".py"}
_MADE_WITH = {"results.json", "report.json"}


@dataclass(frozen=True)
class Recognised:
    """A model folder.

    Args:
        backbone: folder of the weights and their configuration.
        adapter: folder of an adapter to these weights, if that is what the model is.
        tokens: folder of the tokenizer.
        images: folder of the image processor's settings.
        doubt: why its vectors may say little, of a folder that does not say itself how it was trained; "" for none.
    """

    settings: Settings
    backbone: str
    adapter: str | None
    tokens: str
    images: str
    doubt: str = ""

    def facts(self) -> list[tuple[str, int, int]]:
        """Equal while the files are that decide what the model gives, whatever else lies in its folders."""
        folders = dict.fromkeys(folder for folder in (self.backbone, self.adapter, self.tokens, self.images) if folder)
        files = [path for folder in folders for path in sorted(Path(folder).iterdir()) if path.is_file()]
        return [file_facts(path) for path in files if path.suffix in _MADE_OF and path.name not in _MADE_WITH]

    def processing(self) -> Processing:
        """Raises UserError: a tokenizer or image processor that does not load."""
        settings = self.settings
        tokenizer = load_tokenizer(self.tokens, settings.pool_token, compression=settings.compression_tokens)
        ids = [] if self.adapter is None else trained_ids(self.adapter)
        if other := sorted(set(ids) - set(new_rows(tokenizer))):
            raise UserError(
                f"'{self.adapter}' trained row {other[0]} of the vocabulary, which is no embedding token in the "
                f"tokenizer of '{self.tokens}': copy the tokenizer of its training beside the adapter"
            )
        return Processing(tokenizer, load_image_processor(self.images), settings, self.backbone)


def recognise(path: str, base: str | None = None) -> Recognised:
    """The model in a folder.

    Args:
        base: folder of the backbone of an adapter, where it is not the one that the adapter names.
    Raises:
        UserError: no folder of a supported model, an adapter without its backbone, or no token that could be pooled.
    """
    if not os.path.isdir(path):
        raise UserError(
            f"'{path}' is no folder: give a model's folder (one of the hub is fetched once with "
            "`hf download NAME --local-dir FOLDER`)"
        )
    adapter = os.path.isfile(os.path.join(path, ADAPTER_CONFIG))
    if base is not None and not adapter:
        raise UserError(f"'{path}' holds no {ADAPTER_CONFIG}: it is no adapter, leave its base out")
    backbone = base_of(path, base) if adapter else path
    config = load_config(backbone)
    tokens, images = (
        path if os.path.isfile(os.path.join(path, file)) else backbone
        for file in ("tokenizer_config.json", "preprocessor_config.json")
    )
    settings, doubt = _settings(path, adapter, tokens, images, config)
    return Recognised(settings, backbone, path if adapter else None, tokens, images, doubt)


def _settings(path: str, adapter: bool, tokens: str, images: str, config: PretrainedConfig) -> tuple[Settings, str]:
    """Settings, and the doubt."""
    if os.path.isfile(os.path.join(path, SETTINGS_FILE)):
        return read_settings(path), ""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokens)
    except (OSError, ValueError) as error:
        raise UserError(f"'{tokens}' holds no tokenizer that loads: copy its tokenizer files") from error
    vocabulary = tokenizer.get_vocab()
    if compressed := len(compression_ids(tokenizer)):
        return Settings(EMB_TOKEN, *COMA_PIXELS, None, compression_tokens=compressed, template="plain"), ""
    if EMB_TOKEN in vocabulary or (adapter and trained_ids(path)):
        doubt = (
            f"holds no {SETTINGS_FILE} and is read as MuCo's release, which there is none of for {config.model_type}"
        )
        return Settings(EMB_TOKEN, *MUCO_PIXELS, None, template="muco"), doubt * (config.model_type != "qwen2_vl")
    if adapter or END not in vocabulary:
        raise UserError(
            f"'{path}' holds no {SETTINGS_FILE}, and its tokenizer has neither {EMB_TOKEN} nor compression tokens: "
            f"how this {config.model_type} {'adapter' if adapter else 'model'} pools is not known"
        )
    size = load_image_processor(images).size
    doubt = "was never trained to embed: its vectors say little (see docs/training.md)"
    return Settings(END, int(size["shortest_edge"]), int(size["longest_edge"]), None), doubt
